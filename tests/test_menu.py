"""The trainer's menu: advantages, normalisers, losses and penalties by hand, and against TRL's numbers."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_group, make_prompt, new_policy

import ranks
import rewards
import scoring
import train_grpo
import train_sft
from kernels.policy_loss import policy_loss
from model import pack_groups
from data.responses import response_text
from data.scenes import scene_rows
from rewards import extract_scene, overlong_penalty, repetition_penalty
from rollout import Completion
from sampling import check_reward, part_weights, score
from train_grpo import Config, check_config, group_advantages, token_scale

TRL = json.loads((Path(__file__).parent / "vectors" / "trl_losses.json").read_text())
# Their names, in our flags: (loss, normalize, the upper clip of cispo is a bound of the ratio there)
OURS = {"grpo": ("grpo", "sequence"), "bnpo": ("grpo", "token"), "dr_grpo": ("grpo", "length"), "dapo": ("grpo", "token"),
        "cispo": ("cispo", "token"), "gspo": ("gspo", "sequence")}  # fmt: skip


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for row, n in zip(rows, TRL["lengths"]) for x in row[:n]], dtype=torch.float64)


def packed_like(lengths: list[int]):
    lengths = torch.tensor(lengths)
    return SimpleNamespace(loss_mask=torch.ones(int(lengths.sum())), lengths=lengths,
                           sequence=torch.arange(len(lengths)).repeat_interleave(lengths))  # fmt: skip


@pytest.mark.parametrize("case", TRL["cases"], ids=[case["name"] for case in TRL["cases"]])
def test_losses_and_gradients_are_trls(case):
    """policy_loss with token_scale's weights gives what TRL 1.16's trainer computes from the same tensors."""
    loss, normalize = OURS[case["name"].partition(",")[0]]
    packed = packed_like(TRL["lengths"])
    scale = token_scale(packed, normalize, sum(TRL["lengths"]), len(TRL["lengths"]), longest=8).double()
    advantages = torch.tensor(TRL["advantages"], dtype=torch.float64)[packed.sequence]
    logp = flat(TRL["logp"]).requires_grad_()
    total, _ = policy_loss(
        logp, advantages, scale, loss=loss, old_logp=None if case["on_policy"] else flat(TRL["old_logp"]),
        ref_logp=flat(TRL["ref_logp"]), kl="k3" if case["beta"] else "none", kl_coef=case["beta"], dual_clip=0.0, clip_low=0.2,
        clip_high=case["clip_high"] - 1 if loss == "cispo" else case["clip_high"], lengths=packed.lengths,
        entropy=flat(TRL["entropy"]), entropy_coef=case["entropy_coef"], importance_cap=2.0 if case["importance"] else 0.0,
        rollout_logp=flat(TRL["rollout_logp"]) if case["importance"] else None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(total, logp)
    torch.testing.assert_close(float(total.detach()), case["loss"], rtol=1e-6, atol=1e-8)  # the weights are fp32
    torch.testing.assert_close(gradient, flat(case["gradient"]), rtol=1e-6, atol=1e-8)


def test_rloo_is_the_distance_to_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.1], [0.3, 0.3, 0.3, 0.3]])
    advantages = group_advantages(rewards, scale_by_std=False, baseline="rloo")
    torch.testing.assert_close(advantages[0], torch.tensor([1 - 0.6 / 3, 0 - 1.6 / 3, 0.5 - 1.1 / 3, 0.1 - 1.5 / 3]))
    assert (advantages[1] == 0).all()


def test_dr_grpo_has_the_distance_alone():
    torch.testing.assert_close(group_advantages(torch.tensor([[1.0, 0.0]]), scale_by_std=False), torch.tensor([[0.5, -0.5]]))


def test_normalisers_by_hand():
    packed = packed_like([2, 1])
    packed.loss_mask[2] = 0.0  # the second completion is masked
    for normalize, expected in (("token", [1 / 5, 1 / 5, 0]), ("sequence", [1 / 6, 1 / 6, 0]), ("length", [1 / 30, 1 / 30, 0])):
        found = token_scale(packed, normalize, tokens=5, sequences=3, longest=10)
        torch.testing.assert_close(found, torch.tensor(expected), msg=normalize)


def test_overlong_penalty_of_dapo():
    found = [overlong_penalty(n, limit=100, buffer=20) for n in (0, 80, 85, 90, 100, 120)]
    assert found == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert overlong_penalty(100, limit=100, buffer=0) == 0


def test_repetition_penalty_counts_what_was_said_before():
    assert repetition_penalty("") == repetition_penalty("a b c d") == repetition_penalty("a b c d e f") == 0
    assert repetition_penalty("a b c d a b c d") == pytest.approx(-1 / 5)  # of five 4-grams the last is the first
    assert repetition_penalty("no " * 100) == pytest.approx(1 / 97 - 1)


def completions(*lengths: int) -> list[Completion]:
    return [Completion([1] * n, [0.0] * n, "left of the cube " * n, True) for n in lengths]


class Pool:
    def score(self, texts, rows):
        return [{"total": 1.0, "accuracy": 1.0, "format": 0.5} for _ in texts]


def test_parts_are_weighted_by_flags():
    cfg = Config(part_weights="accuracy=2,format=0.2,overlong=1", max_completion_tokens=10, overlong_buffer=4)
    parts = score(Pool(), [{}], [completions(2, 8)], cfg)
    assert [part["total"] for part in parts] == pytest.approx([2.1, 2.1 - 0.5])
    assert parts[1]["overlong"] == -0.5 and parts[0]["repetition"] <= 0
    assert [part["total"] for part in score(Pool(), [{}], [completions(2, 8)], Config())] == [1.0, 1.0]


def test_weights_that_make_no_sense_are_one_line():
    with pytest.raises(ValueError, match="--part-weights accuracy: write name=number"):
        check_config(Config(part_weights="accuracy"), 1)
    with pytest.raises(ValueError, match="has no part 'beauty', only total, accuracy"):
        score(Pool(), [{}], [completions(2, 3)], Config(part_weights="beauty=1"))
    assert part_weights(Config()) == {} and part_weights(Config(part_weights="a=1, b=-0.5")) == {"a": 1.0, "b": -0.5}


@pytest.mark.parametrize("flag, value", [("loss", "ppo"), ("baseline", "median"), ("normalize", "word")])
def test_unknown_names_are_one_line(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value}: one of "):
        check_config(replace(Config(), **{flag: value}), 1)


@pytest.mark.parametrize("script", [train_grpo, train_sft])
@pytest.mark.parametrize("wrong, said", [
    (dict(save_every=-1), "--save-every -1: give"), (dict(keep=0), "--keep 0"), (dict(limit=0), "--limit 0"),
    (dict(min_pixels=9, max_pixels=8), "--min-pixels 9 is more than --max-pixels 8"), (dict(shard="fdsp"), "--shard fdsp: one of auto"),
    (dict(schedule="wsd"), "--schedule wsd: one of constant"), (dict(lr=float("nan")), "--lr nan: give a number above 0"),
    (dict(lr=float("inf")), "--lr inf"), (dict(max_grad_norm=0.0), "--max-grad-norm 0.0: give a number above 0"),
    (dict(max_grad_norm=-1.0), "--max-grad-norm -1.0"), (dict(val_every=-1), "--val-every -1: give a number from 0 on"),
])  # fmt: skip
def test_settings_that_cannot_work_are_one_line(script, wrong, said):
    with pytest.raises(ValueError, match=said):
        script.check_config(replace(script.Config(), **wrong), *([1] if script is train_grpo else []))


@pytest.mark.parametrize("wrong", [
    dict(temperature=float("nan")), dict(temperature=0.0), dict(clip_low=-0.1), dict(clip_low=1.0), dict(kl_coef=float("nan")),
    dict(entropy_coef=float("nan")), dict(overlong_buffer=-5), dict(part_weights="accuracy=nan"), dict(part_weights="accuracy=x"),
])  # fmt: skip
def test_numbers_of_the_loss_that_cannot_work_are_one_line(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .*: (give a number|below 1|write name=number)"):
        check_config(replace(Config(), **wrong), 1)
    check_config(replace(Config(), max_grad_norm=float("inf")), 1)  # cuts nothing


@pytest.mark.parametrize("name", ["sft-3b", "spacer-sft-7b"])
def test_validation_of_the_baselines_pays_for_what_they_teach(name):
    cfg = train_sft.PRESETS[name][1]
    rows = scene_rows(4, seed=4)
    with scoring.RewardPool(cfg.reward, mode=cfg.reward_mode) as pool:
        found = pool.score([train_sft.response_of(row, cfg) for row in rows], rows)
    assert [parts["accuracy"] for parts in found] == [1.0] * 4


def test_a_failed_sample_has_no_parts_to_weigh():
    class Failing:
        scored, failures = 9, {"raised": 2}

        def score(self, texts, rows):
            return [{"total": 0.0, "error": "raised: no"} for _ in texts]

    parts = score(Failing(), [{}], [completions(2, 3)], Config(part_weights="accuracy=1,overlong=1"))
    assert [part["total"] for part in parts] == [0.0, 0.0]


@pytest.mark.parametrize("device", ["gpu", "cuda0", "meta"])
def test_an_unknown_device_is_one_line(device):
    with pytest.raises(ValueError, match=f"--device {device}: auto, cpu or cuda"):
        ranks.setup(device)


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_the_policy_computes_every_loss_from_its_own_log_probs(loss):
    """Forward with settings is policy_loss over the log-probs that forward without them gives, gradients too."""
    policy, processor = new_policy(seed=2)
    prompt = make_prompt(processor, "where is it", [(56, 84)])
    packed = pack_groups([prompt], [make_group(policy, (5, 3, 4))], policy.config, advantages=torch.tensor([[1.0, -0.5, 0.3]]))
    packed.old_logp = policy(packed)[0].detach() + 0.3 * torch.randn(12)
    scale, settings = torch.full((12,), 1 / 12), dict(loss=loss, importance_cap=0.0, clip_low=0.2, clip_high=0.2, dual_clip=3.0,
                                                      kl="none", kl_coef=0.0, entropy_coef=0.01)  # fmt: skip
    found, seen, logp, _ = policy(packed, scale=scale, **settings)
    own, entropy = policy(packed)
    expected, _ = policy_loss(own, packed.advantages, scale, old_logp=packed.old_logp, lengths=packed.lengths, entropy=entropy, **settings)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logp, own.detach())
    assert float(seen["token_sum"]) == 12
    trained = [p for p in policy.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, trained, allow_unused=True) for x in (found, expected))):
        assert a is None and b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_ablation_rewards_differ_where_they_should():
    """A right answer with half of the relations, and the same without its format."""
    import scoring

    row = scene_rows(1, seed=4)[0]
    text = response_text(row, letter=row["gold"])
    scene = extract_scene(text)
    while len(scene["relationships"]) > len(row["scene"]["relationships"]) // 2:
        scene["relationships"].pop()
    head, _, tail = text.partition("<scene>")
    text = f"{head}<scene>{json.dumps(scene)}</scene>{tail.partition('</scene>')[2]}"
    made = {name: scoring.resolve_reward(f"examples/ablations.py:{name}") for name in ("count_8_2", "count_10_0", "count_5_5", "no_gates")}
    counts = {name: reward(text, row)["count"] for name, reward in made.items()}
    assert counts["count_10_0"] == 1.0 > counts["count_8_2"] > counts["no_gates"] > counts["count_5_5"]
    unformed = text.replace("<think>", "").replace("</think>", "")
    assert made["count_8_2"](unformed, row)["total"] == 0.0
    parts = made["no_gates"](unformed, row)
    assert parts["format"] == 0.0 and parts["accuracy"] == 1.0 and parts["spatial"] > 0.6


def test_a_reward_that_fails_on_everything_ends_the_run():
    class Broken:
        def __init__(self, scored=0, failed=0):
            self.file, self.scored, self.failures = "runs/x/failures.jsonl", scored, {"raised": failed}

        def score(self, texts, rows):
            self.scored, self.failures["raised"] = self.scored + len(texts), self.failures["raised"] + len(texts)
            return [{"total": 0.0, "error": "KeyError: 'gold_box'"} for _ in texts]

    said = "all of the last {}: KeyError: 'gold_box'; texts in runs/x/failures.jsonl"
    with pytest.raises(RuntimeError, match=said.format("16 samples")):
        score(Broken(scored=900), [{}], [completions(*[1] * 16)], Config())
    few = Broken()
    for _ in range(7):
        assert [part["total"] for part in score(few, [{}], [completions(1, 1)], Config())] == [0.0, 0.0], "a few may fail"
    with pytest.raises(RuntimeError, match=said.format("2 samples")):
        score(few, [{}], [completions(1, 1)], Config())  # on a rank with few samples a step: the 16th since the start
    one_was_scored = Broken(scored=1)
    for _ in range(9):
        score(one_was_scored, [{}], [completions(1, 1)], Config())


def test_a_package_that_one_kind_of_row_needs_is_missed_before_the_first_rollout(monkeypatch):
    rows = [{"id": f"r{i}", "kind": kind, "gold": gold, "options": options, "map": None} for i, (kind, gold, options) in
            enumerate([("choice", "A", ["a", "b"]), ("number", "3", []), ("text", "a chair", [])])]  # fmt: skip
    with scoring.RewardPool("spacer") as pool:
        check_reward(pool, rows, Config(reward="spacer"))
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
        rewards._rouge_scorer.cache_clear()
        with pytest.raises(ValueError, match=r"--reward spacer cannot score row r2 \(text\): .*pip install rouge-score"):
            check_reward(pool, rows, Config(reward="spacer"))
    rewards._rouge_scorer.cache_clear()
