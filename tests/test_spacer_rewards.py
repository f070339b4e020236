"""SpaceR's rewards: the published code's vectors, every mend of corrected mode, and that any text gives a number.

python -m pytest tests/test_spacer_rewards.py
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards as R

SPACER = [json.loads(line) for line in (Path(__file__).parent / "vectors" / "spacer.jsonl").read_text().splitlines()]
GOLD = {"bed": [[5, 5]], "chair": [[1, 1], [9, 9]], "trash can": [[0, 9]]}
MODES = ("upstream", "corrected")


def vectors(function):
    found = [v for v in SPACER if v["function"] == function]
    assert found
    return [pytest.param(v["input"], v["expected"], id=v["id"]) for v in found]


def say(answer, *, map_text=None):
    """A well-formed response, with the map's text inside its reasoning."""
    thought = "t" if map_text is None else f"t <map>{map_text}</map>"
    return f"<think>{thought}</think><answer>{answer}</answer>"


def score(answer, gold, problem_type, *, mode="corrected", map_text=None, gold_map=None, options=()):
    response = say(answer, map_text=map_text)
    return R.spacer_reward(response, f"<answer>{gold}</answer>", problem_type, gold_map=gold_map, mode=mode, options=options)


# ---- upstream mode against the published code ----


@pytest.mark.parametrize("i, want", vectors("format_reward"))
def test_format_as_published(i, want):
    assert R.spacer_reward(i["completion"], "", "other")["format"] == want["value"]


@pytest.mark.parametrize("i, want", vectors("accuracy_reward"))
def test_accuracy_as_published(i, want):
    here = Path(i["path"]).stem == "scene0001_00"  # the one video that the recorded map belongs to
    gold_map = i["cognitive_map"] if here else None
    result = R.spacer_reward(i["completion"], i["solution"], i["problem_type"], gold_map=gold_map)
    assert result["accuracy"] == pytest.approx(want["value"], abs=1e-9)
    assert result["total"] == result["accuracy"] + result["format"]


@pytest.mark.parametrize("i, want", vectors("accuracy_reward_batch"))
def test_each_row_is_scored_by_the_type_it_is_given(i, want):
    # Upstream scores a whole batch by the type of its first row: given that type, ours agrees.
    pairs = zip(i["completions"], i["solutions"], strict=True)
    assert [R.spacer_reward(text, gold, i["problem_types"][0])["accuracy"] for text, gold in pairs] == want["value"]


@pytest.mark.parametrize("i, want", vectors("extract_map_data"))
def test_maps_are_read_as_published(i, want):
    assert R.parse_map(i["map_string"], i["object_list"]) == want["value"]


@pytest.mark.parametrize("i, want", vectors("calculate_prediction_score"))
def test_map_score_as_published(i, want):
    value = 0.0 if "raises" in want else want["value"]  # where it raises there is no reward
    assert R.map_score(i["response"], i["solution"], i["grid"]) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("i, want", vectors("group_rewards_and_advantages"))
def test_group_terms_as_published(i, want):
    G, shuffled = i["group_size"], i["shuffled_rewards_per_func"]
    totals = []
    for k in range(0, len(i["rewards_per_func"]), G):
        accuracies, formats = zip(*i["rewards_per_func"][k : k + G], strict=True)
        others = [a for a, _ in shuffled] if i["temporal"] and i["is_video"] and shuffled else None
        terms = R.spacer_group_terms(list(accuracies), i["completion_lengths"][k : k + G], shuffled_accuracies=others,
                                     length_control=i["len_control"])  # fmt: skip
        totals += [a + f + t for a, f, t in zip(accuracies, formats, terms, strict=True)]
    assert totals == pytest.approx(want["value"]["rewards"], abs=1e-4)


def test_group_terms_at_their_limits():
    assert R.spacer_group_terms([1, 1, 1, 1], [319, 320, 512, 513]) == pytest.approx([0, 0.2, 0.2, 0])
    assert R.spacer_group_terms([1, 0.1, 0.1], [400, 400, 400]) == [0, 0, 0]  # 0.1 is not above 0.1: one alive, not two
    assert R.spacer_group_terms([1, 1], [400, 400], length_control=False) == [0, 0]
    assert R.spacer_group_terms([0.8, 0.8], [1, 1], shuffled_accuracies=[1.0]) == pytest.approx([0.3, 0.3])
    assert R.spacer_group_terms([0.7, 0.8], [1, 1], shuffled_accuracies=[1.0]) == [0, 0]
    assert R.spacer_group_terms([2, 0], [1, 1], shuffled_accuracies=[0.0]) == pytest.approx([0.3, 0])


# ---- corrected mode: a test for every mend ----


def test_mend_gate():
    for gold_map in (GOLD, None):
        assert score("B", "B", "multiple choice", mode="upstream", map_text="{}", gold_map=gold_map)["accuracy"] == 0
        assert score("B", "B", "multiple choice", map_text="{}", gold_map=gold_map)["accuracy"] == 1
        assert score("4", "4", "numerical", map_text="{}", gold_map=gold_map)["accuracy"] == 1
    assert score("B", "B", "multiple choice", map_text=str(GOLD), gold_map=GOLD)["accuracy"] == pytest.approx(2)
    assert score("A", "B", "multiple choice", map_text=str(GOLD), gold_map=GOLD)["accuracy"] == 0
    assert score("6", "4", "numerical", map_text=str(GOLD), gold_map=GOLD)["accuracy"] == 0.1  # half off: no map term


def test_mend_chance():
    rng = random.Random(0)

    def draw(spots):
        return [[rng.randrange(10), rng.randrange(10)] for _ in spots]

    plain, mended, raw = [], [], []
    for _ in range(400):
        gold = {"bed": draw("x"), "chair": draw("xxx"), "sofa": draw("xx")}
        pred = {name: draw(spots) for name, spots in gold.items()}
        plain.append(R.map_score(pred, gold))
        mended.append(R.map_score(pred, gold, mode="corrected"))
        raw.append(sum(R._mend_chance(R._near(pred[n], gold[n], 10), gold[n], 10) * len(gold[n]) / 6 for n in gold))
    assert sum(plain) / 400 > 0.6
    assert abs(sum(raw) / 400) < 0.03  # before what is negative becomes 0
    assert sum(mended) / 400 < 0.13
    assert R.map_score(GOLD, GOLD, mode="corrected") == pytest.approx(1)
    assert R.map_score({}, GOLD, mode="corrected") == 0
    # A category that is left out is worth what chance is, 0: naming the one that is known is no loss.
    assert R.map_score({"bed": [[5, 5]]}, GOLD, mode="corrected") == pytest.approx(1 / 4)
    assert R.map_score({"bed": [[0, 0]]}, GOLD, mode="corrected") == 0
    # Gold that shows nothing: as published an empty map is perfect there, and worth a whole point.
    for gold_map in ({}, {"chair": []}):
        assert R.map_score({}, gold_map) == 1 and R.map_score({}, gold_map, mode="corrected") == 0
        assert score("B", "B", "multiple choice", map_text="{}", gold_map=gold_map)["accuracy"] == 1


def test_mend_names():
    capital = {"Bed": [[5, 5]]}
    assert score("B", "B", "multiple choice", mode="upstream", map_text=str(capital), gold_map=capital)["map"] == 0
    assert score("B", "B", "multiple choice", map_text=str(capital), gold_map=capital)["map"] == pytest.approx(1)


@pytest.mark.parametrize("answer, gold, published, mended", [
    ("twenty one", "21", 0, 1), ("a table and 7 chairs", "7", 0, 1), ("1,200", "1200", 0, 1), (".5", "0.5", 0, 1),
    ("1e3", "1000", 0, 1), ("-3", "3", 1, 0), ("5", "-3", 1, 0), ("-3", "-3", 1, 1), ("0", "0", 0, 1),
    ("150 cm", "1.5", 0, 0),
])  # fmt: skip
def test_mend_number(answer, gold, published, mended):
    assert score(answer, gold, "numerical", mode="upstream")["accuracy"] == published
    assert score(answer, gold, "numerical")["accuracy"] == mended


@pytest.mark.parametrize("answer, gold, published", [("10", "10", 0.9999999999), ("0", "0", 0), ("10 kg", "10", 0)])
def test_mend_regression(answer, gold, published):
    assert score(answer, gold, "regression", mode="upstream")["accuracy"] == pytest.approx(published, abs=1e-12)
    assert score(answer, gold, "regression")["accuracy"] == 1


def test_mend_rouge():
    assert score("Cats.", "cat", "free-form", mode="upstream")["accuracy"] == pytest.approx(2 / 3)
    assert score("Cats.", "cat", "free-form")["accuracy"] == 1
    assert score("空间推理", "空间推理", "free-form", mode="upstream")["accuracy"] == 0
    assert score("空间推理", "空间推理", "free-form")["accuracy"] == 1
    assert 0 < score("空间", "空间推理", "free-form")["accuracy"] < 1
    assert score("dog", "cat", "free-form")["accuracy"] == 0
    same = ("the cat sits on a mat", "the cat sat on the mat")
    assert score(*same, "free-form") == score(*same, "free-form", mode="upstream")  # elsewhere the two agree
    assert score("", "", "free-form")["accuracy"] == 0


def test_mend_choice():
    options = ("left", "right")
    for answer in ("(B)", "b", "B. right", "right"):
        assert score(answer, "B", "multiple choice", mode="upstream")["accuracy"] == 0
        assert score(answer, "B", "multiple choice", options=options)["accuracy"] == 1
    assert score("A", "B", "multiple choice", options=options)["accuracy"] == 0
    assert R.spacer_reward("hm", "none", "multiple choice")["accuracy"] == 1
    assert R.spacer_reward("hm", "none", "multiple choice", mode="corrected")["accuracy"] == 0


def test_mend_blocks():
    assert score("B", "B", "multiple choice")["format"] == 1
    padded = f" {say('B')}\n"
    assert [R.spacer_reward(padded, "<answer>B</answer>", "multiple choice", mode=m)["format"] for m in MODES] == [0, 1]


# ---- what holds in both modes ----


@pytest.mark.parametrize("mode", MODES)
def test_parts_are_told_apart(mode):
    with_map = score("B", "B", "multiple choice", mode=mode, map_text=str(GOLD), gold_map=GOLD)
    assert with_map == pytest.approx({"total": 3, "format": 1, "accuracy": 2, "answer": 1, "map": 1, "mapped": 1})
    wrong = score("A", "B", "multiple choice", mode=mode, map_text=str(GOLD), gold_map=GOLD)
    assert wrong == pytest.approx({"total": 1, "format": 1, "accuracy": 0, "answer": 0, "map": 1, "mapped": 1})
    ocr = score("exit", "exit", "OCR", mode=mode, map_text=str(GOLD), gold_map=GOLD)
    assert ocr["accuracy"] == ocr["answer"] == 1  # maps count for choices and numbers only


def test_mra_of_the_reward_is_the_graders():
    row = {"id": "r", "kind": "mra", "gold": "20", "options": []}
    for n in (20, 19, 18, 16, 14, 10, 9):
        assert score(str(n), "20", "numerical")["accuracy"] == R.grade(row, say(n))["correct"]


def test_missing_rouge_names_the_cure(monkeypatch):
    R._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install rouge-score"):
        R.spacer_reward(say("a"), "<answer>b</answer>", "free-form")
    monkeypatch.undo()
    R._rouge_scorer.cache_clear()


BITS = ["<map>", "</map>", "<answer>", "</answer>", "<think>", "</think>", "{", "}", "[[", "]]", "'bed'", "bed", "Chair",
        ":", ",", "1", "-2.5", "9" * 400, "1e400", "nan", "inf", "(5,5)", "str{{", "\x00", "\ud800", "٣", "日本", " ", "\n", "#",
        "yyying"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(BITS), max_size=40),
    st.sampled_from([*R.PROBLEM_TYPES.values(), "other"]),
    st.sampled_from(["<answer>B</answer>", "<answer>4</answer>", "<answer>0</answer>", "x", "<answer>nan</answer>"]),
)
def test_any_text_gives_finite_numbers(bits, problem_type, gold):
    for text in ("".join(bits), say("".join(bits), map_text="{" + "".join(bits) + "}")):
        for mode in MODES:
            result = R.spacer_reward(text, gold, problem_type, gold_map=GOLD, mode=mode, options=("left", "right"))
            assert all(map(math.isfinite, result.values())), result
            assert 0 <= result["accuracy"] <= 2 and 0 <= result["map"] <= 1


HOSTILE = ["{" * 300_000, "bed 1 1 " * 120_000, "1 " * 500_000, "{'bed': [" + "[1,1]," * 150_000 + "]}", "y" * 1_000_000,
           "<map>" * 200_000, "the cat " * 120_000, "(" * 1_000_000, "{" + "-" * 1_000_000 + "1}"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("problem_type", ["multiple choice", "numerical", "OCR", "free-form"])
def test_a_megabyte_takes_no_time(text, problem_type):
    R._rouge_scorer(False), R._rouge_scorer(True)
    start = time.perf_counter()
    for response in (text, say(text), say("B", map_text=text)):
        for mode in MODES:
            R.spacer_reward(response, "<answer>the cat sat</answer>", problem_type, gold_map=GOLD, mode=mode)
    assert time.perf_counter() - start < 10  # quadratic time would be minutes


def test_a_map_of_odd_syntax_is_read_in_silence(recwarn):
    assert R.parse_map("{'bed': 1and [5, 5]}", ["bed"]) == {"bed": [[1, 5]]} and not recwarn.list


@pytest.mark.parametrize("key", ["0x" + "f" * 4000, "1" * 4301, "(0x" + "f" * 4000 + ",)", "None", "b'bed'"])
@pytest.mark.parametrize("mode", ["upstream", "corrected"])
def test_map_keys_that_are_no_names_are_left_out(key, mode):
    text = f"<map>{{{key}: [[1, 2]], 'bed': [[3, 4]]}}</map><answer>B</answer>"
    assert math.isfinite(R.spacer_reward(text, "<answer>B</answer>", "multiple choice", gold_map=GOLD, mode=mode)["total"])


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="unknown reward mode 'fixed'"):
        R.spacer_reward("", "", "OCR", mode="fixed")
