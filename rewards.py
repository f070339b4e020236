"""Rewards and graders: text in, numbers out. Copy this file into another project and it runs (numpy, scipy; rouge-score for
SpaceR's free-form answers, spaCy for the similarity of that name).

    Parsing           extract_answer, extract_scene, extract_size, solution_text: the tagged blocks of a text
    Scene graphs      is_valid_scene, format_score, count_score
    Boxes             iou, ciou
    Labels            lexical, exact, spacy_similarity: how alike two are
    Matching          match_objects: predictions to gold
    SpatialThinker    spatialthinker_reward, scene_metrics
    Vanilla           vanilla_reward; overlong_penalty and repetition_penalty, which any reward may add
    SpaceR            spacer_reward, spacer_group_terms; word_accuracy, rouge; parse_map, map_score
    Reading answers   extract_choice, read_number, plain
    Graders           grade: one row, one text, the score; mean_relative_accuracy
    Published rules   PUBLISHED: the graders of the published evaluations; grade_math

Every function is total: any text at all gives finite numbers in time linear in its length; what cannot be computed
counts 0. Section numbers such as 2.1 are those of the specification notes of SpatialThinker (arXiv 2511.07403); in the
parts about SpaceR, those of its own (arXiv 2504.01805).

mode="upstream" gives the published code's numbers; where that code raises (2.8.1), the part that it could not compute
is 0. There the spatial term is at most 1, but an inverted box can push it far below 0, as published.
mode="corrected" has the same weights and gates, every number is in [0, 1], and these defects are mended (SpaceR's are
listed in its part). The code names each where it is mended:

  mend_boxes      corners ordered, boxes clipped to the picture, unreadable coordinates 0           (2.8.1, 2.8.6)
  mend_floor      plain CIoU, negative values 0: random boxes earn about 0, not 0.4                 (2.7 no. 2, 2.8.7)
  mend_relations  spatial = 0.7 boxes + 0.3 F1 of the relation triplets, where gold has relations   (2.7 no. 8, 2.8.9)
  mend_empty      a missing gold scene pays nothing; without gold objects, none may be predicted    (2.8.2, 2.8.3)
  mend_answer     a right letter or a right text is enough, letter against text is wrong, so is an
                  empty answer; numbers are compared as numbers; no algebra on words                (2.1, 2.3)
  mend_blocks     whitespace around the response is no format error, an answer may span lines       (2.3, 2.4)

Kept on purpose: a tag name spoken inside the reasoning spoils the format (2.8.5); that also guards against stuffing.
"""

import ast
import json
import math
import operator
import re
import string
import warnings
from collections import Counter
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

MODES = ("upstream", "corrected")
TAGS = ("observe", "scene", "think", "answer")


def _is_corrected(mode: str) -> bool:
    if mode not in MODES:
        raise ValueError(f"unknown reward mode {mode!r}: choose one of {', '.join(MODES)}")
    return mode == "corrected"


# ---------------------------------------------------------------------------------------------------------------------
# Parsing, without `<a>.*?</a>`, which is quadratic on a megabyte of opening tags


def _inside(text: str, tag: str) -> str | None:
    """What stands between the first opening tag and the first closing tag after it."""
    inside, closed, _ = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    return inside if closed else None


def extract_answer(text: str) -> str:
    """The first answer block, stripped; '' without one (2.1)."""
    return (_inside(text, "answer") or "").strip()


def extract_scene(text: str) -> dict:
    """The first scene block as strict JSON; {} if there is none, it does not parse, or it is no object (2.1)."""
    try:
        scene = json.loads((_inside(text, "scene") or "").strip())
    except (ValueError, RecursionError):  # ValueError: bad JSON, or an integer of more digits than Python reads
        return {}
    return scene if isinstance(scene, dict) else {}


def extract_size(problem: str) -> tuple[int, int] | None:
    """(W, H) from the first `Image size: (W x H)` of a prompt; None where upstream raises (2.1, 2.8.1)."""
    for rest in re.findall(r"Image size: \((.*)", problem):  # of each line, what follows the first
        width, _, rest = rest.partition(" x ")
        height, closed, _ = rest.partition(")")
        if closed:
            try:
                return int(width), int(height)
            except ValueError:
                return None
    return None


def _are_blocks(text: str, tags: tuple) -> bool:
    """Whether the whole text is <a>..</a> <b>..</b> in this order with only whitespace between. One pass: if any split
    into blocks exists, the one that takes each joint as early as possible does."""
    if not text.startswith(f"<{tags[0]}>"):
        return False
    at = len(tags[0]) + 2
    for left, right in zip(tags, tags[1:]):
        joint = re.compile(rf"</{left}>\s*<{right}>").search(text, at)
        if joint is None:
            return False
        at = joint.end()
    return text.endswith(f"</{tags[-1]}>", at)


def solution_text(row: dict) -> str:
    """The tagged gold text that rewards take: `<scene>JSON</scene>`, line break, `<answer>(B) text</answer>`.

    A row without scene has no scene block. Raises ValueError for a gold letter that is not one of the options."""
    answer = str(row["gold"])
    if row["options"]:
        letter, letters = answer.strip("() ").upper(), string.ascii_uppercase[: len(row["options"])]
        if len(letter) != 1 or letter not in letters:
            last = chr(64 + len(row["options"]))
            raise ValueError(f"row {row['id']}: gold {answer!r} is no letter from A to {last}: correct gold or options")
        answer = f"({letter}) {row['options'][letters.index(letter)]}"
    scene = row.get("scene")
    block = "<scene>" + json.dumps(scene).replace("</", "<\\/") + "</scene>\n" if scene is not None else ""
    return f"{block}<answer>{answer}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# Scene graphs: {"objects": [{"id", "bbox"}], "relationships": [{"subject", "predicate", "object"}]} (1.1, 2.1)

ID = re.compile(r"[a-zA-Z_]+\.\d+")  # \d: any Unicode digit, as upstream
W_OBJECTS, W_RELATIONS = 0.7, 0.3  # in the count term; and in the corrected spatial term


def is_valid_id(value: object) -> bool:
    return isinstance(value, str) and ID.fullmatch(value) is not None


def _is_box(box: object) -> bool:
    return isinstance(box, (list, tuple)) and len(box) == 4 and set(map(type, box)) <= {int, float, bool}


def _is_gold_object(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("id"), str) and _is_box(item.get("bbox"))


def _is_gold_relation(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(k), str) for k in ("subject", "predicate", "object"))


def is_valid_object(item: object) -> bool:
    """A dict of exactly `id` and `bbox`."""
    return _is_gold_object(item) and len(item) == 2 and is_valid_id(item["id"])


def is_valid_relation(item: object) -> bool:
    """A dict with two ids and a text as predicate; more keys are fine."""
    return _is_gold_relation(item) and is_valid_id(item["subject"]) and is_valid_id(item["object"])


def is_valid_scene(scene: dict) -> bool:
    objects, relations = scene.get("objects", []), scene.get("relationships", [])
    return (bool(scene) and isinstance(objects, list) and isinstance(relations, list)
            and all(map(is_valid_object, objects)) and all(map(is_valid_relation, relations))
            and len({item["id"] for item in objects}) == len(objects))  # fmt: skip


def format_score(response: str, scene: dict) -> float:
    """1.0 if each of the four blocks is there, each opening tag occurs once, and the scene obeys the grammar."""
    blocks = all(response.count(f"<{tag}>") == 1 and _inside(response, tag) is not None for tag in TAGS)
    return float(blocks and is_valid_scene(scene))


def count_score(scene: dict, gold: dict, *, objects_share: float = W_OBJECTS) -> float:
    """How near the numbers of objects and relations are to gold's, in [0, 1]."""
    if not (isinstance(scene.get("objects"), list) and isinstance(gold.get("objects"), list)):
        return 0.0
    p, g = len(scene["objects"]), len(gold["objects"])
    by_objects = max(0.0, 1 - abs(p - g) / max(g, 1))
    p, g = (len(x) if isinstance(x, list) else 0 for x in (scene.get("relationships"), gold.get("relationships")))
    if g == 0:
        return by_objects
    return objects_share * by_objects + (1 - objects_share) * max(0.0, 1 - abs(p - g) / g)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes: x1, y1, x2, y2. Plain Python: for the five objects of a scene numpy's overhead would exceed the arithmetic.

EPS = 1e-7


def _is_size(size) -> bool:
    return size is not None and len(size) == 2 and all(0 < abs(side) < 1e300 for side in size)


def _boxes(items: list[dict], size: tuple) -> list[tuple]:
    """The boxes as shares of the picture's width and height."""
    wide, high = size
    boxes = [item["bbox"] for item in items]
    try:
        return [(x1 / wide, y1 / high, x2 / wide, y2 / high) for x1, y1, x2, y2 in boxes]
    except OverflowError:  # an integer of hundreds of digits
        return [tuple(min(max(x, -1e308), 1e308) / side for x, side in zip(box, (wide, high) * 2)) for box in boxes]


def _mend_boxes(boxes: list[tuple]) -> list[tuple]:
    clipped = [[min(max(0.0, x), 1.0) for x in box] for box in boxes]  # max(0.0, nan) is 0.0
    return [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in clipped]


def iou(a: tuple, b: tuple) -> float:
    """IoU of two boxes in one unit; 0 where the union is 0 (2.2) or it cannot be computed."""
    try:
        inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        value = inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
    except (OverflowError, ZeroDivisionError):
        return 0.0
    return value if math.isfinite(value) else 0.0


def ciou(a: tuple, b: tuple) -> float:
    """CIoU of two boxes, mapped by (x + 1) / 2 as upstream does: 1 when equal, 0.4 on average for random ones (2.1).
    At most 1; negative for far-off or inverted boxes; 0 if it cannot be computed."""
    value = _ciou(a, b)
    return value if math.isfinite(value) else 0.0


def _ciou(a: tuple, b: tuple) -> float:
    """ciou(), but nan where upstream raises (2.8.1)."""
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    try:
        inter = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
        overlap = inter / (aw * ah + bw * bh - inter + EPS)
        centre = ((ax1 + ax2 - bx1 - bx2) / 2) ** 2 + ((ay1 + ay2 - by1 - by2) / 2) ** 2
        hull = (max(ax2, bx2) - min(ax1, bx1)) ** 2 + (max(ay2, by2) - min(ay1, by1)) ** 2 + EPS
        v = 4 / math.pi**2 * (math.atan(bw / (bh + EPS)) - math.atan(aw / (ah + EPS))) ** 2
        alpha = v / (1 - overlap + v) if 1 - overlap + v else 0.0
        return (overlap - (centre / hull + alpha * v) + 1) / 2
    except (OverflowError, ZeroDivisionError):
        return math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Labels, and how alike two cleaned ones are: 1.0 for equal token sequences. A reward takes any such function.


def clean_label(label: str) -> str:
    """Lower case, underscore and hyphen as space (2.1 step 2)."""
    return label.replace("_", " ").replace("-", " ").strip().lower()


@lru_cache(maxsize=4096)
def _name(identifier: str) -> str:
    """'red_car.2' -> 'red car'."""
    return clean_label(identifier.split(".", 1)[0])


@lru_cache(maxsize=65536)
def lexical(a: str, b: str) -> float:
    """1.0 for equal words, else 0.95 of the Dice overlap of the word sets, a plural s ignored: 'chairs' and 'chair'
    0.95, 'red circle' and 'blue circle' 0.475, 'man' and 'woman' 0: near spelling is not near meaning."""
    words_a, words_b = a.split(), b.split()
    if words_a == words_b:
        return 1.0
    set_a, set_b = ({w[:-1] if len(w) > 3 and w[-1] == "s" else w for w in words} for words in (words_a, words_b))
    return 0.95 * 2 * len(set_a & set_b) / max(len(set_a) + len(set_b), 1)


def exact(a: str, b: str) -> float:
    """1.0 for equal words, else 0.0."""
    return float(a.split() == b.split())


@lru_cache(maxsize=1)
def _spacy_pipeline():
    try:
        import spacy

        return spacy.load("en_core_web_md", disable=["parser", "ner", "tagger"])
    except (ImportError, OSError) as error:
        cure = "pip install spacy, then python -m spacy download en_core_web_md, or choose --similarity lexical"
        raise ImportError(f"similarity 'spacy' needs spaCy and its model en_core_web_md: {cure}") from error


@lru_cache(maxsize=65536)
def spacy_similarity(a: str, b: str) -> float:
    """The published choice: cosine of the mean word vectors of en_core_web_md, 0 for unknown words (2.1).
    Raises ImportError with the cure if spaCy or the model is missing."""
    doc_a, doc_b = (_spacy_pipeline()(label.encode("utf-8", "replace").decode()) for label in (a, b))
    if [token.text for token in doc_a] == [token.text for token in doc_b]:
        return 1.0
    norm = float(np.linalg.norm(doc_a.vector) * np.linalg.norm(doc_b.vector))
    return float(np.dot(doc_a.vector, doc_b.vector)) / norm if norm > 0 else 0.0


SIMILARITIES = {"lexical": lexical, "exact": exact, "spacy": spacy_similarity}  # the names the command line takes

# ---------------------------------------------------------------------------------------------------------------------
# Matching

COST_LABEL, COST_BOX = 2.0, 1.0  # matching prefers the right label over the near box
PAD = 1e5  # cost of leaving a gold object without a prediction


def _first(items: list, gold: list) -> list:
    """The predictions that take part in matching. With thousands of them the count term is 0 already; without this
    bound one response could cost minutes. At most 1,000, fewer only where gold has over 50 objects (223 for 223)."""
    return items[: min(1000, max(1, 50_000 // max(len(gold), 1)))]


def assign(cost: np.ndarray) -> list[int | None]:
    """For each column of cost (P, G) the row assigned to it by the Hungarian method, or None; rows are used once."""
    P, G = cost.shape
    padded = np.vstack([cost, np.full((max(0, G - P), G), PAD)])
    matched: list[int | None] = [None] * G
    for row, column in zip(*(x.tolist() for x in linear_sum_assignment(padded))):
        if row < P:
            matched[column] = row
    return matched


def match_objects(labels, boxes, gold_labels, gold_boxes, *, similarity=lexical) -> list[tuple[int, float] | None]:
    """For each gold object its prediction's index and their mapped CIoU, or None (2.1 step 5).

    labels: cleaned; boxes: shares of the picture. Nothing is matched if any box or similarity is not finite."""
    near = [[_ciou(box, gold) for gold in gold_boxes] for box in boxes]  # P x G
    alike = [[similarity(label, gold) for gold in gold_labels] for label in labels]
    cost = COST_LABEL * (1 - np.array(alike, dtype=np.float64)) + COST_BOX * (1 - np.array(near, dtype=np.float64))
    if not np.isfinite(cost).all():
        return [None] * len(gold_labels)
    rows = assign(cost.reshape(len(labels), len(gold_labels)))
    return [None if row is None else (row, near[row][column]) for column, row in enumerate(rows)]


def _triplets(relations: list[dict]) -> list[tuple[str, str, str]]:
    return [(_name(r["subject"]), clean_label(r["predicate"]), _name(r["object"])) for r in relations]


def _f1(items: list, gold: list) -> float:
    """F1 of two multisets; 1.0 if both are empty."""
    both = sum((Counter(items) & Counter(gold)).values())
    return 2 * both / (len(items) + len(gold)) if items or gold else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# SpatialThinker's reward (2.1), and how good a scene graph is by itself

W_FORMAT, W_COUNT, W_ACCURACY, W_SPATIAL = 0.1, 0.2, 0.5, 0.2


class Gold(NamedTuple):
    answer: str
    scene: dict
    objects: list
    relations: list
    sound: bool  # False: upstream raises on it


@lru_cache(maxsize=2048)  # the G completions of a prompt share one gold text
def _read_gold(gold: str) -> Gold:
    scene = extract_scene(gold)
    objects, relations = scene.get("objects") or [], scene.get("relationships") or []
    sound = isinstance(objects, list) and isinstance(relations, list)
    sound = sound and all(map(_is_gold_object, objects)) and all(map(_is_gold_relation, relations))
    return Gold(extract_answer(gold), scene, objects, relations, sound)


def spatial_score(scene: dict, gold: Gold, size: tuple, *, corrected: bool, similarity) -> float:
    """Mean mapped CIoU over gold objects, unmatched ones 0. scene must be valid, see is_valid_scene()."""
    objects, relations = scene.get("objects", []), scene.get("relationships", [])
    if not gold.sound:
        return 0.0
    if not gold.objects and corrected:  # mend_empty
        return float(bool(gold.scene) and not objects)
    if not gold.objects:
        return float(bool(gold.relations) or not objects)
    if not objects or not _is_size(size):
        return 0.0
    objects = _first(objects, gold.objects)
    boxes, gold_boxes = _boxes(objects, size), _boxes(gold.objects, size)
    if corrected:
        boxes, gold_boxes = _mend_boxes(boxes), _mend_boxes(gold_boxes)
    labels, gold_labels = ([_name(item["id"]) for item in side] for side in (objects, gold.objects))
    found = [pair[1] for pair in match_objects(labels, boxes, gold_labels, gold_boxes, similarity=similarity) if pair]
    if corrected:  # mend_floor
        found = [min(max(2 * mapped - 1, 0.0), 1.0) for mapped in found]
    score = sum(found) / len(gold.objects)
    if corrected and gold.relations:  # mend_relations
        # Exact triplets: by the published similarity 'bike behind man' would still be worth 0.46 of 'man behind bike'.
        score = W_OBJECTS * score + W_RELATIONS * _f1(_triplets(relations), _triplets(gold.relations))
    return score


def spatialthinker_reward(
    response: str, gold: str, size: tuple, *, mode="upstream", similarity=lexical, options: tuple[str, ...] = (),
    objects_share: float = W_OBJECTS, gates: bool = True,
) -> dict[str, float]:  # fmt: skip
    """The SpatialThinker reward: 0.1 format + 0.2 count + 0.5 accuracy + 0.2 spatial.

    Format gates everything, accuracy gates spatial. gold: see solution_text(). size: (W, H) of the original picture,
    whose pixels the boxes are in. similarity: a function of two cleaned labels, see SIMILARITIES. options: the texts of
    a choice; corrected mode then grades by grade_choice(), as evaluation does. The paper's ablations: objects_share of the
    count term, the rest is for relations; gates=False: every term by itself.
    Returns total, format, count, accuracy, spatial. Raises ValueError for an unknown mode."""
    corrected = _is_corrected(mode)
    scene = extract_scene(response)
    formed = format_score(response, scene)
    if gates and not formed:
        return {"total": 0.0, "format": 0.0, "count": 0.0, "accuracy": 0.0, "spatial": 0.0}
    want, answer = _read_gold(gold), extract_answer(response)
    count = count_score(scene, want.scene, objects_share=objects_share)
    right = _is_right(response, answer, want.answer, options) if corrected else answer.lower() == want.answer.lower()
    paid = right if gates else is_valid_scene(scene)
    spatial = spatial_score(scene, want, size, corrected=corrected, similarity=similarity) if paid else 0.0
    total = W_FORMAT * formed + W_COUNT * count + W_ACCURACY * right + W_SPATIAL * spatial
    return {"total": total, "format": float(formed), "count": count, "accuracy": float(right), "spatial": spatial}


def scene_metrics(response: str, gold_scene: dict, size: tuple) -> dict[str, float | None]:
    """How good a predicted scene graph is, apart from any reward: all in [0, 1], and 1 if both scenes are empty.

    iou: mean over gold objects, each matched to at most one prediction of its label; ciou: mean plain CIoU (below 0 for
    far-off boxes) of those so matched, None without any; object_f1: of labels as multisets; relation_f1: of (subject
    label, predicate, object label). Boxes in pixels of a picture of size (W, H), mended as in corrected mode. Unreadable
    predictions are left out."""

    def readable(graph: dict, key: str, is_sound) -> list[dict]:
        return [x for x in graph[key] if is_sound(x)] if isinstance(graph.get(key), list) else []

    scene = extract_scene(response)
    objects, gold_objects = readable(scene, "objects", is_valid_object), readable(gold_scene, "objects", _is_gold_object)
    relations = readable(scene, "relationships", is_valid_relation)
    gold_relations = readable(gold_scene, "relationships", _is_gold_relation)
    labels, gold_labels = ([_name(x["id"]) for x in side] for side in (objects, gold_objects))
    overlap, right = float(not objects and not gold_objects), []
    if objects and gold_objects and _is_size(size):
        few = _first(objects, gold_objects)
        rows = list(zip(labels, _mend_boxes(_boxes(few, size))))
        columns = list(zip(gold_labels, _mend_boxes(_boxes(gold_objects, size))))
        near = np.array([[iou(a, b) if label == want else -1.0 for want, b in columns] for label, a in rows])  # (P, G)
        pairs = [(p, g) for g, p in enumerate(assign(1 - near)) if p is not None and near[p, g] >= 0]
        overlap = sum(float(near[p, g]) for p, g in pairs) / len(gold_objects)
        right = [2 * ciou(rows[p][1], columns[g][1]) - 1 for p, g in pairs]
    return {
        "iou": overlap, "object_f1": _f1(labels, gold_labels), "ciou": sum(right) / len(right) if right else None,
        "relation_f1": _f1(_triplets(relations), _triplets(gold_relations)),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Vanilla GRPO's reward (2.3) and its scene form (2.4); penalties that any reward may add


def vanilla_reward(
    response: str, gold: str, *, scene: bool = False, mode: str = "upstream", options: tuple[str, ...] = ()
) -> dict[str, float]:
    """Vanilla GRPO's reward: 0.5 accuracy + 0.5 format, without a gate (2.3); scene=True: four blocks in order, and
    nothing at all without them (2.4). options: as in spatialthinker_reward(). Upstream accuracy is grade_math() resp.
    equality of the answer blocks.
    Returns total, format, accuracy. Raises ValueError for an unknown mode."""
    corrected = _is_corrected(mode)
    blocks = response.strip() if corrected else response  # mend_blocks
    formed = _are_blocks(blocks, TAGS if scene else ("think", "answer"))
    if corrected:
        found = _inside(response, "answer")
        right = _is_right(response, response if found is None else found, extract_answer(gold) or gold, options)
    elif scene:
        right = extract_answer(response).lower() == extract_answer(gold).lower()
    else:
        right = grade_math(_one_line_answer(response), _one_line_answer(gold))
    right = right and (formed or not scene)
    return {"total": 0.5 * right + 0.5 * formed, "format": float(formed), "accuracy": float(right)}


def _one_line_answer(text: str) -> str:
    """The first answer block without a line break in it, as upstream's pattern finds it (2.3); without one, the text."""
    for rest in re.findall("<answer>(.*)", text):  # of each line, what follows its first opening tag
        inside, closed, _ = rest.partition("</answer>")
        if closed:
            return inside
    return text


def overlong_penalty(tokens: int, limit: int, buffer: int) -> float:
    """DAPO's (arXiv 2503.14476, 3.4): 0 up to limit - buffer tokens, then down in a straight line to -1 at the limit."""
    return -min(1.0, max(0.0, (tokens - (limit - buffer)) / max(1, buffer)))


def repetition_penalty(text: str, n: int = 4) -> float:
    """Minus the share of n-grams of words that stood in the text before, in [-1, 0]; 0 for a text of at most n words."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# SpaceR's reward: video questions, and a map of the room as an intermediate step. Section numbers are SpaceR's own.
#
# mode="upstream": the published training code's numbers. mode="corrected" mends these defects, and mend_blocks as above:
#
#   mend_gate       a worthless map, or one where no gold map exists, leaves a right answer its worth   (2.4, 2.6 no. 1)
#   mend_chance     the map score of a random map is 0 on average, not 0.6; so is that of a left-out category     (2.4)
#   mend_names      gold categories with capitals match                                                   (2.6 no. 7)
#   mend_number     the number that an answer states is read; targets of 0 and below work          (2.6 nos. 2 and 3)
#   mend_regression an exact answer is 1, also 0 for 0; units behind a number do no harm                  (2.6 no. 4)
#   mend_rouge      an equal text is 1, also of one word, also in Chinese                                 (2.6 no. 5)
#   mend_choice     a letter in any dress, or the option's text; no answer is wrong, whatever gold is     (2.6 no. 6)
#
# Not mended, for want of the question's unit: 150 cm for 1.5 m.

PROBLEM_TYPES = {"choice": "multiple choice", "mra": "numerical", "number": "numerical", "ocr": "OCR",
                 "text": "free-form", "regression": "regression"}  # of the kinds of a row  # fmt: skip
MAP_GATE, SHUFFLED_SHARE, LIVE = 0.5, 0.8, 0.1
TEMPORAL_BONUS, LENGTH_BONUS, LENGTHS = 0.3, 0.2, (320, 512)
MAX_TEXT = 20_000  # characters of a map or of a free-form answer that are read; 1,024 tokens have about 5,000


def spacer_reward(
    response: str, solution: str, problem_type: str, *, gold_map: dict | None = None, mode: str = "upstream",
    options: tuple[str, ...] = (),
) -> dict[str, float]:  # fmt: skip
    """SpaceR's reward of one response (2.1 to 2.4), without the terms that need its group: see spacer_group_terms().

    solution: gold between answer tags. problem_type: multiple choice, numerical, OCR, free-form or regression; others
    are worth 0. gold_map: {category: [[x, y], ...]} in cells. options: the texts of a choice, for corrected mode.
    Returns total = accuracy + format; accuracy in [0, 2], the map's worth in it; answer: accuracy without the map; map:
    the map score alone, 0 without a map; mapped: whether there is one. Raises ValueError for an unknown mode, and
    ImportError with the cure where free-form text is scored without rouge-score."""
    corrected = _is_corrected(mode)
    blocks = response.strip() if corrected else response  # mend_blocks
    formed = _are_blocks(blocks, ("think", "answer"))
    answer = _spacer_answer(response, extract_answer(solution), problem_type, options, mode=mode)
    mapped = "<map>" in response and "</map>" in response
    score = 0.0
    if mapped and gold_map is not None:
        score = map_score(parse_map(_inside(response, "map") or "", list(gold_map)), gold_map, mode=mode)
    accuracy = answer
    right = {"multiple choice": answer == 1, "numerical": answer > MAP_GATE}.get(problem_type, False)
    if mapped and right:
        without = answer if corrected else 0.0  # mend_gate
        accuracy = answer + score if score > 0 else without
    return {"total": accuracy + formed, "format": float(formed), "accuracy": accuracy, "answer": answer, "map": score,
            "mapped": float(mapped)}  # fmt: skip


def spacer_group_terms(
    accuracies: list[float], lengths: list[int], *, shuffled_accuracies: list[float] | None = None,
    length_control: bool = True,
) -> list[float]:  # fmt: skip
    """What a group's completions earn beside their own rewards (2.5), one number each.

    accuracies, lengths: `accuracy` of spacer_reward() and tokens, the end token counted. shuffled_accuracies: of the
    completions of the same prompt with its frames in random order; None for pictures or without the term. 0.3 for each
    completion above 0.1 if the mean is at least 0.8 of theirs; 0.2 for 320 to 512 tokens if two or more are above 0.1.
    In float32, as published: 0.1 itself is not above."""
    alive = np.array(accuracies, dtype=np.float32) > np.float32(LIVE)
    terms = np.zeros(len(accuracies))
    if shuffled_accuracies:
        shuffled = np.array(shuffled_accuracies, dtype=np.float32).mean()
        if np.array(accuracies, dtype=np.float32).mean() >= np.float32(SHUFFLED_SHARE) * shuffled:
            terms += TEMPORAL_BONUS * alive
    if length_control and alive.sum() >= 2:
        tokens = np.array(lengths)
        terms += LENGTH_BONUS * (alive & (tokens >= LENGTHS[0]) & (tokens <= LENGTHS[1]))
    return terms.tolist()


def _spacer_answer(response: str, gold: str, problem_type: str, options: tuple, *, mode: str) -> float:
    """The base reward by type (2.2), in [0, 1]."""
    corrected = _is_corrected(mode)
    given = _final(response).strip() if corrected else extract_answer(response)
    if problem_type == "OCR":
        return word_accuracy(given, gold)
    if problem_type == "free-form":
        return rouge(given, gold, mode=mode)
    if problem_type == "multiple choice":  # mend_choice
        return float(_is_right(response, given, gold, options) if corrected else given == gold)
    if problem_type not in ("numerical", "regression"):
        return 0.0
    if corrected:  # mend_number, mend_regression
        kind = "mra" if problem_type == "numerical" else "regression"
        return float(_number_row({"kind": kind, "gold": gold}, response)[0])
    return _upstream_number(given, gold, problem_type)


def _upstream_number(given: str, gold: str, problem_type: str) -> float:
    """0 where upstream raises."""
    try:
        if problem_type == "regression":
            number, want = (float(text.replace(",", "")) for text in (given, gold))
        else:
            number, want = spacer_number(given), float(gold)
    except ValueError:
        return 0.0
    if number is None or not (math.isfinite(number) and math.isfinite(want)):
        return 0.0
    if problem_type == "numerical":
        return mean_relative_accuracy(number, want, mode="upstream")
    return 1 - min(max((abs(number - want) + 1e-9) / (abs(want) + 1e-9), 0.0), 1.0)


# Texts: word error rate and ROUGE


def word_accuracy(given: str, gold: str) -> float:
    """1 minus the word error rate, in [0, 1]: Levenshtein over words, as a share of gold's, at least one (2.2)."""
    said, want = given.split(), gold.split()
    if len(said) - len(want) >= max(1, len(want)):
        return 0.0  # so many words too many that the rate is 1 or more: a long text costs no time
    row = list(range(len(want) + 1))  # edits from the words so far to want[:j]
    for i, word in enumerate(said, start=1):
        last, row[0] = row[0], i
        for j, other in enumerate(want, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return min(max(1 - row[-1] / max(1, len(want)), 0.0), 1.0)


def rouge(given: str, gold: str, *, mode: str = "upstream") -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with Porter's stemmer, in [0, 1] (2.2). Of both texts the first 20,000
    characters count. Raises ImportError with the cure without rouge-score."""
    corrected = _is_corrected(mode)
    if corrected and given.split() == gold.split():  # mend_rouge
        return float(bool(gold))
    scores = _rouge_scorer(corrected).score(gold[:MAX_TEXT], given[:MAX_TEXT])
    if corrected and len(WORDS.findall(gold)) < 2:
        del scores["rouge2"]  # gold has no pair of words to find
    return min(max(sum(part.fmeasure for part in scores.values()) / len(scores), 0.0), 1.0)


@lru_cache(maxsize=2)
def _rouge_scorer(corrected: bool):
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("free-form answers are scored by ROUGE: pip install rouge-score") from error
    stem = PorterStemmer().stem
    words = SimpleNamespace(tokenize=lambda text: [stem(word) if word.isascii() and len(word) > 3 else word
                                                   for word in WORDS.findall(text.lower())])  # fmt: skip
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True, tokenizer=words if corrected else None)


# Words of any script; scripts that are written without spaces, character by character.
WORDS = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")

# Maps: {category: [[x, y], ...]} in cells

GRID = 10
FAR = 10**9  # coordinates beyond it are moved there: their distance scores 0 all the same
MAP_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MAP_ELEMENT = re.compile(rf"[<\[(]?\s*({MAP_NUMBER.pattern})\s*[>\])]?")
MAP_KEY = re.compile(r"[^\w\s]*([\w\s]+)[^\w\s]*")


def parse_map(text: str, names: list[str]) -> dict[str, list[list[int]]]:
    """The map that a text states, {name in lower case: [[x, y], ...]} in cells, for these categories only (2.4).

    A Python or JSON dict, or else prose: each name owns the numbers up to the next name. Cells are cut to whole numbers
    towards 0 and not checked against the grid. Of the text the first 20,000 characters count."""
    text = text[:MAX_TEXT].strip()
    known = {name.lower() for name in names if isinstance(name, str) and name}
    if text.startswith("str{{") and text.endswith("}}"):
        text = text[4:-1]
    found = None
    if text.startswith("{") and text.endswith("}"):
        try:
            with warnings.catch_warnings(action="ignore"):  # Python's remarks on the syntax of `{1in}`
                found = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal: read as prose
            pass
    if not isinstance(found, dict):
        return _map_of_prose(text, sorted(known))
    points: dict[str, list[list[int]]] = {}
    for key, value in found.items():
        if not isinstance(key, str):  # str() of a number may raise: more digits than Python writes
            continue
        key = key.lower().strip()
        if peeled := MAP_KEY.fullmatch(key):
            key = peeled[1]
        spots = [spot for item in (value if isinstance(value, list) else [value]) if (spot := _spot(item))]
        if key in known and spots:
            points.setdefault(key, []).extend(spots)
    return points


def _spot(item: object) -> list[int] | None:
    """[x, y] of a pair, of a pair wrapped once, or of a text with two numbers; None for anything else."""
    if isinstance(item, str):
        item = [float(number) for number in MAP_NUMBER.findall(item)[:2]]
    elif isinstance(item, (list, tuple)) and len(item) == 1:
        item = item[0]
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return None
    item = [float(m[1]) if isinstance(x, str) and (m := MAP_ELEMENT.fullmatch(x.strip())) else x for x in item]
    return [_cell(x) for x in item] if all(isinstance(x, (int, float)) for x in item) else None


def _cell(value: float) -> int:
    return int(min(max(-FAR, value), FAR))


def _map_of_prose(text: str, names: list[str]) -> dict[str, list[list[int]]]:
    matches = [
        (m.start(), m.end(), name) for name in names
        for m in re.finditer(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])", text, re.IGNORECASE)
    ]  # fmt: skip
    kept: list[tuple[int, int, str]] = []
    for start, end, name in sorted(matches, key=lambda match: (match[0], -match[1], match[2])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end, name))
        elif end > kept[-1][1]:  # overlaps the one before and reaches further
            kept[-1] = (start, end, name)
    points: dict[str, list[list[int]]] = {}
    for (_, end, name), until in zip(kept, [*(start for start, _, _ in kept[1:]), len(text)]):
        numbers = [_cell(float(number)) for number in MAP_NUMBER.findall(text, end, until)]
        pairs = [list(pair) for pair in zip(numbers[::2], numbers[1::2])]
        if pairs:
            points.setdefault(name, []).extend(pairs)
    return points


def map_score(pred: dict, gold: dict, grid: int = GRID, *, mode: str = "upstream") -> float:
    """How well a map's points lie, in [0, 1]: each category's points matched greedily to gold's by distance, a pair worth
    1 - distance / diagonal, the mean over gold's instances (2.4). Both {category: [[x, y], ...]} in cells of a grid x
    grid map. Gold without any instance: 1 for an empty prediction, else 0, where upstream raises.

    mode="corrected": each predicted category less what a random map gets, and so 0 for chance; below 0 in all is 0, and so
    is everything about gold without any instance."""
    corrected = _is_corrected(mode)
    if corrected:
        pred, gold = _mend_names(pred), _mend_names(gold)
    weight = sum(len(spots) for spots in gold.values())
    if weight == 0:
        return float(not pred and not corrected)
    score = 0.0
    for name, spots in gold.items():
        worth = _near(pred.get(name, ()), spots, grid)
        if corrected and pred.get(name) and spots:
            worth = _mend_chance(worth, spots, grid)
        score += worth * len(spots) / weight
    return min(max(score, 0.0), 1.0)


def _near(spots: list, gold: list, grid: int) -> float:
    """One category's share: pairs by ascending distance, each point once (ties: the earlier prediction, then gold)."""
    diagonal = grid * math.sqrt(2)
    pairs = sorted((math.hypot(x - u, y - v), i, j) for i, (x, y) in enumerate(spots) for j, (u, v) in enumerate(gold))
    used: tuple[set, set] = (set(), set())
    total = 0.0
    for apart, i, j in pairs:
        if i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            total += max(0.0, 1 - apart / diagonal)
    return total / max(len(spots), len(gold), 1)


def _mend_names(spots: dict) -> dict:
    merged: dict[str, list] = {}
    for name, points in spots.items():
        merged.setdefault(str(name).lower(), []).extend(points)
    return merged


def _mend_chance(worth: float, gold: list, grid: int) -> float:
    chance = _chance(tuple(map(tuple, gold)), grid)
    return (worth - chance) / (1 - chance)


@lru_cache(maxsize=4096)
def _chance(gold: tuple, grid: int) -> float:
    """What as many random cells get on average: exact for one point, else the mean of 200 draws, always the same ones."""
    if len(gold) == 1:
        return sum(_near([(x, y)], gold, grid) for x in range(grid) for y in range(grid)) / grid**2
    draws = np.random.default_rng(0).integers(0, grid, (200, len(gold), 2)).tolist()
    return sum(_near(draw, gold, grid) for draw in draws) / len(draws)


# ---------------------------------------------------------------------------------------------------------------------
# Reading answers: letters, numbers, texts. Used by the corrected rewards and by every grader.

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {word: n for n, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"|(?<![\w.])[-+\u2212]?\.[0-9]+"
)
NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b(?:[- ](?:{'|'.join(ONES[1:10])})\b)?", re.I)
# '(B)', 'b)', 'B.', 'B' alone, or 'B ' before more text; 'A ' before more text is an article, except after 'answer is'.
LEAD = r"[\s*_\"'`:]*(?:[(\[{]\s?([A-Za-z])\s?[)\]}]|([A-Za-z])(?=[).:,*\n]|\s*\Z)|([%s-Z])(?=\s))[\s.):,*_]*"
LETTER, STATED_LETTER = re.compile(LEAD % "B"), re.compile(LEAD % "A")
ARTICLE = re.compile(r"(?:the|an?) (?=\w)")
EDGES = string.whitespace + ".,:;!?\"'`*_()[]{}$"


def plain(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends, no article in front; a number word as digits."""
    text = " ".join(text.lower().split()).rstrip(EDGES).lstrip(EDGES.replace(".", ""))  # '.5' keeps its point
    if article := ARTICLE.match(text):
        text = text[article.end() :]
    return str(NUMBER_WORDS.get(text, text))


def read_number(text: str) -> float | None:
    """The number a text states: its first word if that is one, else the last number in it. Sign, thousands, exponent
    and number words are read, units ignored; None without a number."""
    text = text[-2000:].strip(EDGES.replace(".", ""))
    found = [(m.start(), float(m.group().replace(",", "").replace("\u2212", "-"))) for m in NUMBER.finditer(text)]
    found = found or [(m.start(), float(sum(NUMBER_WORDS[word] for word in re.split("[- ]", m.group().lower()))))
                      for m in NUMBER_WORD.finditer(text)]  # fmt: skip
    found = [(at, value) for at, value in found if math.isfinite(value)]
    return (found[0] if found[0][0] == 0 else found[-1])[1] if found else None


CENTIMETRES = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 100.0), **dict.fromkeys(("foot", "feet", "ft"), 30.48),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 1.0),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 0.1),
    **dict.fromkeys(("km", "kilometer", "kilometers", "kilometre", "kilometres"), 1e5),
    **dict.fromkeys(("in", "inch", "inches"), 2.54),
}  # fmt: skip
# A number with its unit; 'in' only where nothing follows ('two in the room').
LENGTH = re.compile(rf"({NUMBER.pattern}|{NUMBER_WORD.pattern})[\s-]*(?!in\s+\w)({'|'.join(CENTIMETRES)})\b", re.I)


def read_length(text: str, unit: str = "") -> float | None:
    """The length a text states, in cm: what it begins with, else the last one; without any, its number in `unit`."""
    text = text[-2000:].strip(EDGES.replace(".", ""))
    if found := [*LENGTH.finditer(text)]:
        said = found[0] if found[0].start() == 0 else found[-1]
        number, unit = read_number(said[1]), said[2].lower()
    else:
        number = read_number(text)
    return None if number is None or unit not in CENTIMETRES else number * CENTIMETRES[unit]


def _split_letter(answer: str, form: re.Pattern = LETTER) -> tuple[str, str]:
    """'(b) Left.' -> ('B', 'Left.'); ('', all of it) where no letter stands in front."""
    m = form.match(answer)
    return (m.group(m.lastindex).upper(), answer[m.end() :]) if m else ("", answer)


def _same_text(given: str, gold: str) -> bool:
    number = read_number(gold) if NUMBER.fullmatch(gold) else None
    return given == gold or number is not None and read_number(given) == number


def _mend_answer(given: str, gold: str) -> bool:
    """Whether an answer names gold's letter or gold's text and contradicts neither."""
    (letter, text), (gold_letter, gold_text) = _split_letter(given), _split_letter(gold)
    text, gold_text = plain(text), plain(gold_text)
    if letter and gold_letter:
        return letter == gold_letter and (not text or not gold_text or _same_text(text, gold_text))
    return bool(text) and _same_text(text, gold_text)


def _is_right(response: str, given: str, gold: str, options: tuple[str, ...]) -> bool:
    """What every corrected reward takes for a right answer; given: what it takes for the answer without options."""
    return grade_choice(response, list(options), gold) if options else _mend_answer(given, gold)


# A description of the picture; one that is cut off ends where the next block begins, or with the text.
DESCRIPTION = re.compile(r"<(observe|scene)>.*?(?:</\1>|(?=<(?:scene|think)>)|\Z)", re.DOTALL)


def _final(text: str) -> str:
    """The part of a response that holds the answer: the last answer block (also when one of its tags is missing), else
    what follows the reasoning, without the description of the picture; of that, what follows the last `Answer:` (5.4
    no. 1). Nothing of a response that was cut before its answer: reasoning and description name options too."""
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + 8 :].partition("</answer>")[0]
    elif "</answer>" in text:
        text = text[: text.rfind("</answer>")]
    else:
        text = DESCRIPTION.sub("", text.rpartition("</think>")[2])
        text = "" if "<think>" in text else text
    after = text.rpartition("</think>")[2]
    text = (after if after.strip() else text).replace("<s>", "").replace("</s>", "")
    after = re.split("answer:", text, flags=re.IGNORECASE)[-1]
    return after if after.strip(EDGES) else text


STATED = re.compile(r"\b(?:answer|option|choice)\b\W{0,3}?(?:(?:is|would be|should be|must be)\b|:|(?=\())", re.I)
NAMED = re.compile(r"\(([A-Za-z])\)|\b(?:[Oo]ption|[Cc]hoice) ([A-Z])\b")


def extract_choice(text: str, options: list[str]) -> str | None:
    """The letter a response chooses, or None if it names none or several (5.4, without its defect of a fall-back on A).

    Read is the last answer block, or what follows the last `Answer:` or the reasoning. In it, in this order: a box;
    'the answer is B'; the beginning and the last line ('(B)', 'B.', 'B', an option's text, 'Yes, ...'); bold; 'B. its
    text'; the only '(B)', 'option B' or final 'is B'; the only option whose text occurs. A letter and another option's
    text are a contradiction."""
    cleaned = tuple(plain(str(option)) for option in options)
    for found in _readings(_final(text), cleaned):
        if found:
            letter = found.pop()
            return letter if not found and letter in string.ascii_uppercase[: len(options) or 26] else None
    return None


def _readings(span: str, options: tuple):
    """Sets of letters, from the surest way to read an answer to the weakest."""
    for boxed in re.findall(r"\\boxed\{(?:\\text\{)?([^{}]{1,200})\}", span)[-1:]:
        yield _leading(boxed, options, form=STATED_LETTER)
    for m in list(STATED.finditer(span))[:-20:-1]:  # 'I hope this answer is helpful' names nothing: go back
        tail = span[m.end() : m.end() + 400]
        yield set() if _denied(span, m) else _leading(tail, options, form=STATED_LETTER)
    yield set().union(*(_leading(part, options) for part in span.strip().rsplit("\n", 1)))
    for bold in re.findall(r"\*\*([^*]{1,200})\*\*", span)[-1:]:
        yield _leading(bold, options)
    flat = " ".join(span.lower().split())
    yield {
        chr(65 + i) for i, option in enumerate(options)
        if option and option in flat and re.search(rf"\b{chr(97 + i)}[.):]+ ?{re.escape(option)}(?!\w)", flat)
    }  # fmt: skip
    named = set(re.findall(r"\b(?:is|be|choose|pick|with) ([A-Z])\W{0,3}\Z", span))
    for m, _ in zip(NAMED.finditer(span), range(100)):
        named |= {(m.group(1) or m.group(2)).upper(), *_denied(span, m)}
    yield named
    yield _mentioned(flat, options)


# After a letter: '(B)', 'possibly B', and after a comma a 'B' that is no word of a clause ('A, because', 'A, the cat').
SECOND = re.compile(r"[(\[{]\s?([A-Za-z])\s?[)\]}]|(?:(?:and|or|possibly|perhaps|maybe)\W{1,3}){1,2}\(?([A-Z])(?![\w'])"
                    r"|([A-Z])(?=\W{0,3}(?:\Z|[,.;:)\n]|(?:and|or)\b))")  # fmt: skip


def _leading(text: str, options: tuple, *, form: re.Pattern = LETTER) -> set[str]:
    """The letters that the beginning of a text names, by letter or by an option's text. Two are a contradiction."""
    text = text[:400]
    by_text = _by_text(text, options)
    letter, rest = _split_letter(text, form)
    if not letter or ord(letter) - 65 >= (len(options) or 8):
        return by_text
    if other := re.match(r"(?:and|or|nor|/|&)\W{0,3}([A-Za-z])(?![A-Za-z])", rest):  # 'A and B'
        return {letter, other.group(1).upper()}
    other = SECOND.match(rest)
    if other and (other.lastindex < 3 or "," in text[: len(text) - len(rest)]) and plain(text) not in options:
        second = other.group(other.lastindex).upper()
        if second != letter and ord(second) - 65 < (len(options) or 8):
            return {letter, second}
    if by_text and rest:  # 'C is closer' can be an option's own text
        return by_text
    beside = _by_text(rest, options)
    return by_text | {letter} | (set() if letter in beside else beside)


def _by_text(text: str, options: tuple) -> set[str]:
    """The letters of the options that equal a text or its first clause."""
    readings = (plain(text), plain(re.split(r"[.,;:!\n]+(?:\s|\Z)", text, maxsplit=1)[0]))
    return {chr(65 + i) for i, option in enumerate(options) if option and option in readings}


def _mentioned(span: str, options: tuple) -> set[str]:
    """The options whose text occurs anywhere as whole words, longest first: 'in front of' hides 'front'. A denied one
    adds '?'."""
    found = set()
    for i, option in sorted(enumerate(options), key=lambda pair: -len(pair[1])):
        if option in ("yes", "no", "true", "false") or len(option) < 2 and not option.isdigit():
            continue  # they occur in any prose
        if option not in span:
            continue  # saves compiling the pattern, nine tenths of the time of grading
        pattern = re.compile(rf"(?<![\w.]){re.escape(option)}(?!\w|\.[0-9])")
        if m := pattern.search(span):
            found |= {chr(65 + i), *_denied(span, m)}
            span = pattern.sub("|", span)
    return found


def _denied(span: str, m: re.Match) -> str:
    before = span[max(0, m.start() - 20) : m.start()]
    return "?" if re.search(r"(?:\bnot|n't|\bneither|\bnor)\W+(?:\w+\W+)?\Z", before, re.IGNORECASE) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Graders: the one way a score is computed, in training, validation and evaluation. Each of GRADERS and PUBLISHED takes a
# row and a text and gives (correct, what was read or None).


def grade(row: dict, text: str | None, *, mode: str = "corrected") -> dict:
    """{"correct": bool, or a float in [0, 1] for regression, mra and view_change, "answer": what was read, or None}, by
    row["kind"]; mode="upstream": by the published rule that row["meta"]["rule"] names, see PUBLISHED.
    None, a generation that failed, is graded as the empty text. Raises ValueError for an unknown kind or rule."""
    graders, name, what = GRADERS, row["kind"], "kind"
    if not _is_corrected(mode):
        graders, name, what = PUBLISHED, (row.get("meta") or {}).get("rule"), "published rule"
    if name not in graders:
        raise ValueError(f"row {row['id']}: unknown {what} {name!r}: choose one of {', '.join(graders)}")
    correct, answer = graders[name](row, text or "")
    return {"correct": correct, "answer": answer}


def grade_choice(text: str, options: list[str], gold: str) -> bool:
    """Whether a response chooses gold: a letter in any dress, or the text of an option."""
    return _choice_row({"options": options, "gold": gold}, text)[0]


def grade_number(text: str, gold: str) -> bool:
    """Whether a response states gold's number."""
    return _number_row({"kind": "number", "gold": gold}, text)[0]


def grade_yes_no(text: str, gold: str) -> bool:
    """Whether the first yes or no of a response is gold's."""
    return _yes_no_row({"gold": gold}, text)[0]


def _choice_row(row: dict, text: str) -> tuple[bool, str | None]:
    letter, gold = extract_choice(text, row["options"]), row["gold"].strip(EDGES).upper()
    if not (len(gold) == 1 and gold.isalpha()):
        gold = extract_choice(row["gold"], row["options"])
    return letter is not None and letter == gold, letter


def _number_row(row: dict, text: str) -> tuple[bool | float, str | None]:
    """number: whether it is gold's; regression: 1 minus the relative error, in [0, 1]; mra: the relative accuracy."""
    number, want = read_number(_final(text)), read_number(row["gold"])
    correct = False if row["kind"] == "number" else 0.0
    if number is not None and want is not None:
        if row["kind"] == "number":
            correct = math.isclose(number, want, rel_tol=1e-9, abs_tol=1e-9)
        elif row["kind"] == "mra":
            correct = mean_relative_accuracy(number, want)
        else:
            correct = float(number == want) if want == 0 else max(1 - abs(number - want) / abs(want), 0.0)
    return correct, None if number is None else f"{number:g}"


def _length_row(row: dict, text: str) -> tuple[bool, str | None]:
    """A length with its unit (SpatialScore; seed_systems 3.9): less than twice gold and more than half of it, in any unit,
    in gold's own if it names none; zero for zero."""
    unit = named[2].lower() if (named := LENGTH.match(row["gold"])) else ""
    given, want = read_length(_final(text), unit), read_length(row["gold"])
    comparable = given is not None and want is not None
    right = comparable and (given == want or given * want > 0 and 0.5 < given / want < 2)
    return right, None if given is None else f"{given:g} cm"


def _yes_no_row(row: dict, text: str) -> tuple[bool, str | None]:
    said = re.search(r"\b(?:yes|no)\b", _final(text).lower())
    return said is not None and said.group() == plain(row["gold"]), said and said.group()


def _text_row(row: dict, text: str) -> tuple[bool, str | None]:
    """Equal texts, but for case, spacing, a letter in front, an article, punctuation at the ends."""
    given = _final(text)
    right = _yes_no_row(row, text)[0] if plain(row["gold"]) in ("yes", "no") else _mend_answer(given, row["gold"])
    return right, given.strip() or None


MRA_BOUNDS = (1 - np.linspace(0.5, 0.95, 10)).tolist()  # these very floats decide at errors of exactly 5, 10, ... %


def mean_relative_accuracy(pred: float, target: float, *, mode: str = "corrected") -> float:
    """The share of ten thresholds 0.50, 0.55, ... 0.95 with relative error <= 1 - threshold (SpaceR 2.3), in [0, 1].

    A target of 0 is compared by the absolute error, as SPAR-Bench does (SpaceR 5.4). mode="upstream", that of SpaceR's
    training and VSI-Bench: a negative target divides as it is, and 0, where it raises, gives 0."""
    scale = abs(target) or 1.0 if _is_corrected(mode) else target
    return sum(abs(pred - target) / scale <= bound for bound in MRA_BOUNDS) / len(MRA_BOUNDS) if scale else 0.0


MOVE = re.compile(r"\b(move|rotate)[ _](right|left|up|down|forward|backward)\s*[:=]\s*([-+]?[0-9]*\.?[0-9]+)", re.I)
AXES = (("move_right", "move_left"), ("move_up", "move_down"), ("move_forward", "move_backward"),
        ("rotate_right", "rotate_left"), ("rotate_up", "rotate_down"))  # fmt: skip


def _moves_row(row: dict, text: str) -> tuple[float, str | None]:
    """A camera's move (SpaceR 5.4): the mean of the relative accuracies on five axes, relative to the truth."""
    said, want = ({f"{m[1]}_{m[2]}".lower(): float(m[3]) for m in MOVE.finditer(t)} for t in (_final(text), row["gold"]))
    if not said or not want:
        return 0.0, None
    return _moves_accuracy(said, want), ",".join(f"{key}:{value:g}" for key, value in said.items())


def _moves_accuracy(pred: dict[str, float], target: dict[str, float]) -> float:
    nets = [[moves.get(plus, 0.0) - moves.get(minus, 0.0) for plus, minus in AXES] for moves in (pred, target)]
    return sum(mean_relative_accuracy(p, t) for p, t in zip(*nets)) / len(AXES)


GRADERS = {
    "choice": _choice_row, "number": _number_row, "regression": _number_row, "text": _text_row, "ocr": _text_row,
    "mra": _number_row, "length": _length_row, "yes_no": _yes_no_row, "view_change": _moves_row,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Published rules: the graders of the published evaluations, with their defects: to re-derive published numbers, not to
# believe them. SpatialThinker 5.4; SpaceR 5.1 to 5.6 of its own notes.


def _raw_gold(row: dict) -> str:
    """Gold as the dataset writes it: some of these rules fail on that."""
    return str((row.get("meta") or {}).get("raw_gold", row["gold"]))


def _published_evals(row: dict, text: str, *, direct: bool = False) -> tuple[bool, str | None]:
    """SpatialThinker. Sets with choices: an option's text counts, anything else is taken for A (5.4 no. 2); direct
    (realworld_qa, spatialbench and mmvp): the answer against the dataset's own gold (no. 3)."""
    text = text.split("Answer:")[-1].strip() if "Answer:" in text else text
    if not text:
        return False, None  # that script says 'Failed to extract.' (no. 1)
    given, gold = text.split("<answer>")[-1].split("</answer>")[0].strip(), _raw_gold(row).strip()
    if not direct:
        gold = gold.replace("(", "").replace(")", "").strip()
        gold = gold[0].lower() if len(gold) > 1 else gold
        if options := [option.lower() for option in row["options"]]:
            named = re.sub(r"^\([A-Za-z]\)\s*", "", given).replace("{", "").replace("}", "").lower()
            given = chr(65 + options.index(named)) if named in options else "A"
    return gold.lower() == given.lower() or grade_math(gold, given) or _evals_last_resort(gold, given), given


def _evals_last_resort(gold: str, given: str) -> bool:
    """Gold against what stands in the first parentheses, less a final period (5.4 no. 4)."""
    if "(" in given and ")" in given:
        given = given.split("(")[1].split(")")[0]
    return given.removesuffix(".").strip().lower() == gold.strip().lower()


def _spacer_span(text: str) -> str:
    """The first answer block, the word None for an unclosed one, the whole text without a tag (SpaceR 5.1)."""
    if "<answer>" not in text:
        return text
    found = _inside(text, "answer")
    return "None" if found is None else found.strip()


SPACER_WORDS = {word: NUMBER_WORDS[word] for word in [*ONES[1:], *TENS, "zero"]} | {"a": 1, "an": 1}
SPACER_WORD = re.compile(rf"\b(?:{'|'.join(SPACER_WORDS)})\b")


def spacer_number(text: str) -> float | None:
    """SpaceR's reader of numbers (its 2.3): the first of its number words, in the order of its table and anywhere in the
    text, 'a' and 'an' among them; else the first digits, without sign, comma or exponent."""
    text = text.strip().lower()
    words = set(SPACER_WORD.findall(text))
    if words:
        return float(next(value for word, value in SPACER_WORDS.items() if word in words))
    found = re.search(r"\d+(?:\.\d+)?", text)
    return float(found.group()) if found else None


def _published_vsi(row: dict, text: str) -> tuple[bool | float, str | None]:
    given = _spacer_span(text)
    if row["kind"] == "mra":
        number = spacer_number(given)
        if number is None:
            return 0.0, None
        return mean_relative_accuracy(number, float(row["gold"]), mode="upstream"), f"{number:g}"
    given = given.replace("Answer:", "")
    first = re.search(r"^[A-D]\.?$", given.split(" ")[0].strip())
    given = first.group().rstrip(".") if first else given.strip()
    return given.lower() == row["gold"].lower(), given or None


STI_LETTERS = [re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in (
    r"\(([A-E])\)", r"Ans\s*=\s*['\"]?([A-E])['\"]?", r"Answer\s*[:=]\s*([A-E])", r"Option\s+([A-E])",
    r"\b([A-E])\s*(?:is|was)\s*correct", r"\b([A-E])[\.\)]\s*$")]  # fmt: skip


def sti_letter(text: str) -> str | None:
    """The letter by the first of STI-Bench's six patterns that hits (SpaceR 5.3)."""
    return next((m.group(1).upper() for pattern in STI_LETTERS if (m := pattern.search(text))), None)


def _published_spar(row: dict, text: str) -> tuple[bool | float, str | None]:
    """An empty answer is right, a choice's text may be part of gold; moves are judged relative to the prediction
    (SpaceR 5.4)."""
    given, gold = _spacer_span(text), _raw_gold(row)
    if row["kind"] == "view_change":
        try:
            pairs = [[part.split(":") for part in moves.split(",")] for moves in (given, gold)]
            said, want = ({key: float(value) for key, value in parts} for parts in pairs)
        except ValueError:
            return 0.0, given or None
        return _moves_accuracy(want, said), given or None
    if row["kind"] == "mra":
        numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", given)
        if not numbers:
            return 0.0, None
        number = float(numbers[-1 if row["category"].endswith("_mv") else 0])
        return mean_relative_accuracy(number, float(gold)), f"{number:g}"
    given, gold = given.lower(), gold.lower()
    return given in gold or given[0] == gold, given or None


STOCK = ("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
         "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:")  # fmt: skip


def first_capital(text: str, letters: str) -> str:
    """Video-MME's and LongVideoBench's letter: the first of these capitals anywhere, stock phrases removed (SpaceR 5.5,
    5.6). Video-MME removes two phrases more, which hold none of its capitals."""
    for phrase in STOCK:
        text = text.replace(phrase, "")
    found = re.search(f"[{letters}]", text)
    return found.group() if found else ""


def _published_letter(row: dict, text: str, *, read) -> tuple[bool, str | None]:
    given = read(_spacer_span(text))
    return given == row["gold"], given or None


def _published_tempcompass(row: dict, text: str) -> tuple[bool, str | None]:
    given, gold = _spacer_span(text), _raw_gold(row)
    letter = re.match(r"([A-D])(?:[.)]|\Z)", given)
    return given == gold or letter is not None and letter.group(1) == gold[:1], given or None


PUBLISHED = {
    "evals": _published_evals,
    "evals-direct": partial(_published_evals, direct=True),
    "vsi-bench": _published_vsi,
    "sti-bench": partial(_published_letter, read=lambda given: sti_letter(given) or given.strip()),
    "spar-bench": _published_spar,
    "tempcompass": _published_tempcompass,
    "video-mme": partial(_published_letter, read=partial(first_capital, letters="ABCD")),
    "longvideobench": partial(_published_letter, read=partial(first_capital, letters="ABCDE")),
}

# ---- grade_math: what SpatialThinker's code takes for equal answers, in training and in evaluation (2.3)

UNITS = "degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
UNIT = re.compile(rf"(?:{UNITS})(?:es)?s? *(?:\^[0-9]+)?|\^ *\\circ")
FRACTION = re.compile(r"\\[td]?frac *(?:\{([^{}]*)\}|(\w)) *(?:\{([^{}]*)\}|(\w))")
TEXT_WRAP = re.compile(r"\A\\text\{(.+?)\}\Z", re.DOTALL)
LOOSE = {"\\%": "", "\\$": "", "$": "", "%": "", " or ": " , ", " and ": " , ",
         "million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}  # fmt: skip


def grade_math(given: str, gold: str) -> bool:
    """mathruler's grade_answer without sympy: equal in one of two normal forms, or equal in value.

    Covered: fractions, decimals, thousands, powers, tuples, at most two letters. Not covered: other LaTeX, functions,
    roots, sympy's simplification. Texts above 1,000 characters are compared as they are."""
    if len(given) > 1000 or len(gold) > 1000:
        return given.strip() == gold.strip()
    if _tight(given) == _tight(gold):
        return True
    given, gold = _loose(given), _loose(gold)
    if given == gold or not given or not gold:
        return given == gold
    if given[0] in "([" and gold[0] in "([" and given[-1] in ")]" and gold[-1] in ")]" and "," in gold:
        pairs = list(zip(map(_whole, given[1:-1].split(",")), map(_whole, gold[1:-1].split(","))))
        same_ends = given[0] + given[-1] == gold[0] + gold[-1] and given.count(",") == gold.count(",")
        return same_ends and all(a == b or _same_value(a, b) for a, b in pairs)
    return _same_value(given, gold)


def _tight(answer: str) -> str:
    """First normal form: no LaTeX decoration, spaces, percent signs, leading `x=`; case and units are kept."""
    answer = TEXT_WRAP.sub(r"\1", answer.strip()).strip()
    for drop in ("\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", "%"):
        answer = answer.replace(drop, "")
    head, equals, tail = answer.partition("=")
    answer = tail if equals and len(head) <= 2 and "=" not in tail else answer
    answer = FRACTION.sub(r"\1\2/\3\4", answer.split("\\text{ ")[0].replace(" ", ""))
    return "1/2" if answer == "0.5" else answer


def _loose(answer: str) -> str:
    """Second normal form: lower case without spaces, units, currency and percent; 'and', 'or' are commas."""
    answer = TEXT_WRAP.sub(r"\1", answer)
    for old, new in LOOSE.items():
        answer = answer.replace(old, new)
    answer = _whole(UNIT.sub("", answer))
    answer = FRACTION.sub(r"(\1\2)/(\3\4)", answer).replace("\\cdot", "*").replace("\\times", "*").replace("\\", "")
    answer = re.sub(r"([0-9]) +([0-9])", r"\1+\2", answer)  # 3 1/2
    return _whole(re.sub(r"[ {}]", "", answer).lower())


def _whole(answer: str) -> str:
    """'3.0' and '1,000' as '3' and '1000'; other texts as they are."""
    try:
        value = float(re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", answer))
        return str(round(value)) if abs(value - round(value)) <= 1e-7 else answer
    except (ValueError, OverflowError):
        return answer


def _same_value(given: str, gold: str) -> bool:
    a, b = _value(given), _value(gold)
    fractions = all(re.fullmatch(r"-?[0-9]+/[0-9]+", text) for text in (given, gold))  # 2/4 is not taken for 1/2
    one_whole = given.lstrip("-").isdigit() != gold.lstrip("-").isdigit()  # nor an expression for a whole number
    return not (a is None or b is None or fractions or one_whole) and math.isclose(a, b, rel_tol=1e-13)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: math.pow, ast.UAdd: operator.pos, ast.USub: operator.neg}  # fmt: skip


def _value(text: str) -> float | None:
    """The value of a small expression of numbers and at most two letters, None for anything else. A letter stands for a
    fixed odd number, so that equal values mean equal polynomials: upstream's sympy, too, finds 'on' equal to 'no'."""
    too_hard = re.search(r"\^(\(|[0-9]+\^|[0-9][0-9])", text) or len(set(text) & set(string.ascii_lowercase)) > 2
    if too_hard or not re.fullmatch(r"[0-9a-z.()+*/^-]{1,100}", text):
        return None
    factors = re.sub(r"(?<=[0-9a-z.)])(?=[a-z(])|(?<=[a-z)])(?=[0-9.])", "*", text)  # side by side means times
    try:
        value = _evaluate(ast.parse(factors.replace("^", "**"), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _evaluate(node: ast.expr) -> float:
    match node:
        case ast.BinOp(left, op, right):
            return OPERATORS[type(op)](_evaluate(left), _evaluate(right))
        case ast.UnaryOp(op, operand):
            return OPERATORS[type(op)](_evaluate(operand))
        case ast.Constant(int() | float() as number):
            return float(number)
        case ast.Name(letter):
            return ord(letter) ** 0.7390851
    raise ValueError(f"no arithmetic: {type(node).__name__}")
