"""rewards.py against the oracle vectors, the mends of corrected mode one by one, and tables of odd answers.

tests/vectors/spatialthinker.jsonl was computed with the published code; `meta` says what was stubbed. Tests on texts
that real models wrote run where shared/realdata is at hand."""

import ast
import gzip
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import rewards as R

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "realdata" / "model_outputs"
VECTORS = [json.loads(line) for line in (ROOT / "tests/vectors/spatialthinker.jsonl").read_text().splitlines()]

# ---------------------------------------------------------------------------------------------------------------------
# Upstream functions that the product does not need, composed of its parts: if these agree, so do the parts.


def box_l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def giou(a, b):
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return (R.iou(a, b) - (hull - union) / hull + 1) / 2 if hull else R.iou(a, b)


def match(gold_objects, objects, similarity):
    sides = [([R._name(x["id"]) for x in side], [x["bbox"] for x in side]) for side in (objects, gold_objects)]
    return R.match_objects(*sides[0], *sides[1], similarity=similarity)


def match_triplets(gold_relations, relations, similarity):
    def alike(a, b):
        parts = (("subject", 0.3), ("object", 0.3), ("predicate", 0.4))
        return sum(share * similarity(R._name(a[key]), R._name(b[key])) for key, share in parts)

    table = np.array([[alike(r, g) for g in gold_relations] for r in relations]).reshape(
        len(relations), len(gold_relations)
    )
    pairs = [(row, column) for column, row in enumerate(R.assign(1 - table)) if row is not None]
    return [
        {
            "groundtruth": gold_relations[c],
            "prediction": relations[r],
            "cost": 1 - table[r, c],
            "similarity": table[r, c],
        }
        for r, c in sorted(pairs)
    ]


def relation_score(gold_relations, relations, similarity):
    found = [pair["similarity"] for pair in match_triplets(gold_relations, relations, similarity)]
    return sum(found) / len(gold_relations) if gold_relations else 1.0


def relaxed_spatial_reward(scene, gold_scene, w, h, threshold, rel_gating, similarity):
    assert threshold == 0
    if not (isinstance(scene, dict) and R.is_valid_scene(scene)):
        return 0.0
    gold = R._read_gold(f"<scene>{json.dumps(gold_scene)}</scene>")
    if rel_gating and gold.relations and not match_triplets(gold.relations, scene["relationships"], similarity):
        return 0.0
    return R.spatial_score(scene, gold, (w, h), corrected=False, similarity=similarity)


def spatial_reward(scene, gold_scene, w, h, similarity):
    if not (isinstance(scene, dict) and R.is_valid_scene(scene)):
        return [0.0, 0.0]
    scaled = []
    for side in (gold_scene, scene):
        boxes = R._boxes(side["objects"], (w, h))
        scaled.append([{"id": x["id"], "bbox": box} for x, box in zip(side["objects"], boxes)])
    relations, gold_relations = scene.get("relationships", []), gold_scene["relationships"]
    object_score = float(not scaled[1])
    if scaled[0]:
        rows = [pair and scaled[1][pair[0]] for pair in match(*scaled, similarity)]
        pairs = [(g, x) for g, x in zip(scaled[0], rows) if x]
        near = [(R.iou(g["bbox"], x["bbox"]) + 5 * math.exp(-box_l1(g["bbox"], x["bbox"]))) / 6 for g, x in pairs]
        alike = [similarity(R._name(g["id"]), R._name(x["id"])) for g, x in pairs]
        object_score = 0.5 * (sum(near) + sum(alike)) / len(scaled[0])
    empty = float(not relations)
    return [object_score, relation_score(gold_relations, relations, similarity) if gold_relations else empty]


# ---------------------------------------------------------------------------------------------------------------------
# One checker for each upstream function: (input, similarity) -> what the vector's `expected` must equal


def named(result, **names):
    return {names.get(key, key): value for key, value in result.items()}


def scored(i, sim):
    result = R.spatialthinker_reward(
        i["predict_str"], i["ground_truth_str"], R.extract_size(i["problem"]), similarity=sim
    )
    return named(result, total="overall", spatial="spatial_score")


def vanilla(i, scene):
    return named(R.vanilla_reward(i["predict_str"], i["ground_truth"], scene=scene), total="overall")


CHECKS = {
    "spatial_sgg_compute_score": scored,
    "format_reward": lambda i, sim: R.format_score(i["text"], R.extract_scene(i["text"])),
    "acc_reward": lambda i, sim: float(
        R.extract_answer(f"<answer>{i['pred']}</answer>").lower()
        == R.extract_answer(f"<answer>{i['gt']}</answer>").lower()
    ),
    "count_reward": lambda i, sim: R.count_score(i["pred_scene"], i["gt_scene"]),
    "extract_answer": lambda i, sim: R.extract_answer(i["text"]),
    "extract_scene": lambda i, sim: R.extract_scene(i["text"]),
    "extract_image_size": lambda i, sim: (lambda size: size and list(size))(R.extract_size(i["problem"])),
    "is_valid_id_format": lambda i, sim: R.is_valid_id(i["s"]),
    "is_valid_object": lambda i, sim: R.is_valid_object(i["obj"]),
    "is_valid_relation": lambda i, sim: R.is_valid_relation(i["rel"]),
    "compute_iou": lambda i, sim: R.iou(i["boxA"], i["boxB"]),
    "compute_giou": lambda i, sim: giou(i["boxA"], i["boxB"]),
    "compute_ciou": lambda i, sim: R.ciou(i["boxA"], i["boxB"]),
    "box_L1": lambda i, sim: box_l1(i["a"], i["b"]),
    "refine_node_edge": lambda i, sim: R.clean_label(i["label"]),
    "bi_match": lambda i, sim: [pair and pair[0] for pair in match(i["gt_objs"], i["pr_objs"], sim)],
    "compute_obj_score": lambda i, sim: (
        sum(pair[1] for pair in match(i["gt_objs"], i["pr_objs"], sim) if pair) / len(i["gt_objs"])
        if i["gt_objs"]
        else 1.0
    ),
    "bi_match_triplets": lambda i, sim: match_triplets(i["gt_rels"], i["pred_rels"], sim),
    "compute_rel_score": lambda i, sim: relation_score(i["gt_rels"], i["pr_rels"], sim),
    "relaxed_spatial_reward": lambda i, sim: relaxed_spatial_reward(
        *(i[key] for key in ("pred_scene", "gt_scene", "w", "h", "threshold", "rel_gating")), sim
    ),
    "spatial_reward": lambda i, sim: spatial_reward(i["pred_scene"], i["gt_scene"], i["w"], i["h"], sim),
    "r1v_compute_score": lambda i, sim: vanilla(i, False),
    "r1v_scene_compute_score": lambda i, sim: vanilla(i, True),
}
ELSEWHERE = {
    "math_compute_score": "the fork's reward for mathematics (2.5), which SpatialThinker does not use: left out",
    "evals.grade_sample": "test_evaluation_vectors", "evals.process_response": "test_evaluation_vectors",
    "evals.extract_answer": "test_evaluation_vectors",
    "evals.format_instruction": "data/prompts.py", "evals.build_instruction": "data/prompts.py",
    "loader.process_image_size": "data/pictures.py", "loader.build_messages": "data/prompts.py",
    "algo.grpo_advantage": "train_grpo.py", "algo.compute_kl": "train_grpo.py", "algo.policy_loss": "train_grpo.py",
    "algo.response_mask": "train_grpo.py", "algo.lr_multiplier": "optim.py",
    **{f"data_gen.{name}": "data/generate_stvqa.py, a later issue" for name in (
        "allocations", "compute_data_stats", "extract_json_from_output", "gpt4o_letter", "map_objects",
        "map_relationships", "shuffle_options", "update_answer_column", "validate_row")},
}  # fmt: skip
# Where upstream's answer rests on sympy's algebra and ours differs (design section 4): none of these vectors.
ALGEBRA: set[str] = set()


def blank(a, b):
    return float(a.split() == b.split())


def similarity_of(vector):
    """The stub the vector was computed with: blank, or its table (1 if equal, 0 if absent)."""
    table = vector["input"].get("similarity_table")
    if table is None:
        return blank
    return lambda a, b: 1.0 if a == b else table.get(f"{a}||{b}", table.get(f"{b}||{a}", 0.0))


def assert_equal(found, expected, where):
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), (where, found, expected)
        for key in expected:
            assert_equal(found[key], expected[key], f"{where} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), (where, found, expected)
        for a, b in zip(found, expected):
            assert_equal(a, b, where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-9), (where, found, expected)
    else:
        assert found == expected, (where, found, expected)


@pytest.mark.parametrize("function", CHECKS)
def test_vectors(function):
    vectors = [v for v in VECTORS if v["function"] == function and v["id"] not in ALGEBRA]
    assert vectors
    for vector in vectors:
        found = CHECKS[function](vector["input"], similarity_of(vector))
        if isinstance(vector["expected"], dict) and "error" in vector["expected"]:  # 2.8.1: the uncomputable part is 0
            assert found is None or found["spatial_score"] == 0.0, vector["id"]
            assert found is None or all(math.isfinite(x) for x in found.values()), vector["id"]
        else:
            assert_equal(found, vector["expected"], vector["id"])


def test_invariant_vectors_hold_for_the_default_similarity():
    vectors = [
        v for v in VECTORS if v["function"] == "spatial_sgg_compute_score" and v["meta"].get("similarity_invariant")
    ]
    vectors = [v for v in vectors if "error" not in v["expected"]]
    assert len(vectors) > 70
    for vector in vectors:
        assert_equal(scored(vector["input"], R.lexical), vector["expected"], vector["id"])


def test_every_function_of_the_vector_file_is_covered_or_named():
    functions = {vector["function"] for vector in VECTORS}
    assert set(CHECKS) | set(ELSEWHERE) >= functions and not set(CHECKS) & set(ELSEWHERE)
    assert set(CHECKS) <= functions


# There upstream's verdict is a defect of 5.4: the fall-back on A (no. 2), the bracketed MMVP label (no. 4), the
# number with a letter, the word as gold (no. 2). Ours is what a reader would say.
DEFECTS = {
    **{f"evals.grade_sample-{number}": 1 for number in ("013", "022", "038", "045", "060")},
    "evals.grade_sample-025": 0,
    "evals.extract_answer-006": True,
    "evals.extract_answer-012": True,
}


def graded(i):
    """A benchmark sample as a row, then grade()."""
    gold, options = i["response"].strip(), i["choices"] or []
    if i["dataset"] == "hallusionbench":
        gold, options = "BA"[int(gold)], ["Yes", "No"]
    kind = "choice" if options or len(gold.strip("()")) == 1 and gold.strip("()").isalpha() else "text"
    row = {"id": "x", "kind": "number" if gold.isdigit() else kind, "options": options, "gold": gold}
    return int(R.grade(row, i["model_output"])["correct"])


def test_evaluation_vectors():
    for vector in VECTORS:
        name, i = vector["function"], vector["input"]
        if name == "evals.grade_sample":
            want = DEFECTS.get(vector["id"], vector["expected"]["correct"])
            assert graded(i) == want, vector["id"]
            assert vector["id"] not in DEFECTS or vector["expected"]["correct"] != want, "no defect after all"
        if name == "evals.extract_answer":
            assert (
                R.grade_choice(i["pred_answer"], [], i["correct_answer"]) == DEFECTS[vector["id"]] != vector["expected"]
            )
        if name == "evals.process_response":  # what is no letter in the end is None here, the response itself upstream
            letter = R.extract_choice(i["response"], i["choices"] or [])
            assert letter == (vector["expected"] if vector["expected"] in "AB" else None), vector["id"]


# ---------------------------------------------------------------------------------------------------------------------
# Corrected mode: the mends, one test each

OBJECTS = [{"id": "man.1", "bbox": [40, 60, 200, 300]}, {"id": "bike.1", "bbox": [220, 100, 400, 330]}]
RELATIONS = [{"subject": "man.1", "predicate": "left of", "object": "bike.1"}]


def response(objects=OBJECTS, relations=RELATIONS, answer="(B) left of"):
    scene = json.dumps({"objects": objects, "relationships": relations})
    return f"<observe>o</observe>\n<scene>{scene}</scene>\n<think>t</think>\n<answer>{answer}</answer>"


def gold_text(objects=OBJECTS, relations=RELATIONS):
    row = {
        "id": "r",
        "options": ["right of", "left of"],
        "gold": "B",
        "scene": {"objects": objects, "relationships": relations},
    }
    return R.solution_text(row)


def corrected(text, gold=None, size=(500, 400)):
    return R.spatialthinker_reward(text, gold or gold_text(), size, mode="corrected")


def test_corrected_keeps_weights_and_gates():
    best, wrong, bad = (
        corrected(response()),
        corrected(response(answer="(A) right of")),
        corrected("<answer>(B) left of</answer>"),
    )
    assert best == pytest.approx({"total": 1.0, "format": 1.0, "count": 1.0, "accuracy": 1.0, "spatial": 1.0}, abs=1e-5)
    assert wrong == pytest.approx({"total": 0.3, "format": 1.0, "count": 1.0, "accuracy": 0.0, "spatial": 0.0})
    assert set(bad.values()) == {0.0}
    with pytest.raises(ValueError, match="unknown reward mode 'Corrected': choose one of upstream, corrected"):
        R.spatialthinker_reward("", "", (1, 1), mode="Corrected")
    with pytest.raises(ValueError, match="unknown reward mode"):
        R.vanilla_reward("", "", mode="strict")


def test_mend_boxes_ordered_and_clipped_2_8_6():
    inverted = [{"id": "man.1", "bbox": [200, 300, 40, 60]}, OBJECTS[1]]
    assert corrected(response(inverted))["spatial"] == pytest.approx(1.0, abs=1e-5)
    assert R.spatialthinker_reward(response(inverted), gold_text(), (500, 400))["spatial"] < 0.8
    edge = [{"id": "man.1", "bbox": [0, 0, 500, 400]}]
    outside = [{"id": "man.1", "bbox": [-900, -900, 10**400, 900]}]
    assert corrected(response(outside, []), gold_text(edge, []))["spatial"] == pytest.approx(1.0, abs=1e-5)


def test_mend_boxes_unreadable_coordinate_costs_its_object_only_2_8_1():
    text = response().replace("[40,", "[NaN,")
    assert R.spatialthinker_reward(text, gold_text(), (500, 400))["spatial"] == 0.0
    assert corrected(text)["spatial"] > 0.7


def test_mend_boxes_keeps_the_reward_bounded_for_glued_digits():
    glued = [{"id": "man.1", "bbox": [40, 60, 20, 300300]}, {"id": "bike.1", "bbox": [400, 330, 1, 1]}]
    assert R.spatialthinker_reward(response(glued), gold_text(), (500, 400))["spatial"] < 0.45
    assert 0.0 <= corrected(response(glued))["spatial"] <= 1.0


def test_mend_floor_random_boxes_earn_nothing_2_7_no_2():
    rng, upstream, mended = random.Random(0), [], []
    for _ in range(300):
        corners = [[rng.random() * side for side in (250, 200, 250, 200)] for _ in range(2)]
        box, guess = ([x, y, x + w, y + h] for x, y, w, h in corners)
        text, gold = response([{"id": "man.1", "bbox": guess}], []), gold_text([{"id": "man.1", "bbox": box}], [])
        upstream.append(R.spatialthinker_reward(text, gold, (500, 400))["spatial"])
        mended.append(corrected(text, gold)["spatial"])
    assert 0.35 < np.mean(upstream) < 0.5 and np.mean(mended) < 0.1 and np.median(mended) == 0.0


def test_mend_relations_content_is_rewarded_2_7_no_8():
    swapped = [{"subject": "bike.1", "predicate": "left of", "object": "man.1"}]
    upstream = [
        R.spatialthinker_reward(response(relations=x), gold_text(), (500, 400))["spatial"] for x in (RELATIONS, swapped)
    ]
    assert upstream[0] == upstream[1]
    assert corrected(response(relations=swapped))["spatial"] == pytest.approx(0.7, abs=1e-5)
    assert corrected(response(relations=RELATIONS + swapped))["spatial"] == pytest.approx(0.7 + 0.3 * 2 / 3, abs=1e-5)
    other_number = [{"subject": "man.7", "predicate": "Left_of", "object": "bike.1"}]
    assert corrected(response(relations=other_number))["spatial"] == pytest.approx(1.0, abs=1e-5)
    assert corrected(response(relations=swapped), gold_text(relations=[]))["spatial"] == pytest.approx(1.0, abs=1e-5)


def test_mend_empty_gold_2_8_2_and_2_8_3():
    nothing = response([], [])
    assert R.spatialthinker_reward(nothing, "<answer>(B) left of</answer>", (500, 400))["spatial"] == 1.0
    assert corrected(nothing, "<answer>(B) left of</answer>")["spatial"] == 0.0
    assert R.spatialthinker_reward(response(), gold_text([]), (500, 400))["spatial"] == 1.0
    assert corrected(response(), gold_text([]))["spatial"] == 0.0
    assert corrected(nothing, gold_text([], []))["spatial"] == 1.0


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("(B) left of", "(B) left of", 1), ("(b) Left  Of.", "(B) left of", 1), ("(B)left of", "(B) left of", 1),
        ("(B) left\u00a0of", "(B) left of", 1), ("B", "(B) left of", 1), ("(b)", "(B) left of", 1),
        ("B.", "(B) left of", 1),
        ("B) left of", "(B) left of", 1), ("B: left of", "(B) left of", 1), ("B left of", "(B) left of", 1),
        ("left of", "(B) left of", 1), ("**(B) left of**", "(B) left of", 1), ("a chair", "(A) chair", 1),
        ("A chair", "(B) chair", 1),
        ("(A)", "(B) left of", 0), ("(B) right of", "(B) left of", 0), ("(A) left of", "(B) left of", 0),
        ("right of", "(B) left of", 0),
        ("", "(B) left of", 0), ("", "", 0), ("(B)", "left of", 0), ("(B) left of (A) right of", "(B) left of", 0),
        ("3", "(C) 3", 1), ("(C) 3.0", "(C) 3", 1), ("three", "(C) 3", 1), ("1,000", "(C) 1000", 1),
        ("(C) 3 chairs", "(C) 3", 1),
        ("-3", "(C) 3", 0), ("(C) 4", "(C) 3", 0), ("left of left", "(B) left of", 0), ("no", "on", 0),
        ("feet", "foot", 0),
        ("left and right", "left or right", 0),
    ],
)  # fmt: skip
def test_mend_answer_letter_and_text_2_1(answer, gold, right):
    assert corrected(response(answer=answer), f"<scene>{{}}</scene><answer>{gold}</answer>")["accuracy"] == right
    text = f"<think>t</think><answer>{answer}</answer>"
    assert R.vanilla_reward(text, f"<answer>{gold}</answer>", mode="corrected")["accuracy"] == right


def test_mend_blocks_whitespace_and_line_breaks_2_3_2_4():
    text, gold = "\n<think>t</think> <answer>\n(B) left of\n</answer>\n", "<answer>(B) left of</answer>"
    assert R.vanilla_reward(text, gold) == {"total": 0.0, "format": 0.0, "accuracy": 0.0}
    assert R.vanilla_reward(text, gold, mode="corrected") == {"total": 1.0, "format": 1.0, "accuracy": 1.0}
    assert R.vanilla_reward(response() + "\n", gold, scene=True)["total"] == 0.0
    assert R.vanilla_reward(response() + "\n", gold, scene=True, mode="corrected")["total"] == 1.0
    assert R.vanilla_reward("x" + text, gold, mode="corrected") == {"total": 0.5, "format": 0.0, "accuracy": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# Parsers and upstream subtleties


@pytest.mark.parametrize("part", ["objects", "relationships"])
@pytest.mark.parametrize("value", ["null", '"x"', "{}", "1"])
def test_lists_must_be_lists_2_1(part, value):
    other = {"objects": "relationships", "relationships": "objects"}[part]
    text = f'<observe></observe><scene>{{"{part}": {value}, "{other}": []}}</scene><think></think><answer></answer>'
    assert R.format_score(text, R.extract_scene(text)) == 0.0


def test_ids_are_distinct_as_exact_strings_2_1():
    twice = [OBJECTS[0], {**OBJECTS[1], "id": "man.1"}]
    assert R.format_score(response(twice), R.extract_scene(response(twice))) == 0.0
    cased = [OBJECTS[0], {**OBJECTS[1], "id": "Man.1"}]
    assert R.format_score(response(cased), R.extract_scene(response(cased))) == 1.0


def test_a_missing_list_passes_the_format_but_counts_nothing_2_1():
    text = '<observe></observe><scene>{"x": 1}</scene><think></think><answer>(B) left of</answer>'
    assert R.spatialthinker_reward(text, gold_text(), (500, 400)) == pytest.approx(
        {"total": 0.6, "format": 1.0, "count": 0.0, "accuracy": 1.0, "spatial": 0.0})  # fmt: skip


def test_a_tag_named_in_the_reasoning_spoils_the_format_in_both_modes_2_8_5():
    text = response().replace("<think>t", "<think>I write <answer> next")
    assert [R.spatialthinker_reward(text, gold_text(), (500, 400), mode=mode)["format"] for mode in R.MODES] == [
        0.0,
        0.0,
    ]


def test_unusable_sizes_and_gold_pay_no_box_2_8_1():
    for size in (None, (0, 400), (500, 0), (math.nan, 400), (math.inf, 400), (10**400, 400)):
        for mode in R.MODES:
            assert R.spatialthinker_reward(response(), gold_text(), size, mode=mode)["spatial"] == 0.0, (size, mode)
    for box in ("[1, 2, 3]", '["1", 2, 3, 4]', "null", "[1, 2, 3, 4, 5]", "[NaN, 2, 3, 4]"):
        gold = f'<scene>{{"objects": [{{"id": "man.1", "bbox": {box}}}]}}</scene><answer>(B) left of</answer>'
        got = R.spatialthinker_reward(response(), gold, (500, 400))
        assert (got["accuracy"], got["spatial"]) == (1.0, 0.0), box


def test_boxes_that_cannot_be_compared_give_zero_2_8_1():
    for bad in ([0, 0, 1e200, 1], [0, 0, math.nan, 1], [0, -math.inf, 1, math.inf], [10**400, 0, 1, 1]):
        assert R.ciou(bad, [0, 0, 1, 1]) == R.ciou([0, 0, 1, 1], bad) == 0.0, bad
        assert math.isfinite(R.iou(bad, [0, 0, 1, 1])), bad


def test_surplus_objects_beyond_the_bound_leave_the_rest_matched():
    many = OBJECTS + [{"id": f"spam.{k}", "bbox": [1, 1, 2, 2]} for k in range(5000)]
    got = R.spatialthinker_reward(response(many), gold_text(), (500, 400))
    assert got["count"] == pytest.approx(0.3) and got["spatial"] > 0.99


def test_solution_text_round_trip_and_its_errors():
    gold = gold_text([{"id": "a</scene>b.1", "bbox": [1, 2, 3, 4]}])
    assert R.extract_scene(gold)["objects"][0]["id"] == "a</scene>b.1" and R.extract_answer(gold) == "(B) left of"
    row = {"id": "r7", "options": ["yes", "no"], "gold": "C", "scene": None}
    with pytest.raises(ValueError, match="row r7: gold 'C' is no letter from A to B: correct gold or options"):
        R.solution_text(row)
    assert R.solution_text({**row, "gold": "(b)"}) == "<answer>(B) no</answer>"
    assert R.solution_text({"id": "n", "options": [], "gold": 3, "scene": None}) == "<answer>3</answer>"


def test_similarities():
    assert R.lexical("traffic light", "traffic  light") == 1.0 and R.lexical("chairs", "chair") == pytest.approx(0.95)
    assert R.lexical("red circle", "blue circle") == pytest.approx(0.475) and R.lexical("man", "woman") == 0.0
    assert R.exact("chairs", "chair") == 0.0 and R.exact("a b", "a  b") == 1.0
    assert R.SIMILARITIES.keys() == {"lexical", "exact", "spacy"}


def test_spacy_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    R._spacy_pipeline.cache_clear()
    with pytest.raises(ImportError, match="python -m spacy download en_core_web_md"):
        R.spacy_similarity("man", "person")


def test_a_similarity_of_the_callers_own_decides_the_match():
    seen = []
    R.spatialthinker_reward(response(), gold_text(), (500, 400), similarity=lambda a, b: seen.append((a, b)) or 0.5)
    assert set(seen) == {(a, b) for a in ("man", "bike") for b in ("man", "bike")}


def test_scene_metrics():
    def metrics(text, gold):
        return R.scene_metrics(text, gold, (500, 400))

    gold = {"objects": OBJECTS, "relationships": RELATIONS}
    perfect = metrics(response(), gold)
    assert perfect == pytest.approx({"iou": 1, "object_f1": 1, "relation_f1": 1, "ciou": 1})
    half = response([{"id": "man.1", "bbox": [40, 60, 200, 180]}, {"id": "dog.1", "bbox": [220, 100, 400, 330]}], [])
    found = metrics(half, gold)
    ciou = found.pop("ciou")  # of the man alone: IoU 0.5, less the distance of centres and the other shape
    assert found == pytest.approx({"iou": 0.25, "object_f1": 0.5, "relation_f1": 0}) and 0.3 < ciou < 0.5
    far = response([{"id": "man.1", "bbox": [480, 380, 499, 399]}], [])
    assert metrics(far, gold)["iou"] == 0 and metrics(far, gold)["ciou"] < 0
    nothing = {"iou": 0.0, "object_f1": 0.0, "relation_f1": 0.0, "ciou": None}
    assert metrics("no scene", gold) == nothing
    assert metrics("<scene>{}</scene>", {}) == {**nothing, "iou": 1.0, "object_f1": 1.0, "relation_f1": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# Answer extraction

SIDES, YES_NO, COUNTS, LETTERS = (
    ["behind", "in front of", "front"],
    ["yes", "no"],
    ["1", "2", "3", "4"],
    ["B is nearer", "A is nearer"],
)


@pytest.mark.parametrize(
    "text, options, letter",
    [
        ("<answer>(B) in front of</answer>", SIDES, "B"), ("<answer>A</answer> <answer>B</answer>", SIDES, "B"),
        ("(B) in front of</answer>", SIDES, "B"), ("<answer>b</answer>", SIDES, "B"),
        ("<answer> Answer: (B)</answer>", SIDES, "B"),
        ("<answer>(B) in front of", SIDES, "B"), ("<think>(A) or (B)?</think> B", SIDES, "B"),
        ("<answer></answer>", SIDES, None),
        ("B", SIDES, "B"), ("b.", SIDES, "B"), ("(b)", SIDES, "B"), ("B)", SIDES, "B"), ("[B]", SIDES, "B"),
        ("**B**", SIDES, "B"),
        ("B. In front of.", SIDES, "B"), ("B) in front of the man", SIDES, "B"), ("b: in front of", SIDES, "B"),
        ("B\n\nbecause", SIDES, "B"),
        ("The answer is B", SIDES, "B"), ("the correct answer is:\n\n(B) in front of", SIDES, "B"),
        ("Answer: B", SIDES, "B"),
        ("**Answer:** B", SIDES, "B"), ("Final Answer: **(B)**", SIDES, "B"),
        ("The answer is A. Wait, the answer is B.", SIDES, "B"),
        (r"so \boxed{B}", SIDES, "B"), (r"$\boxed{\text{(B)}}$", SIDES, "B"),
        ("I would choose option B here", SIDES, "B"),
        ("so the man is there.\n**B**", SIDES, "B"), ("It is behind it, not really (B)", SIDES, None),
        ("Hence (B).", SIDES, "B"), ("so it must be B.", SIDES, "B"), ("The correct option: B", SIDES, "B"),
        ("It looks like (A), but it is B", SIDES, None),
        ("in front of", SIDES, "B"), ("In Front Of.", SIDES, "B"), ("The man stands in front of the bike", SIDES, "B"),
        ("The tempo is B. in front of, I say", SIDES, "B"), ("front", SIDES, "C"),
        ("A man stands there", SIDES, None), ("a man stands behind it", SIDES, "A"), ("A", SIDES, "A"),
        ("A.", SIDES, "A"),
        ("a bike", ["car", "bike"], "B"), ("A bike", ["car", "bike"], "B"), ("A bike", ["bike", "car"], "A"),
        ("The bike", ["car", "bike"], "B"),
        ("A or B", SIDES, None), ("(A) and (B)", SIDES, None), ("neither (A) nor (B) is right", SIDES, None),
        ("B/C", SIDES, None),
        ("A, B", SIDES, None), ("A, B, C", SIDES, None), ("A, B and C", SIDES, None), ("**A**, **B**", SIDES, None),
        ("A, possibly B", SIDES, None), ("A, or maybe (B)", SIDES, None), ("(A) (B) (C)", SIDES, None),
        ("(A), (B)", SIDES, None), ("A, because B is farther", SIDES, "A"), ("A, the man", SIDES, "A"),
        ("A, a man, I think", SIDES, "A"), ("A, I think", SIDES, "A"), ("B, possibly a shadow", SIDES, "B"),
        ("(A) (behind)", SIDES, "A"), ("A, E", SIDES, "A"), ("(B) A is nearer", LETTERS, "B"), ("A, B", ["C", "A, B"], "B"),
        ("(A) behind\n(B) in front of", SIDES, None), ("(A) in front of", SIDES, None), ("D", SIDES, None),
        ("(E) behind it", SIDES, None),
        ("behind or in front of", SIDES, None), ("It is not behind it", SIDES, None), ("", SIDES, None),
        ("I cannot tell", SIDES, None),
        ("Yes", YES_NO, "A"), ("No, the car is not beneath the cat.", YES_NO, "B"), ("There is no car", YES_NO, None),
        ("(B) no. The car is beside it. Yes.", YES_NO, "B"), ("<s> Yes", YES_NO, "A"), ("unknown", YES_NO, None),
        ("3", COUNTS, "C"), ("three", COUNTS, "C"), ("There are 3 chairs", COUNTS, "C"),
        ("2 men and 3 chairs", COUNTS, None), ("3.5", COUNTS, None),
        ("A is nearer", LETTERS, "B"), ("B is nearer.", LETTERS, "A"), ("A", ["B", "A"], None), ("B", ["A", "B"], "B"),
        ("left", ["Left", "left"], None), ("(B) left", ["Left", "left"], "B"), ("(B) 4", [], "B"),
        ("(a) Open", [], "A"), ("4", [], None),
    ],
)  # fmt: skip
def test_extract_choice(text, options, letter):
    assert R.extract_choice(text, options) == letter


def test_grade_number_reads_the_number_that_is_stated():
    assert R.grade_number("<answer>about 3.0 chairs</answer>", "3") and R.grade_number("three", "3")
    assert not R.grade_number("4", "3") and not R.grade_number("none that I see", "3")


def test_grade_choice_reads_gold_in_any_dress():
    assert (
        R.grade_choice("(B) no", YES_NO, "no")
        and R.grade_choice("no", YES_NO, "(b)")
        and R.grade_choice("B", YES_NO, "B")
    )
    assert not R.grade_choice("(A) yes", YES_NO, "no") and not R.grade_choice("perhaps", YES_NO, "maybe")


@pytest.mark.parametrize(
    "text, value",
    [("3", 3), ("-2.5 m", -2.5), ("1,234.5", 1234.5), ("1e3", 1000), ("2.5 meters (8 feet)", 2.5),
     ("2 rows of 3, so 6", 2), ("so 2 rows of 3 make 6", 6), (".5", 0.5),
     ("twenty-one cars", 21), ("the answer is twelve", 12), ("\u22124", -4), ("none", None), ("", None),
     ("1" * 400, None),
     ("10,20", 10), ("v1.2.3", None)],
)  # fmt: skip
def test_read_number(text, value):
    assert R.read_number(text) == value


def test_grade_dispatches_by_kind():
    row = {"id": "r", "options": YES_NO, "gold": "B", "kind": "choice"}
    assert R.grade(row, "<answer>(B) no</answer>") == {"correct": True, "answer": "B"}
    assert R.grade(row, None) == {"correct": False, "answer": None}
    row = {"id": "r", "options": [], "gold": "4", "kind": "number"}
    assert (
        R.grade(row, "<answer>(B) 4</answer>") == {"correct": True, "answer": "4"} and not R.grade(row, "5")["correct"]
    )
    assert R.grade({**row, "kind": "regression"}, "about 3") == {"correct": 0.75, "answer": "3"}
    assert R.grade({**row, "kind": "regression", "gold": "0"}, "0")["correct"] == 1.0
    assert R.grade({**row, "kind": "text", "gold": "yes"}, "Yes, it is.") == {"correct": True, "answer": "Yes, it is."}
    assert R.grade({**row, "kind": "ocr", "gold": "STOP"}, "<answer>the stop.</answer>")["correct"] is True
    with pytest.raises(ValueError, match="row r: unknown kind 'video': choose one of choice, number"):
        R.grade({**row, "kind": "video"}, "x")


@pytest.mark.parametrize(
    "a, b, same",
    [("foot", "feet", 1), ("left and right", "left or right", 1), ("on", "no", 1), ("(A) 3.0", "(A) 3", 1),
     ("x=5", "5", 1),
     ("(B)behind", "(B) behind", 1), ("(B) behind.", "(B) behind", 0), ("1/2", "2/4", 0), ("50%", "50", 1),
     ("\\frac{1}{2}", "0.5", 1),
     ("\\text{(B) behind}", "(B) behind", 1), ("(B) 1 day", "(B) 1 hour", 1), ("2*3", "6", 0), ("1,000", "1000", 1),
     ("(1,2)", "(1, 2.0)", 1),
     ("(2,1)", "(1,2)", 0), ("[1,2)", "(1,2)", 0), ("3 1/2", "3.5", 1), ("1e3", "1000", 1), ("B", "(b)", 1),
     ("B)", "B", 0),
     ("0.75", "3/4", 1), ("9^9", "9^8", 0), ("x", "y", 0), ("", "foot", 1), ("2 million", "2000000", 0)],
)  # fmt: skip
def test_grade_math_agrees_with_mathruler_2_3(a, b, same):  # every line was run through mathruler 0.1.0
    assert R.grade_math(a, b) == bool(same)


# ---------------------------------------------------------------------------------------------------------------------
# Real model outputs, where they are at hand


@pytest.mark.skipif(not (REAL / "blink").is_dir(), reason="shared/realdata is not here")
def test_extract_choice_agrees_with_the_authors_of_blink():
    total, differ = 0, []
    for file in (REAL / "blink" / "saved_outputs").glob("*/Spatial_Relation.json"):
        for item in sum(json.loads(file.read_text()).values(), []):
            total += 1
            letter, theirs = R.extract_choice(item["full_prediction"], YES_NO), item["prediction"].strip("()")
            if (letter or "Z") != theirs:
                differ.append((item["idx"], theirs, letter))
    assert total == 1430 and len(differ) <= 13  # 99.1 %
    # The rest name no option (the authors' judge inferred one), but for one 'No, there is no ...' that they left out.
    assert [x for x in differ if x[2] is not None] == [("val_Spatial_Relation_121", "Z", "B")]


@pytest.mark.skipif(not (REAL / "tempcompass").is_dir(), reason="shared/realdata is not here")
def test_grading_agrees_with_the_rule_based_verdicts_of_tempcompass():
    total = 0
    for file in (REAL / "tempcompass" / "auto_eval_results").glob("*/*.json.gz"):
        items = [q for video in json.load(gzip.open(file)).values() for aspect in video.values() for q in aspect]
        for q in (q for q in items if q["match_success"]):  # the others were judged by a language model
            if "yes_no" in file.name:
                right = R.grade_yes_no(q["video-llm-prediction"], q["gt-answer"])
            else:
                options = [re.sub(r"^[A-Z]\. ?", "", line) for line in q["question"].split("\n")[1:]]
                right = R.grade_choice(q["video-llm-prediction"], options, q["gt-answer"][0])
            assert right == bool(q["rating"]), (file.name, q)
            total += 1
    assert total > 10_000


# ---------------------------------------------------------------------------------------------------------------------
# The file on its own, and its speed


def test_runs_from_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "rewards.py", tmp_path)
    code = "import sys; sys.path.insert(0, '.'); import rewards as R; print(R.__file__, R.vanilla_reward('a', 'a'))"
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout and "{'total': 0.5, 'format': 0.0, 'accuracy': 1.0}" in run.stdout


def test_imports_only_what_the_design_allows():
    tree = ast.parse((ROOT / "rewards.py").read_text())
    top = {name.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert top <= set(sys.stdlib_module_names) | {"numpy", "scipy"}


def test_every_mend_of_the_two_lists_is_named_where_the_code_mends():
    text = (ROOT / "rewards.py").read_text()
    listing = re.compile(r"^(?:  |#   )(mend_\w+) +\w.*$", re.MULTILINE)
    listed, code = listing.findall(text), listing.sub("", text)
    assert len(set(listed)) == len(listed) == 13
    assert [name for name in listed if not re.search(rf"(?:_|# .*){name}\b", code)] == []


@pytest.mark.parametrize("mode", R.MODES)
def test_4096_completions_take_at_most_one_second_on_one_core(mode):
    """The issue's bound is one second on two cores; this is one process's CPU time, the best of three."""
    rng, labels = random.Random(0), ["man", "bike", "red_car", "tree", "dog", "table_lamp"]
    work = []
    for _ in range(512):  # prompts, of eight completions each, all right, so that nothing is skipped
        scenes = []
        for _ in range(9):
            corners = [(rng.randint(0, 500), rng.randint(0, 300)) for _ in range(rng.randint(4, 6))]
            boxes = [[x, y, x + rng.randint(10, 140), y + rng.randint(10, 180)] for x, y in corners]
            objects = [{"id": f"{rng.choice(labels)}.{k}", "bbox": box} for k, box in enumerate(boxes)]
            pairs = [rng.sample(objects, 2) for _ in range(3)]
            scenes.append(
                (objects, [{"subject": a["id"], "predicate": "left of", "object": b["id"]} for a, b in pairs])
            )
        gold = gold_text(*scenes[0])
        work += [
            (response(*scene).replace("<think>t", "<think>" + "the man is left of the bike " * 30), gold)
            for scene in scenes[1:]
        ]
    times = []
    for _ in range(3):
        start = time.process_time()
        totals = [R.spatialthinker_reward(text, gold, (640, 480), mode=mode)["total"] for text, gold in work]
        times.append(time.process_time() - start)
    assert len(totals) == 4096 and min(totals) > 0.5
    assert min(times) <= 1.0, times
