"""memory.py: bytes by cause against the shapes, what auto decides, and the table in the docs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memory
from model import load_policy
from train_grpo import PRESETS

ROOT = Path(__file__).resolve().parent.parent
CFG = replace(PRESETS["spatialthinker-7b"][1], offload_moments=False)


@pytest.fixture(scope="module")
def shape():
    """Qwen2.5-VL-7B without a byte of weights."""
    return load_policy("random:7b", device="meta", dtype=torch.bfloat16, kernels=False)[0]


def numbers(policy) -> int:
    return sum(p.numel() for p in policy.parameters())


def test_held_bytes_by_hand(shape):
    n = numbers(shape)
    whole = memory.held(CFG, shape, 4, "none", "gpu")
    assert whole == {"weights": 2 * n, "masters": 4 * n, "moments": 8 * n, "reference": 2 * n}
    sliced = memory.held(CFG, shape, 4, "optimizer", "sharded")
    assert sliced == {"weights": 2 * n, "masters": n, "moments": 2 * n, "reference": n / 2}
    shards = memory.held(CFG, shape, 4, "fsdp", "host")
    assert shards == {"weights": 0, "masters": n, "moments": 2 * n, "reference": 0}
    for kind, masters, moments in (("adamw8bit", n, n / 2), ("kahan", 0, 1.5 * n)):
        found = memory.held(replace(CFG, optimizer=kind), shape, 4, "optimizer", "none")
        assert (found["masters"], found["moments"], found["reference"]) == (masters, moments, 0)
    assert memory.held(replace(CFG, offload_moments=True), shape, 4, "fsdp", "none")["moments"] == 0
    assert memory.update(CFG, shape, 4, "optimizer")["gradients"] == 4 * n == 4 * memory.update(CFG, shape, 4, "fsdp")["gradients"]


def test_a_frozen_tower_stays_whole_in_bf16():
    policy, _ = load_policy("random:tiny", dtype=torch.bfloat16, freeze_vision=True)
    tower = sum(p.numel() for p in policy.vision.parameters())
    held = memory.held(CFG, policy, 2, "fsdp", "none")
    assert held["weights"] == 2 * tower and held["masters"] == 2 * (numbers(policy) - tower)


def test_auto_cuts_no_more_than_it_must(shape):
    def choice(world, total, **changes):
        return memory.choose_shard(replace(CFG, **changes), shape, world, reference="auto", total=total)

    assert choice(1, 10e9) == ("none", "gpu"), "one rank has nobody to share with"
    assert choice(4, 141e9) == ("optimizer", "gpu") and choice(4, 80e9) == ("fsdp", "sharded")
    needed = sum(memory.held(CFG, shape, 4, "optimizer", "gpu").values()) + sum(memory.update(CFG, shape, 4, "optimizer").values())
    assert choice(4, needed)[0] == "optimizer" and choice(4, needed - 1)[0] == "fsdp"
    assert choice(4, 10e9, optimizer="kahan")[0] == "optimizer" and choice(4, 10e9, optimizer="muon")[0] == "none"
    assert choice(4, 10e9, shard="optimizer") == ("optimizer", "gpu"), "what was asked for is done"
    assert memory.choose_shard(CFG, shape, 4, reference="host", total=80e9) == ("fsdp", "host")
    assert memory.choose_shard(CFG, shape, 4, total=141e9) == ("optimizer", "none")
    assert memory.choose_shard(CFG, shape, 4, reference="auto", engine=0.7, total=141e9)[0] == "fsdp", "the awake engine needs room"


def test_the_table_of_the_docs_is_what_the_code_says():
    assert memory.table() in (ROOT / "docs" / "memory.md").read_text(), "python memory.py prints the new one"
