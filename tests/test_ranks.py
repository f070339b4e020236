"""Two ranks through gloo: the gradient, the metrics and the end of a run do not depend on how many there are.

    PYTHONPATH=. python -m torch.distributed.run --nproc_per_node 2 tests/test_ranks.py OUT      as the tests start it

Every case runs in one pair of processes, which write down what they computed; the tests compare it with this process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_group, make_prompt, new_policy

import ranks
import train_grpo
from model import frozen_copy, reduce_gradients
from optim import MasterOptimizer
from train_grpo import Config, train_step

ROOT = Path(__file__).resolve().parent.parent
BASE = Config(kl="k3", kl_coef=0.5, importance_cap=0.0, token_budget=10_000, mini_batches=1, lr=1e-3, steps=10)

# name -> (config, batch)
CASES = {
    "token": (replace(BASE, normalize="token"), "unequal"),
    "sequence": (replace(BASE, normalize="sequence"), "unequal"),
    "two optimiser steps": (replace(BASE, normalize="token", mini_batches=2), "unequal"),
    "unequal micro-batches": (replace(BASE, normalize="token", token_budget=60), "unequal"),
    "pictures on one rank only": (replace(BASE, normalize="token"), "pictures on rank 0"),
    "unequal micro-batches and pictures": (replace(BASE, normalize="sequence", token_budget=60), "pictures on rank 0"),
}
# (pictures, completion lengths) of each prompt; dealt out like cards, so rank 0 has the even ones
BATCHES = {
    "unequal": [(0, (2, 3)), (1, (30, 21)), (1, (1, 1)), (0, (40, 17)),
                (0, (4, 2)), (1, (9, 33)), (0, (1, 5)), (2, (28, 8))],
    "pictures on rank 0": [(1, (2, 3)), (0, (30, 21)), (2, (1, 1)), (0, (40, 17)),
                           (1, (4, 2)), (0, (9, 33)), (1, (1, 5)), (0, (28, 8))],
}  # fmt: skip


def batch(policy, processor, name: str):
    """The whole batch of all ranks: prompts, groups, advantages (8, 2)."""
    shapes = [(), ((84, 56),), ((56, 56), (112, 56))]
    prompts = [make_prompt(processor, f"question {i}", shapes[n], seed=i) for i, (n, _) in enumerate(BATCHES[name])]
    groups = [make_group(policy, lengths, seed=i) for i, (_, lengths) in enumerate(BATCHES[name])]
    return prompts, groups, torch.linspace(-1.5, 2.0, 16).view(8, 2)


def one_case(name: str, rank: int, world: int) -> dict:
    """Gradients of every optimiser step as they reach the optimiser, weights after them, metrics."""
    cfg, rows = CASES[name]
    policy, processor = new_policy()
    reference = frozen_copy(policy)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.02)
    optimizer, gradients, micro_batches = MasterOptimizer(policy.named_parameters()), [], []
    policy.register_forward_hook(lambda module, args, out: micro_batches.append(out[0].requires_grad))
    step = optimizer.step

    def recording(*, lr):
        gradients.append([g.clone() for g in optimizer.gradients])
        return step(lr=lr)

    optimizer.step = recording
    prompts, groups, advantages = batch(policy, processor, rows)
    own = prompts[rank::world], groups[rank::world], advantages[rank::world]
    metrics = train_step(policy, reference, optimizer, *own, cfg, step=0)
    return dict(gradients=gradients, weights=[p.detach() for p in policy.parameters()], metrics=metrics,
                micro_batches=sum(micro_batches))  # fmt: skip


def reductions(rank: int) -> list:
    """A list of tensors of many shapes through small buckets: every sum, in place."""
    tensors = [
        torch.full(shape, float(10 * i + rank + 1)) for i, shape in enumerate([(3,), (2, 2), (), (5,), (1, 1, 7)])
    ]
    reduce_gradients(tensors, bucket_bytes=20)
    return tensors


def worker(out: Path) -> None:
    torch.set_num_threads(1)
    rank, world, *_ = ranks.setup("cpu")
    found = {name: one_case(name, rank, world) for name in CASES}
    found["reduced"] = reductions(rank)
    found["gathered"] = ranks.gather({"rank": rank})
    torch.save(found, out / f"rank{rank}.pt")
    dist.destroy_process_group()


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen:
    """Two ranks under torchrun, started but not waited for."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *arguments]  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen, seconds: float) -> tuple[str, str]:
    """stdout and stderr once it has ended; past the limit it and its ranks are killed and the test fails."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [map(int, line.split()) for line in table.splitlines()]
        for pid in [pid for pid, parent in pairs if parent == process.pid] + [process.pid]:  # ranks have own sessions
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"not over after {seconds:g} s\n{out[-2000:]}\n{err[-4000:]}")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    process = torchrun(ROOT, str(Path(__file__)), str(out))
    _, err = finish(process, 240)
    assert process.returncode == 0, err[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_rank():
    return {name: one_case(name, 0, 1) for name in CASES}


def assert_close(found, expected, tolerance=1e-5):
    largest = max(float(g.abs().max()) for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-3 * largest)


@pytest.mark.parametrize("name", CASES)
def test_rule_06_ranks_do_not_change_the_gradient(two_ranks, one_rank, name):
    """Token and sequence means, KL included, with very unequal shares of tokens."""
    expected = one_rank[name]["gradients"]
    assert len(expected) == CASES[name][0].mini_batches and max(float(g.abs().max()) for g in expected[0]) > 0
    for own in two_ranks:
        assert len(own[name]["gradients"]) == len(expected)
    # after an update the weights differ by rounding, which Adam's first step magnifies: the first is compared tightly
    assert_close(two_ranks[0][name]["gradients"][0], expected[0])
    for a, b in zip(two_ranks[0][name]["gradients"][1:], expected[1:]):
        assert_close(a, b, tolerance=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_rule_06_ranks_stay_bit_for_bit_alike(two_ranks, name):
    first, second = (own[name] for own in two_ranks)
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_one_rank(two_ranks, one_rank, name):
    expected, found = one_rank[name]["metrics"], two_ranks[0][name]["metrics"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key != "rollout/logprob_gap_p99":  # a quantile of each micro-batch
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_rule_16_ranks_run_the_same_number_of_micro_batches(two_ranks, one_rank):
    """The shares differ so much that without the extra ones the second rank would wait for a reduction for ever."""
    for name in CASES:
        assert two_ranks[0][name]["micro_batches"] == two_ranks[1][name]["micro_batches"], name
    policy, processor = new_policy()
    prompts, groups, _ = batch(policy, processor, "unequal")
    shares = [len(train_grpo.pack(prompts[r::2], groups[r::2], policy.config, token_budget=60)) for r in (0, 1)]
    assert shares[0] < shares[1] == two_ranks[0]["unequal micro-batches"]["micro_batches"]


def test_rule_16_a_rank_without_pictures_has_the_vision_gradients_too(two_ranks):
    names = [name for name, _ in new_policy()[0].named_parameters()]
    for own in two_ranks:
        (gradients,) = own["pictures on one rank only"]["gradients"]
        vision = [g for name, g in zip(names, gradients, strict=True) if "visual" in name]
        assert vision and all(g.abs().max() > 0 for g in vision)


def test_reductions_are_sums_whatever_the_buckets(two_ranks):
    for own in two_ranks:
        assert [t.flatten()[0].item() for t in own["reduced"]] == [20.0 * i + 3 for i in range(5)]
        assert [tuple(t.shape) for t in own["reduced"]] == [(3,), (2, 2), (), (5,), (1, 1, 7)]
        assert own["gathered"] == [{"rank": 0}, {"rank": 1}]


# ---------------------------------------------------------------- whole runs of two ranks

SMALL = (
    "demo --model random:tiny --limit 8 --val-data None --prompts-per-step 4 --group-size 2 --max-completion-tokens 6 "
    "--max-pixels 12544 --token-budget 200 --kl k3 --kl-coef 0.1 --device cpu --lr 1e-3"
).split()
START = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_grpo, tyro
with open(f"pid{{os.environ['RANK']}}", "w") as file:
    file.write(str(os.getpid()))
RANK, calls = int(os.environ["RANK"]), []
inner = train_grpo.train_step
def train_step(*args, **kwargs):
    calls.append(1)
    here()
    return inner(*args, **kwargs)
train_grpo.train_step = train_step
{{here}}
train_grpo.main(tyro.extras.overridable_config_cli(train_grpo.PRESETS))
"""


RAISE = """
def here():
    if RANK == 1 and len(calls) == 2:
        open("raised", "w").close()
        raise ArithmeticError("boiled over")
"""
TERMINATE = """
def here():
    if RANK == 1 and len(calls) == 2 and not os.path.exists("sent"):
        open("sent", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
"""


def script(folder: Path, name: str, here: str) -> str:
    """train_grpo.py with something that happens at the start of each update."""
    (folder / name).write_text(START.replace("{here}", here))
    return name


def is_alive(pid: int) -> bool:
    """A process that has ended but was not yet collected by its parent does not count."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_rule_17_an_exception_on_one_rank_ends_all_of_them_with_its_traceback(tmp_path):
    """Raised by rank 1 in its second update, while rank 0 goes on into a reduction with it."""
    process = torchrun(tmp_path, script(tmp_path, "fails.py", RAISE), *SMALL, "--steps", "50")
    start = time.monotonic()
    while not (tmp_path / "raised").exists() and process.poll() is None and time.monotonic() - start < 200:
        time.sleep(0.1)
    assert (tmp_path / "raised").exists(), finish(process, 1)[1][-4000:]
    _, err = finish(process, 60)  # within a minute of the exception
    assert process.returncode != 0
    assert "[rank 1] ArithmeticError: boiled over" in err
    assert "[rank 1]   File" in err and "in train_step" in err, "with its traceback"
    assert not any(is_alive(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1))


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
def test_rule_12_two_ranks_stop_together_and_resume_exactly(tmp_path):
    """SIGTERM to rank 1 alone, in the second step: both end after it with status 0, and go on as if nothing was."""
    for folder in ("stopped", "whole"):
        (tmp_path / folder).mkdir()
    name = script(tmp_path / "stopped", "run.py", TERMINATE)
    script(tmp_path / "whole", "run.py", "def here(): pass")
    for folder, resume, lines in (("stopped", (), 2), ("stopped", ("--resume",), 4), ("whole", (), 4)):
        process = torchrun(tmp_path / folder, name, *SMALL, "--steps", "4", *resume)
        _, err = finish(process, 240)
        assert process.returncode == 0, err[-4000:]
        assert len(metrics_of(tmp_path / folder)) == lines
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    a, b = (torch.load(tmp_path / f / "runs" / "demo" / "step_4" / "trainer" / "state.pt", weights_only=True)
            for f in ("stopped", "whole"))  # fmt: skip
    assert len(a["rng"]) == 2
    for x, y in zip(a["optimizer"]["masters"], b["optimizer"]["masters"], strict=True):
        assert torch.equal(x, y)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
