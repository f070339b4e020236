"""Procedural scenes: flat pictures with an exact scene graph and a question whose answer follows from the boxes.

    python -m data.scenes --out DIR --n 5000 --val 500 --level demo --seed 0     STVQA-schema parquet files
    python -m data.scenes --show sheet.png                                       twelve scenes to look at
    python -m data.scenes --bench                                                scenes drawn per second

Boxes are [x1, y1, x2, y2] in pixels, x2 and y2 one past the last pixel drawn, so width = x2 - x1. A centre is
((x1 + x2) // 2, (y1 + y2) // 2). With these two sentences every answer can be recomputed from boxes alone.

Three rules keep the world honest:
  1. The options are drawn first, the right one uniformly among them, and only then a scene that makes it right. So
     letter, option texts and question say nothing about the answer: a blind guess is at chance.
  2. Near ties are not asked: every question keeps a margin (a knob), and where boxes and drawn pixels could disagree
     (which of two shapes is larger, do they touch) both must say the same.
  3. Integers only, on PCG64's raw stream, which NumPy keeps stable (NEP 19; Generator's own methods may change): one
     seed gives one picture, byte for byte, on every machine.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 45, 40), "green": (50, 165, 65), "blue": (45, 85, 215),
    "yellow": (240, 220, 50), "purple": (145, 55, 185), "orange": (245, 140, 35),
    "cyan": (60, 205, 215), "pink": (250, 150, 200), "white": (248, 248, 248), "black": (22, 22, 22),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
DIRECTIONS = ("left of", "right of", "above", "below")
CONTACTS = ("overlapping", "touching", "apart from")
CELLS = {  # parts of the picture, row by row, for a grid of 2 x 2 and of 3 x 3
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top center", "top right", "middle left", "center", "middle right",
        "bottom left", "bottom center", "bottom right"),
}  # fmt: skip
CATEGORIES = ("relation", "size", "count", "existence", "instance_location")

_DEMO = {
    "width": 112, "height": 112,
    "objects": [2, 4],              # how many, lowest and highest
    "side": [14, 34],               # pixels
    "shapes": ["circle", "square", "triangle", "diamond"],
    "colours": ["red", "green", "blue", "yellow", "purple", "orange"],
    "gap": 2,                       # least number of free pixels between two boxes, if they may not overlap
    "overlap": 0,                   # at most so many percent of the smaller box shared with another; 0: gap holds
    "noise": 10, "texture": 6, "tint": 8,   # amplitudes: every pixel, blotches of the background, colour of an object
    "margin": 6,                    # relation: least ||dx| - |dy||, or pixels of overlap, or of gap
    "size_margin": 4,               # size: least difference of sides
    "grid": 2, "grid_margin": 5,    # location: parts across and down, least distance of a centre from their borders
    "count_max": 4, "count_by": ["name"],   # "name": red circles; "colour": red shapes; "shape": circles
    "contact": 0,                   # percent of the relation questions that ask about overlapping and touching
    "smallest": 0,                  # percent of the size questions that ask for the smallest
    "options": {"relation": [4, 4], "size": [2, 2], "count": [4, 4], "existence": [2, 2], "instance_location": [4, 4]},
    "mix": {"relation": 48, "size": 13, "count": 13, "existence": 13, "instance_location": 13},
}  # fmt: skip
LEVELS: dict[str, dict] = {
    "easy": _DEMO | {
        "objects": [2, 3], "side": [22, 38], "noise": 5, "texture": 3, "margin": 16, "size_margin": 8,
        "grid_margin": 14, "count_max": 3,
        "options": {"relation": [2, 4], "size": [2, 2], "count": [2, 3], "existence": [2, 2],
                    "instance_location": [2, 4]},
    },
    "demo": _DEMO,
    "medium": _DEMO | {
        "width": 168, "height": 168, "objects": [3, 6], "side": [14, 44], "shapes": list(SHAPES[:5]),
        "colours": list(COLOURS)[:8], "noise": 18, "texture": 12, "margin": 4, "size_margin": 3, "grid": 3,
        "grid_margin": 3, "count_max": 5, "count_by": ["name", "colour", "shape"], "overlap": 20, "contact": 15,
        "smallest": 40,
        "options": {"relation": [3, 4], "size": [2, 4], "count": [4, 4], "existence": [2, 2],
                    "instance_location": [4, 4]},
    },
    "hard": _DEMO | {
        "width": 224, "height": 168, "objects": [4, 8], "side": [10, 48], "shapes": list(SHAPES),
        "colours": list(COLOURS), "noise": 30, "texture": 20, "tint": 14, "margin": 2, "size_margin": 2, "grid": 3,
        "grid_margin": 2, "count_max": 7, "count_by": ["name", "colour", "shape"], "overlap": 25, "contact": 30,
        "smallest": 50,
        "options": {"relation": [3, 4], "size": [3, 4], "count": [4, 4], "existence": [2, 2],
                    "instance_location": [4, 4]},
    },
}  # fmt: skip

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a scene must show. names: one an object, those that the question is about first.

    sides() draws as many sides (pixels), again at each attempt to place them. holds(boxes): may the answer still become
    right? asked after each object that is placed.
    """

    category: str
    task: str
    question: str
    options: list[str]
    gold: str
    names: list[str]
    relevant: list[int]
    sides: Callable[[], list[int]]
    holds: Callable[[list[Box]], bool] = lambda boxes: True


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, all that is in it, and its question.

    image: (H, W, 3) uint8. objects: [{"id": "red_circle.1", "bbox": [x1, y1, x2, y2]}], left to right. relations: every
    triple of two objects that holds by the margin. gold_scene: the part of the graph that plan.question is about.
    """

    image: np.ndarray
    objects: list[dict]
    relations: list[dict]
    gold_scene: dict
    plan: Plan


class Draw:
    """Integers from one seed: PCG64's raw 64-bit stream and nothing else (rule 3)."""

    def __init__(self, seed: int):
        self._bits = np.random.PCG64(seed)
        self._pool: list[int] = []

    def below(self, n: int) -> int:
        """0 .. n-1, uniform to within n / 2**64."""
        if not self._pool:
            self._pool = self._bits.random_raw(32).tolist()
        return (self._pool.pop() * n) >> 64

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence):
        return items[self.below(len(items))]

    def sample(self, items: Sequence, n: int) -> list:
        """n different items in random order."""
        pool = list(items)
        for i in range(n):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def noise(self, height: int, width: int, amplitude: int) -> np.ndarray:
        """(height, width) int16 in -amplitude .. amplitude (at most 60, or the product below leaves int16)."""
        raw = self._bits.random_raw(-(-height * width // 8)).astype("<u8").view(np.uint8)[: height * width]
        return ((raw.astype(np.int16) * (2 * amplitude + 1) >> 8) - amplitude).reshape(height, width)


# ---- geometry, from boxes alone --------------------------------------------------------------------------------------


def centre(box: Sequence[int]) -> tuple[int, int]:
    return (box[0] + box[2]) // 2, (box[1] + box[3]) // 2


def direction(a: Sequence[int], b: Sequence[int], margin: int = 1) -> str | None:
    """Where a is with respect to b, along the axis on which the centres differ most; None within the margin."""
    (ax, ay), (bx, by) = centre(a), centre(b)
    dx, dy = ax - bx, ay - by
    if abs(abs(dx) - abs(dy)) < margin:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def shared(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """Pixels that two boxes share along x and y; 0: they meet; negative: the gap."""
    return min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])


def contact(a: Sequence[int], b: Sequence[int]) -> str:
    x, y = shared(a, b)
    if x > 0 and y > 0:
        return "overlapping"
    return "touching" if min(x, y) == 0 and max(x, y) > 0 else "apart from"


def cell(box: Sequence[int], width: int, height: int, grid: int, margin: int = 0) -> str | None:
    """The part of the picture that holds the box's centre; None nearer than margin to an inner border."""
    spots = []
    for c, length in zip(centre(box), (width, height), strict=True):
        if any(abs(c * grid - line * length) < margin * grid for line in range(1, grid)):
            return None
        spots.append(c * grid // length)
    return CELLS[grid][spots[1] * grid + spots[0]]


# ---- drawing ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def mask(shape: str, side: int) -> np.ndarray:
    """(side, side) bool, touching all four borders. u and v are twice the distance from the middle, so integers."""
    line = 2 * np.arange(side) + 1 - side
    u, v = line[None, :], line[:, None]
    if shape == "square":
        drawn = np.ones((side, side), dtype=bool)
    elif shape == "circle":
        drawn = u * u + v * v <= side * side
    elif shape == "ring":
        drawn = (u * u + v * v <= side * side) & (4 * (u * u + v * v) >= side * side)
    elif shape == "triangle":
        drawn = 2 * np.abs(u) <= v + side + 1
    elif shape == "diamond":
        drawn = np.abs(u) + np.abs(v) <= side
    elif shape == "cross":
        drawn = (3 * np.abs(u) <= side) | (3 * np.abs(v) <= side)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    drawn.flags.writeable = False  # the cache hands the same array to everybody
    return drawn


@lru_cache(maxsize=4096)
def pixels(shape: str, side: int) -> int:
    return int(mask(shape, side).sum())


def _paint(draw: Draw, names: list[str], boxes: list[Box], order: list[int], k: dict) -> np.ndarray:
    height, width = k["height"], k["width"]
    grey = draw.between(95, 160)
    canvas = np.empty((height, width, 3), dtype=np.int16)
    canvas[:] = [grey + draw.between(-8, 8) for _ in range(3)]
    blotches = draw.noise(-(-height // 8), -(-width // 8), k["texture"])
    canvas += np.repeat(np.repeat(blotches, 8, axis=0), 8, axis=1)[:height, :width, None]
    for i in order:
        colour, shape = names[i].split()
        x1, y1, x2, y2 = boxes[i]
        fill = [c + draw.between(-k["tint"], k["tint"]) for c in COLOURS[colour]]
        canvas[y1:y2, x1:x2][mask(shape, x2 - x1)] = fill
    canvas += draw.noise(height, width, k["noise"])[:, :, None]
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _all_sides_seen(names: list[str], boxes: list[Box], order: list[int], k: dict) -> bool:
    """No object hides another's outermost pixels: the box of what is seen is the box of what was drawn."""
    owner = np.full((k["height"], k["width"]), -1, dtype=np.int16)
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        owner[y1:y2, x1:x2][mask(names[i].split()[1], x2 - x1)] = i
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        seen = owner[y1:y2, x1:x2] == i
        if not (seen[0].any() and seen[-1].any() and seen[:, 0].any() and seen[:, -1].any()):
            return False
    return True


def _clear_contact(names: Sequence[str], a: Box, b: Box, margin: int) -> str | None:
    """contact(a, b) where the drawn pixels agree and nothing is a near tie, else None."""
    kind, (x, y) = contact(a, b), shared(a, b)
    if kind == "apart from":
        return kind if -min(x, y) >= margin else None
    if kind == "overlapping" and min(x, y) < margin:
        return None
    left, top = min(a[0], b[0]) - 1, min(a[1], b[1]) - 1  # a frame of one free pixel, for the neighbours
    both = np.zeros((2, max(a[3], b[3]) - top + 1, max(a[2], b[2]) - left + 1), dtype=bool)
    for layer, name, (x1, y1, x2, y2) in zip(both, names, (a, b), strict=True):
        layer[y1 - top : y2 - top, x1 - left : x2 - left] = mask(name.split()[1], x2 - x1)
    if kind == "overlapping":
        return kind if (both[0] & both[1]).any() else None
    near = both[0].copy()
    for axis in (0, 1):
        near |= np.roll(both[0], 1, axis) | np.roll(both[0], -1, axis)
    return kind if (near & both[1]).any() else None


# ---- questions: options, then the right one, then what the scene must show (rule 1) ---------------------------------


def object_names(k: dict) -> list[str]:
    return [f"{colour} {shape}" for colour in k["colours"] for shape in k["shapes"]]


def plural(name: str) -> str:
    return name + ("es" if name.endswith("ss") else "s")


def _some(draw: Draw, k: dict, at_least: int) -> int:
    return max(at_least, draw.between(*k["objects"]))


def _sides(draw: Draw, k: dict, n: int) -> Callable[[], list[int]]:
    return lambda: [draw.between(*k["side"]) for _ in range(n)]


def _choose(draw: Draw, k: dict, category: str, pool: Sequence[str]) -> tuple[list[str], str]:
    low, high = k["options"][category]
    options = draw.sample(pool, min(draw.between(low, high), len(pool)))
    return options, draw.pick(options)


def _plan_relation(draw: Draw, k: dict) -> Plan:
    asks_contact = draw.below(100) < k["contact"]
    options, gold = _choose(draw, k, "relation", CONTACTS if asks_contact else DIRECTIONS)
    names = draw.sample(object_names(k), _some(draw, k, 2))
    a, b = names[:2]
    if asks_contact:
        listed = " or ".join([", ".join(options[:-1]), options[-1]])
        question = f"Is the {a} {listed} the {b}?"

        def holds(boxes: list[Box]) -> bool:
            return len(boxes) != 2 or _clear_contact((a, b), *boxes, k["margin"]) == gold
    else:
        question = f"Where, mainly, is the {a} with respect to the {b}?"

        def holds(boxes: list[Box]) -> bool:
            return len(boxes) != 2 or direction(*boxes, k["margin"]) == gold

    task = "contact" if asks_contact else "direction"
    return Plan("relation", task, question, options, gold, names, [0, 1], _sides(draw, k, len(names)), holds)


def _plan_size(draw: Draw, k: dict) -> Plan:
    small = draw.below(100) < k["smallest"]
    n_options = draw.between(*k["options"]["size"])
    names = draw.sample(object_names(k), _some(draw, k, n_options))
    options = draw.sample(names[:n_options], n_options)
    gold = draw.pick(options)
    if n_options == 2:
        question = f"Which is {'smaller' if small else 'larger'}, the {names[0]} or the {names[1]}?"
    else:
        question = f"Which of these is the {'smallest' if small else 'largest'}?"
    best, sign, draw_sides = names.index(gold), -1 if small else 1, _sides(draw, k, len(names))

    def sides() -> list[int]:
        for _ in range(5000):
            drawn = draw_sides()
            areas = [pixels(name.split()[1], side) for name, side in zip(names, drawn, strict=True)]
            if all(
                sign * (drawn[best] - drawn[i]) >= k["size_margin"] and sign * (areas[best] - areas[i]) > 0
                for i in range(n_options)
                if i != best
            ):
                return drawn
        raise ValueError(f"knobs side={k['side']}, size_margin={k['size_margin']}: no clear winner; widen side")

    task = "smallest" if small else "largest"
    return Plan("size", task, question, options, gold, names, list(range(n_options)), sides)


def _plan_count(draw: Draw, k: dict) -> Plan:
    options, gold = _choose(draw, k, "count", [str(i) for i in range(1, k["count_max"] + 1)])
    n, by = int(gold), draw.pick(k["count_by"])
    asked = draw.pick(object_names(k))
    colour, shape = asked.split()
    matching = {
        "name": [asked],
        "colour": [f"{colour} {s}" for s in k["shapes"]],
        "shape": [f"{c} {shape}" for c in k["colours"]],
    }[by]
    names = [draw.pick(matching) for _ in range(n)]
    names += draw.sample([name for name in object_names(k) if name not in matching], _some(draw, k, n) - n)
    what = {"name": plural(asked), "colour": f"{colour} shapes", "shape": plural(shape)}[by]
    question = f"How many {what} are there?"
    return Plan("count", f"count_{by}", question, options, gold, names, list(range(n)), _sides(draw, k, len(names)))


def _plan_existence(draw: Draw, k: dict) -> Plan:
    """The scene holds one or two objects of the asked shape in either case, and if there is room one of the colour."""
    options, gold = _choose(draw, k, "existence", ("yes", "no"))
    asked = draw.pick(object_names(k))
    colour, shape = asked.split()
    total, n_alike = _some(draw, k, 2), draw.between(1, 2)
    others = [f"{c} {shape}" for c in k["colours"] if c != colour]
    names = [asked] * (gold == "yes") + draw.sample(others, n_alike - (gold == "yes"))
    rest = [name for name in object_names(k) if name.split()[1] != shape]
    if total > n_alike:
        names.append(draw.pick([name for name in rest if name.split()[0] == colour]))
        rest.remove(names[-1])
    names += draw.sample(rest, total - len(names))
    question = f"Is there {'an' if colour[0] in 'aeiou' else 'a'} {asked}?"
    return Plan("existence", "exists", question, options, gold, names, list(range(n_alike)), _sides(draw, k, total))


def _plan_location(draw: Draw, k: dict) -> Plan:
    options, gold = _choose(draw, k, "instance_location", CELLS[k["grid"]])
    names = draw.sample(object_names(k), _some(draw, k, 1))
    where = (k["width"], k["height"], k["grid"], k["grid_margin"])

    def holds(boxes: list[Box]) -> bool:
        return len(boxes) != 1 or cell(boxes[0], *where) == gold

    question = f"In which part of the image is the {names[0]}?"
    sides = _sides(draw, k, len(names))
    return Plan("instance_location", f"grid_{k['grid']}", question, options, gold, names, [0], sides, holds)


PLANS = {
    "relation": _plan_relation,
    "size": _plan_size,
    "count": _plan_count,
    "existence": _plan_existence,
    "instance_location": _plan_location,
}


# ---- placing ---------------------------------------------------------------------------------------------------------


def _propose(draw: Draw, plan: Plan, side: int, boxes: list[Box], k: dict) -> Box:
    """A place for the next object: anywhere, or beside the first one if the answer says that they meet."""
    if len(boxes) == 1 and plan.gold in ("touching", "overlapping"):
        x1, y1, x2, y2 = boxes[0]
        x, y = draw.between(x1 - side, x2), draw.between(y1 - side, y2)
        if plan.gold == "touching":  # two shapes seldom meet by chance: put one edge to edge
            x, y = draw.pick([(x1 - side, y), (x2, y), (x, y1 - side), (x, y2)])
    else:
        x, y = draw.between(1, k["width"] - 1 - side), draw.between(1, k["height"] - 1 - side)
    return x, y, x + side, y + side


def _fits(box: Box, boxes: list[Box], k: dict) -> bool:
    if box[0] < 1 or box[1] < 1 or box[2] >= k["width"] or box[3] >= k["height"]:
        return False
    for other in boxes:
        x, y = shared(box, other)
        if not k["overlap"]:
            if x > -k["gap"] and y > -k["gap"]:
                return False
        elif x > 0 and y > 0 and 100 * x * y > k["overlap"] * min(box[2] - box[0], other[2] - other[0]) ** 2:
            return False
    return True


def _layout(draw: Draw, plan: Plan, k: dict) -> list[Box] | None:
    boxes: list[Box] = []
    for side in plan.sides():
        for _ in range(40):
            box = _propose(draw, plan, side, boxes, k)
            if _fits(box, boxes, k) and plan.holds([*boxes, box]):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _place(draw: Draw, plan: Plan, k: dict) -> tuple[list[Box], list[int]]:
    """Boxes, and the order in which they are painted."""
    for _ in range(400):
        boxes = _layout(draw, plan, k)
        order = draw.sample(range(len(plan.names)), len(plan.names))
        if boxes and (not k["overlap"] or _all_sides_seen(plan.names, boxes, order, k)):
            return boxes, order
    raise ValueError(
        f"knobs leave no room: {len(plan.names)} objects of side {k['side']} in {k['width']}x{k['height']} "
        f"(gap {k['gap']}, overlap {k['overlap']}); fewer or smaller objects, or smaller margins"
    )


def draw_scene(seed: int, knobs: dict) -> Scene:
    """The scene and the question of a seed. knobs: a whole dict, as in LEVELS or as resolve_knobs returns it.

    Raises ValueError if the knobs leave no room for such a scene.
    """
    draw = Draw(seed)
    plan = PLANS[draw.pick([c for c, weight in knobs["mix"].items() for _ in range(weight)])](draw, knobs)
    boxes, order = _place(draw, plan, knobs)
    image = _paint(draw, plan.names, boxes, order, knobs)

    left_to_right = sorted(range(len(boxes)), key=lambda i: boxes[i])
    ids: dict[int, str] = {}
    for i in left_to_right:
        number = 1 + sum(plan.names[j] == plan.names[i] for j in ids)
        ids[i] = f"{plan.names[i].replace(' ', '_')}.{number}"
    objects = {i: {"id": ids[i], "bbox": list(boxes[i])} for i in left_to_right}

    relations = []
    for i in left_to_right:
        for j in left_to_right:
            pair = (plan.names[i], plan.names[j])
            found = [direction(boxes[i], boxes[j], knobs["margin"]), _clear_contact(pair, boxes[i], boxes[j], 1)]
            relations += [_triple(ids[i], p, ids[j]) for p in found if i != j and p not in (None, "apart from")]

    asked = plan.relevant if plan.category in ("relation", "size") else [i for i in left_to_right if i in plan.relevant]
    gold_scene = {
        "objects": [{"id": ids[i], "bbox": list(boxes[i])} for i in asked],
        "relationships": [_triple(ids[0], plan.gold, ids[1])] if plan.category == "relation" else [],
    }
    return Scene(image, list(objects.values()), relations, gold_scene, plan)


def _triple(subject: str, predicate: str, other: str) -> dict:
    return {"subject": subject, "predicate": predicate, "object": other}


# ---- rows ------------------------------------------------------------------------------------------------------------


def resolve_knobs(level: str = "demo", knobs: dict | None = None) -> dict:
    """A level's knobs with some replaced. ValueError, one line, for an unknown name or a value that cannot work."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
    given = knobs or {}
    for name in given:
        if name not in _DEMO:
            raise ValueError(f"unknown knob {name!r}; known: {', '.join(_DEMO)}")
        if isinstance(_DEMO[name], dict) and not set(given[name]) <= set(CATEGORIES):
            raise ValueError(f"knob {name}={given[name]} names no known category; known: {', '.join(CATEGORIES)}")
    k = json.loads(json.dumps(LEVELS[level] | given))  # a copy of one's own, and proof that it can be stored
    k["options"] = LEVELS[level]["options"] | k["options"]
    # A count question fills up with objects that are not of the asked shape, or not of the asked colour.
    n_shapes, n_colours = len(k["shapes"]), len(k["colours"])
    most = min(n_colours * (n_shapes - 1), (n_colours - 1) * n_shapes)
    wrong = [
        ("shapes", len(set(k["shapes"])) < 2 or not set(k["shapes"]) <= set(SHAPES)),
        ("colours", len(set(k["colours"])) < 3 or not set(k["colours"]) <= set(COLOURS)),
        ("side", not 4 <= k["side"][0] <= k["side"][1] <= min(k["width"], k["height"]) - 2),
        ("objects", not 1 <= k["objects"][0] <= k["objects"][1] <= most),
        ("noise", not 0 <= k["noise"] <= 60), ("texture", not 0 <= k["texture"] <= 60),
        ("margin", k["margin"] < 1), ("size_margin", k["size_margin"] < 1), ("gap", k["gap"] < 0),
        ("grid", k["grid"] not in CELLS), ("count_max", not 2 <= k["count_max"] <= max(2, k["objects"][1])),
        ("count_by", not k["count_by"] or not set(k["count_by"]) <= {"name", "colour", "shape"}),
        ("overlap", not 0 <= k["overlap"] <= 100
         or (k["contact"] > 0 and 100 * k["margin"] ** 2 > k["overlap"] * k["side"][1] ** 2)),
        ("options", any(not 2 <= low <= high <= 4 for low, high in k["options"].values())),
        ("mix", sum(k["mix"].values()) < 1 or min(k["mix"].values()) < 0),
    ]  # fmt: skip
    for name, bad in wrong:
        if bad:
            raise ValueError(f"knob {name}={k[name]} cannot work; level demo has {name}={_DEMO[name]}")
    return k


def scene_row(seed: int, *, level: str = "demo", knobs: dict | None = None) -> dict:
    """One seed as a row (design section 3). knobs replaces single knobs of the level; meta keeps all of them."""
    return _row(seed, level, resolve_knobs(level, knobs))


def _row(seed: int, level: str, k: dict) -> dict:
    scene = draw_scene(seed, k)
    plan = scene.plan
    return {
        "id": f"scenes-{level}-{seed}",
        "source": "scenes",
        "category": plan.category,
        "images": [Image.fromarray(scene.image)],
        "question": plan.question,
        "options": plan.options,
        "gold": "ABCD"[plan.options.index(plan.gold)],
        "kind": "choice",
        "size": (k["width"], k["height"]),
        "scene": scene.gold_scene,
        "map": None,
        "problem": None,
        "style": None,
        "meta": {"level": level, "knobs": k, "seed": seed, "task": plan.task},
    }


def scene_rows(
    n: int, *, seed: int = 0, level: str = "demo", split: str = "train", start: int = 0, knobs: dict | None = None
) -> list[dict]:
    """Rows start .. start+n-1 of an endless list. Seeds and splits have ranges of their own (2**32 rows each), so
    train and val never share a scene seed."""
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; known: train, val")
    if seed < 0 or n < 0 or start < 0:
        raise ValueError(f"n={n}, seed={seed} and start={start} must not be negative")
    k = resolve_knobs(level, knobs)
    first = ((2 * seed + (split == "val")) << 32) + start
    return [_row(first + i, level, k) for i in range(n)]


# ---- the gold response -----------------------------------------------------------------------------------------------


def _compare(a: int, b: int) -> str:
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b} by {abs(a - b)}"


def _derivation(row: dict) -> str:
    """The steps from the gold boxes to the answer, as few words as possible."""
    boxes = [o["bbox"] for o in row["scene"]["objects"]]
    task = row["meta"]["task"]
    if task == "direction":
        (ax, ay), (bx, by) = centre(boxes[0]), centre(boxes[1])
        return f"x {_compare(ax, bx)}; y {_compare(ay, by)}"
    if task == "contact":
        parts = zip("xy", shared(*boxes), strict=True)
        return "; ".join(f"{axis} {'shared' if n >= 0 else 'gap'} {abs(n)}" for axis, n in parts)
    if row["category"] == "size":
        sides = [box[2] - box[0] for box in boxes]
        return _compare(*sides) if len(sides) == 2 else ", ".join(map(str, sides))
    if row["category"] == "count":
        return ", ".join(str(i + 1) for i in range(len(boxes)))
    if task == "exists":
        asked = "_".join(row["question"].rstrip("?").split()[-2:])
        return f"{sum(o['id'].startswith(asked + '.') for o in row['scene']['objects'])} found"
    grid = row["meta"]["knobs"]["grid"]
    columns, lines = {2: (("left", "right"), ("top", "bottom"))}.get(
        grid, (("left", "center", "right"), ("top", "middle", "bottom"))
    )
    (x, y), (width, height) = centre(boxes[0]), row["size"]
    return f"x {x} {columns[x * grid // width]}; y {y} {lines[y * grid // height]}"


def _observation(row: dict) -> str:
    if row["category"] == "count":
        return "all " + row["question"].removeprefix("How many ").removesuffix(" are there?")
    if row["category"] == "existence":
        return "all " + plural(row["question"].rstrip("?").split()[-1])
    return " and ".join("the " + o["id"].split(".")[0].replace("_", " ") for o in row["scene"]["objects"])


def response_text(row: dict, *, observe: str | None = None, think: str | None = None, letter: str | None = None) -> str:
    """The whole four-tag response to a procedural row, for a warm start: short text, gold scene, short derivation.

    The derivation ends with the word it found and, glued to it, the option's letter ("so below(A) "): a small model
    learns the look-up from word to letter far more easily where the two are neighbours. letter: a careless teacher's
    answer, right or wrong; boxes and derivation stay right, the conclusion and the answer follow the letter.
    Raises ValueError if there is no such option.
    """
    letter = letter or row["gold"]
    if letter not in "ABCD"[: len(row["options"])]:
        raise ValueError(f"row {row['id']} has no option {letter!r}: it has {len(row['options'])} options")
    text = row["options"]["ABCD".index(letter)]
    think = f"{_derivation(row)}; so {text}({letter}) " if think is None else think
    return (
        f"<observe>{_observation(row) if observe is None else observe}</observe>\n"
        f"<scene>{json.dumps(row['scene'])}</scene>\n"
        f"<think>{think}</think>\n"
        f"<answer>({letter}) {text}</answer>"
    )


# ---- command line ----------------------------------------------------------------------------------------------------


def contact_sheet(rows: list[dict], path: str | Path, *, columns: int = 4) -> None:
    """Pictures three times as large, gold boxes outlined, question and options below, the right one with a star."""
    zoom, text_height = 3, 120
    width, height = rows[0]["size"]
    tile_w, tile_h = max(zoom * width, 330) + 10, zoom * height + text_height
    sheet = Image.new("RGB", (columns * tile_w, -(-len(rows) // columns) * tile_h), "white")
    pen = ImageDraw.Draw(sheet)
    for n, row in enumerate(rows):
        left, top = n % columns * tile_w, n // columns * tile_h
        sheet.paste(row["images"][0].resize((zoom * width, zoom * height), Image.Resampling.NEAREST), (left, top))
        for thing in row["scene"]["objects"]:
            x1, y1, x2, y2 = (zoom * c for c in thing["bbox"])
            pen.rectangle((left + x1 - 1, top + y1 - 1, left + x2, top + y2), outline="black")
        triples = ["{subject} {predicate} {object}".format(**r) for r in row["scene"]["relationships"]]
        options = [f"{'*' if c == row['gold'] else ' '}({c}) {o}" for c, o in zip("ABCD", row["options"], strict=False)]
        think = response_text(row).split("<think>")[1].split("</think>")[0]
        words = row["question"].split()
        lines = [" ".join(words[:9]), " ".join(words[9:]), *options, think, *triples]
        pen.multiline_text((left + 4, top + zoom * height + 2), "\n".join(line for line in lines if line), "black")
    sheet.save(path)


def bench(level: str, *, seconds: float = 3.0) -> float:
    """Rows per second on this core."""
    n, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        scene_rows(50, level=level, start=n)
        n += 50
    return n / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw scenes with questions and write them in the STVQA schema.")
    parser.add_argument("--out", type=Path, help="folder for train- and val-00000-of-00001.parquet")
    parser.add_argument("--n", type=int, default=1000, help="training rows")
    parser.add_argument("--val", type=int, default=0, help="validation rows")
    parser.add_argument("--level", default="demo", help=", ".join(LEVELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=Path, help="PNG file for a sheet of twelve scenes")
    parser.add_argument("--bench", action="store_true", help="print scenes per second")
    args = parser.parse_args()
    if not (args.out or args.show or args.bench):
        parser.error("say what to do: --out DIR, --show FILE.png or --bench")
    resolve_knobs(args.level)  # an unknown level is told before anything slow
    if args.bench:
        print(f"level {args.level}: {bench(args.level):.0f} scenes/s on one core")
    if args.show:
        contact_sheet(scene_rows(12, seed=args.seed, level=args.level), args.show)
        print(f"wrote {args.show}")
    if args.out:
        from data.dataset import write_stvqa  # here, because data.dataset itself reads "scenes@train" from this file

        args.out.mkdir(parents=True, exist_ok=True)
        for split, n in (("train", args.n), ("val", args.val)):
            if n:
                path = args.out / f"{split}-00000-of-00001.parquet"
                some = {"seed": args.seed, "level": args.level, "split": split}
                starts = range(0, n, 256)  # a generator: a million pictures need not be in memory at once
                write_stvqa((row for at in starts for row in scene_rows(min(256, n - at), start=at, **some)), path)
                print(f"wrote {path}: {n} rows")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
