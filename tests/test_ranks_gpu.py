"""Two GPUs through NCCL, in bf16: whatever is cut over the ranks, the step is that of one GPU up to rounding.

    python -m pytest -m gpu tests/test_ranks_gpu.py          a minute or two on two H200

Written and checked on the CPU as far as that goes (test_ranks.py has the tight comparisons, in fp32)."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import new_policy
from test_ranks import LATER, MODES, batch, one_case, run_ranks, whole

import ranks
from train_grpo import prepare, train_step

pytestmark = pytest.mark.gpu
NAMES = ("token", "unequal micro-batches and pictures")
KINDS = {
    "adamw": dict(optimizer="adamw"),
    "in host memory": dict(optimizer="adamw", offload_moments=True),
    "adamw8bit": dict(optimizer="adamw8bit"),
    "kahan": dict(optimizer="kahan"),
}


def stepped(rank: int, world: int, shard: str, **changes) -> list[torch.Tensor]:
    """Weights after three steps of a bf16 policy."""
    cfg = replace(LATER, shard=shard, **changes)
    policy, processor = new_policy(dtype=torch.bfloat16)
    policy.to("cuda")
    _, optimizer = prepare(cfg, policy)
    prompts, groups, advantages = batch(policy, processor, "unequal")
    for step in range(3):
        train_step(policy, None, optimizer, prompts[rank::world], groups[rank::world], advantages[rank::world], cfg, step=step)
    return whole(policy)


def worker(out: Path) -> None:
    rank, world, *_ = ranks.setup("cuda")
    how = dict(device="cuda", dtype=torch.bfloat16)
    found = {(name, shard): one_case(name, rank, world, shard, **how) for name in NAMES for shard in MODES}
    for reference in ("sharded", "host"):
        found[reference] = one_case(NAMES[1], rank, world, "fsdp", reference, **how)
    found["kinds"] = {name: stepped(rank, world, "optimizer", **changes) for name, changes in KINDS.items()}
    found["kinds"]["fsdp"] = stepped(rank, world, "fsdp")
    found["kinds"]["fsdp, in host memory"] = stepped(rank, world, "fsdp", offload_moments=True)
    torch.save(found, out / f"rank{rank}.pt")
    dist.barrier()
    ranks.leave()


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    return run_ranks(tmp_path_factory.mktemp("gpus") / "two", 2, __file__)


@pytest.fixture(scope="module")
def one_gpu():
    return {name: one_case(name, 0, 1, device="cuda", dtype=torch.bfloat16) for name in NAMES}


def assert_near(found, expected, tolerance: float, name: str = "") -> None:
    """As vectors: single numbers of a bf16 gradient are rounding."""
    a, b = (torch.cat([x.flatten().float() for x in side]) for side in (found, expected))
    assert len(a) == len(b) and (a - b).norm() < tolerance * b.norm(), f"{name} {float((a - b).norm() / b.norm())}"


@pytest.mark.parametrize("shard", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_rule_06_two_gpus_take_the_step_of_one(two_gpus, one_gpu, name, shard):
    for own in two_gpus:
        assert_near(own[name, shard]["gradients"][0], one_gpu[name]["gradients"][0], tolerance=0.03)
    for a, b in zip(two_gpus[0][name, shard]["weights"], two_gpus[1][name, shard]["weights"], strict=True):
        assert torch.equal(a, b)


def test_references_over_ranks_and_in_host_memory(two_gpus, one_gpu):
    for reference in ("sharded", "host"):
        for own in two_gpus:
            assert_near(own[reference]["gradients"][0], one_gpu[NAMES[1]]["gradients"][0], tolerance=0.03)


def test_rule_07_every_kind_moves_the_weights_alike(two_gpus):
    start = whole(new_policy(dtype=torch.bfloat16)[0])
    moved = {  # as bf16: the shards of fsdp are fp32, and what rounding takes is a seventh of these steps
        name: [a.bfloat16().float() - b.float() for a, b in zip(after, start, strict=True)] for name, after in two_gpus[0]["kinds"].items()
    }
    assert all(torch.equal(a, b) for a, b in zip(moved["adamw"], moved["in host memory"])), "the same numbers, elsewhere"
    for name, found in moved.items():  # where a gradient is rounding, Adam's first steps go either way
        assert_near(found, moved["adamw"], tolerance=0.4, name=name)
        for a, b in zip(two_gpus[0]["kinds"][name], two_gpus[1]["kinds"][name], strict=True):
            assert torch.equal(a, b), name


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
