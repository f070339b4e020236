"""SpaceR's training: the second rollout on shuffled frames, the terms of a group, its advantages and loss, the presets.

python -m pytest tests/test_spacer_training.py
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, needs_vllm, saved_masters, search_path
from PIL import Image
from test_spacer_rewards import vectors
from test_train import metrics_of, run, state_of

import train_grpo
import train_sft
from data.dataset import load_rows
from kernels.policy_loss import policy_loss_reference
from metrics import Clock
from model import pack
from rollout import Completion, HFRollout
from sampling import collect, encoding, sample_groups, score_groups
from train_grpo import PRESETS, Config, group_advantages, token_scale

REWARD = """
import zlib

def score(response, row):
    value = zlib.crc32(response.encode()) % 5 // 4
    return {"total": value, "accuracy": value}

def bare(response, row):
    return {"total": 0.5}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reward, and four rows: two clips, two pictures."""
    folder = tmp_path_factory.mktemp("spacer")
    (folder / "reward.py").write_text(REWARD)
    rng, rows = np.random.default_rng(0), []
    for n in range(4):
        names = [f"{n}-{k}.png" for k in range(4 if n % 2 else 1)]
        for name in names:
            Image.fromarray(rng.integers(0, 255, (56, 84, 3), np.uint8)).save(folder / name)
        shown = {"video": names, "fps": 2, "map": {"cup": [[1, 2]]}} if n % 2 else {"images": names}
        rows.append({"id": str(n), "question": "How many cups are there?", "gold": "2", "kind": "mra", **shown})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(files, **changes) -> Config:
    """The preset made small: two rows a step, groups of four."""
    made = replace(
        PRESETS["spacer-7b"][1], model="random:tiny", data=str(files / "rows.jsonl"), name="run", prompts_per_step=2, group_size=4,
        max_pixels=112 * 112, max_prompt_tokens=1024, max_completion_tokens=6, reward=f"{files}/reward.py:score", reward_workers=0,
        top_p=0.9, lr=1e-3, steps=4, save_every=2, keep=3, samples_every=1, rollout="hf", rollout_sequences=12, dtype="float32",
        device="cpu",
    )  # fmt: skip
    return replace(made, **changes)


class Recorder:
    """An engine that notes what it is asked, and answers with numbers."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, *, n, **settings):
        counts = [n] * len(prompts) if isinstance(n, int) else n
        self.asked.append((prompts, counts, settings))
        return [[Completion([7] * (j + 1), [0.0], f"{i}/{j}", True) for j in range(count)] for i, count in enumerate(counts)]


class Judge:
    """Rewards by text; any other text is worth nothing."""

    def __init__(self, worth: dict[str, tuple[float, float]]):
        self.worth, self.seen, self.file = worth, [], None

    def score(self, texts, rows):
        self.seen += [(text, row["id"]) for text, row in zip(texts, rows, strict=True)]
        found = [self.worth.get(text, (0.0, 0.0)) for text in texts]
        return [{"total": a + f, "accuracy": a, "format": f} for a, f in found]


# ---- the second rollout ----


def test_clips_are_asked_again_with_their_frames_in_another_order(files, tiny):
    cfg = small(files)
    rows = load_rows(cfg.data)
    prompts = [train_grpo.encode(row, tiny.processor, **encoding(cfg)) for row in rows]
    engine = Recorder()
    groups, others = sample_groups(cfg, engine, tiny.processor, prompts, seed=5)
    [(asked, counts, settings)] = engine.asked
    assert asked[:4] == prompts and counts == [4] * 4 + [2] * 2 and settings["top_p"] == 0.9
    assert [len(group) for group in groups] == [4] * 4 and [len(other) for other in others] == [0, 2, 0, 2]
    assert [other[0].text for other in others if other] == ["4/0", "5/0"]
    for shuffled, prompt in zip(asked[4:], (prompts[1], prompts[3]), strict=True):
        assert sorted(f.tobytes() for f in shuffled.images) == sorted(f.tobytes() for f in prompt.images)
        assert shuffled.expanded == prompt.expanded and shuffled.row is prompt.row
    orders = [[p.images.index(f) for f in s.images] for s, p in zip(asked[4:], (prompts[1], prompts[3]), strict=True)]
    sample_groups(cfg, engine, tiny.processor, prompts, seed=5)
    assert [f.tobytes() for p in engine.asked[1][0] for f in p.images] == [f.tobytes() for p in asked for f in p.images]
    several = set()
    for seed in range(6):
        sample_groups(cfg, engine, tiny.processor, prompts, seed=seed)
        several.add(str([[p.images.index(f) for f in s.images]
                         for s, p in zip(engine.asked[-1][0][4:], (prompts[1], prompts[3]), strict=True)]))  # fmt: skip
    assert len(several) > 3 and str(orders) in several, "the seed decides"
    sample_groups(replace(cfg, temporal=False), engine, tiny.processor, prompts, seed=5)
    assert engine.asked[-1][:2] == (prompts, [4] * 4)


def test_several_numbers_of_completions_in_one_call(tiny, prompts):
    engine = HFRollout(tiny.policy, tiny.processor)
    settings = dict(max_tokens=5, temperature=0.0, seed=0)
    same = engine.generate([prompts["one"], prompts["text"]], n=2, **settings)
    mixed = engine.generate([prompts["one"], prompts["text"], prompts["one"]], n=[3, 1, 2], **settings)
    assert [len(group) for group in mixed] == [3, 1, 2]
    assert [group[0].token_ids for group in mixed] == [same[0][0].token_ids, same[1][0].token_ids, same[0][0].token_ids]


# ---- what a group earns ----


@pytest.mark.parametrize("i, want", vectors("group_rewards_and_advantages"))
def test_totals_and_advantages_as_published(files, i, want):
    """From the reward's parts to the numbers trained on; eight equal rewards get 0 there too."""
    G, count = i["group_size"], len(i["rewards_per_func"])
    shuffled = i["shuffled_rewards_per_func"] if i["temporal"] and i["is_video"] else None
    cfg = small(files, group_size=G, length_control=i["len_control"], temporal=bool(i["temporal"]))
    worth = {str(k): tuple(pair) for k, pair in enumerate(i["rewards_per_func"])}
    worth |= {f"other {k}": tuple(pair) for k, pair in enumerate(shuffled or [])}
    groups = [[Completion([7] * i["completion_lengths"][k], [], str(k), True) for k in range(at, at + G)] for at in range(0, count, G)]
    others = [[Completion([7], [], f"other {k}", True) for k in range(len(shuffled or []))] for _ in groups]
    judge = Judge(worth)
    by_group, of_others = score_groups(cfg, judge, [{"id": str(b)} for b in range(len(groups))], groups, others)
    totals = torch.tensor([[part["total"] for part in parts] for parts in by_group])
    assert totals.flatten().tolist() == pytest.approx(want["value"]["rewards"], abs=1e-4)
    if G > 1:  # upstream's is nan for a group of one, which is refused here
        found = group_advantages(totals, eps=cfg.std_eps)
        assert found.flatten().tolist() == pytest.approx(want["value"]["advantages"], abs=1e-4)
    assert [len(parts) for parts in of_others] == [len(other) for other in others]
    assert len(judge.seen) == count + sum(map(len, others))
    for parts, (a, f) in zip([p for ps in by_group for p in ps], i["rewards_per_func"], strict=True):
        assert parts["total"] == pytest.approx(a + f + parts["temporal_term"] + parts["length_term"])
    flag = want["value"]["temporal_flag"]
    assert any(part["temporal_term"] for parts in by_group for part in parts) <= (flag == 1)


def test_without_the_terms_the_reward_is_left_alone(files):
    cfg = small(files, temporal=False, length_control=False)
    groups = [[Completion([7] * 400, [], "a", True)] * 4]
    [parts], [none] = score_groups(cfg, Judge({"a": (1.0, 1.0)}), [{"id": "0"}], groups, [[]])
    assert [part["total"] for part in parts] == [2.0] * 4 and none == [] and "length_term" not in parts[0]


def test_a_reward_without_accuracy_is_refused_at_the_start(files, tmp_path):
    with pytest.raises(SystemExit, match="need a reward with a part accuracy; .*reward.py:bare has total"):
        run(tmp_path, small(files, reward=f"{files}/reward.py:bare"))


# ---- the loss ----


def test_the_loss_is_the_published_one(tiny, prompts, files):
    """3.1: mean over completions of the mean over tokens of -(ratio A - beta KL), ratio 1; its gradient by log-prob too."""
    cfg = small(files)
    rng = torch.Generator().manual_seed(0)
    allowed = (~tiny.policy.banned).nonzero().squeeze(-1)
    lengths = [[3, 9, 1, 5], [2, 2, 8, 4]]
    groups = [[Completion(allowed[:n].tolist(), [0.0] * n, "", True) for n in some] for some in lengths]
    advantages = torch.tensor([[1.0, -1.2, 0.3, -0.1], [0.0, 0.5, -0.7, 0.2]])
    [packed] = pack([prompts["one"], prompts["text"]], groups, tiny.config, token_budget=100_000, advantages=advantages)
    ref = -3 * torch.rand(len(packed.loss_mask), generator=rng)
    logp = (ref + torch.randn(len(ref), generator=rng)).requires_grad_()
    scale = token_scale(packed, cfg.normalize, float(packed.loss_mask.sum()), 8.0)
    ours, _ = policy_loss_reference(
        logp, packed.advantages, scale, ref_logp=ref, rollout_logp=packed.rollout_logp, importance_cap=cfg.importance_cap, kl=cfg.kl,
        kl_coef=cfg.kl_coef, clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(ours, logp)
    x = (ref - logp).clamp(-10, 10)
    token = -(torch.exp(logp - logp.detach()) * packed.advantages - 0.04 * (x.exp() - x - 1))
    theirs = torch.stack([part.mean() for part in token.split([n for some in lengths for n in some])]).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, logp)[0])


# ---- whole steps ----


def test_a_step_trains_on_the_whole_groups_and_only_scores_the_others(files, tiny):
    cfg, rows = small(files), load_rows(str(files / "rows.jsonl"))
    engine = Recorder()
    engine.wake = engine.sleep = lambda *_: None
    engine.keeps_frozen, engine.memory = True, dict
    judge = Judge({f"{i}/{j}": (1.0, 1.0) for i in range(2) for j in range(4)} | {"2/0": (1.0, 0.0)})
    share, cursor, metrics = collect(cfg, tiny.policy, engine, tiny.processor, judge, rows, 0, 0, Clock(), 0, 1)
    clips = sum(bool(row.get("video")) for row in share.rows)
    assert cursor == 2 and [len(group) for group in share.groups] == [4, 4] and clips > 0
    assert len(judge.seen) == 8 + 2 * clips and [text for text, _ in judge.seen[8:10]] == ["2/0", "2/1"]
    assert metrics["shuffled/accuracy"] == 1 / (2 * clips) and metrics["reward/accuracy"] == 1.0
    assert metrics["reward/temporal_term"] == pytest.approx(0.3 * clips / 2) and metrics["reward/length_term"] == 0
    assert metrics["speed/sampled_tokens"] == 2 * (1 + 2 + 3 + 4) + clips * (1 + 2)
    assert share.rewards.sum() == pytest.approx(16 + 0.3 * 4 * clips)


def test_runs_repeat_and_resume_bit_for_bit(files, tmp_path):
    """Clips and pictures, both terms, a cut distribution, several rounds of dynamic sampling."""
    cfg = small(files, dynamic_sampling=True, max_rounds=2)
    straight = run(tmp_path / "straight", cfg)
    lines = metrics_of(straight)
    assert len(lines) == 4 and all(line["shuffled/length"] > 0 for line in lines if line["sampling/drawn"] > 3)
    assert any(line["reward/temporal_term"] > 0 for line in lines) and max(line["optim/grad_norm"] for line in lines) > 0
    gaps = [line["rollout/logprob_gap"] for line in lines]
    assert all(0 < gap < -np.log(0.9) for gap in gaps), "what top_p cut off, and no more"
    halves = tmp_path / "halves"
    with pytest.MonkeyPatch.context() as patch:
        inner, calls = train_grpo.train_step, []

        def train_step(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return inner(*args, **kwargs)

        patch.setattr(train_grpo, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            run(halves, cfg)
    resumed = run(halves, replace(cfg, resume=True))
    assert metrics_of(resumed) == lines
    a, b = state_of(straight, 4), state_of(resumed, 4)
    assert a["cursor"] == b["cursor"] > 8 and all(torch.equal(x, y) for x, y in zip(a["rng"], b["rng"], strict=True))
    ours, theirs = saved_masters(straight / "step_4"), saved_masters(resumed / "step_4")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- settings ----


def test_presets_have_the_published_settings():
    for name, model in (("spacer-7b", "7B"), ("spacer-3b", "3B")):
        cfg = PRESETS[name][1]
        assert model in cfg.model and cfg.name == name
        assert (cfg.prompts_per_step, cfg.group_size, cfg.mini_batches, cfg.temperature, cfg.top_p) == (8, 8, 1, 1.0, 0.95)
        assert (cfg.lr, cfg.schedule, cfg.warmup_steps, cfg.weight_decay, cfg.max_grad_norm) == (1e-6, "cosine", 0, 0.01, 5.0)
        assert (cfg.kl, cfg.kl_coef, cfg.std_eps, cfg.normalize, cfg.importance_cap) == ("k3", 0.04, 1e-4, "sequence", 0.0)
        assert (cfg.max_prompt_tokens, cfg.max_completion_tokens, cfg.steps) == (16384, 1024, -(-151_310 // 8))
        assert cfg.temporal and cfg.length_control and (cfg.reward, cfg.reward_mode, cfg.style) == ("spacer", "upstream", "spacer_map")
        for world in (1, 2, 4, 8):
            with pytest.raises(FileNotFoundError, match="SpaceR-151k.jsonl: no such file: docs/video.md says"):
                train_grpo.check_config(cfg, world)
    sft = train_sft.PRESETS["spacer-sft-7b"][1]
    assert (sft.rows_per_step, sft.lr, sft.schedule, sft.max_grad_norm, sft.lora_rank) == (16, 1e-6, "linear", 5.0, 0)
    assert sft.steps == -(-151_310 // 16) and (sft.style, sft.response) == ("spacer", "gold")


def test_top_p_and_the_importance_weight_exclude_each_other(files):
    cfg = small(files)
    train_grpo.check_config(cfg, 1)
    with pytest.raises(ValueError, match="--top-p 0.9: .*add --importance-cap 0"):
        train_grpo.check_config(replace(cfg, importance_cap=2.0), 1)
    with pytest.raises(ValueError, match="--top-p 1.5: above 0"):
        train_grpo.check_config(replace(cfg, top_p=1.5), 1)
    given = tyro.extras.overridable_config_cli(PRESETS, args=["spacer-7b", "--no-temporal", "--top-p", "1.0"])
    assert not given.temporal and given.top_p == 1.0 and given.length_control


def test_supervised_spacer_teaches_the_bare_gold(files, tiny):
    cfg = replace(train_sft.PRESETS["spacer-sft-7b"][1], data=str(files / "rows.jsonl"), max_pixels=112 * 112)
    row = load_rows(cfg.data)[1] | {"kind": "choice", "options": ["one", "two"], "gold": "B"}
    done = train_sft.target(row, tiny.processor, cfg)
    assert done.text == "<answer>B</answer>" and done.token_ids[-1] == tiny.processor.tokenizer.eos_token_id
    batches = train_sft.Batches(replace(cfg, rows_per_step=4), load_rows(cfg.data), tiny.processor, tiny.config, 0, 1)
    assert sum(len(packed.lengths) for packed in batches[0]) == 4


@pytest.mark.slow
def test_supervised_spacer_learns_from_clips(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = replace(
        train_sft.PRESETS["spacer-sft-7b"][1], model="random:tiny", data=str(files / "rows.jsonl"), rows_per_step=4, steps=8, lr=1e-2,
        schedule="constant", workers=0, dtype="float32", device="cpu", max_pixels=112 * 112,
    )  # fmt: skip
    train_sft.main(cfg)
    losses = [line["loss/sft"] for line in metrics_of(tmp_path / "runs" / "spacer-sft-7b")]
    assert len(losses) == 8 and losses[-1] < losses[0] / 2


@pytest.mark.slow
def test_the_engine_samples_both_rollouts(files, tmp_path):
    """Clips, shuffled clips and pictures through vLLM: what top_p cuts off is all that its log-probs differ by."""
    needs_vllm()
    flags = ("--model random:demo --rollout vllm --prompts-per-step 4 --group-size 4 --max-prompt-tokens 1024 --max-completion-tokens 8 "
             "--max-pixels 12544 --top-p 0.9 --lr 1e-3 --steps 2 --save-every 2 --dtype float32 --device cpu").split()  # fmt: skip
    done = subprocess.run(
        [sys.executable, ROOT / "train_grpo.py", "spacer-3b", "--data", files / "rows.jsonl", "--reward", f"{files}/reward.py:score", *flags],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "log-probs differ by 0.0000 on average" in done.stdout, done.stderr[-3000:]
    lines = metrics_of(tmp_path / "runs" / "spacer-3b")
    assert len(lines) == 2 and all(line["shuffled/length"] > 0 for line in lines)
    assert all(0 < line["rollout/logprob_gap"] < -np.log(0.9) + 1e-4 for line in lines)
