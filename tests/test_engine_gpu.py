"""The checks of test_engine.py on a GPU, in bf16, with CUDA graphs, and with real sleep at both levels.

    python -m pytest -m gpu tests/test_engine_gpu.py          two minutes on one H200; one engine for all tests
"""

import gc

import pytest
import torch
from conftest import make_prompt
from test_engine import (
    LANGUAGE, VISION, Side, changed, check_agreement_to_noise, check_bans_and_stops, check_distribution,
    check_groups_and_seeds, check_sync, check_syncs_in_a_row, sampling_policy, sampling_prompts, start_engine,
)  # fmt: skip

import train_grpo
from model import weights
from rollout import Completion, EngineDied, vllm_kind

pytestmark = pytest.mark.gpu
ASLEEP = 1.5  # GiB that a sleeping engine may hold
MEMORY = 0.2  # share of the GPU for the engine
SOME = [*(("language_model", name) for name in LANGUAGE[:3:2]), *(("visual", name) for name in VISION[:3])]


def free_gib() -> float:
    """GiB free on this GPU when the trainer has given back what it only caches."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 2**30


@pytest.fixture(scope="module")
def started():
    """An engine and the memory that was free before it. vLLM allows one that sleeps a process: it changes levels."""
    if not torch.cuda.is_available() or vllm_kind() != "cuda":
        pytest.skip("needs an NVIDIA GPU and vLLM for it")
    policy, processor = sampling_policy(dtype=torch.bfloat16, device="cuda")
    prompts = sampling_prompts(processor)
    side = Side(None, policy, processor, prompts)
    side.gaps([[Completion([5], [0.0], "", True)]] * len(prompts))  # what CUDA and cuBLAS keep is there from here on
    side.free = free_gib()
    side.engine = start_engine(policy, processor, dtype="bfloat16", memory=MEMORY)
    side.engine.sleep()
    side.sync()
    side.gap = check_agreement_to_noise(side)
    return side


@pytest.fixture(params=[2, 1], ids=["level 2", "level 1"])
def side(request, started):
    """The engine after a sleep at this level and a sync."""
    started.engine.level, started.engine.dead = request.param, None
    started.engine.sleep()
    started.sync()
    return started


def test_log_probs_are_the_trainers_to_rounding(side):
    check_agreement_to_noise(side)


def test_a_sleeping_engine_gives_its_memory_back(side):
    side.sample()
    awake = side.engine.memory()
    side.engine.sleep()
    asleep, free = side.engine.memory(), free_gib()
    total = torch.cuda.mem_get_info()[1] / 2**30
    assert side.free - free < ASLEEP, f"{side.free - free:.2f} GiB held at level {side.engine.level}"
    assert awake["free"] < side.free - MEMORY * total / 2, "it hardly took any"
    assert asleep["engine"] < ASLEEP < awake["engine"]
    for ledger in (awake, asleep):
        assert sum(ledger.values()) == pytest.approx(total, abs=0.01) and min(ledger.values()) >= 0


@pytest.mark.parametrize("prefix, name", SOME)
def test_a_sync_changes_the_output_for_the_same_picture(side, prefix, name):
    check_sync(side, prefix, name, exact=3 * side.gap, between=side.engine.sleep)


def test_a_sync_without_sleep_does_too(side):
    check_sync(side, "visual", VISION[0], exact=3 * side.gap)


def test_parity_holds_over_sleeps_and_syncs(side):
    check_syncs_in_a_row(side, 8, exact=4 * side.gap, between=side.engine.sleep)


def test_memory_does_not_grow_with_sleeps_and_pictures(side):
    """Other picture sizes every time: what an engine remembers of each must not add up."""
    free = []
    for i in range(8):
        sizes = [(28 * (2 + (i + j) % 7), 28 * (2 + j)) for j in range(3)]
        side.sample([make_prompt(side.processor, "which one", sizes, seed=i), *side.prompts])
        side.engine.sleep()
        free.append(free_gib())
        side.sync()
    assert free[2] - free[-1] < 0.2, free


def test_groups_and_seeds(side):
    check_groups_and_seeds(side)


def test_bans_and_stops(side):
    check_bans_and_stops(side)


def test_nothing_is_cut_off_the_distribution(side):
    check_distribution(side)


def test_frozen_weights_are_sent_once_at_level_1_and_always_at_level_2(side):
    new = changed(side, *("language_model", LANGUAGE[0]), by=1.0)
    new.policy.freeze_vision()
    assert side.engine.keeps_frozen == (side.engine.level == 1)
    if side.engine.level == 2:
        with pytest.raises(EngineDied, match="not sent, and lost in level 2 sleep: .*visual"):
            new.sync(trained=True)
        return
    side.engine.sleep()
    new.sync(trained=True)
    assert new.gaps(new.sample()).mean() < 3 * side.gap


def test_weights_that_arrive_wrong_are_noticed_at_the_start(side, monkeypatch):
    cfg = train_grpo.Config(max_gap=4 * side.gap)
    side.engine.sleep()
    train_grpo.check_engine(side.engine, side.policy, side.prompts[0], cfg)

    def stream(policy, **kwargs):
        return ((name, w.roll(1, 0) if "patch_embed" in name else w) for name, w in weights(policy, **kwargs))

    restarted = []
    monkeypatch.setattr(train_grpo, "weights", stream)
    monkeypatch.setattr(train_grpo.os, "execv", lambda *command: restarted.append(command))
    with pytest.raises(ValueError, match=f"after level {side.engine.level} sleep, more than --max-gap"):
        train_grpo.check_engine(side.engine, side.policy, side.prompts[0], cfg)
    assert len(restarted) == (side.engine.level == 2)
