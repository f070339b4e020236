"""Properties of rewards.py: any text gives finite numbers in range and never raises, in time linear in the text."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards as R

any_text = st.text(alphabet=st.characters(), max_size=60)  # lone surrogates too
PIECES = [f"<{slash}{tag}>" for tag in R.TAGS for slash in ("", "/")]
PIECES += [
    "Answer:",
    "answer is",
    "(A)",
    "(B)",
    "B.",
    "**",
    "\\boxed{",
    "}",
    " ",
    "\n",
    "not ",
    "yes",
    "no",
    "left",
    "<s>",
    "</think>",
]
PIECES += [
    "1,000",
    "-",
    "3.5e9",
    "1e999",
    "9" * 5000,
    "\ud800",
    "\u0661",
    "\\frac",
    "\\text{ ",
    "x=",
    "(",
    ")",
    "^",
    "sqrt",
    "1/0",
    "\x00",
]
messy_text = st.lists(st.sampled_from(PIECES) | any_text, max_size=25).map("".join)

numbers = st.integers(-1000, 1000) | st.integers(-(10**400), 10**400) | st.floats() | st.booleans()
wild = st.recursive(
    st.none() | numbers | any_text,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(any_text, x, max_size=4),
    max_leaves=8,
)
ids = st.sampled_from(["man.1", "man.2", "bike.1", "red_car.3", "_.1", "x.\u0661"])
boxes = st.lists(numbers, min_size=4, max_size=4)
objects = st.fixed_dictionaries({"id": ids, "bbox": boxes})
relations = st.fixed_dictionaries(
    {"subject": ids, "predicate": st.sampled_from(["on", "left of"]) | any_text, "object": ids}
)


def scenes(some_objects, some_relations):
    return st.fixed_dictionaries({}, optional={"objects": some_objects, "relationships": some_relations})


valid_scene = scenes(st.lists(objects, max_size=5, unique_by=lambda x: x["id"]), st.lists(relations, max_size=4))
odd_scene = (
    valid_scene
    | scenes(wild | st.lists(objects | wild, max_size=4), wild | st.lists(relations | wild, max_size=4))
    | wild
)
answers = st.sampled_from(["(B) left", "B", "left.", "(A) right", "3", ""]) | any_text
sizes = st.tuples(numbers, numbers) | st.sampled_from([(640, 480), (1, 1), (0, 5), None])


@st.composite
def tagged(draw, some_scene):
    """A response whose four blocks are there, so that the deeper parts of the reward are reached."""
    scene = json.dumps(draw(some_scene))  # writes NaN and Infinity, which upstream's parser reads
    return f"<observe></observe>{draw(any_text)}<scene>{scene}</scene><think>t</think><answer>{draw(answers)}</answer>"


def assert_sane(result, *, keys, bounded):
    assert set(result) == keys
    for name, value in result.items():
        assert isinstance(value, (int, float)) and math.isfinite(value), result
        assert value <= 1 + 1e-9, result
        assert value >= 0 or (not bounded and name in ("spatial", "total")), (
            result
        )  # upstream's CIoU has no lower bound


def check_spatialthinker(response, gold, size):
    keys = {"total", "format", "count", "accuracy", "spatial"}
    for mode in R.MODES:
        assert_sane(R.spatialthinker_reward(response, gold, size, mode=mode), keys=keys, bounded=mode == "corrected")


def check_all(response, gold, size):
    check_spatialthinker(response, gold, size)
    for mode in R.MODES:
        for scene in (False, True):
            assert_sane(
                R.vanilla_reward(response, gold, scene=scene, mode=mode),
                keys={"total", "format", "accuracy"},
                bounded=True,
            )
    for kind in R.GRADERS:
        for options in (["left", "right"], []):
            got = R.grade({"id": "r", "kind": kind, "gold": gold, "options": options}, response)
            assert 0 <= got["correct"] <= 1 and (got["answer"] is None or isinstance(got["answer"], str))
    for options in ([], ["yes", "no"], ["in front of", "front", "", "3"], [gold, response]):
        assert R.extract_choice(response, options) in {None, *"ABCDEFGH"[: len(options) or 8]}
    for text in (response, gold):
        size_read = R.extract_size(text)
        assert size_read is None or all(isinstance(x, int) for x in size_read)
        assert isinstance(R.extract_answer(text), str) and isinstance(R.extract_scene(text), dict)
        assert (number := R.read_number(text)) is None or math.isfinite(number)
    metrics = R.scene_metrics(response, R.extract_scene(gold), size)
    ciou = metrics.pop("ciou")
    assert ciou is None or math.isfinite(ciou) and ciou <= 1 + 1e-9
    assert_sane(metrics, keys={"iou", "object_f1", "relation_f1"}, bounded=True)


@settings(max_examples=400, deadline=None)
@given(messy_text, messy_text, sizes)
def test_any_text_gives_finite_numbers_in_range(response, gold, size):
    check_all(response, gold, size)


@settings(max_examples=400, deadline=None)
@given(tagged(odd_scene), tagged(odd_scene), sizes)
def test_any_json_gives_finite_numbers_in_range(response, gold, size):
    check_all(response, gold, size)


@settings(max_examples=500, deadline=None)
@given(valid_scene, valid_scene, sizes)
def test_wild_boxes_in_right_answers_give_finite_numbers_in_range(scene, gold, size):
    text = "<observe></observe><scene>{}</scene><think></think><answer>(B) left</answer>"
    check_spatialthinker(text.format(json.dumps(scene)), text.format(json.dumps(gold)), size)


pixels = st.integers(0, 400)
proper = st.tuples(pixels, pixels, st.integers(20, 200), st.integers(20, 200)).map(
    lambda t: [t[0], t[1], t[0] + t[2], t[1] + t[3]]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(proper, min_size=1, max_size=6), st.lists(st.tuples(ids, ids), max_size=4), st.randoms())
def test_gold_itself_earns_everything_in_any_order(some_boxes, pairs, rng):
    gold = {"objects": [{"id": f"{'ab'[k % 2]}.{k}", "bbox": box} for k, box in enumerate(some_boxes)],
            "relationships": [{"subject": a, "predicate": "on", "object": b} for a, b in pairs]}  # fmt: skip
    text = "<observe></observe><scene>{}</scene><think></think><answer>(B) left</answer>"
    shuffled = {key: rng.sample(value, len(value)) for key, value in gold.items()}
    for mode in R.MODES:
        got = R.spatialthinker_reward(
            text.format(json.dumps(shuffled)), text.format(json.dumps(gold)), (640, 640), mode=mode
        )
        assert got["total"] == pytest.approx(1.0, abs=1e-3), mode
    found = R.scene_metrics(text.format(json.dumps(shuffled)), gold, (640, 640))
    ciou = found.pop("ciou")
    assert found == {"iou": 1.0, "object_f1": 1.0, "relation_f1": 1.0} and ciou == pytest.approx(1.0, abs=1e-3)


@settings(max_examples=300, deadline=None)
@given(proper, proper)
def test_boxes_overlap_alike_both_ways(a, b):
    assert R.iou(a, b) == pytest.approx(R.iou(b, a)) and R.ciou(a, b) == pytest.approx(R.ciou(b, a))
    assert 0 <= R.iou(a, b) <= 1 and R.ciou(a, b) <= (R.iou(a, b) + 1) / 2 + 1e-9
    assert R.iou(a, a) == 1.0 and R.ciou(a, a) == pytest.approx(1.0)


@settings(max_examples=300, deadline=None)
@given(any_text, any_text)
def test_lexical_is_a_similarity(a, b):
    value = R.lexical(R.clean_label(a), R.clean_label(b))
    assert value == R.lexical(R.clean_label(b), R.clean_label(a)) and 0 <= value <= 1
    assert (value == 1) == (R.clean_label(a).split() == R.clean_label(b).split())


words = st.lists(
    st.sampled_from("the red blue car man left right of behind near 3 12 two".split()), min_size=1, max_size=4
).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(words, min_size=2, max_size=6, unique_by=R.plain), st.data())
def test_the_letter_and_text_of_an_option_choose_it(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    letter, text = "ABCDEF"[index], options[index]
    for said in (
        f"({letter}) {text}",
        f"({letter})",
        f"{letter}.",
        letter,
        text,
        f"{letter}) {text.upper()}.",
        f"The answer is ({letter})",
    ):
        assert R.extract_choice(f"<think>(A) or (B)?</think>\n<answer>{said}</answer>", options) == letter, said


# ---------------------------------------------------------------------------------------------------------------------
# Time. A megabyte of anything; the bound of the issue is 0.2 s for a reward (CPU time here, the best of three).

MB = 1_000_000
FOUR = "<observe>o</observe>{0}<scene>{{}}</scene>{0}<think>t</think>{0}<answer>(B) left</answer>"
HOSTILE = {
    "opening scene tags": "<scene>" * (MB // 7),
    "opening answer tags": "<answer>" * (MB // 8),
    "opening think tags": "<think>" * (MB // 7),
    "think joints": "<think>" + "</think> " * (MB // 9) + "<answer>",
    "spaces between blocks": FOUR.format(" " * (MB // 3)),
    "spaces before the answer": "<think>t</think>" + " " * MB + "<answer>(B) left</answer>",
    "spaces": " " * MB,
    "line breaks": "\n" * MB,
    "an opening tag a line": "<answer>\n" * (MB // 9) + "</answer>",
    "blocks with a line break": "<answer>\n</answer>" * (MB // 18),
    "sizes": "Image size: (" * (MB // 13),
    "crosses": "Image size: (1 x " + " x " * (MB // 3),
    "open brackets": FOUR.replace("{{}}", "[" * MB).format(""),
    "nested objects": FOUR.replace("{{}}", '{{"objects":' * (MB // 11)).format(""),
    "a long integer": FOUR.replace("{{}}", '{{"objects": ' + "9" * MB + "}}").format(""),
    "letters": "(A) " * (MB // 4),
    "stated answers": "the answer is " * (MB // 14),
    "bold": "**a" * (MB // 3),
    "boxes": "\\boxed{" * (MB // 7),
    "denials": "not " * (MB // 4) + "(A)",
    "commas": "1,111" * (MB // 5),
    "digits": "1" * MB,
    "fractions": "\\frac{" * (MB // 6),
    "Answer:": "Answer: " * (MB // 8),
    "words": "left right " * (MB // 11),
    "one letter": "a" * MB,
}
GOLD = (
    '<scene>{"objects": [{"id": "man.1", "bbox": [1, 2, 3, 4]}], "relationships": []}</scene><answer>(B) left</answer>'
)


def within(seconds, function, *arguments, **options):
    """CPU time of one call is below the bound, in one of three tries: a busy machine may spoil two."""
    for _ in range(3):
        start = time.process_time()
        function(*arguments, **options)
        if time.process_time() - start < seconds:
            return True
    return False


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_takes_linear_time(name):
    text = HOSTILE[name]
    assert len(text) > 0.9 * MB
    for mode in R.MODES:
        assert within(0.2, R.spatialthinker_reward, text, GOLD, (640, 480), mode=mode)
        assert within(0.2, R.spatialthinker_reward, GOLD, text, (640, 480), mode=mode)
        assert within(0.2, R.vanilla_reward, text, GOLD, mode=mode)
        assert within(0.2, R.vanilla_reward, text, GOLD, scene=True, mode=mode)
    for kind in ("choice", "number", "text"):
        row = {"id": "r", "kind": kind, "gold": "left", "options": ["left", "right"] if kind == "choice" else []}
        assert within(0.6, R.grade, row, text)
    assert within(0.2, R.scene_metrics, text, R.extract_scene(GOLD), (640, 480))
    assert within(0.2, R.extract_size, text)
    check_spatialthinker(text, text, (640, 480))


@pytest.mark.parametrize("gold_objects", [5, 400])
def test_thousands_of_objects_do_not_make_the_matching_explode(gold_objects):
    def scene(n):
        found = [
            {"id": f"{chr(97 + k % 26)}{chr(97 + k // 26 % 26)}.{k}", "bbox": [k % 97, k % 89, k % 97 + 9, k % 89 + 9]}
            for k in range(n)
        ]
        return json.dumps(
            {"objects": found, "relationships": [{"subject": "a.1", "predicate": "on", "object": "b.1"}] * n}
        )

    text = FOUR.replace("{{}}", "{1}")
    response, gold = text.format("", scene(10_000)), text.format("", scene(gold_objects))
    for mode in R.MODES:
        assert within(1.0, R.spatialthinker_reward, response, gold, (640, 480), mode=mode)
    assert within(1.0, R.scene_metrics, response, R.extract_scene(gold), (640, 480))
