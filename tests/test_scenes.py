"""data/scenes.py: answers recomputed from boxes by a checker that shares no code with it, balance, determinism."""

import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.drawing import COLOURS, SHAPES, mask
from data.responses import response_text
from data.scenes import LEVELS, draw_scene, resolve_knobs, scene_row, scene_rows
from rewards import solution_text, spatialthinker_reward

ROOT = Path(__file__).parents[1]
GOLDEN = {  # first 16 hex digits of sha256; a change here is a change of everybody's data
    ("easy", 0): "d08893a1c1cbcd15",
    ("demo", 0): "bbf0b0bab06a46b7",
    ("demo", 1): "1049e5f5f1bbe419",
    ("demo", 2**40 + 7): "1fde1d7520962a85",
    ("medium", 3): "d8fc449c33e69d7e",
    ("hard", 4): "57572319394d5861",
    ("hard", 5): "6365135546d99525",
}


@pytest.fixture(scope="module")
def demo_rows() -> list[dict]:
    rows = scene_rows(5000)
    for row in rows:
        row["images"] = [row["images"][0].tobytes()]
    return rows


# ---- the independent checker: question text, boxes, picture size; nothing from data.scenes ---------------------------


def named(objects: list[dict], name: str) -> list[list[int]]:
    return [o["bbox"] for o in objects if o["id"].split(".")[0] == name.replace(" ", "_")]


def mid(box: list[int]) -> tuple[int, int]:
    return (box[0] + box[2]) // 2, (box[1] + box[3]) // 2


def where(a: list[int], b: list[int]) -> str:
    dx, dy = mid(a)[0] - mid(b)[0], mid(a)[1] - mid(b)[1]
    assert abs(dx) != abs(dy)
    return ("left of", "right of")[dx > 0] if abs(dx) > abs(dy) else ("above", "below")[dy > 0]


def meeting(a: list[int], b: list[int]) -> str:
    gap_x, gap_y = max(a[0] - b[2], b[0] - a[2]), max(a[1] - b[3], b[1] - a[3])
    if max(gap_x, gap_y) < 0:
        return "overlapping"
    return "touching" if max(gap_x, gap_y) == 0 and min(gap_x, gap_y) < 0 else "apart from"


def recompute(question: str, options: list[str], objects: list[dict], size: tuple[int, int], grid: int) -> str:
    """The answer as text, from the whole scene's boxes."""
    if m := re.fullmatch(r"Where, mainly, is the (.+) with respect to the (.+)\?", question):
        (a,), (b,) = named(objects, m[1]), named(objects, m[2])
        return where(a, b)
    if m := re.fullmatch(r"Is the (\w+ \w+) .*(?:overlapping|touching|apart from) the (\w+ \w+)\?", question):
        (a,), (b,) = named(objects, m[1]), named(objects, m[2])
        return meeting(a, b)
    if m := re.fullmatch(
        r"Which (?:is|of these is the) (larger|largest|smaller|smallest)(?:, the .+ or the .+)?\?", question
    ):
        area = {name: math.prod((b[2] - b[0], b[3] - b[1])) for name in options for b in named(objects, name)}
        assert len(area) == len(options) and len(set(area.values())) > 1
        return (max if m[1].startswith("larg") else min)(area, key=area.get)
    if m := re.fullmatch(r"How many (.+) are there\?", question):
        words = [{"crosses": "cross"}.get(w, w.removesuffix("s")) for w in m[1].split() if w != "shapes"]
        return str(sum(all(w in o["id"].split(".")[0].split("_") for w in words) for o in objects))
    if m := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
        return "yes" if named(objects, m[1]) else "no"
    m = re.fullmatch(r"In which part of the image is the (.+)\?", question)
    (box,) = named(objects, m[1])
    x, y = mid(box)
    if grid == 2:
        return f"{'bottom' if 2 * y >= size[1] else 'top'} {'right' if 2 * x >= size[0] else 'left'}"
    row, column = ("top", "middle", "bottom")[3 * y // size[1]], ("left", "center", "right")[3 * x // size[0]]
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


@pytest.mark.parametrize("level", list(LEVELS))
def test_every_answer_follows_from_the_boxes(level):
    knobs = resolve_knobs(level)
    seen = set()
    for row in scene_rows(400, seed=3, level=level, split="val"):
        scene = draw_scene(row["meta"]["seed"], knobs)
        text = row["options"]["ABCD".index(row["gold"])]
        assert text == recompute(row["question"], row["options"], scene.objects, row["size"], knobs["grid"]), row["id"]
        seen.add(row["meta"]["task"])
    assert len({row_task for row_task in seen}) >= 5
    if knobs["contact"]:
        assert {"contact", "smallest", "count_colour", "count_shape"} <= seen


@pytest.mark.parametrize("level", list(LEVELS))
def test_gold_scene_holds_what_the_question_is_about(level):
    for row in scene_rows(200, seed=5, level=level):
        scene = draw_scene(row["meta"]["seed"], row["meta"]["knobs"])
        objects, triples = row["scene"]["objects"], row["scene"]["relationships"]
        assert all(o in scene.objects for o in objects) and objects
        names = {o["id"].split(".")[0].replace("_", " ") for o in objects}
        if row["category"] == "relation":
            assert triples == [dict(subject=objects[0]["id"], predicate=row["options"]["ABCD".index(row["gold"])],
                                    object=objects[1]["id"])]  # fmt: skip
            assert all(name in row["question"] for name in names) and len(objects) == 2
        else:
            assert triples == []
        if row["category"] == "count":
            assert len(objects) == int(row["options"]["ABCD".index(row["gold"])])
        if row["category"] == "size":
            assert names == set(row["options"])
        if row["category"] == "instance_location":
            assert len(objects) == 1 and names.pop() in row["question"]
        if row["category"] == "existence":  # all of the asked shape, so that the list alone decides
            shape = row["question"].rstrip("?").split()[-1]
            assert objects == [o for o in scene.objects if f"_{shape}." in o["id"]]


@pytest.mark.parametrize("level", list(LEVELS))
def test_relations_of_a_scene_are_those_of_its_boxes(level):
    knobs = resolve_knobs(level)
    for seed in range(60):
        scene = draw_scene(seed, knobs)
        boxes = {o["id"]: o["bbox"] for o in scene.objects}
        for t in scene.relations:
            a, b = boxes[t["subject"]], boxes[t["object"]]
            assert t["predicate"] in (where(a, b), meeting(a, b))
        listed = {
            (t["subject"], t["object"])
            for t in scene.relations
            if t["predicate"] in ("left of", "right of", "above", "below")
        }
        for a in boxes:
            for b in boxes:
                (ax, ay), (bx, by) = mid(boxes[a]), mid(boxes[b])
                clear = abs(abs(ax - bx) - abs(ay - by)) >= knobs["margin"]
                assert ((a, b) in listed) == (a != b and clear)


def test_questions_keep_their_margins():
    for row in scene_rows(600, seed=9):
        boxes = [o["bbox"] for o in row["scene"]["objects"]]
        if row["category"] == "relation":
            (ax, ay), (bx, by) = mid(boxes[0]), mid(boxes[1])
            assert abs(abs(ax - bx) - abs(ay - by)) >= 6
        if row["category"] == "size":
            assert abs((boxes[0][2] - boxes[0][0]) - (boxes[1][2] - boxes[1][0])) >= 4
        if row["category"] == "instance_location":
            assert all(abs(c - 56) >= 5 for c in mid(boxes[0]))


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_touch_all_four_sides_of_their_box(shape):
    for side in range(4, 64):
        drawn = mask(shape, side)
        assert drawn.shape == (side, side)
        assert drawn[0].any() and drawn[-1].any() and drawn[:, 0].any() and drawn[:, -1].any()
    assert len({mask(s, 21).tobytes() for s in SHAPES}) == len(SHAPES)


@pytest.mark.parametrize("level", list(LEVELS))
def test_boxes_are_the_tight_boxes_of_the_visible_pixels(level):
    """Without noise a pixel tells its colour: inside its box, an object's colour reaches all four sides, also where
    another object overlaps it; outside all boxes of a colour there is none of it."""
    knobs = resolve_knobs(level, {"noise": 0, "tint": 0, "texture": 0})
    overlaps = 0
    for seed in range(150):
        scene = draw_scene(seed, knobs)
        for colour in {o["id"].split("_")[0] for o in scene.objects}:
            found = (scene.image == np.array(COLOURS[colour], dtype=np.uint8)).all(-1)
            for o in scene.objects:
                if o["id"].startswith(colour + "_"):
                    x1, y1, x2, y2 = o["bbox"]
                    inside = found[y1:y2, x1:x2]
                    assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            for x1, y1, x2, y2 in (o["bbox"] for o in scene.objects if o["id"].startswith(colour + "_")):
                found[y1:y2, x1:x2] = False
            assert not found.any()
        boxes = [o["bbox"] for o in scene.objects]
        overlaps += any(meeting(a, b) == "overlapping" for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(0 <= b[0] < b[2] <= knobs["width"] and 0 <= b[1] < b[3] <= knobs["height"] for b in boxes)
    assert (overlaps > 10) == (knobs["overlap"] > 0)


def test_asked_contacts_are_true_of_the_pixels_too():
    knobs = resolve_knobs("hard", {"contact": 100, "mix": {"relation": 1}, "noise": 0, "tint": 0, "texture": 0})
    seen = Counter()
    for seed in range(150):
        scene = draw_scene(seed, knobs)
        a, b = scene.gold_scene["objects"]
        layers = np.zeros((2, knobs["height"], knobs["width"]), dtype=bool)
        for layer, o in zip(layers, (a, b), strict=True):
            x1, y1, x2, y2 = o["bbox"]
            layer[y1:y2, x1:x2] = mask(o["id"].split(".")[0].split("_")[1], x2 - x1)
        crossing = (layers[0] & layers[1]).any()
        grown = layers[0].copy()
        grown[1:] |= layers[0][:-1]
        grown[:-1] |= layers[0][1:]
        grown[:, 1:] |= layers[0][:, :-1]
        grown[:, :-1] |= layers[0][:, 1:]
        near = (grown & layers[1]).any()
        assert (crossing, near) == {
            "overlapping": (True, True),
            "touching": (False, True),
            "apart from": (False, False),
        }[scene.plan.gold]
        seen[scene.plan.gold] += 1
    assert len(seen) == 3 and min(seen.values()) > 20


# ---- determinism -----------------------------------------------------------------------------------------------------


def fingerprint(level: str, seed: int) -> str:
    scene = draw_scene(seed, resolve_knobs(level))
    text = json.dumps(
        [scene.objects, scene.relations, scene.gold_scene, scene.plan.question, scene.plan.options, scene.plan.gold]
    )
    return hashlib.sha256(scene.image.tobytes() + text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(("level", "seed"), list(GOLDEN))
def test_one_seed_one_scene_on_every_machine(level, seed):
    assert fingerprint(level, seed) == GOLDEN[level, seed]


def test_rows_do_not_depend_on_how_they_are_asked_for():
    rows = scene_rows(6, seed=2)
    again = scene_rows(3, seed=2, start=3)
    alone = [scene_row(row["meta"]["seed"]) for row in rows]
    for a, b in [*zip(rows, alone, strict=True), *zip(rows[3:], again, strict=True)]:
        assert a["images"][0].tobytes() == b["images"][0].tobytes()
        assert {k: v for k, v in a.items() if k != "images"} == {k: v for k, v in b.items() if k != "images"}
    assert rows[0]["meta"]["knobs"] == LEVELS["demo"] and json.dumps(rows[0]["meta"])


def test_train_and_val_share_no_scene(demo_rows):
    val = scene_rows(1000, split="val")
    assert not {row["meta"]["seed"] for row in demo_rows} & {row["meta"]["seed"] for row in val}
    assert not {row["images"][0] for row in demo_rows} & {row["images"][0].tobytes() for row in val}
    assert len({row["images"][0] for row in demo_rows}) == len(demo_rows)


# ---- a blind guess is at chance --------------------------------------------------------------------------------------


def test_letters_are_balanced(demo_rows):
    """Chi-square over 5,000 rows, among the questions with equally many options, together and by category."""
    groups = defaultdict(list)
    for row in demo_rows:
        groups[len(row["options"]), "all"].append(row["gold"])
        groups[len(row["options"]), row["category"]].append(row["gold"])
    for (n, _), letters in groups.items():
        counts = [letters.count(letter) for letter in "ABCD"[:n]]
        assert sum(counts) == len(letters) and chisquare(counts).pvalue > 0.001, (n, counts)


def test_every_category_comes_as_often_as_its_weight(demo_rows):
    counts = Counter(row["category"] for row in demo_rows)
    mix = LEVELS["demo"]["mix"]
    assert (
        chisquare([counts[c] for c in mix], [mix[c] * len(demo_rows) / sum(mix.values()) for c in mix]).pvalue > 0.001
    )


@pytest.mark.parametrize("level", ["demo", "hard"])
def test_no_answer_comes_more_often_than_the_other_options(level, demo_rows):
    """Given what is offered, each option is right equally often: yes and no, the counts, the directions, the parts."""
    rows = demo_rows if level == "demo" else scene_rows(1200, level="hard", seed=1)
    offered, right = Counter(), Counter()
    for row in rows:
        if row["category"] != "size":
            for option in row["options"]:
                offered[row["category"], option] += 1 / len(row["options"])
            right[row["category"], row["options"]["ABCD".index(row["gold"])]] += 1
    for category in {c for c, _ in offered}:
        keys = [key for key in offered if key[0] == category]
        assert chisquare([right[k] for k in keys], [offered[k] for k in keys]).pvalue > 0.001, category


def blind_accuracy(rows: list[dict]) -> tuple[float, float, float]:
    """A learner that reads question and options but sees no picture: naive Bayes on (word, option, place), fitted on
    the first half, tried on the second -> (accuracy, chance, standard error of chance)."""
    half = len(rows) // 2
    good, all_ = Counter(), Counter()

    def features(row, i):
        words = re.findall(r"\w+", row["question"])
        rank = sorted(row["options"]).index(row["options"][i])
        place = row["question"].find(row["options"][i])
        return [*((w, row["options"][i]) for w in words), (row["category"], "letter", i, len(row["options"])),
                (row["category"], "rank", rank, len(row["options"])), (row["category"], "named", place)]  # fmt: skip

    for row in rows[:half]:
        for i in range(len(row["options"])):
            for f in features(row, i):
                all_[f] += 1
                good[f] += "ABCD"[i] == row["gold"]
    hits, chance = 0, []
    for row in rows[half:]:
        n = len(row["options"])
        score = [sum(math.log((good[f] + 1) / (all_[f] + n)) for f in features(row, i)) for i in range(n)]
        hits += "ABCD"[score.index(max(score))] == row["gold"]
        chance.append(1 / n)
    p = sum(chance) / half
    return hits / half, p, math.sqrt(sum(c * (1 - c) for c in chance)) / half


def test_a_blind_learner_is_at_chance(demo_rows):
    by_category = defaultdict(list)
    for row in demo_rows:
        by_category[row["category"]].append(row)
    for category, rows in by_category.items():
        rows = rows[: len(rows) // 2 * 2]
        accuracy, chance, error = blind_accuracy(rows)
        assert abs(accuracy - chance) < 3.5 * error, (category, accuracy, chance)
    leaky = [row for row in by_category["count"] if row["options"]["ABCD".index(row["gold"])] in "34"]
    accuracy, chance, error = blind_accuracy(leaky[: len(leaky) // 2 * 2])
    assert accuracy > chance + 3.5 * error  # the learner does find a leak where there is one


# ---- rows, knobs, responses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", list(LEVELS))
def test_rows_have_the_shape_of_a_row(level):
    for row in scene_rows(150, seed=7, level=level):
        keys = "id source category images question options gold kind size scene map problem style meta"
        assert list(row) == keys.split()
        assert 2 <= len(row["options"]) <= 4 and len(set(row["options"])) == len(row["options"])
        assert row["gold"] in "ABCD"[: len(row["options"])] and row["kind"] == "choice"
        assert row["images"][0].size == row["size"] and row["images"][0].mode == "RGB"
        assert set(row["meta"]) == {"level", "knobs", "seed", "task"}
        objects = draw_scene(row["meta"]["seed"], row["meta"]["knobs"]).objects
        ids = [o["id"] for o in objects]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z_]+\.\d+", i) for i in ids)
        if row["category"] != "count":
            assert all(i.endswith(".1") for i in ids)
            assert len(objects) in range(LEVELS[level]["objects"][0], LEVELS[level]["objects"][1] + 1)


@pytest.mark.parametrize("mode", ["upstream", "corrected"])
@pytest.mark.parametrize("level", list(LEVELS))
def test_the_gold_response_earns_the_full_reward(level, mode):
    for row in scene_rows(60, seed=11, level=level):
        parts = spatialthinker_reward(response_text(row), solution_text(row), row["size"], mode=mode)
        assert parts["total"] == pytest.approx(1, abs=1e-5), (row["id"], parts)


@pytest.mark.parametrize("mode", ["upstream", "corrected"])
def test_a_careless_teacher_loses_the_answer_and_nothing_else(mode):
    for row in scene_rows(40, seed=12):
        wrong = "ABCD"[("ABCD".index(row["gold"]) + 1) % len(row["options"])]
        text, gold = response_text(row, letter=wrong), response_text(row)
        parts = spatialthinker_reward(text, solution_text(row), row["size"], mode=mode)
        assert parts["accuracy"] == 0 and parts["format"] == 1 and parts["count"] == pytest.approx(1)
        assert text.split("<think>")[0] == gold.split("<think>")[0]
        assert text.split("; so ")[0] == gold.split("; so ")[0]
        said = row["options"]["ABCD".index(wrong)]
        assert text.endswith(f"; so {said}({wrong}) </think>\n<answer>({wrong}) {said}</answer>")


def test_the_derivation_agrees_with_the_boxes():
    told = {
        "direction": r"x (\d+) ([<>=]) (\d+) by (\d+); y (\d+) ([<>=]) (\d+) by (\d+)",
        "contact": r"x (?:shared|gap) \d+; y (?:shared|gap) \d+",
    }
    for row in scene_rows(300, seed=13):
        think = re.search(r"<think>(.*); so (.+)\(([A-D])\) </think>", response_text(row))
        assert think[3] == row["gold"] and think[2] == row["options"]["ABCD".index(row["gold"])]
        if row["meta"]["task"] == "direction":
            m = re.fullmatch(told["direction"], think[1])
            ax, bx, by_x, ay, by, by_y = (int(m[i]) for i in (1, 3, 4, 5, 7, 8))
            assert [(ax, ay), (bx, by)] == [mid(o["bbox"]) for o in row["scene"]["objects"]]
            assert (by_x, by_y) == (abs(ax - bx), abs(ay - by))
            for left, sign, right in ((ax, m[2], bx), (ay, m[6], by)):
                assert {"<": left < right, ">": left > right, "=": left == right}[sign]
    with pytest.raises(ValueError, match="no option 'D'"):
        response_text(next(r for r in scene_rows(50) if len(r["options"]) == 2), letter="D")
    assert "<observe>o</observe>" in response_text(row, observe="o") and "<think>t</think>" in response_text(
        row, think="t"
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries({
        "side": st.tuples(st.integers(5, 12), st.integers(18, 30)).map(list),
        "objects": st.tuples(st.integers(1, 3), st.just(5)).map(list),
        "shapes": st.lists(st.sampled_from(SHAPES), min_size=3, max_size=6, unique=True),
        "colours": st.lists(st.sampled_from(list(COLOURS)), min_size=4, max_size=10, unique=True),
        "margin": st.integers(1, 4), "size_margin": st.integers(1, 5), "grid": st.sampled_from([2, 3]),
        "overlap": st.sampled_from([20, 30, 60]), "contact": st.sampled_from([0, 50]), "noise": st.integers(0, 60),
        "width": st.integers(100, 200), "height": st.integers(100, 200),
    }),
    st.integers(0, 2**70),
)  # fmt: skip
def test_other_knobs_give_right_answers_too(knobs, seed):
    try:
        row = scene_row(seed, level="medium", knobs=knobs)
    except ValueError as error:  # some knobs cannot work, and say so; hypothesis fails the test if most do
        assume("no room" not in str(error) and "no clear winner" not in str(error))
        raise
    scene = draw_scene(seed, row["meta"]["knobs"])
    text = row["options"]["ABCD".index(row["gold"])]
    assert text == recompute(row["question"], row["options"], scene.objects, row["size"], knobs["grid"])


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(level="extreme"), "unknown level 'extreme'; known: easy, demo, medium, hard"),
    (dict(knobs={"sides": [1, 2]}), "unknown knob 'sides'; known: width"),
    (dict(knobs={"side": [30, 20]}), r"knob side=\[30, 20\] cannot work"),
    (dict(knobs={"shapes": ["heart", "circle"]}), "knob shapes="),
    (dict(knobs={"mix": {"depth": 1}}), "names no known category"),
    (dict(knobs={"count_max": 9}), "knob count_max=9 cannot work"),
    (dict(knobs={"contact": 10}), "knob overlap=0 cannot work"),
    (dict(level="hard", knobs={"margin": 30}), "knob overlap=25 cannot work"),
    (dict(knobs={"side": [80, 90], "mix": {"relation": 1}}), "knobs leave no room"),
    (dict(knobs={"side": [20, 22], "mix": {"size": 1}}), "no clear winner"),
])  # fmt: skip
def test_knobs_that_cannot_work_are_told_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        scene_row(0, **arguments)
    assert "\n" not in str(error.value)


# ---- command line, files, speed --------------------------------------------------------------------------------------


def test_command_writes_stvqa_files_that_load_again(tmp_path):
    from data.dataset import load_rows

    command = [sys.executable, "-m", "data.scenes", "--out", str(tmp_path), "--n", "300", "--val", "5", "--seed", "4",
               "--show", str(tmp_path / "sheet.png")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "sheet.png", "train-00000-of-00001.parquet", "val-00000-of-00001.parquet"]  # fmt: skip
    for split, n in (("train", 300), ("val", 5)):
        loaded, drawn = load_rows(f"{tmp_path}@{split}"), scene_rows(n, seed=4, split=split)
        assert len(loaded) == n
        for a, b in zip(loaded, drawn, strict=True):
            assert all(a[key] == b[key] for key in ("category", "question", "options", "gold", "kind", "scene"))
            assert tuple(a["size"]) == b["size"]


def test_command_tells_bad_input_in_one_line(tmp_path):
    command = [sys.executable, "-m", "data.scenes", "--out", str(tmp_path), "--level", "extreme"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: unknown level") and done.stderr.count("\n") == 1


def test_at_least_300_scenes_a_second():
    """The issue's bound, at 112 pixels. Processor time, so that a neighbour on the machine does not count; about 2,300
    are usual."""
    rates = []
    for attempt in range(3):
        begin = time.process_time()
        scene_rows(100, start=attempt * 100)
        rates.append(100 / (time.process_time() - begin))
    assert max(rates) >= 300
