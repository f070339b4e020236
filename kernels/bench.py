"""Time, memory and error of the log-prob and policy-loss kernels beside what others use, on one GPU.

    python -m kernels.bench                        about 3 minutes on one H200
    python -m kernels.bench --quick                the 3B shape only, fewer rounds, no torch.compile: under a minute
    python -m kernels.bench --out bench.json       also every time of every run

All providers of a table run in turns within one process, so that clocks, heat and power are the same for all; a plain
cuBLAS product of the head takes a turn too, and rates are quoted as a fraction of its rate. Useful work is 2NHV for a
forward pass and 6NHV with gradients, for everybody: recomputing is not credited. Medians over rounds with the 10th and
90th percentile; transient memory is the peak without inputs and returned gradients; errors are against fp64 on 256
rows with the full vocabulary. Hidden states are noise plus a multiple of the target's own weight: mean log-prob about
-1, half of the tokens above p = 0.99, as in a trained model and unlike plain noise. A peer that is not installed or
fails costs one printed line.
"""

import argparse
import json
import os
import subprocess
import time
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

from .linear_policy_loss import linear_policy_loss
from .logprob import token_logprob, token_logprob_reference
from .policy_loss import policy_loss, policy_loss_reference

SHAPES = {"3B": (2048, 151_936), "7B": (3584, 152_064)}  # H, V of Qwen2.5-VL
ROWS, LENGTH = 8192, 512  # rows of the main tables, as 16 sequences for peers that want them padded
SWEEP = (1024, 4096, 8191, 32_768, 131_072)
KL = dict(kl="k3", kl_coef=0.01, dual_clip=0.0)  # what all of them can do


@dataclass
class Batch:
    """Inputs of one shape. N rows."""

    hidden: Tensor  # (N, H) bf16
    weight: Tensor  # (V, H) bf16
    targets: Tensor  # (N,)
    advantages: Tensor  # (N,) one value a sequence, a quarter of the groups exactly 0
    mask: Tensor  # (N,) 1.0 or 0.0, a fifth masked
    old: Tensor  # (N,)
    ref: Tensor  # (N,)
    upstream: Tensor  # (N,) what a loss might send back

    @property
    def scale(self) -> Tensor:
        return self.mask / self.mask.sum()


def make_batch(rows: int, shape: str, weight: Tensor | None = None) -> Batch:
    width, vocabulary = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(rows)

    def noise(*size):
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    if weight is None:
        weight = noise(vocabulary, width) * width**-0.5
    weight = weight.detach().requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator, device="cuda")
    margin = 12 + 18 * torch.rand(rows, 1, generator=generator, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = (3 * noise(rows, width) + margin * weight[targets]).requires_grad_()
        logp = token_logprob(hidden, weight, targets)[0]
    sequence = torch.arange(rows, device="cuda") // LENGTH
    advantages = torch.randn(rows // LENGTH + 1, generator=generator, device="cuda")
    advantages[1::4] = 0  # not the first: the errors are taken on 256 rows of it
    mask = (torch.rand(rows, generator=generator, device="cuda") > 0.2).float()
    near = [logp + 0.05 * noise(rows).float() for _ in range(2)]
    return Batch(hidden, weight, targets, advantages[sequence], mask, *near, torch.randn_like(logp))


# ---------------------------------------------------------------- providers: batch -> results, gradients last


def plain_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer without kernels does: bf16 logits, fp32 log-softmax of all rows at once."""
    logps = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), entropy


def logprob_providers(compiled: bool) -> dict:
    """name -> (hidden, weight, targets) -> (logp, entropy)"""
    found = {"ours": token_logprob, "torch": plain_logprob}
    if compiled:
        found["torch.compile"] = torch.compile(plain_logprob)
    try:
        from trl.kernels import ChunkedLogProbFunction

        def trl(hidden, weight, targets):  # its trainer's own tile
            return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ("entropy",))[:2]

        found["TRL 1.16 chunked"] = trl
    except ImportError as error:
        print(f"- TRL left out: {error}")
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        def liger(hidden, weight, targets):
            nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, 1.0, -100, 1, True)
            return -nll, entropy

        found["Liger CuTe scaled CE"] = liger
    except ImportError as error:
        print(f"- Liger scaled cross-entropy left out: {error}")
    return found


def liger_grpo(precision: str):
    """Liger's fused GRPO loss on the same rows, as 16 padded sequences; `precision` of its fp32 products."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = dict(beta=KL["kl_coef"], use_ref_model=True, epsilon_low=0.2, epsilon_high=0.3, loss_type="dapo")
    module = LigerFusedLinearGRPOLoss(**options)

    def run(b: Batch):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        length = min(LENGTH, len(b.targets))
        part = [x.view(-1, length) for x in (b.targets, b.mask, b.advantages, b.ref, b.old)]
        loss = module(
            b.hidden.view(-1, length, b.hidden.shape[1]), b.weight, part[0], part[1], part[2][:, 0].contiguous(),
            ref_per_token_logps=part[3], old_per_token_logps=part[4], num_items_in_batch=b.mask.sum(),
        )[0]  # fmt: skip
        gradients = torch.autograd.grad(loss, (b.hidden, b.weight))
        torch.set_float32_matmul_precision(before)
        return loss.detach(), *gradients

    return run


def single_pass(b: Batch):
    loss, *_ = linear_policy_loss(b.hidden, b.weight, b.targets, b.advantages, b.scale, old_logp=b.old, ref_logp=b.ref, **KL)
    return loss.detach(), *torch.autograd.grad(loss, (b.hidden, b.weight))


def tables(compiled: bool) -> dict[str, dict]:
    """table -> provider -> run(batch)"""

    def forward(function):
        return lambda b: with_no_grad(function, b)

    def with_no_grad(function, b):
        with torch.no_grad():
            return function(b.hidden, b.weight, b.targets)

    def both(function):
        def run(b):
            logp, entropy = function(b.hidden, b.weight, b.targets)
            return logp.detach(), entropy.detach(), *torch.autograd.grad(logp, (b.hidden, b.weight), b.upstream)

        return run

    def loss_of(function, reference):
        def run(b):
            logp, _ = function(b.hidden, b.weight, b.targets)
            loss, _ = policy_loss(logp, b.advantages, b.scale, old_logp=b.old, ref_logp=b.ref, reference=reference, **KL)
            return loss.detach(), *torch.autograd.grad(loss, (b.hidden, b.weight))

        return run

    logprobs = logprob_providers(compiled)
    losses = {"ours, single pass": single_pass, "ours, log-probs then loss": loss_of(token_logprob, False)}
    peers = {name: function for name, function in logprobs.items() if name != "ours"}
    losses |= {f"{name}, then our loss": loss_of(function, name.startswith("torch")) for name, function in peers.items()}
    try:
        losses |= {"Liger GRPO, fp32 (its default)": liger_grpo("highest"), "Liger GRPO, TF32": liger_grpo("high")}
    except ImportError as error:
        print(f"- Liger GRPO loss left out: {error}")
    return {
        "log-probs, no gradient": {name: forward(f) for name, f in logprobs.items()},
        "log-probs, forward and backward": {name: both(f) for name, f in logprobs.items()},
        "policy loss, forward and backward": losses,
    }


# ---------------------------------------------------------------- measuring


def cublas(b: Batch):
    """The head's product in bf16, at most 8192 rows of it: the rate that others are a fraction of."""
    return torch.mm(b.hidden[:ROWS].detach(), b.weight.detach().T)


def one_time(run, batch) -> float:
    """Milliseconds on the GPU of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(batch)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def transient(run, batch) -> float:
    """GiB that one call holds at its peak, beyond what was there and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(batch)
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.itemsize for x in results if isinstance(x, Tensor))
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**30


def measure(runs: dict, batch: Batch, rounds: int) -> dict[str, dict]:
    """provider -> {"ms": [...], "transient": GiB}. In turns; a slow provider sits out rounds, a failing one leaves."""
    found, every = {}, {}
    for name, run in {"cuBLAS": cublas, **runs}.items():
        try:
            one_time(run, batch)  # compiles
            memory = transient(run, batch)
            every[name] = max(1, round(one_time(run, batch) / 120))
        except Exception as error:  # a peer's failure is its own; ours must not pass for a missing row
            if name.startswith(("ours", "cuBLAS")):
                raise
            print(f"- {name} left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            torch.cuda.empty_cache()
            continue
        found[name] = {"ms": [], "transient": memory}
    for i in range(-max(1, rounds // 3), rounds):  # the first third warms up
        for name in found:
            if i % every[name] == 0:
                milliseconds = one_time(cublas if name == "cuBLAS" else runs[name], batch)
                if i >= 0:
                    found[name]["ms"].append(milliseconds)
    return found


def errors(runs: dict, table: str, batch: Batch, exact: dict) -> dict[str, dict]:
    """provider -> {what: largest error of log-probs and entropy, relative Frobenius error of gradients}"""
    out = {}
    wanted = exact["loss"] if table.startswith("policy") else exact["logprob"]
    names = ("logp", "entropy", "dX", "dW")[-len(wanted) :]
    for name, run in runs.items():
        results = run(batch)[-len(wanted) :] if not table.endswith("no gradient") else run(batch)
        out[name] = {}
        for what, got, want in zip(names, results, wanted):
            gap = got.double() - want
            out[name][what] = float(gap.norm() / want.norm() if what[0] == "d" else gap.abs().max())
    return out


def exact_results(b: Batch) -> dict[str, list[Tensor]]:
    """fp64: (logp, entropy, dX, dW) of the log-probs with the given upstream gradient, (dX, dW) of the policy loss."""
    hidden, weight = b.hidden.detach().double().requires_grad_(), b.weight.detach().double().requires_grad_()
    logp, entropy = token_logprob_reference(hidden, weight, b.targets)
    loss, _ = policy_loss_reference(
        logp, b.advantages.double(), b.scale.double(), old_logp=b.old.double(), ref_logp=b.ref.double(), **KL
    )
    of_loss = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    of_logp = torch.autograd.grad(logp, (hidden, weight), b.upstream.double())
    return {"logprob": [logp.detach(), entropy.detach(), *of_logp], "loss": list(of_loss)}


def clocks() -> str:
    query = "--query-gpu=name,clocks.sm,power.draw,temperature.gpu"
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader", "-i", "0"], capture_output=True, text=True)
    return done.stdout.strip() or "nvidia-smi says nothing"


def row(name: str, found: dict, useful: float, ours: float, base: float, error: dict) -> str:
    times = found["ms"]
    spread = quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    cells = [name, f"{median(times):.2f} ({spread[0]:.2f} to {spread[-1]:.2f})", f"{median(times) / ours:.2f}",
             f"{useful * base / median(times):.0%}", f"{found['transient']:.2f}"]  # fmt: skip
    cells += [f"{error[what]:.1e}" if what in error else "" for what in ("logp", "entropy", "dX", "dW")]
    return "| " + " | ".join(cells) + " |"


def report(shape: str, table: str, found: dict, error: dict) -> None:
    useful = 1 if table.endswith("no gradient") else 3
    base, ours = median(found["cuBLAS"]["ms"]), median(next(v["ms"] for k, v in found.items() if k.startswith("ours")))
    print(f"\n**{shape}: {table}**, {ROWS} rows\n")
    print("| | ms, median (p10 to p90) | times ours | of cuBLAS | transient GiB | log-prob error | entropy | dX | dW |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in found:
        print(row(name, found[name], 1 if name == "cuBLAS" else useful, ours, base, error.get(name, {})))


def sweep(shape: str, weight: Tensor, providers: dict, rows: tuple, rounds: int) -> dict:
    """The policy loss at other row counts: ours, and TRL's log-probs up to 32,768 rows."""
    print(f"\n**{shape}: policy loss, forward and backward, by rows**\n")
    print("| rows | ours, ms | of cuBLAS | transient GiB | TRL 1.16 then our loss, ms |\n|---|---|---|---|---|")
    out = {}
    for count in rows:
        batch = make_batch(count, shape, weight)
        keep = {k: v for k, v in providers.items() if k == "ours, single pass" or (k.startswith("TRL") and count <= 32_768)}
        found = measure(keep, batch, max(3, rounds // 2 if count <= 8192 else rounds // 8))
        base = median(found["cuBLAS"]["ms"]) * count / min(count, ROWS)
        ours, memory = median(found["ours, single pass"]["ms"]), found["ours, single pass"]["transient"]
        peer = "".join(f"{median(v['ms']):.2f}" for k, v in found.items() if k.startswith("TRL"))
        print(f"| {count} | {ours:.2f} | {3 * base / ours:.0%} | {memory:.2f} | {peer} |")
        out[count] = found
        del batch
        torch.cuda.empty_cache()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3B only, fewer rounds, no torch.compile")
    parser.add_argument("--out", help="write all times and errors to this JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels.bench needs an NVIDIA GPU")
        return
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # its check stops the GPU
    began, rounds = time.time(), 8 if args.quick else 30
    print(f"torch {torch.__version__}, {clocks()}")
    everything = {}
    for shape in list(SHAPES)[: 1 if args.quick else None]:
        providers = tables(compiled=not args.quick)
        batch = make_batch(ROWS, shape)
        small = make_batch(256, shape, batch.weight)
        exact = exact_results(small)
        for table, runs in providers.items():
            found = measure(runs, batch, rounds)
            error = errors({name: run for name, run in runs.items() if name in found}, table, small, exact)
            report(shape, table, found, error)
            everything[f"{shape}: {table}"] = {"runs": found, "errors": error}
            torch.cuda.empty_cache()
        del exact
        counts = (1024, 131_072) if args.quick else SWEEP
        losses = providers["policy loss, forward and backward"]
        everything[f"{shape}: rows"] = sweep(shape, batch.weight, losses, counts, rounds)
    print(f"\n{clocks()}; {time.time() - began:.0f} s in all")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(everything, file, indent=1)


if __name__ == "__main__":
    main()
