"""Log-probability of a chosen token and the entropy of its distribution, row by row over logits that exist already.

    z[m, v]    = logits[m, v] / temperature                   banned v: -inf
    lse[m]     = log sum_v exp(z[m, v])          p[m, v] = exp(z[m, v] - lse[m])
    logp[m]    = z[m, target[m]] - lse[m]
    entropy[m] = - sum_v p[m, v] log p[m, v]
    d / d logits[m, v] = (dlogp[m] (1[v = target] - p) - dentropy[m] p (log p + entropy[m])) / temperature

Two kernels that read every logit once: `row_stats` (one program a row) and `row_dz` (the gradient, into a buffer of the
caller's choice). `logits_logprob` joins them for logits that a model returned; kernels/logprob.py and
kernels/linear_policy_loss.py run them on one chunk of logits at a time. A row with target IGNORE gives 0, 0 and no
gradient.

What plain fp32 gets wrong and these do not:
- a confident token: z_t - lse is exactly 0 from a margin of 16, where the truth is -1e-7. The sum is kept without the
  target, and logp = -softplus(log(sum of the others) - z_t); the gradient at the target is -expm1(logp), not 1 - p.
- the entropy of a peaked row: lse - sum p z cancels. The weighted sum is kept around the running maximum.
- rows x V above 2^31: offsets are 64 bit.

Copy the file and it runs: it needs torch, and Triton for the kernels. Without a GPU the plain torch functions run;
TRITON_INTERPRET=1, set before the import, runs the kernels on a CPU (fp32 only: the interpreter cannot do bf16).
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system (macOS, Windows): the reference runs
    triton = None

IGNORE = -100  # torch's own mark of a row without a target
BLOCK = 4096  # columns at a time: 16 a thread at 8 warps, so that several rows share an SM and hide each other's loads
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def has_kernel(x: Tensor) -> bool:
    """Do the Triton kernels run on this tensor?"""
    return triton is not None and (x.is_cuda or INTERPRETED)


# ---------------------------------------------------------------- reference


def logits_logprob_reference(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None, upcast: bool = True
) -> tuple[Tensor, Tensor]:
    """Plain torch with plain autograd; arguments and results as `logits_logprob`.

    `upcast=True` computes in fp32 (fp64 for fp64 logits), the truth to judge by; `upcast=False` in the logits' dtype,
    the error that bf16 arithmetic makes.
    """
    if upcast:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits / temperature  # (M, V)
    if banned is not None:
        logits = logits.masked_fill(banned, float("-inf"))
    # log_softmax subtracts the maximum first: `logit - logsumexp` of logits in the thousands loses four digits, and
    # so does an entropy formed as lse - sum(p * logit).
    logps = torch.log_softmax(logits, dim=-1)  # (M, V)
    probabilities = logps.exp()
    # 0 * -inf is nan for banned tokens; they carry no probability, so any finite value will do.
    entropy = -(probabilities * logps.masked_fill(probabilities == 0, 0.0)).sum(-1)  # (M,)
    ignored = targets == IGNORE
    logp = logps.gather(-1, targets.masked_fill(ignored, 0)[:, None]).squeeze(-1)
    return logp.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


# ---------------------------------------------------------------- kernels

if triton is not None:

    @triton.jit
    def _log1p(x):
        # log(1 + x) without libdevice, which the interpreter lacks; exact where 1 + x rounds x away
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))

    @triton.jit
    def _expm1(x):
        # exp(x) - 1 without libdevice: the rounding of u cancels in (u - 1) / log(u)
        u = tl.exp(x)
        near = (u != 1.0) & (x > -1.0)  # further down u - 1 is exact enough, and a denormal u has no digits left for log
        return tl.where(near, (u - 1.0) * (x / tl.log(tl.where(near, u, 0.5))), tl.where(u == 1.0, x, u - 1.0))

    @triton.jit
    def _fold(x, top, sums, weighted, scale):
        # One block of logits into the running sums. Lane by lane: only the maximum needs the whole program, and only a
        # new one touches what was summed. In powers of 2, where x scale - top is one fused multiply-add.
        high = tl.max(x, axis=0) * scale
        if high > top:
            moved = tl.where(top == -float("inf"), 0.0, top - high)
            weighted = (weighted + moved * sums) * tl.exp2(moved)
            sums = sums * tl.exp2(moved)
            top = high
        # The floor keeps 0 x -inf out of `weighted`; nan passes.
        delta = tl.maximum(x * scale - tl.where(top == -float("inf"), 0.0, top), -1000.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(delta)
        return top, sums + e, weighted + e * delta

    @triton.jit
    def _row_stats(logits, stride, targets, banned, logp_out, lse_out, entropy_out, columns, inverse_temperature,
                   IGNORE: tl.constexpr, BANNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # rows x stride passes 2^31
        logits += row * stride
        target = tl.load(targets + row).to(tl.int32)
        scale = inverse_temperature * 1.4426950408889634  # log2(e)
        # Over all columns but the target: maximum, sum of 2^delta and of 2^delta delta with delta = x scale - top. The
        # maximum starts at -inf, not 0, or a row of all-negative logits underflows.
        top = tl.full((), -float("inf"), tl.float32)
        sums, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        lane = tl.arange(0, BLOCK)
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            x = tl.load(logits + start + lane).to(tl.float32)
            if BANNED:
                x = tl.where(tl.load(banned + start + lane) != 0, -float("inf"), x)
            if (target >= start) & (target < start + BLOCK):
                x = tl.where(start + lane == target, -float("inf"), x)
            top, sums, weighted = _fold(x, top, sums, weighted, scale)
        if whole < columns:
            column = whole + lane
            x = tl.load(logits + column, mask=column < columns, other=-float("inf")).to(tl.float32)
            if BANNED:
                x = tl.where(tl.load(banned + column, mask=column < columns, other=1) != 0, -float("inf"), x)
            x = tl.where(column == target, -float("inf"), x)
            top, sums, weighted = _fold(x, top, sums, weighted, scale)
        others, bent = tl.sum(sums, axis=0), tl.sum(weighted, axis=0)

        allowed = (target >= 0) & (target < columns)
        x = tl.load(logits + target, mask=allowed, other=-float("inf")).to(tl.float32)
        if BANNED:
            x = tl.where(tl.load(banned + target, mask=allowed, other=1) != 0, -float("inf"), x)
        # gap = log(sum over the others) - z_target, so that log p = -softplus(gap) and log(1 - p) = gap + log p
        own = x * scale - tl.where(top == -float("inf"), 0.0, top)
        gap = 0.6931471805599453 * (tl.log2(others) - own)
        logp = -(tl.maximum(gap, 0.0) + _log1p(tl.exp(-tl.abs(gap))))
        p, q = tl.exp(logp), -_expm1(logp)
        lse = tl.where(p > 0, x * inverse_temperature - logp, 0.6931471805599453 * (top + tl.log2(others)))
        # entropy of (target or not), then of the others among themselves
        entropy = tl.where(p > 0, -p * logp, 0.0)
        among = 0.6931471805599453 * (tl.log2(others) - bent / others)
        entropy += tl.where(q > 0, q * (among - tl.where(p > 0, gap + logp, 0.0)), 0.0)
        ignored = target == IGNORE
        tl.store(logp_out + row, tl.where(ignored, 0.0, logp))
        tl.store(entropy_out + row, tl.where(ignored, 0.0, entropy))
        tl.store(lse_out + row, lse)

    @triton.jit
    def _row_dz(logits, stride, targets, banned, logp, lse, entropy, dlogp, dentropy, out, out_stride, first, columns,
                inverse_temperature, IGNORE: tl.constexpr, BANNED: tl.constexpr, ENTROPY: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1) * BLOCK
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        target = tl.load(targets + row).to(tl.int32)
        counts = target != IGNORE
        g = tl.where(counts, tl.load(dlogp + row) * inverse_temperature, 0.0)
        h = 0.0
        if ENTROPY:
            h = tl.where(counts, tl.load(dentropy + row) * inverse_temperature, 0.0)
        dz = tl.zeros((BLOCK,), tl.float32)
        if (g != 0.0) | (h != 0.0):  # a row of no weight is not read; nan counts as weight
            x = tl.load(logits + row * stride + column, mask=live, other=-float("inf")).to(tl.float32)
            power = x * (inverse_temperature * 1.4426950408889634) - tl.load(lse + row) * 1.4426950408889634  # log2 p
            if BANNED:
                power = tl.where(tl.load(banned + first + column, mask=live, other=1) != 0, -float("inf"), power)
            p = tl.exp2(power)
            dz = -g * p
            if ENTROPY:  # the floor keeps 0 x -inf out; nan passes
                logs = 0.6931471805599453 * tl.maximum(power, -1000.0, propagate_nan=tl.PropagateNan.ALL)
                dz -= h * p * (logs + tl.load(entropy + row))
            if (target - first >= start) & (target - first < start + BLOCK):
                # z - lse cancels for a confident token; the log-prob from row_stats did not
                log_p = tl.load(logp + row)
                own = -g * _expm1(log_p)
                if ENTROPY:
                    own -= h * tl.exp(log_p) * (log_p + tl.load(entropy + row))
                own = tl.where(log_p == -float("inf"), 0.0, own)  # banned: not sampled, and no gradient
                dz = tl.where(column == target - first, own, dz)
        tl.store(out + row * out_stride + column, dz.to(out.dtype.element_ty), mask=live)


# ---------------------------------------------------------------- wrappers


def _check(logits: Tensor, targets: Tensor, temperature: float, banned: Tensor | None) -> None:
    rows = len(logits)
    assert logits.ndim == 2 and logits.stride(1) == 1, f"logits {tuple(logits.shape)}, {logits.stride()}: whole rows"
    assert logits.dtype in (torch.float32, torch.bfloat16, torch.float16), f"logits {logits.dtype}"
    assert targets.shape == (rows,) and targets.dtype == torch.int64, f"targets {tuple(targets.shape)} {targets.dtype}"
    assert targets.is_contiguous() and targets.device == logits.device, f"targets {targets.device}, logits {logits.device}"
    assert banned is None or (banned.dtype == torch.bool and banned.is_contiguous()), "banned is a whole (V,) bool mask"
    assert temperature > 0, f"temperature {temperature}: log-probs of greedy decoding are those at temperature 1"


def row_stats(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (M, V) fp32/bf16/fp16, targets (M,) int64, banned (V,) bool or None -> logp, lse, entropy, each (M,) fp32.

    Not differentiable. A target of IGNORE gives logp 0 and entropy 0; one that is banned or outside the vocabulary has
    probability 0, logp -inf: checking it here would stop the GPU. Needs a GPU or the interpreter.
    """
    _check(logits, targets, temperature, banned)
    assert banned is None or len(banned) == logits.shape[1], f"banned mask {tuple(banned.shape)}, V {logits.shape[1]}"
    rows, columns = logits.shape
    logp, lse, entropy = torch.empty(3, rows, device=logits.device, dtype=torch.float32)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(columns))
        _row_stats[(rows,)](
            logits, logits.stride(0), targets, targets if banned is None else banned.view(torch.uint8), logp, lse, entropy,
            columns, 1.0 / temperature, IGNORE=IGNORE, BANNED=banned is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return logp, lse, entropy


def row_dz(
    logits: Tensor,
    targets: Tensor,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None = None,
    *,
    out: Tensor,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Gradient by the logits, written to `out` (M, V), any float dtype, and returned.

    logp, lse, entropy (M,) are what `row_stats` gave; dlogp and dentropy (M,) the gradients by logp and entropy, None
    for no entropy term. `out` may be `logits` itself, overwritten; another dtype in the same memory would be a race.
    `logits` may hold only the columns from `first` on of a wider row: targets and the mask count from column 0.
    """
    _check(logits, targets, temperature, banned)
    rows, columns = logits.shape
    for name, x in dict(logp=logp, lse=lse, entropy=entropy, dlogp=dlogp, dentropy=dentropy).items():
        ok = x is None or (x.shape == (rows,) and x.dtype == torch.float32 and x.is_contiguous())
        assert ok, f"{name} must be ({rows},) contiguous fp32"
    assert out.shape == logits.shape and out.stride(1) == 1, f"out {tuple(out.shape)}, logits {tuple(logits.shape)}"
    apart = out.data_ptr() != logits.data_ptr()
    assert apart or out.dtype == logits.dtype, "another dtype in the logits' own memory is a race"
    assert banned is None or len(banned) >= first + columns, f"banned mask {tuple(banned.shape)}, V {first + columns}"
    if rows:
        block = min(BLOCK, triton.next_power_of_2(columns))
        _row_dz[(rows, triton.cdiv(columns, block))](
            logits, logits.stride(0), targets, targets if banned is None else banned.view(torch.uint8), logp, lse, entropy,
            dlogp, dlogp if dentropy is None else dentropy, out, out.stride(0), first, columns, 1.0 / temperature,
            IGNORE=IGNORE, BANNED=banned is not None, ENTROPY=dentropy is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out


class _LogitsLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, banned):
        ctx.set_materialize_grads(False)
        logp, lse, entropy = row_stats(logits, targets, temperature=temperature, banned=banned)
        ctx.save_for_backward(logits, targets, banned, logp, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        logits, targets, banned, logp, lse, entropy = ctx.saved_tensors
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        out = torch.empty_like(logits)
        row_dz(logits, targets, logp, lse, entropy, dlogp, dentropy, out=out, temperature=ctx.temperature, banned=banned)
        return out, None, None, None


def logits_logprob(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None, reference: bool = False
) -> tuple[Tensor, Tensor]:
    """logits (M, V), targets (M,) int64 or IGNORE, banned (V,) bool or None -> logp (M,), entropy (M,), fp32.

    Differentiable in the logits through both; the gradient has their dtype, and the logits are kept for it. SFT's loss
    is -logp.sum() / count. `reference=True`, or no GPU: plain torch.
    """
    if reference or not has_kernel(logits):
        return logits_logprob_reference(logits, targets, temperature=temperature, banned=banned)
    return _LogitsLogprob.apply(logits, targets, temperature, banned)


# ---------------------------------------------------------------- check and bench


def check(device: str) -> None:
    """Kernels against the reference in fp64: spiky and shifted rows, a banned tail, an ignored row, an odd vocabulary."""
    torch.manual_seed(0)
    logits = torch.randn(9, 1001, device=device) * torch.tensor([1, 30, 3] * 3, device=device)[:, None]
    logits[3] -= 400
    logits.requires_grad_()
    targets = torch.randint(990, (9,), device=device)
    targets[4] = IGNORE
    banned = torch.arange(1001, device=device) >= 990
    ours = logits_logprob(logits, targets, temperature=0.7, banned=banned)
    exact = logits_logprob_reference(logits.double(), targets, temperature=0.7, banned=banned)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        (got,), (want,) = (torch.autograd.grad(x.sum(), logits, retain_graph=True) for x in (a, b))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)  # fp32 logits of 140 lie 1.5e-5 apart


def bench(rows: int = 8192, columns: int = 151_936) -> None:
    """Share of the copy bandwidth that each kernel reaches, on bf16 and on fp32 logits."""
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).to(dtype)
        targets = torch.randint(columns, (rows,), device="cuda")
        stats, out = row_stats(logits, targets), torch.empty_like(logits, dtype=torch.bfloat16)
        dlogp = torch.ones(rows, device="cuda")
        runs = {
            "copy": (lambda: out.copy_(logits), logits.itemsize + 2),
            "row_stats": (lambda: row_stats(logits, targets), logits.itemsize),
            "row_dz": (lambda: row_dz(logits, targets, *stats, dlogp, out=out), logits.itemsize + 2),
            "row_dz with entropy": (lambda: row_dz(logits, targets, *stats, dlogp, dlogp, out=out), logits.itemsize + 2),
        }
        for name, (run, size) in runs.items():
            milliseconds = triton.testing.do_bench(run, return_mode="median")
            print(f"{name}, {dtype}: {milliseconds:.3f} ms, {rows * columns * size / milliseconds / 1e9:.2f} TB/s")


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    print("row_logprob: values and gradients equal fp64")
    if device == "cuda":
        bench()
