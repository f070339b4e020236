"""Rewards and graders: text in, numbers out. Copy this file into another project and it runs (numpy, scipy).

Every function is total: any text at all gives finite numbers in time linear in its length; what cannot be computed
counts 0. Section numbers such as 2.1 are those of the specification notes of SpatialThinker (arXiv 2511.07403).

mode="upstream" gives the published code's numbers; where that code raises (2.8.1), the part that it could not compute
is 0. There the spatial term is at most 1, but an inverted box can push it far below 0, as published.
mode="corrected" has the same weights and gates, every number is in [0, 1], and these defects are mended, a name each:

  _mend_boxes      corners ordered, boxes clipped to the picture, unreadable coordinates 0           (2.8.1, 2.8.6)
  _mend_floor      plain CIoU, negative values 0: random boxes earn about 0, not 0.4                 (2.7 no. 2, 2.8.7)
  _mend_relations  spatial = 0.7 boxes + 0.3 F1 of the relation triplets, where gold has relations   (2.7 no. 8, 2.8.9)
  _mend_empty      a missing gold scene pays nothing; without gold objects, none may be predicted    (2.8.2, 2.8.3)
  _mend_answer     a right letter or a right text is enough, letter against text is wrong, so is an
                   empty answer; numbers are compared as numbers; no algebra on words                (2.1, 2.3)
  _mend_blocks     whitespace around the response is no format error, an answer may span lines       (2.3, 2.4)

Kept on purpose: a tag name spoken inside the reasoning spoils the format (2.8.5); that also guards against stuffing.

The last part of this file is SpaceR's reward, with the list of its own mends.
"""

import ast
import json
import math
import operator
import re
import string
from collections import Counter
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

MODES = ("upstream", "corrected")
W_FORMAT, W_COUNT, W_ACCURACY, W_SPATIAL = 0.1, 0.2, 0.5, 0.2
W_OBJECTS, W_RELATIONS = 0.7, 0.3  # in the count term; and in the corrected spatial term
COST_LABEL, COST_BOX = 2.0, 1.0  # matching prefers the right label over the near box
PAD = 1e5  # cost of leaving a gold object without a prediction
MAX_OBJECTS, MAX_PAIRS = 1000, 50_000  # predictions matched at most, pairs compared at most: see _first()
TAGS = ("observe", "scene", "think", "answer")
EPS = 1e-7

# ---------------------------------------------------------------------------------------------------------------------
# Parsers. str.find instead of regular expressions, because `<a>.*?</a>` is quadratic on a megabyte of opening tags.


def _inside(text: str, tag: str) -> str | None:
    """What stands between the first opening tag and the first closing tag after it, stripped."""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start) if start >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if end >= 0 else None


def extract_answer(text: str) -> str:
    """The first answer block, stripped; '' without one (2.1)."""
    return _inside(text, "answer") or ""


def extract_scene(text: str) -> dict:
    """The first scene block as strict JSON; {} if there is none, it does not parse, or it is no object (2.1)."""
    try:
        scene = json.loads(_inside(text, "scene") or "")
    except (ValueError, RecursionError):  # ValueError: bad JSON, or an integer of more digits than Python reads
        return {}
    return scene if isinstance(scene, dict) else {}


def extract_size(problem: str) -> tuple[int, int] | None:
    """(W, H) from the first `Image size: (W x H)` of a prompt; None where upstream raises (2.1, 2.8.1)."""
    prefix, at = "Image size: (", 0
    while (at := problem.find(prefix, at)) >= 0:
        end = problem.find("\n", at)
        end = len(problem) if end < 0 else end
        cross = problem.find(" x ", at, end)
        close = problem.find(")", cross + 3, end) if cross >= 0 else -1
        if close >= 0:
            try:
                return int(problem[at + len(prefix) : cross]), int(problem[cross + 3 : close])
            except ValueError:
                return None
        at = end
    return None


def clean_label(label: str) -> str:
    """Lower case, underscore and hyphen as space (2.1 step 2)."""
    return label.replace("_", " ").replace("-", " ").strip().lower()


@lru_cache(maxsize=4096)
def _name(identifier: str) -> str:
    """'red_car.2' -> 'red car'."""
    return clean_label(identifier.split(".", 1)[0])


def solution_text(row: dict) -> str:
    """The tagged gold text that rewards take: `<scene>JSON</scene>`, line break, `<answer>(B) text</answer>`.

    A row without scene has no scene block. Raises ValueError for a gold letter that is not one of the options."""
    answer = str(row["gold"])
    if row["options"]:
        index = string.ascii_uppercase.find(answer.strip("() ").upper() or "?")
        if len(answer.strip("() ")) != 1 or not 0 <= index < len(row["options"]):
            last = chr(64 + len(row["options"]))
            raise ValueError(f"row {row['id']}: gold {answer!r} is no letter from A to {last}: correct gold or options")
        answer = f"({string.ascii_uppercase[index]}) {row['options'][index]}"
    scene = row.get("scene")
    block = "<scene>" + json.dumps(scene).replace("</", "<\\/") + "</scene>\n" if scene is not None else ""
    return f"{block}<answer>{answer}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# Format and count (2.1)

ID = re.compile(r"[a-zA-Z_]+\.\d+")  # \d: any Unicode digit, as upstream


def is_valid_id(value: object) -> bool:
    return isinstance(value, str) and ID.fullmatch(value) is not None


def _is_box(box: object) -> bool:
    return isinstance(box, (list, tuple)) and len(box) == 4 and set(map(type, box)) <= {int, float, bool}


def is_valid_object(item: object) -> bool:
    """A dict of exactly `id` and `bbox` (1.1)."""
    return isinstance(item, dict) and len(item) == 2 and is_valid_id(item.get("id")) and _is_box(item.get("bbox"))


def is_valid_relation(item: object) -> bool:
    """A dict with two ids and a text as predicate; more keys are fine (1.1)."""
    return (isinstance(item, dict) and isinstance(item.get("predicate"), str)
            and is_valid_id(item.get("subject")) and is_valid_id(item.get("object")))  # fmt: skip


def is_valid_scene(scene: dict) -> bool:
    objects, relations = scene.get("objects", []), scene.get("relationships", [])
    if not (scene and isinstance(objects, list) and isinstance(relations, list)):
        return False
    if not (all(map(is_valid_object, objects)) and all(map(is_valid_relation, relations))):
        return False
    return len({item["id"] for item in objects}) == len(objects)


def format_score(response: str, scene: dict) -> float:
    """1.0 if each of the four blocks is there, each opening tag occurs once, and the scene obeys the grammar (2.1)."""
    blocks = all(response.count(f"<{tag}>") == 1 and _inside(response, tag) is not None for tag in TAGS)
    return float(blocks and is_valid_scene(scene))


def count_score(scene: dict, gold: dict, *, objects_share: float = W_OBJECTS) -> float:
    """How near the numbers of objects and relations are to gold's, in [0, 1] (2.1)."""
    objects, want = scene.get("objects"), gold.get("objects")
    if not (isinstance(objects, list) and isinstance(want, list)):
        return 0.0
    relations, wanted = scene.get("relationships"), gold.get("relationships")
    p = len(relations) if isinstance(relations, list) else 0
    g = len(wanted) if isinstance(wanted, list) else 0
    by_objects = max(0.0, 1 - abs(len(objects) - len(want)) / max(len(want), 1))
    if g == 0:
        return by_objects
    return objects_share * by_objects + (1 - objects_share) * max(0.0, 1 - abs(p - g) / g)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes: x1, y1, x2, y2. Plain Python: for the five objects of a scene numpy's overhead would exceed the arithmetic.


def _boxes(items: list[dict], size: tuple) -> list[tuple]:
    """The boxes as shares of the picture's width and height."""
    wide, high = size
    boxes = [item["bbox"] for item in items]
    try:
        return [(x1 / wide, y1 / high, x2 / wide, y2 / high) for x1, y1, x2, y2 in boxes]
    except OverflowError:  # an integer of hundreds of digits
        return [tuple(min(max(x, -1e308), 1e308) / side for x, side in zip(box, (wide, high) * 2)) for box in boxes]


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
# Similarity of two cleaned labels: 1.0 for equal token sequences. Any such function may be given to the reward.


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


def _first(items: list, gold: list) -> list:
    """The predictions that take part in matching. With thousands of them the count term is 0 already; without this
    bound one response could cost minutes. At most 1,000, fewer only where gold has over 50 objects (223 for 223)."""
    return items[: min(MAX_OBJECTS, max(1, MAX_PAIRS // max(len(gold), 1)))]


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
# SpatialThinker


class Gold(NamedTuple):
    answer: str
    scene: dict
    objects: list
    relations: list
    labels: list[str]  # of objects
    sound: bool  # False: upstream raises on it


def _is_gold_object(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("id"), str) and _is_box(item.get("bbox"))


def _is_gold_relation(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(k), str) for k in ("subject", "predicate", "object"))


@lru_cache(maxsize=2048)  # the G completions of a prompt share one gold text
def _read_gold(gold: str) -> Gold:
    scene = extract_scene(gold)
    objects, relations = scene.get("objects") or [], scene.get("relationships") or []
    sound = isinstance(objects, list) and isinstance(relations, list)
    sound = sound and all(map(_is_gold_object, objects)) and all(map(_is_gold_relation, relations))
    labels = [_name(item["id"]) for item in objects] if sound else []
    return Gold(extract_answer(gold), scene, objects, relations, labels, sound)


def _is_size(size) -> bool:
    return size is not None and len(size) == 2 and all(0 < abs(side) < 1e300 for side in size)


def _mend_boxes(boxes: list[tuple]) -> list[tuple]:
    clipped = [[min(max(0.0, x), 1.0) for x in box] for box in boxes]  # max(0.0, nan) is 0.0
    return [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in clipped]


def _mend_floor(mapped: float) -> float:
    return min(max(2 * mapped - 1, 0.0), 1.0)


def _mend_relations(boxes: float, relations: list[dict], gold: list[dict]) -> float:
    # Exact triplets: by the published similarity 'bike behind man' would still be worth 0.46 of 'man behind bike'.
    return W_OBJECTS * boxes + W_RELATIONS * _f1(_triplets(relations), _triplets(gold)) if gold else boxes


def _mend_empty(objects: list, gold: Gold) -> float:
    return float(bool(gold.scene) and not objects)


def spatial_score(scene: dict, gold: Gold, size: tuple, *, corrected: bool, similarity) -> float:
    """Mean mapped CIoU over gold objects, unmatched ones 0 (2.1). scene must be valid, see is_valid_scene()."""
    objects, relations = scene.get("objects", []), scene.get("relationships", [])
    if not gold.sound:
        return 0.0
    if not gold.objects:
        return _mend_empty(objects, gold) if corrected else float(bool(gold.relations) or not objects)
    if not objects or not _is_size(size):
        return 0.0
    objects = _first(objects, gold.objects)
    boxes, gold_boxes = _boxes(objects, size), _boxes(gold.objects, size)
    if corrected:
        boxes, gold_boxes = _mend_boxes(boxes), _mend_boxes(gold_boxes)
    labels = [_name(item["id"]) for item in objects]
    matched = match_objects(labels, boxes, gold.labels, gold_boxes, similarity=similarity)
    found = [_mend_floor(pair[1]) if corrected else pair[1] for pair in matched if pair]
    score = sum(found) / len(gold.objects)
    return _mend_relations(score, relations, gold.relations) if corrected else score


def spatialthinker_reward(
    response: str, gold: str, size: tuple, *, mode="upstream", similarity=lexical, options: tuple[str, ...] = (),
    objects_share: float = W_OBJECTS, gates: bool = True,
) -> dict[str, float]:  # fmt: skip
    """The SpatialThinker reward (2.1): 0.1 format + 0.2 count + 0.5 accuracy + 0.2 spatial.

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
    if corrected:
        right = grade_choice(response, list(options), want.answer) if options else _mend_answer(answer, want.answer)
    else:
        right = answer.lower() == want.answer.lower()
    paid = right if gates else is_valid_scene(scene)
    spatial = spatial_score(scene, want, size, corrected=corrected, similarity=similarity) if paid else 0.0
    total = W_FORMAT * formed + W_COUNT * count + W_ACCURACY * right + W_SPATIAL * spatial
    return {"total": total, "format": float(formed), "count": count, "accuracy": float(right), "spatial": spatial}


def _is_corrected(mode: str) -> bool:
    if mode not in MODES:
        raise ValueError(f"unknown reward mode {mode!r}: choose one of {', '.join(MODES)}")
    return mode == "corrected"


# ---------------------------------------------------------------------------------------------------------------------
# Vanilla GRPO (2.3) and its scene form (2.4)

SPACES = re.compile(r"\s*")


def _are_blocks(text: str, tags: tuple) -> bool:
    """Whether the whole text is <a>..</a> <b>..</b> in this order with only whitespace between. One pass: if any split
    into blocks exists, the one that takes each joint as early as possible does."""
    if not text.startswith(f"<{tags[0]}>"):
        return False
    at = len(tags[0]) + 2
    for left, right in zip(tags, tags[1:]):
        while True:
            at = text.find(f"</{left}>", at)
            if at < 0:
                return False
            at = SPACES.match(text, at + len(left) + 3).end()
            if text.startswith(f"<{right}>", at):
                at += len(right) + 2
                break
    end = f"</{tags[-1]}>"
    return text.endswith(end) and at <= len(text) - len(end)


def _one_line_answer(text: str) -> str | None:
    """The first answer block without a line break in it, as upstream's pattern finds it (2.3)."""
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    while 0 <= start < end:
        if text.find("\n", start, end) < 0:
            return text[start + 8 : end]
        start = text.find("<answer>", text.rfind("\n", start, end))  # what opens before that break fails alike
        end = text.find("</answer>", start) if start >= 0 else -1
    return None


def vanilla_reward(
    response: str, gold: str, *, scene: bool = False, mode: str = "upstream", options: tuple[str, ...] = ()
) -> dict[str, float]:
    """Vanilla GRPO's reward: 0.5 accuracy + 0.5 format, without a gate (2.3); scene=True: four blocks in order, and
    nothing at all without them (2.4). options: as in spatialthinker_reward(). Upstream accuracy is grade_math() resp.
    equality of the answer blocks.
    Returns total, format, accuracy. Raises ValueError for an unknown mode."""
    corrected = _is_corrected(mode)
    formed = _are_blocks(_mend_blocks(response) if corrected else response, TAGS if scene else ("think", "answer"))
    if corrected and options:
        right = grade_choice(response, list(options), extract_answer(gold) or gold)
    elif corrected:
        found = _inside(response, "answer")
        right = _mend_answer(response if found is None else found, extract_answer(gold) or gold)
    elif scene:
        right = extract_answer(response).lower() == extract_answer(gold).lower()
    else:
        found, want = _one_line_answer(response), _one_line_answer(gold)
        right = grade_math(response if found is None else found, gold if want is None else want)
    right = right and (formed or not scene)
    return {"total": 0.5 * right + 0.5 * formed, "format": float(formed), "accuracy": float(right)}


def _mend_blocks(response: str) -> str:
    return response.strip()


# Penalties in [-1, 0], which any reward may add (train_grpo.py --part-weights)


def overlong_penalty(tokens: int, limit: int, buffer: int) -> float:
    """DAPO's (arXiv 2503.14476, 3.4): 0 up to limit - buffer tokens, then down in a straight line to -1 at the limit."""
    return -min(1.0, max(0.0, (tokens - (limit - buffer)) / max(1, buffer)))


def repetition_penalty(text: str, n: int = 4) -> float:
    """Minus the share of n-grams of words that stood in the text before; 0 for a text of at most n words."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


UNITS = "degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
UNIT = re.compile(rf"(?:{UNITS})(?:es)?s? *(?:\^[0-9]+)?|\^ *\\circ")
FRACTION = re.compile(r"\\[td]?frac *(?:\{([^{}]*)\}|(\w)) *(?:\{([^{}]*)\}|(\w))")
TEXT_WRAP = re.compile(r"\\text\{(.+?)\}", re.DOTALL)


def _tight(answer: str) -> str:
    """First normal form of 2.3: no LaTeX decoration, spaces, percent signs, leading `x=`; case and units are kept."""
    wrapped = TEXT_WRAP.fullmatch(answer.strip())
    answer = (wrapped.group(1) if wrapped else answer).strip()
    for drop in ("\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", "%"):
        answer = answer.replace(drop, "")
    head, equals, tail = answer.partition("=")
    answer = tail if equals and len(head) <= 2 and "=" not in tail else answer
    answer = FRACTION.sub(r"\1\2/\3\4", answer.split("\\text{ ")[0].replace(" ", ""))
    return "1/2" if answer == "0.5" else answer


def _loose(answer: str) -> str:
    """Second normal form of 2.3: lower case without spaces, units, currency and percent; 'and', 'or' are commas."""
    wrapped = TEXT_WRAP.fullmatch(answer)
    answer = wrapped.group(1) if wrapped else answer
    for old, new in (("\\%", ""), ("\\$", ""), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , ")):
        answer = answer.replace(old, new)
    for word, power in (("million", 6), ("billion", 9), ("trillion", 12)):
        answer = answer.replace(word, f"*10^{power}")
    answer = UNIT.sub("", answer)
    answer = _whole(answer)
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


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS[ast.Pow] = math.pow


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
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp):
        return _evaluate(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.Name) and len(node.id) == 1:
        return ord(node.id) ** 0.7390851
    raise ValueError(f"no arithmetic: {type(node).__name__}")


def _same_value(given: str, gold: str) -> bool:
    a, b = _value(given), _value(gold)
    fractions = all(re.fullmatch(r"-?[0-9]+/[0-9]+", text) for text in (given, gold))  # 2/4 is not taken for 1/2
    one_whole = given.lstrip("-").isdigit() != gold.lstrip("-").isdigit()  # nor an expression for a whole number
    return not (a is None or b is None or fractions or one_whole) and math.isclose(a, b, rel_tol=1e-13)


def grade_math(given: str, gold: str) -> bool:
    """mathruler's grade_answer without sympy (2.3): equal in one of two normal forms, or equal in value.

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
    text = ARTICLE.sub("", text, count=1) if ARTICLE.match(text) else text
    return str(NUMBER_WORDS.get(text, text))


def read_number(text: str) -> float | None:
    """The number a text states: its first word if that is one, else the last number in it. Sign, thousands, exponent
    and number words are read, units ignored; None without a number."""
    text = text[-2000:].strip(EDGES.replace(".", ""))
    found = [(m.start(), float(m.group().replace(",", "").replace("\u2212", "-"))) for m in NUMBER.finditer(text)]
    if not found:
        for m in NUMBER_WORD.finditer(text):
            found.append((m.start(), float(sum(NUMBER_WORDS[w] for w in re.split("[- ]", m.group().lower())))))
    found = [(at, value) for at, value in found if math.isfinite(value)]
    return (found[0] if found[0][0] == 0 else found[-1])[1] if found else None


def _split_letter(answer: str) -> tuple[str, str]:
    """'(b) Left.' -> ('B', 'left'); ('', 'left') where no letter stands in front."""
    m = LETTER.match(answer)
    return (m.group(m.lastindex).upper(), plain(answer[m.end() :])) if m else ("", plain(answer))


def _same_text(given: str, gold: str) -> bool:
    number = read_number(gold) if NUMBER.fullmatch(gold) else None
    return given == gold or number is not None and read_number(given) == number


def _mend_answer(given: str, gold: str) -> bool:
    """Whether an answer names gold's letter or gold's text and contradicts neither."""
    (letter, text), (gold_letter, gold_text) = _split_letter(given), _split_letter(gold)
    if letter and gold_letter:
        return letter == gold_letter and (not text or not gold_text or _same_text(text, gold_text))
    return bool(text) and _same_text(text, gold_text)


def _final(text: str) -> str:
    """The part of a response that holds the answer: the last answer block (also when one of its tags is missing), else
    what follows the reasoning; of that, what follows the last `Answer:` (5.4 no. 1)."""
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + 8 :].partition("</answer>")[0]
    elif "</answer>" in text:
        text = text[: text.rfind("</answer>")]
    after = text[text.rfind("</think>") + 8 :] if "</think>" in text else text
    text = (after if after.strip() else text).replace("<s>", "").replace("</s>", "")
    after = re.split("answer:", text, flags=re.IGNORECASE)[-1]
    return after if after.strip(EDGES) else text


STATED = re.compile(r"\b(?:answer|option|choice)\b\W{0,3}?(?:(?:is|would be|should be|must be)\b|:|(?=\())", re.I)
BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]{1,200})\}")
BOLD = re.compile(r"\*\*([^*]{1,200})\*\*")
NAMED = re.compile(r"\(([A-Za-z])\)|\b(?:[Oo]ption|[Cc]hoice) ([A-Z])\b")
DENIED = re.compile(r"(?:\bnot|n't|\bneither|\bnor)\W+(?:\w+\W+)?\Z", re.IGNORECASE)
LAST_LETTER = re.compile(r"\b(?:is|be|choose|pick|with) ([A-Z])\W{0,3}\Z")
OTHERS = re.compile(r"(?:and|or|nor|/|&)\W{0,3}([A-Za-z])(?![A-Za-z])")
CLAUSE_END = re.compile(r"[.,;:!\n]+(?:\s|\Z)")


def _by_text(text: str, options: tuple) -> set[str]:
    """The letters of the options that equal a text or its first clause."""
    readings = (plain(text), plain(CLAUSE_END.split(text, maxsplit=1)[0]))
    return {chr(65 + i) for i, option in enumerate(options) if option and option in readings}


def _leading(text: str, options: tuple, *, letter_form: re.Pattern = LETTER) -> set[str]:
    """The letters that the beginning of a text names, by letter or by an option's text. Two are a contradiction."""
    head = text[:400]
    by_text = _by_text(head, options)
    m = letter_form.match(head)
    letter = m.group(m.lastindex).upper() if m else ""
    if not letter or ord(letter) - 65 >= (len(options) or 8):
        return by_text
    rest = head[m.end() :]
    if other := OTHERS.match(rest):  # 'A and B'
        return {letter, other.group(1).upper()}
    if by_text and rest:  # 'C is closer' can be an option's own text
        return by_text
    beside = _by_text(rest, options)
    return by_text | {letter} | (set() if letter in beside else beside)


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
    return "?" if DENIED.search(span[max(0, m.start() - 20) : m.start()]) else ""


def _readings(span: str, options: tuple):
    """Sets of letters, from the surest way to read an answer to the weakest."""
    boxed = [m.group(1) for m in BOXED.finditer(span)]
    yield _leading(boxed[-1], options, letter_form=STATED_LETTER) if boxed else set()
    for m in list(STATED.finditer(span))[:-20:-1]:  # 'I hope this answer is helpful' names nothing: go back
        tail = span[m.end() : m.end() + 400]
        yield set() if _denied(span, m) else _leading(tail, options, letter_form=STATED_LETTER)
    lines = span.strip().rsplit("\n", 1)
    yield _leading(lines[0], options) | (_leading(lines[-1], options) if len(lines) > 1 else set())
    bold = [m.group(1) for m in BOLD.finditer(span)]
    yield _leading(bold[-1], options) if bold else set()
    flat = " ".join(span.lower().split())
    yield {
        chr(65 + i) for i, option in enumerate(options)
        if option and option in flat and re.search(rf"\b{chr(97 + i)}[.):]+ ?{re.escape(option)}(?!\w)", flat)
    }  # fmt: skip
    named = set()
    for m, _ in zip(NAMED.finditer(span), range(100)):
        named |= {(m.group(1) or m.group(2)).upper(), *_denied(span, m)}
    if m := LAST_LETTER.search(span):
        named.add(m.group(1))
    yield named
    yield _mentioned(flat, options)


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


# ---------------------------------------------------------------------------------------------------------------------
# Graders: the one way a score is computed, in training, validation and evaluation


def _gold_letter(gold: str, options: list[str]) -> str | None:
    letter = gold.strip(EDGES).upper()
    return letter if len(letter) == 1 and letter.isalpha() else extract_choice(gold, options)


def grade_choice(text: str, options: list[str], gold: str) -> bool:
    """Whether a response chooses gold: a letter in any dress, or the text of an option."""
    letter = extract_choice(text, options)
    return letter is not None and letter == _gold_letter(gold, options)


def grade_number(text: str, gold: str) -> bool:
    """Whether a response states gold's number."""
    number, want = read_number(_final(text)), read_number(gold)
    return number is not None and want is not None and math.isclose(number, want, rel_tol=1e-9, abs_tol=1e-9)


def grade_regression(text: str, gold: str) -> float:
    """1 minus the relative error of the response's number, in [0, 1]."""
    number, want = read_number(_final(text)), read_number(gold)
    if number is None or want is None:
        return 0.0
    return float(number == want) if want == 0 else min(max(1 - abs(number - want) / abs(want), 0.0), 1.0)


YES_NO = re.compile(r"\b(yes|no)\b")


def grade_yes_no(text: str, gold: str) -> bool:
    """Whether the first yes or no of a response is gold's."""
    said = YES_NO.search(_final(text).lower())
    return said is not None and said.group(1) == plain(gold)


def grade_text(text: str, gold: str) -> bool:
    """Equal texts, but for case, spacing, a letter in front, an article, punctuation at the ends; yes or no is read
    by grade_yes_no()."""
    return grade_yes_no(text, gold) if plain(gold) in ("yes", "no") else _mend_answer(_final(text), gold)


MRA_BOUNDS = (1 - np.linspace(0.5, 0.95, 10)).tolist()  # these very floats decide at errors of exactly 5, 10, ... %


def mean_relative_accuracy(pred: float, target: float, *, mode: str = "corrected") -> float:
    """The share of ten thresholds 0.50, 0.55, ... 0.95 with relative error <= 1 - threshold (spacer 2.3), in [0, 1].

    A target of 0 is compared by the absolute error, as SPAR-Bench does (spacer 5.4). mode="upstream", that of SpaceR's
    training and VSI-Bench: a negative target divides as it is, and 0, where it raises, gives 0."""
    error = abs(pred - target)
    if _is_corrected(mode):
        error = error / abs(target) if target else error
    elif target:
        error /= target
    else:
        return 0.0
    return sum(error <= bound for bound in MRA_BOUNDS) / len(MRA_BOUNDS)


def _grade_choice_row(row: dict, text: str) -> tuple[bool, str | None]:
    letter = extract_choice(text, row["options"])
    return letter is not None and letter == _gold_letter(row["gold"], row["options"]), letter


def _grade_number_row(row: dict, text: str) -> tuple[bool | float, str | None]:
    number = read_number(_final(text))
    grader = grade_regression if row["kind"] == "regression" else grade_number
    return grader(text, row["gold"]), None if number is None else f"{number:g}"


def _grade_mra_row(row: dict, text: str) -> tuple[float, str | None]:
    number, want = read_number(_final(text)), read_number(row["gold"])
    if number is None or want is None:
        return 0.0, None
    return mean_relative_accuracy(number, want), f"{number:g}"


def _grade_yes_no_row(row: dict, text: str) -> tuple[bool, str | None]:
    said = YES_NO.search(_final(text).lower())
    return grade_yes_no(text, row["gold"]), said and said.group(1)


def _grade_text_row(row: dict, text: str) -> tuple[bool, str | None]:
    return grade_text(text, row["gold"]), _final(text).strip() or None


MOVE = re.compile(r"\b(move|rotate)[ _](right|left|up|down|forward|backward)\s*[:=]\s*([-+]?[0-9]*\.?[0-9]+)", re.I)
AXES = (("move_right", "move_left"), ("move_up", "move_down"), ("move_forward", "move_backward"),
        ("rotate_right", "rotate_left"), ("rotate_up", "rotate_down"))  # fmt: skip


def _net_moves(moves: dict[str, float]) -> list[float]:
    return [moves.get(plus, 0.0) - moves.get(minus, 0.0) for plus, minus in AXES]


def _grade_view_row(row: dict, text: str) -> tuple[float, str | None]:
    """A camera's move (spacer 5.4): the mean of the relative accuracies on five axes, relative to the truth."""
    said, want = ({f"{m[1]}_{m[2]}".lower(): float(m[3]) for m in MOVE.finditer(t)} for t in (_final(text), row["gold"]))
    if not said or not want:
        return 0.0, None
    scores = [mean_relative_accuracy(p, t) for p, t in zip(_net_moves(said), _net_moves(want))]
    return sum(scores) / len(scores), ",".join(f"{key}:{value:g}" for key, value in said.items())


GRADERS = {"choice": _grade_choice_row, "number": _grade_number_row, "regression": _grade_number_row,
           "text": _grade_text_row, "ocr": _grade_text_row, "mra": _grade_mra_row, "yes_no": _grade_yes_no_row,
           "view_change": _grade_view_row}  # fmt: skip


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


# ---------------------------------------------------------------------------------------------------------------------
# The published evaluations' graders, with their defects: to re-derive published numbers, not to believe them. Each takes
# a row and a text and gives (correct, what was read or None). SpatialThinker 5.4; SpaceR 5.1 to 5.7 of its own notes.


def _raw_gold(row: dict) -> str:
    """Gold as the dataset writes it: some of these rules fail on that."""
    return str((row.get("meta") or {}).get("raw_gold", row["gold"]))


def _published_evals(row: dict, text: str) -> tuple[bool, str | None]:
    """SpatialThinker, sets with choices: an option's text counts, anything else is taken for A (5.4 no. 2)."""
    given = _evals_span(text)
    if given is None:
        return False, None
    gold, options = _raw_gold(row).replace("(", "").replace(")", "").strip(), [o.lower() for o in row["options"]]
    gold = gold[0].lower() if len(gold) > 1 else gold
    if options:
        named = re.sub(r"^\([A-Za-z]\)\s*", "", given).replace("{", "").replace("}", "").lower()
        given = chr(65 + options.index(named)) if named in options else "A"
    return _evals_equal(gold, given), given


def _published_evals_direct(row: dict, text: str) -> tuple[bool, str | None]:
    """SpatialThinker, realworld_qa, spatialbench and mmvp: the answer against the dataset's own gold (5.4 no. 3)."""
    given = _evals_span(text)
    return (False, None) if given is None else (_evals_equal(_raw_gold(row).strip(), given), given)


def _evals_span(text: str) -> str | None:
    """What that script takes for the answer; None where it says 'Failed to extract.' (5.4 no. 1)."""
    text = text.split("Answer:")[-1].strip() if "Answer:" in text else text
    if not text:
        return None
    if "<answer>" not in text:
        return text.split("</answer>")[0].strip()
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def _evals_equal(gold: str, given: str) -> bool:
    return gold.lower() == given.lower() or grade_math(gold, given) or _evals_last_resort(gold, given)


def _evals_last_resort(gold: str, given: str) -> bool:
    """Gold against what stands in the first parentheses, less a final period (5.4 no. 4)."""
    if "(" in given and ")" in given:
        given = given.split("(")[1].split(")")[0]
    return given.removesuffix(".").strip().lower() == gold.strip().lower()


def _spacer_span(text: str) -> str:
    """The first answer block, the word None for an unclosed one, the whole text without a tag (5.1)."""
    if "<answer>" not in text:
        return text
    found = _inside(text, "answer")
    return "None" if found is None else found


def spacer_number(text: str) -> float | None:
    """SpaceR's reader of numbers (2.3): the first of its number words, in the order of its table and anywhere in the
    text, 'a' and 'an' among them; else the first digits, without sign, comma or exponent."""
    text = text.strip().lower()
    words = set(SPACER_WORD.findall(text))
    if words:
        return float(next(value for word, value in SPACER_WORDS.items() if word in words))
    found = re.search(r"\d+(?:\.\d+)?", text)
    return float(found.group()) if found else None


SPACER_WORDS = {word: NUMBER_WORDS[word] for word in [*ONES[1:], *TENS, "zero"]} | {"a": 1, "an": 1}
SPACER_WORD = re.compile(rf"\b(?:{'|'.join(SPACER_WORDS)})\b")


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
    """The letter by the first of STI-Bench's six patterns that hits (5.3)."""
    return next((m.group(1).upper() for pattern in STI_LETTERS if (m := pattern.search(text))), None)


def _published_sti(row: dict, text: str) -> tuple[bool, str | None]:
    given = _spacer_span(text)
    given = sti_letter(given) or given.strip()
    return given == row["gold"], given or None


def _published_spar(row: dict, text: str) -> tuple[bool | float, str | None]:
    """An empty answer is right, a choice's text may be part of gold; moves are judged relative to the prediction (5.4)."""
    given, gold = _spacer_span(text), _raw_gold(row)
    if row["kind"] == "view_change":
        return _spar_moves(given, gold), given or None
    if row["kind"] == "mra":
        numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", given)
        if not numbers:
            return 0.0, None
        number = float(numbers[-1 if row["category"].endswith("_mv") else 0])
        return mean_relative_accuracy(number, float(gold)), f"{number:g}"
    given, gold = given.lower(), gold.lower()
    return given in gold or given[0] == gold, given or None


def _spar_moves(given: str, gold: str) -> float:
    try:
        pairs = [[part.split(":") for part in text.split(",")] for text in (given, gold)]
        said, want = ({key: float(value) for key, value in parts} for parts in pairs)
    except ValueError:
        return 0.0
    scores = [mean_relative_accuracy(t, p) for p, t in zip(_net_moves(said), _net_moves(want))]
    return sum(scores) / len(scores)


STOCK = ("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
         "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:")  # fmt: skip


def first_capital(text: str, letters: str) -> str:
    """Video-MME's and LongVideoBench's letter: the first of these capitals anywhere, stock phrases removed (5.5, 5.6)."""
    text = text.strip()
    for phrase in (*STOCK, "The correct answer", "The correct option")[: None if letters == "ABCD" else len(STOCK)]:
        text = text.replace(phrase, "")
    found = re.search(f"[{letters}]", text)
    return found.group() if found else ""


def _published_video(row: dict, text: str, letters: str) -> tuple[bool, str | None]:
    given = first_capital(_spacer_span(text), letters)
    return given == row["gold"], given or None


def _published_tempcompass(row: dict, text: str) -> tuple[bool, str | None]:
    given, gold = _spacer_span(text), _raw_gold(row)
    letter = re.match(r"([A-D])(?:[.)]|\Z)", given)
    return given == gold or letter is not None and letter.group(1) == gold[:1], given or None


def tempcompass_yes_no(text: str) -> str | None:
    """TempCompass' own reader: a text that begins with yes or no (5.7)."""
    return next((word for word in ("yes", "no") if text.lower().startswith(word)), None)


def tempcompass_caption(text: str, question: str, answer: str) -> bool | None:
    """TempCompass' own rule for matching captions (5.7): whether the text is the option, its sentence or its name;
    None if it is none of them. question: one option a line below the first line, `Caption A: sentence`."""
    lines = [line for line in question.split("\n")[1:] if ": " in line]
    names, sentences = ([line.split(": ")[part] for line in lines] for part in (0, 1))
    names += [re.sub("Sentence |Option |Caption ", "", name) for name in names]
    named = next((line for line in lines if line == text), None)
    named = next((s for s in sentences if s == text or ") " in text and s == text.split(") ")[1]), named)
    named = next((name for name in names if name in (text, text.replace(".", ""))), named)
    gold = [*answer.split(": "), ""]
    return None if named is None else named in (answer, answer.split(":")[0], gold[1], *gold[0].split()[1:2])


PUBLISHED = {
    "evals": _published_evals, "evals-direct": _published_evals_direct, "vsi-bench": _published_vsi,
    "sti-bench": _published_sti, "spar-bench": _published_spar, "tempcompass": _published_tempcompass,
    "video-mme": partial(_published_video, letters="ABCD"), "longvideobench": partial(_published_video, letters="ABCDE"),
}  # fmt: skip


def scene_metrics(response: str, gold_scene: dict, size: tuple) -> dict[str, float | None]:
    """How good a predicted scene graph is, apart from any reward: all in [0, 1], and 1 if both scenes are empty.

    iou: mean over gold objects, each matched to at most one prediction of its label; ciou: mean plain CIoU (below 0 for
    far-off boxes) of those so matched, None without any; object_f1: of labels as multisets; relation_f1: of (subject
    label, predicate, object label). Boxes in pixels of a picture of size (W, H), mended as in
    corrected mode. Unreadable predictions are left out."""
    predicted = (extract_scene(response), is_valid_object, is_valid_relation)
    sides = []
    for graph, is_object, is_relation in (predicted, (gold_scene, _is_gold_object, _is_gold_relation)):
        objects, relations = graph.get("objects"), graph.get("relationships")
        objects = [x for x in objects if is_object(x)] if isinstance(objects, list) else []
        sides.append((objects, [x for x in relations if is_relation(x)] if isinstance(relations, list) else []))
    (objects, relations), (gold_objects, gold_relations) = sides
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
# SpaceR (arXiv 2504.01805): video questions, and a map of the room as an intermediate step. Section numbers in this part
# are those of SpaceR's specification notes.
#
# mode="upstream": the published training code's numbers. mode="corrected" mends these defects, a name each:
#
#   _mend_gate       a worthless map, or one where no gold map exists, leaves a right answer its worth   (2.4, 2.6 no. 1)
#   _mend_chance     the map score of a random map is 0 on average, not 0.6; so is that of a left-out category     (2.4)
#   _mend_names      gold categories with capitals match                                                   (2.6 no. 7)
#   _mend_number     the number that an answer states is read; targets of 0 and below work          (2.6 nos. 2 and 3)
#   _mend_regression an exact answer is 1, also 0 for 0; units behind a number do no harm                  (2.6 no. 4)
#   _mend_rouge      an equal text is 1, also of one word, also in Chinese                                 (2.6 no. 5)
#   _mend_choice     a letter in any dress, or the option's text; no answer is wrong, whatever gold is     (2.6 no. 6)
#
# and _mend_blocks of the other rewards. Not mended, for want of the question's unit: 150 cm for 1.5 m.

GRID = 10
MAX_TEXT = 20_000  # characters of a map or of a free-form answer that are read; 1,024 tokens have about 5,000
FAR = 10**9  # coordinates beyond it are moved there: their distance scores 0 all the same
MAP_GATE, SHUFFLED_SHARE, LIVE = 0.5, 0.8, 0.1
TEMPORAL_BONUS, LENGTH_BONUS, LENGTHS = 0.3, 0.2, (320, 512)
PROBLEM_TYPES = {"choice": "multiple choice", "mra": "numerical", "number": "numerical", "ocr": "OCR",
                 "text": "free-form", "regression": "regression"}  # of the kinds of a row  # fmt: skip
MAP_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MAP_ELEMENT = re.compile(r"[<\[(]?\s*(-?\d+(?:\.\d+)?)\s*[>\])]?")
MAP_KEY = re.compile(r"[^\w\s]*([\w\s]+)[^\w\s]*")


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
    formed = _are_blocks(_mend_blocks(response) if corrected else response, ("think", "answer"))
    given, gold = extract_answer(response), extract_answer(solution)
    if corrected:
        answer = _corrected_answer(response, gold, problem_type, options)
    else:
        answer = _upstream_answer(given, gold, problem_type)
    mapped = "<map>" in response and "</map>" in response
    score = 0.0
    if mapped and gold_map is not None:
        score = map_score(parse_map(_inside(response, "map") or "", list(gold_map)), gold_map, mode=mode)
    accuracy = answer
    right = {"multiple choice": answer == 1, "numerical": answer > MAP_GATE}.get(problem_type, False)
    if mapped and right:
        accuracy = answer + score if score > 0 else _mend_gate(answer) if corrected else 0.0
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


def _upstream_answer(given: str, gold: str, problem_type: str) -> float:
    """The base reward by type (2.2); 0 where upstream raises."""
    if problem_type == "multiple choice":
        return float(given == gold)
    if problem_type == "OCR":
        return word_accuracy(given, gold)
    if problem_type == "free-form":
        return rouge(given, gold)
    if problem_type not in ("numerical", "regression"):
        return 0.0
    try:
        if problem_type == "regression":
            number, want = (float(text.replace(",", "")) for text in (given, gold))
        else:
            number, want = spacer_number(given), float(gold)
    except (ValueError, OverflowError):
        return 0.0
    if number is None or not (math.isfinite(number) and math.isfinite(want)):
        return 0.0
    if problem_type == "numerical":
        return mean_relative_accuracy(number, want, mode="upstream")
    return 1 - min(max((abs(number - want) + 1e-9) / (abs(want) + 1e-9), 0.0), 1.0)


def _corrected_answer(response: str, gold: str, problem_type: str, options: tuple) -> float:
    if problem_type == "multiple choice":
        return _mend_choice(response, gold, options)
    if problem_type == "numerical":
        return _mend_number(response, gold)
    if problem_type == "regression":
        return _mend_regression(response, gold)
    given = _final(response).strip()
    return {"OCR": word_accuracy, "free-form": _mend_rouge}.get(problem_type, lambda *_: 0.0)(given, gold)


def _mend_choice(response: str, gold: str, options: tuple) -> float:
    return float(grade_choice(response, list(options), gold) if options else _mend_answer(_final(response), gold))


def _mend_number(response: str, gold: str) -> float:
    return float(_grade_mra_row({"gold": gold}, response)[0])


def _mend_regression(response: str, gold: str) -> float:
    return grade_regression(response, gold)


def _mend_gate(answer: float) -> float:
    return answer


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


def rouge(given: str, gold: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with Porter's stemmer, in [0, 1] (2.2). Of both texts the first 20,000
    characters count. Raises ImportError with the cure without rouge-score."""
    scores = _rouge_scorer(False).score(gold[:MAX_TEXT], given[:MAX_TEXT])
    return min(max(sum(part.fmeasure for part in scores.values()) / len(scores), 0.0), 1.0)


def _mend_rouge(given: str, gold: str) -> float:
    if given.split() == gold.split():
        return float(bool(gold))
    scores = _rouge_scorer(True).score(gold[:MAX_TEXT], given[:MAX_TEXT])
    if len(WORDS.findall(gold)) < 2:
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


# Maps


def parse_map(text: str, names: list[str]) -> dict[str, list[list[int]]]:
    """The map that a text states, {name in lower case: [[x, y], ...]} in cells, for these categories only (2.4).

    A Python or JSON dict, or else prose: each name owns the numbers up to the next name. Cells are cut to whole numbers
    towards 0 and not checked against the grid. Of the text the first 20,000 characters count."""
    text = text[:MAX_TEXT].strip()
    known = {name.lower() for name in names if isinstance(name, str) and name}
    if not text or not known:
        return {}
    if text.startswith("str{") and text.endswith("}") and text[4:-1].startswith("{") and text[4:-1].endswith("}"):
        text = text[4:-1]
    found = None
    if text.startswith("{") and text.endswith("}"):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal: read as prose
            pass
    if not isinstance(found, dict):
        return _map_of_prose(text, sorted(known))
    points: dict[str, list[list[int]]] = {}
    for key, value in found.items():
        key = str(key).lower().strip()
        peeled = MAP_KEY.fullmatch(key)
        key = peeled.group(1) if peeled else key
        spots = [_spot(item) for item in (value if isinstance(value, list) else [value])]
        if key in known and any(spots):
            points.setdefault(key, []).extend(spot for spot in spots if spot)
    return points


def _spot(item: object) -> list[int] | None:
    """[x, y] of a pair, of a pair wrapped once, or of a text with two numbers; None for anything else."""
    if isinstance(item, str):
        numbers = MAP_NUMBER.findall(item)[:2]
        return [_cell(float(number)) for number in numbers] if len(numbers) == 2 else None
    if isinstance(item, (list, tuple)) and len(item) == 1:
        item = item[0]
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return None
    values = []
    for element in item:
        if isinstance(element, str) and (number := MAP_ELEMENT.fullmatch(element.strip())):
            element = float(number.group(1))
        if not isinstance(element, (int, float)):
            return None
        values.append(_cell(element))
    return values


def _cell(value: float) -> int:
    return int(min(max(-FAR, value), FAR))


def _map_of_prose(text: str, names: list[str]) -> dict[str, list[list[int]]]:
    matches = [
        (m.start(), -m.end(), name) for name in names
        for m in re.finditer(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])", text, re.IGNORECASE)
    ]  # fmt: skip
    kept: list[tuple[int, int, str]] = []  # (start, end, name)
    for start, end, name in sorted(matches):
        if not kept or start >= kept[-1][1]:
            kept.append((start, -end, name))
        elif -end > kept[-1][1]:  # overlaps the one before and reaches further
            kept[-1] = (start, -end, name)
    points: dict[str, list[list[int]]] = {}
    for (_, end, name), after in zip(kept, [*kept[1:], (len(text), 0, "")]):
        numbers = [_cell(float(number)) for number in MAP_NUMBER.findall(text, end, after[0])]
        pairs = [list(pair) for pair in zip(numbers[::2], numbers[1::2])]
        if pairs:
            points.setdefault(name, []).extend(pairs)
    return points


def map_score(pred: dict, gold: dict, grid: int = GRID, *, mode: str = "upstream") -> float:
    """How well a map's points lie, in [0, 1]: each category's points matched greedily to gold's by distance, a pair worth
    1 - distance / diagonal, the mean over gold's instances (2.4). Both {category: [[x, y], ...]} in cells of a grid x
    grid map. Gold without any instance: 1 for an empty prediction, else 0, where upstream raises.

    mode="corrected": each predicted category less what a random map gets, and so 0 for chance; below 0 in all is 0."""
    corrected = _is_corrected(mode)
    if corrected:
        pred, gold = _mend_names(pred), _mend_names(gold)
    weight = sum(len(spots) for spots in gold.values())
    if weight == 0:
        return float(not pred)
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
