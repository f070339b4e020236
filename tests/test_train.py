"""train_grpo.py, whole small runs: data, resumption, seeds, signals, bad settings, the command line."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, saved_masters, search_path
from PIL import Image

import model as model_module
import sampling
import scoring
import train_grpo
from kernels.linear_policy_loss import linear_policy_loss
from model import load_model
from rollout import HFRollout
from train_grpo import PRESETS, Config

REWARD = """
import zlib

def score(response, row):
    value = zlib.crc32(response.encode()) % 101 / 100
    return {"total": value, "half": value / 2, "accuracy": float(value > 0.5)}

def picky(response, row):
    return score(response, row) if zlib.crc32(row["id"].encode()) % 2 else {"total": 0.5}
"""


# ---------------------------------------------------------------- rule 9: rows that do not fit


def test_rule_09_overlong_and_broken_rows_are_dropped_counted_and_printed(tiny, tmp_path, capsys):
    """Dropped at load, never cut: what is kept is encoded whole."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    records = [
        {"id": "short", "images": ["red.png"], "question": "Which colour?", "options": ["red", "blue"], "gold": "A"},
        {
            "id": "endless",
            "images": ["red.png"],
            "question": "left of " * 200 + "?",
            "options": ["red", "blue"],
            "gold": "A",
        },
        {"id": "torn", "images": ["torn.png"], "question": "Which colour?", "options": ["red", "blue"], "gold": "A"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = Config(style="short", min_pixels=784, max_pixels=112 * 112, max_prompt_tokens=100, reward="vanilla")
    rows = train_grpo.load_data(cfg, str(file), None, tiny.processor)
    assert [row["id"] for row in rows] == ["short"]
    printed = capsys.readouterr().out
    assert "1 kept" in printed and "1 overlong" in printed and "endless" in printed and "1 with a broken" in printed
    longer = replace(cfg, max_prompt_tokens=1000)
    assert [row["id"] for row in train_grpo.load_data(longer, str(file), None, tiny.processor)] == ["short", "endless"]
    encoded = train_grpo.encode(records[1] | rows[0] | {"question": records[1]["question"]}, tiny.processor,
                                **sampling.encoding(cfg))  # fmt: skip
    assert tiny.processor.tokenizer.decode(encoded.ids).count("left of") == 200
    with pytest.raises(ValueError, match="rows.jsonl: no row left of 3 .*--max-prompt-tokens"):
        train_grpo.load_data(replace(cfg, max_prompt_tokens=10), str(file), None, tiny.processor)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run installs handlers for SIGTERM and Ctrl-C; the tests after it want the old ones."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "reward.py"
    file.write_text(REWARD)
    return f"{file}:score"


def small(reward_file: str, **changes) -> Config:
    """Four steps of four groups, two optimiser steps each, several micro-batches each, KL on, a cosine schedule."""
    return replace(Config(
        model="random:tiny", data="scenes:easy@train", limit=10, style="short", min_pixels=784, max_pixels=112 * 112,
        max_prompt_tokens=512, max_completion_tokens=7, prompts_per_step=4, group_size=3, mini_batches=2,
        token_budget=90, reward=reward_file, reward_workers=0, kl_coef=0.05, lr=3e-3, schedule="cosine", warmup_steps=2,
        steps=4, val_every=0,
        save_every=2, keep=3, samples_every=1, rollout_sequences=6, dtype="float32", device="cpu",
    ), **changes)  # fmt: skip


def run(folder: Path, cfg: Config) -> Path:
    """A whole run inside `folder` -> its run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_grpo.runs, "plot_reward", lambda folder: None)  # half a second a picture
        train_grpo.main(cfg)
    return folder / "runs" / cfg.name


def metrics_of(run_folder: Path) -> list[dict]:
    """Lines of metrics.jsonl less what a clock says."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def state_of(run_folder: Path, step: int) -> dict:
    state = torch.load(run_folder / f"step_{step}" / "trainer" / "state.pt", weights_only=True)
    state["rng"] = [own["torch"] for own in state["rng"]]  # Python's and numpy's are nobody's here
    files = sorted((run_folder / f"step_{step}" / "trainer").glob("rank_*.pt"))
    assert files, "no optimiser was saved"
    return state | {"optimizer": [torch.load(file, weights_only=True) for file in files]}


def assert_identical(a, b, path="state"):
    """Bit for bit, through dicts and lists."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_identical(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def straight(tmp_path_factory, reward_file):
    """One uninterrupted run of four steps, to compare others with."""
    return run(tmp_path_factory.mktemp("straight"), small(reward_file))


def test_the_run_that_others_are_compared_with_learns_something(straight):
    """Otherwise equality would be cheap: gradients flow at every step, clips and KL are at work."""
    lines = metrics_of(straight)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["optim/grad_norm"] > 0 and line["reward/flat_groups"] < 1 and line["rollout/logprob_gap_max"] < 1e-5
    assert lines[0]["optim/lr"] > 0 and lines[3]["loss/kl"] > 0 and lines[3]["loss/ratio_max"] > 1
    assert len({line["reward/total"] for line in lines}) > 1


def test_rule_15_one_seed_one_result(straight, tmp_path, reward_file):
    again = run(tmp_path, small(reward_file))
    assert metrics_of(again) == metrics_of(straight)
    assert_identical(state_of(again, 4), state_of(straight, 4))
    for name in ("samples.jsonl", "step_4/model.safetensors"):
        assert (again / name).read_bytes() == (straight / name).read_bytes()


def test_rule_15_another_seed_another_result(straight, tmp_path, reward_file):
    other = metrics_of(run(tmp_path, small(reward_file, seed=2, steps=1)))[0]
    first = metrics_of(straight)[0]
    for name in ("reward/total", "loss/entropy", "optim/grad_norm"):
        assert other[name] != first[name], name


def kill_in_step(monkeypatch, number: int, sent=signal.SIGTERM):
    """A signal in the middle of step `number` (from 0), between its rollout and its update."""
    inner, calls = sampling.score, []

    def score(*args):
        calls.append(1)
        if len(calls) == number + 1:
            os.kill(os.getpid(), sent)
        return inner(*args)

    monkeypatch.setattr(sampling, "score", score)


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_rule_12_a_signal_in_a_step_saves_it_and_the_resumed_run_is_bit_exact(straight, tmp_path, reward_file, sent):
    """Stopped in the middle of the third step, where no checkpoint was due, then resumed to the end."""
    with pytest.MonkeyPatch.context() as patch:
        kill_in_step(patch, 2, sent)
        stopped = run(tmp_path, small(reward_file))
    assert [line["step"] for line in metrics_of(stopped)] == [0, 1, 2], "the step in which it came is finished"
    assert sorted(p.name for p in stopped.glob("step_*")) == ["step_2", "step_3"]
    run(tmp_path, small(reward_file, resume=True))
    assert metrics_of(stopped) == metrics_of(straight)
    assert_identical(state_of(stopped, 4), state_of(straight, 4))
    assert (stopped / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    assert (stopped / "step_4" / "model.safetensors").read_bytes() == (
        straight / "step_4" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("changes", [
    dict(dtype="bfloat16"),
    dict(shard="fsdp", reference="sharded"),
    dict(dynamic_sampling=True, max_rounds=3, reward="picky"),
    pytest.param(dict(dtype="bfloat16", optimizer="kahan"), marks=pytest.mark.slow),
    pytest.param(dict(optimizer="muon", freeze_vision=True), marks=pytest.mark.slow),
    pytest.param(dict(normalize="sequence", mini_batches=1), marks=pytest.mark.slow),
], ids=["bf16", "fsdp", "dynamic sampling", "kahan", "muon, frozen tower", "one step a rollout"])  # fmt: skip
def test_rule_12_resume_is_bit_exact_in_other_settings(tmp_path, reward_file, changes):
    """Two steps and two more against four, at a constant rate."""
    if "reward" in changes:
        changes = changes | dict(reward=reward_file.replace(":score", ":" + changes["reward"]))
    cfg = replace(small(reward_file, schedule="constant"), **changes)
    whole = run(tmp_path / "whole", cfg)
    parts = run(tmp_path / "parts", replace(cfg, steps=2))
    run(tmp_path / "parts", replace(cfg, resume=True))
    assert metrics_of(parts) == metrics_of(whole)
    assert_identical(state_of(parts, 4), state_of(whole, 4))


@pytest.mark.parametrize("changes", [dict(shard="fsdp"), dict(shard="fsdp", freeze_vision=True), dict(reference="host")],
                         ids=["fsdp", "fsdp, frozen tower", "reference in host memory"])  # fmt: skip
def test_a_run_over_shards_is_the_same_run(straight, tmp_path, reward_file, changes):
    """With one rank: shards, a copy that samples, and a reference that is gathered give the metrics of the plain run."""
    plain = run(tmp_path, small(reward_file, freeze_vision=True)) if changes.get("freeze_vision") else straight
    lines = metrics_of(run(tmp_path, small(reward_file, name="shards", **changes)))
    for ours, theirs in zip(lines, metrics_of(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    model, saved = (load_model(str(folder / "step_4"))[0].state_dict() for folder in (plain, tmp_path / "runs" / "shards"))
    assert model.keys() == saved.keys()
    near = [((model[name] - saved[name]).abs() <= 1e-2 * model[name].abs() + 1e-3).float().mean() for name in model]
    assert min(near) > 0.9


def test_dynamic_sampling_is_in_the_metrics_and_moves_the_cursor(tmp_path, reward_file):
    """About half of the rows get the same reward whatever is said."""
    cfg = small(reward_file.replace(":score", ":picky"), dynamic_sampling=True, max_rounds=3, steps=2)
    folder = run(tmp_path, cfg)
    lines = metrics_of(folder)
    again = [line for line in lines if line["reward/flat_groups"] > 0]
    assert again and all(line["sampling/rounds"] > 1 and line["sampling/drawn"] > 4 for line in again)
    assert state_of(folder, 2)["cursor"] == sum(line["sampling/drawn"] for line in lines) > 8


def test_rule_12_work_after_the_last_checkpoint_is_done_again_not_twice(straight, tmp_path, reward_file, monkeypatch):
    """A crash in step 3, after the checkpoint of two steps: lines of the lost step are cut and written anew."""
    steps, inner = [], train_grpo.train_step

    def crashing(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("power cut")
        return inner(*args, **kwargs)

    monkeypatch.setattr(train_grpo, "train_step", crashing)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, small(reward_file))
    crashed = tmp_path / "runs" / "run"
    assert [line["step"] for line in metrics_of(crashed)] == [0, 1, 2]
    monkeypatch.setattr(train_grpo, "train_step", inner)
    run(tmp_path, small(reward_file, resume=True))
    assert metrics_of(crashed) == metrics_of(straight)
    assert_identical(state_of(crashed, 4), state_of(straight, 4))


def test_a_run_is_not_resumed_on_other_rows(tmp_path, reward_file, monkeypatch):
    """Their order hangs on their number, so the cursor of the checkpoint would mean other rows."""
    cfg, inner = small(reward_file, steps=2, schedule="constant"), train_grpo.load_data
    run(tmp_path, cfg)
    monkeypatch.setattr(train_grpo, "load_data", lambda *args: inner(*args)[:-1])
    with pytest.raises(SystemExit, match="step_2: trained on 10 rows, .* --data now gives 9 rows, .*: bring back the rows"):
        run(tmp_path, replace(cfg, steps=3, resume=True))


def test_the_reference_of_a_resumed_run_is_the_start_not_the_checkpoint(tmp_path, reward_file):
    """With one optimiser step a rollout the KL is measured before it: 0 at the start, and only there."""
    cfg = small(reward_file, schedule="constant", mini_batches=1, steps=2)
    run(tmp_path, cfg)
    resumed = metrics_of(run(tmp_path, replace(cfg, steps=3, resume=True)))
    assert resumed[0]["loss/kl"] < 1e-9 and resumed[1]["loss/kl"] > 1e-6 and resumed[2]["loss/kl"] > 1e-6


def test_rule_04_an_engine_with_other_weights_stops_the_run(tmp_path, reward_file, monkeypatch):
    inner = HFRollout.generate

    def off(self, *args, **kwargs):
        groups = inner(self, *args, **kwargs)
        for c in (c for group in groups for c in group):
            c.logprobs = [x - 0.5 for x in c.logprobs]
        return groups

    monkeypatch.setattr(HFRollout, "generate", off)
    with pytest.raises(RuntimeError, match="step 0: .*log-probs differ by 0.500.*--max-gap"):
        run(tmp_path, small(reward_file))


def test_rule_11_too_many_skipped_steps_stop_the_run(tmp_path, reward_file, monkeypatch):
    """Weights stay as they were, the count is in the metrics, and the run ends with a reason."""

    def poisoned(*args, **kwargs):
        loss, *rest = linear_policy_loss(*args, **kwargs)
        return loss * math.inf, *rest

    monkeypatch.setattr(model_module, "linear_policy_loss", poisoned)
    with pytest.raises(RuntimeError, match="non-finite gradient"):
        run(tmp_path, small(reward_file, max_skipped=5, save_every=1, steps=40))
    folder = tmp_path / "runs" / "run"
    lines = metrics_of(folder)
    assert len(lines) == 2 and all(line["optim/skipped"] == 2 for line in lines)
    start = dict(load_model("random:tiny", seed=1)[0].named_parameters())
    for name, master in saved_masters(folder / "step_2").items():
        assert torch.equal(master, start[name.removeprefix("model.")]), name


def test_rule_11_a_good_step_resets_the_count(tmp_path, reward_file, monkeypatch):
    calls, inner = [], train_grpo.train_step

    def every_other(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs) | {"optim/skipped": float(2 * (len(calls) % 2))}

    monkeypatch.setattr(train_grpo, "train_step", every_other)
    assert len(metrics_of(run(tmp_path, small(reward_file, max_skipped=3)))) == 4


def test_rule_14_the_first_step_trains(tmp_path, reward_file):
    """No warm-up and warm-up: after one step the weights are others than at the start."""
    start = dict(load_model("random:tiny", seed=1)[0].named_parameters())
    for schedule, warmup in (("constant", 0), ("cosine", 3)):
        cfg = small(
            reward_file, schedule=schedule, warmup_steps=warmup, steps=1, mini_batches=1, name=f"{schedule}{warmup}"
        )
        folder = run(tmp_path, cfg)
        assert metrics_of(folder)[0]["optim/lr"] > 0
        saved = saved_masters(folder / "step_1")
        changed = [not torch.equal(m, start[n.removeprefix("model.")]) for n, m in saved.items()]
        assert sum(changed) > 0.9 * len(changed)


def test_a_frozen_tower_stays_as_it_was(tmp_path, reward_file):
    folder = run(tmp_path, small(reward_file, freeze_vision=True, steps=1))
    names = saved_masters(folder / "step_1").keys()
    assert names and not any("visual" in name for name in names)
    start, saved = (
        dict(load_model(source, seed=1)[0].named_parameters()) for source in ("random:tiny", str(folder / "step_1"))
    )
    for name, tensor in start.items():
        if "visual" in name:
            assert torch.equal(tensor.bfloat16().float(), saved[name])
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(start[name].bfloat16().float(), saved[name])


def test_a_checkpoint_holds_the_weights_of_its_state(straight):
    model, _ = load_model(str(straight / "step_4"))
    saved = saved_masters(straight / "step_4")
    weights = dict(model.named_parameters())
    assert len(weights) == len(saved)
    for name, master in saved.items():
        assert torch.equal(master.bfloat16().float(), weights[name.removeprefix("model.")]), name


@pytest.mark.parametrize("kind", ["random", "folder"])
def test_checkpointing_saves_memory_and_changes_nothing(straight, tmp_path, reward_file, monkeypatch, kind):
    """Models come out of from_pretrained in evaluation mode, where transformers silently skips checkpointing, and in
    training mode it drops the cache that the rollout decodes with."""
    model = "random:tiny" if kind == "random" else str(straight / "step_4")
    inner, kept = train_grpo.Policy.forward, [0]

    def counting(self, packed, **kwargs):
        def count(tensor):
            kept[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return inner(self, packed, **kwargs)

    monkeypatch.setattr(train_grpo.Policy, "forward", counting)
    found = []
    for layers in (0, 1, 2):
        kept[0] = 0
        cfg = small(reward_file, model=model, steps=1, checkpoint_layers=layers, name=f"checkpointing-{layers}")
        metrics = metrics_of(run(tmp_path, cfg))[0]
        assert metrics.pop("speed/checkpointed_layers") == layers
        found.append((metrics, kept[0]))
    (plain, full), (half, some), (same, less) = found
    assert same == pytest.approx(plain, rel=1e-4, abs=1e-6) and half == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert less < some < full and less < 0.7 * full


def test_validation_is_greedy_and_at_its_steps(tmp_path, reward_file):
    cfg = small(reward_file, val_data="scenes:easy@val", val_limit=5, val_every=2)
    lines = metrics_of(run(tmp_path, cfg))
    assert [any(k.startswith("val/") for k in line) for line in lines] == [True, False, True, False]
    assert "final_val/total" in lines[3] and "final_val/total" not in lines[2]
    assert {"val/total", "val/half", "val/length", "val/truncated"} <= set(lines[0])
    plain = metrics_of(run(tmp_path, replace(cfg, val_data=None, name="plain")))
    for line, other in zip(lines, plain):  # looking does not change what is seen
        assert {k: v for k, v in line.items() if "val/" not in k} == other


def test_without_kl_no_reference_is_held(tmp_path, reward_file, monkeypatch):
    monkeypatch.setattr(train_grpo, "frozen_copy", lambda policy: pytest.fail("a reference was made"))
    for changes in (dict(kl="none"), dict(kl_coef=0.0)):
        lines = metrics_of(run(tmp_path, small(reward_file, steps=1, name=str(changes)[6:12].strip("'_: "), **changes)))
        assert "loss/kl" not in lines[0]


def test_dry_run_shows_and_writes_nothing(tmp_path, reward_file, capsys):
    run(tmp_path, small(reward_file, dry_run=True))
    assert not (tmp_path / "runs").exists()
    printed = capsys.readouterr().out
    for words in ("10 kept", "<|im_start|>user", "median", "4 x 4 prompts", "generate", "update"):
        assert words in printed, words


@pytest.mark.parametrize("changes, words", [
    (dict(prompts_per_step=5), "--prompts-per-step 5"),
    (dict(group_size=1), "--group-size"),
    (dict(temperature=0.0), "--temperature"),
    (dict(model="/no/such/folder"), "/no/such/folder"),
    (dict(data="/no/such/file.jsonl"), "/no/such/file.jsonl"),
    (dict(data="scenes:marsh@train"), "marsh"),
    (dict(reward="no_such_reward"), "no_such_reward"),
    (dict(normalize="words"), "--normalize words"),
    (dict(kl="k9"), "k9"),
    (dict(schedule="wsd"), "wsd"),
    (dict(optimizer="sgd"), "sgd"),
    (dict(optimizer="kahan"), "kahan keeps bf16 weights"),
    (dict(optimizer="muon", shard="fsdp"), "muon needs whole matrices"),
    (dict(shard="zero"), "--shard zero"),
    (dict(reference="disk"), "--reference disk"),
    (dict(dynamic_sampling=True, max_rounds=0), "--max-rounds"),
    (dict(dtype="float8"), "--dtype float8"),
    (dict(rollout="sglang"), "--rollout sglang"),
    (dict(style="sonnet"), "sonnet"),
], ids=lambda x: next(iter(x.items())) if isinstance(x, dict) else "")  # fmt: skip
def test_a_setting_that_cannot_work_gets_one_line_before_anything_is_written(tmp_path, reward_file, changes, words):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, small(reward_file, **changes))
    message = str(caught.value)
    assert message.startswith("error: ") and words in message and "\n" not in message, message
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


def test_a_used_folder_is_refused_and_left_alone(straight, reward_file):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="error: .*--resume"):
        run(straight.parent.parent, small(reward_file))
    with pytest.raises(SystemExit, match="error: .*seed was 1, now 2"):
        run(straight.parent.parent, small(reward_file, seed=2, resume=True))
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_published_presets_have_the_published_settings():
    for name, model in (("spatialthinker-3b", "3B"), ("spatialthinker-7b", "7B")):
        cfg = PRESETS[name][1]
        assert model in cfg.model and (cfg.prompts_per_step, cfg.group_size, cfg.steps) == (512, 8, 75)
        assert (cfg.mini_batches, cfg.lr, cfg.weight_decay, cfg.max_grad_norm) == (4, 1e-6, 0.01, 1.0)
        assert (cfg.clip_low, cfg.clip_high, cfg.dual_clip, cfg.kl, cfg.kl_coef) == (0.2, 0.3, 3.0, "k3", 0.01)
        assert (cfg.max_prompt_tokens, cfg.max_completion_tokens, cfg.temperature) == (6144, 2048, 1.0)
        assert (cfg.min_pixels, cfg.max_pixels, cfg.reward_mode, cfg.normalize) == (
            512**2,
            2048**2,
            "upstream",
            "token",
        )


def test_rule_15_no_two_ranks_or_steps_sample_alike():
    cfg = Config()
    seeds = [sampling.sampling_seed(replace(cfg, seed=s), step, rank)
             for s in range(3) for step in range(50) for rank in range(16)]  # fmt: skip
    assert len(set(seeds)) == len(seeds)


def test_rule_13_evaluation_scores_with_the_graders_of_the_rewards():
    """Training's accuracy in corrected mode is evaluation's verdict, whatever dress the answer has."""
    import rewards
    import transcripts
    from data.responses import response_text
    from data.scenes import scene_rows

    assert transcripts.grade is rewards.grade
    differ = []
    for row in scene_rows(12, level="medium"):
        reward = scoring.resolve_reward("spatialthinker", mode="corrected", similarity="exact")
        letters = "ABCD"[: len(row["options"])]
        dressed = [f"({x}) {text}" for x, text in zip(letters, row["options"])] + [
            *letters,
            *row["options"],
            "",
            "A or B",
        ]
        dressed += [dress.format(x) for dress in ("({})", "{}.", "Answer: {}", "The answer is ({})") for x in letters]
        for answer in dressed:
            response = response_text(row).split("<answer>")[0] + f"<answer>{answer}</answer>"
            verdict, score = transcripts.judge(row, response), reward(response, row)
            assert score["format"] == 1.0
            if float(verdict["correct"]) != score["accuracy"]:
                differ.append((row["gold"], row["options"], answer))
    assert not differ, differ[:5]


# ---------------------------------------------------------------- as the user starts it


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip


SMALL_DEMO = (
    "demo --model random:tiny --limit 12 --val-limit 4 --steps 2 --prompts-per-step 2 --group-size 2 "
    "--max-completion-tokens 8"
).split()
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import sampling, train_grpo
inner = sampling.score_groups
def score_groups(*args):
    if not os.path.exists("sent"):
        open("sent", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return inner(*args)
sampling.score_groups = score_groups
import tyro
train_grpo.main(tyro.extras.overridable_config_cli(train_grpo.PRESETS))
"""


def test_rule_12_sigterm_in_a_step_exits_0_and_the_command_line_resumes(tmp_path):
    """The demo preset as a process: stopped in its first step, resumed by train_grpo.py itself, files all there."""
    (tmp_path / "killed.py").write_text(KILLED)
    stopped = launch(tmp_path, "killed.py", *SMALL_DEMO, "--val-every", "0")
    folder = tmp_path / "runs" / "demo"
    assert stopped.returncode == 0, stopped.stderr
    assert "SIGTERM" in stopped.stderr and "Traceback" not in stopped.stderr
    assert [p.name for p in folder.glob("step_*")] == ["step_1"] and len(metrics_of(folder)) == 1
    resumed = launch(tmp_path, str(ROOT / "train_grpo.py"), *SMALL_DEMO, "--val-every", "1", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 1" in resumed.stdout
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_1", "step_2"]
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "reward.png", "step_2/model.safetensors",
                 "step_2/config.json", "step_2/tokenizer.json", "step_2/trainer/state.pt"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [0, 1] and "val/total" in lines[1] and "final_val/total" in lines[1]
