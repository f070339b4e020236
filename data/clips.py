"""Procedural clips: a camera goes round in a furnished room, and the seven question kinds of VSI-Bench about it.

    scenes:clip@train and scenes:clip@val      rows (data/dataset.py: load_rows)
    python -m data.scenes --show sheet.png --level clip

A thing's category is its kind ("chair"); colours vary. The room is a rectangle; the camera stands a little behind its
middle, looks across it and turns by more than half a circle while it moves. In the first frame it looks roughly along
the room's y axis: this axis points up in the map, x to the right.

  map       cell = floor(10 * (v - low) / (high - low)), clamped to 0..9, low and high the walls: {"chair": [[x, y], ...]}
  distance  between the closest points of the upright oriented boxes, metres, one decimal
  size      longest of a box's three sides, whole centimetres; room size: floor, square metres, one decimal
  first     a category comes into view in the first frame in which one thing of it has at least 0.4 % of the pixels

A clip costs 15 to 200 ms. With SPATIAL_GRPO_SCENES=folder every one that is drawn is kept there, at its pixels' size, and
read in a millisecond the next time; nothing removes them.

As in data/scenes.py what is asked and the right option (or, for counts and distances, the right number) are drawn before
the room, so that a blind guess is at chance, and near ties are not asked: each kind below states its margin.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import cos, radians, sin
from pathlib import Path

import numpy as np
from PIL import Image

from data.drawing import COLOURS, Draw
from data.questions import plural
from data.solids import View, look, project
from data.staging import draw_world, extents, ranges
from data.video import RULES, keep_arrays
from data.world import FURNITURE, SIMPLE, TURNS, Thing, World, collide, distance, footprint, gap, shows_itself

_CLIP = {
    "width": 224, "height": 168, "frames": 16, "fps": 2, "rule": None,  # rule of data/video.py; None: as the caller wants
    "objects": [7, 10], "kinds": [*FURNITURE, *SIMPLE],  # things in the room, and of which categories
    "colours": ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink"],
    "own_colour": False,  # every category has a colour of its own: kinds and colours are pairs then
    "side": [30, 80], "scale": [70, 140],  # cm; percent by which each thing's size varies
    "room": [420, 800], "eye": [140, 175], "drop": [28, 40], "focal": [55, 65],  # cm; percent; percent of the width
    "start": 30, "sweep": [200, 320], "both_ways": True,  # degrees: first heading; what the camera turns by, left or also right
    "radius": [400, 800], "shift": 300, "drift": 400,  # mm: camera behind the turning point; that off the middle; its way
    "noise": 5, "tint": 8, "first": 4,  # first: per mille of the pixels that count as "in view"
    "mix": {"rel_direction": 30, "rel_distance": 12, "abs_distance": 16, "object_size": 10, "room_size": 6,
            "counting": 10, "appearance_order": 16},
}  # fmt: skip
CLIPS: dict[str, dict] = {
    "clip": _CLIP,
    # For models of a few million parameters and minutes of training (bench/clips.py): a camera that goes round by the walls
    # of a small room, nearly the same way every time, so that a place in a frame says a place on the map; a colour for
    # each category. Asked is what the map tells: numbers, sides and distances. Order of appearance is left out (nearly all
    # is in view at once), and so are sizes: they vary too little here to tell a guess from an answer.
    "clip_small": _CLIP | {
        "width": 112, "height": 84, "frames": 6, "rule": "whole", "objects": [3, 5], "scale": [70, 110],
        "kinds": ["chair", "table", "lamp", "shelf", "cube", "sphere", "cone", "cylinder"], "own_colour": True,
        "room": [440, 500], "eye": [235, 250], "drop": [72, 78], "focal": [52, 55], "start": 5, "sweep": [150, 165],
        "both_ways": False, "radius": [1900, 2000], "shift": 50, "drift": 0, "noise": 2, "tint": 3,
        "mix": dict.fromkeys(_CLIP["mix"], 0) | {"counting": 34, "rel_distance": 33, "rel_direction": 33},
    },
}  # fmt: skip
GRID = 10
VERSION = 1  # of what a kept clip holds; raise it when a seed would give another row


def wrong_knobs(k: dict) -> list[tuple[str, bool]]:
    """(knob, can it not work?) of a level of CLIPS."""
    return [
        *ranges(k), ("frames", not 2 <= k["frames"] <= 64), ("fps", k["fps"] <= 0),
        ("kinds", len(set(k["kinds"])) < 6 or not set(k["kinds"]) <= {*SIMPLE, *FURNITURE}),
        ("colours", len(k["colours"]) < (len(k["kinds"]) if k["own_colour"] else 1) or not set(k["colours"]) <= set(COLOURS)),
        ("rule", k["rule"] not in (None, *RULES)), ("start", min(k["start"], k["shift"], k["drift"]) < 0),
        ("width", min(k["width"], k["height"]) < 28), ("noise", not 0 <= k["noise"] <= 60),
        ("mix", sum(k["mix"].values()) < 1 or min(k["mix"].values()) < 0),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked before there is a room. categories: those that the question is about; counts: how often each of them
    stands in the room. holds(things, room): is the answer right, by a margin, as far as places decide? seen(first,
    glimpse), by category: and as far as the frames do? gold(things, room): the number, where one is asked for.
    steps(things, room, first): whole numbers from which the answer follows, for the texts of a warm start."""

    task: str
    question: str
    options: list[str]
    answer: str | None
    categories: list[str]
    counts: dict[str, int]
    holds: Callable[[list[Thing], tuple], bool] = lambda things, room: True
    seen: Callable[[dict, dict], bool] = lambda first, glimpse: True
    gold: Callable[[list[Thing], tuple], str] | None = None
    steps: Callable[[list[Thing], tuple, dict], list[int]] = lambda things, room, first: []


# ---- the seven kinds -------------------------------------------------------------------------------------------------


def _only(things: list[Thing], kind: str) -> Thing:
    (thing,) = (thing for thing in things if thing.kind == kind)
    return thing


def _turn_to(place: Thing, front: Thing, target: Thing) -> tuple[float, float] | None:
    """(to the right, ahead), of length one: where the target lies for somebody who stands by `place`, facing `front`."""
    fx, fy, x, y = front.x - place.x, front.y - place.y, target.x - place.x, target.y - place.y
    n = distance(place, front) * distance(place, target)
    if min(distance(place, front), distance(place, target), distance(front, target)) < 0.8:
        return None
    return (x * fy - y * fx) / n, (x * fx + y * fy) / n


QUADRANTS = ("front-left", "front-right", "back-left", "back-right")


def _direction(draw: Draw, k: dict) -> Ask:
    """Left or right: at least 30 degrees off the line. With "behind": beyond 150 degrees, the sides 40 to 120. Quadrants:
    at least 18 degrees from the axes."""
    names = draw.sample(k["kinds"], 3)
    p, q, r = names
    level = draw.pick(["easy", "medium", "hard"])
    pool = {"easy": ["left", "right"], "medium": ["left", "right", "behind"], "hard": QUADRANTS}[level]
    options = draw.sample(pool, len(pool))
    answer = draw.pick(options)

    def found(things: list[Thing]) -> str | None:
        turn = _turn_to(*(_only(things, name) for name in names))
        if turn is None:
            return None
        right, ahead = turn
        if level == "hard":
            word = f"{'front' if ahead > 0 else 'back'}-{'right' if right > 0 else 'left'}"
            return word if min(abs(right), abs(ahead)) > 0.31 else None
        if level == "medium" and ahead < -0.866:
            return "behind"
        side = abs(right) > 0.643 and ahead > -0.5 if level == "medium" else abs(right) > 0.5
        return ("right" if right > 0 else "left") if side else None

    asked = {
        "easy": "is it on my left or on my right?", "medium": "is it on my left, on my right or behind me? "
        "Behind means that I would have to turn by at least 135 degrees to face it.",
        "hard": "in which quarter is it: front-left, front-right, back-left or back-right?",
    }[level]  # fmt: skip
    question = f"I stand by the {p} and face the {q}. Now for the {r}: {asked}"
    return Ask(
        f"rel_direction_{level}", question, options, answer, names, dict.fromkeys(names, 1),
        lambda things, room: found(things) == answer,  # steps: tenths to the right and ahead
        steps=lambda things, *_: [round(10 * part) for part in _turn_to(*(_only(things, name) for name in names))],
    )  # fmt: skip


def _rel_distance(draw: Draw, k: dict) -> Ask:
    """The winner leads by 30 cm and 15 percent."""
    anchor, *options = draw.sample(k["kinds"], 5)
    answer = draw.pick(options)

    def holds(things: list[Thing], room: tuple) -> bool:
        metres = {name: gap(_only(things, anchor), _only(things, name)) for name in options}
        others = min(m for name, m in metres.items() if name != answer)
        return others > metres[answer] + 0.3 and others > 1.15 * metres[answer]

    question = f"Measured between closest points, which of these stands closest to the {anchor}?"
    return Ask(
        "rel_distance", question, options, answer, [anchor, *options], dict.fromkeys([anchor, *options], 1), holds,
        steps=lambda things, *_: [round(10 * gap(_only(things, anchor), _only(things, name))) for name in options],  # dm
    )  # fmt: skip


def _abs_distance(draw: Draw, k: dict) -> Ask:
    """Drawn evenly from 0.5 to 4.5 m, whatever the two things are."""
    a, b = draw.sample(k["kinds"], 2)
    target = draw.between(50, 450) / 100

    def metres(things: list[Thing]) -> float:
        return gap(_only(things, a), _only(things, b))

    question = f"How many metres are there between the {a} and the {b}, from closest point to closest point?"
    return Ask("abs_distance", question, [], None, [a, b], {a: 1, b: 1}, lambda t, room: abs(metres(t) - target) < 0.12,
               gold=lambda things, room: f"{metres(things):.1f}")  # fmt: skip


def _object_size(draw: Draw, k: dict) -> Ask:
    name = draw.pick(k["kinds"])
    question = f"The {name} has a length, a width and a height. How many centimetres is the longest of the three?"

    def sides(things: list[Thing], *_) -> list[int]:
        return [round(100 * side) for side in (_only(things, name).w, _only(things, name).d, _only(things, name).h)]

    return Ask("object_size", question, [], None, [name], {name: 1}, gold=lambda things, room: str(max(sides(things))),
               steps=sides)  # fmt: skip


def _room_size(draw: Draw, k: dict) -> Ask:
    """Drawn evenly from 18 to 60 square metres."""
    target = draw.between(180, 600) / 10
    question = "How many square metres of floor does this room have?"
    return Ask("room_size", question, [], None, [], {},
               lambda things, room: abs((room[2] - room[0]) * (room[3] - room[1]) - target) < 1,
               gold=lambda things, room: f"{(room[2] - room[0]) * (room[3] - room[1]):.1f}",
               steps=lambda things, room, first: [round(10 * (room[2] - room[0])), round(10 * (room[3] - room[1]))])  # fmt: skip


def _counting(draw: Draw, k: dict) -> Ask:
    name, n = draw.pick([kind for kind in k["kinds"] if kind not in ("bed", "sofa")]), draw.between(2, 5)
    return Ask("counting", f"How many {plural(name)} are there in this room?", [], None, [name], {name: n},
               gold=lambda things, room: str(n), steps=lambda *_: list(range(1, n + 1)))  # fmt: skip


def _order(draw: Draw, k: dict) -> Ask:
    """Every category comes a frame or more after the one before, and is not glimpsed before that one either."""
    names = draw.sample(k["kinds"], 4)
    options: list[str] = []
    while len(options) < 4:
        order = ", ".join(draw.sample(names, 4))
        options += [order] if order not in options else []
    answer = draw.pick(options)
    right = answer.split(", ")

    def seen(first: dict, glimpse: dict) -> bool:
        return all(first[a] < first[b] and glimpse[a] < glimpse[b] for a, b in zip(right, right[1:], strict=False))

    question = f"In which order do these come into view for the first time: {', '.join(sorted(names))}?"
    return Ask("appearance_order", question, options, answer, names, dict.fromkeys(names, 1), seen=seen,
               steps=lambda things, room, first: [first[name] for name in sorted(names)])  # fmt: skip


ASKS = {
    "rel_direction": _direction, "rel_distance": _rel_distance, "abs_distance": _abs_distance,
    "object_size": _object_size, "room_size": _room_size, "counting": _counting, "appearance_order": _order,
}  # fmt: skip


# ---- the room and the way through it ---------------------------------------------------------------------------------


@lru_cache(maxsize=720)
def _compass(degrees: int) -> tuple[float, float]:
    """Rounded, so that it is the same with every C library."""
    return round(cos(radians(degrees)), 9), round(sin(radians(degrees)), 9)


def path(draw: Draw, room: tuple, k: dict) -> list[View]:
    """Cameras that look across the middle of the room and turn: place = middle - radius * heading, drifting a little."""
    x1, y1, x2, y2, _ = room
    height, drop = draw.between(*k["eye"]) / 100, draw.between(*k["drop"]) / 100
    focal = draw.between(*k["focal"]) / 100 * k["width"]
    start = 90 + draw.between(-k["start"], k["start"])
    sweep = draw.pick([-1, 1] if k["both_ways"] else [1]) * draw.between(*k["sweep"])
    radius = draw.between(*k["radius"]) / 1000

    def within(limit: int) -> float:
        return draw.between(-limit, limit) / 1000

    mx, my = (x1 + x2) / 2 + within(k["shift"]), (y1 + y2) / 2 + within(k["shift"])
    vx, vy = within(k["drift"]), within(k["drift"])
    views = []
    for i in range(k["frames"]):
        part = i / max(k["frames"] - 1, 1)
        hx, hy = _compass((start + round(sweep * part)) % 360)
        place = (mx + vx * part - radius * hx, my + vy * part - radius * hy, height)
        views.append(look(place, (hx, hy), drop, focal, k["width"], k["height"]))
    return views


def furnish(draw: Draw, ask: Ask, k: dict) -> tuple[tuple, list[View], list[Thing]] | None:
    """A room, the cameras in it and its things, none of them in the way; None if it does not work out."""
    wide, deep = draw.between(*k["room"]) / 100, draw.between(*k["room"]) / 100
    room = (0.0, 0.0, wide, deep, 2.6)
    if not ask.counts and not ask.holds([], room):
        return None
    views = path(draw, room, k)
    kinds = [kind for kind in ask.categories for _ in range(ask.counts[kind])]
    others = [kind for kind in k["kinds"] if kind not in ask.categories]
    more = draw.sample(others, min(len(others), 3))
    kinds += [draw.pick(more) for _ in range(max(0, draw.between(*k["objects"]) - len(kinds)))]
    things: list[Thing] = []
    for number, kind in enumerate(kinds):
        for _ in range(30):
            scale = draw.between(*k["scale"]) / 100
            w, d, h = (scale * side for side in extents(draw, kind, k, False))
            x, y = (draw.between(200, int(1000 * side) - 200) / 1000 for side in (wide, deep))
            colour = k["colours"][k["kinds"].index(kind)] if k["own_colour"] else draw.pick(k["colours"])
            thing = Thing(f"{colour} {kind}", x, y, 0.0, draw.below(24), w, d, min(h, 2.3))
            if _stands(thing, things, room, views):
                things.append(thing)
                break
        else:
            return None
        if number + 1 == sum(ask.counts.values()) and not (ask.holds(things, room) and _in_order(views, things, ask)):
            return None
    return room, views, things


def _stands(thing: Thing, things: list[Thing], room: tuple, views: list[View]) -> bool:
    x1, y1, x2, y2, _ = room
    if not all(x1 + 0.03 < x < x2 - 0.03 and y1 + 0.03 < y < y2 - 0.03 for x, y in footprint(thing)):
        return False
    if any(collide(thing, other, 0.08) for other in things) or not shows_itself(thing, ((x1 + x2) / 2, (y1 + y2) / 2)):
        return False
    c, s = TURNS[thing.turn]
    for view in views:  # half a metre of air around the camera's way
        x, y = view.place[0] - thing.x, view.place[1] - thing.y
        if abs(c * x + s * y) < thing.w / 2 + 0.5 and abs(c * y - s * x) < thing.d / 2 + 0.5:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Clip:
    """frames: (H, W, 3) uint8 each; pixels (F, n) int: of every thing in every frame; first: by thing, the first frame in
    which it has the share of pixels that counts as in view."""

    room: tuple
    views: list[View]
    things: list[Thing]
    frames: list[np.ndarray]
    pixels: np.ndarray
    first: list[int]


def film(draw: Draw, room: tuple, views: list[View], things: list[Thing], ask: Ask, k: dict) -> Clip | None:
    """The frames, if every thing is well seen in one of them and the order of appearance is as asked."""
    light = (0.36, -0.48, 0.8)
    tint = draw.below(2**60)
    least = k["first"] * k["width"] * k["height"] / 1000
    frames, pixels, shown = [], [], [False] * len(things)
    for view in views:
        picture = draw_world(World(view, room, light, things), k, Draw(tint))
        frames.append(picture.image)
        pixels.append(picture.seen)
        for i, thing in enumerate(things):
            enough = picture.seen[i] >= max(0.5 * picture.whole[i], least)
            shown[i] = shown[i] or (enough and _corners_in(view, thing) >= 6)
    if not all(shown):
        return None
    pixels = np.array(pixels)
    first, glimpse = _first(pixels, least), _first(pixels, 1)
    if not ask.seen(_by_kind(things, first), _by_kind(things, glimpse)):
        return None
    return Clip(room, views, things, frames, pixels, first)


def _first(pixels: np.ndarray, least: float) -> list[int]:
    return [int(enough.argmax()) for enough in (pixels >= least).T]  # every thing has enough in some frame


def _by_kind(things: list[Thing], first: list[int]) -> dict[str, int]:
    kinds = [thing.kind for thing in things]
    return {kind: min(f for other, f in zip(kinds, first, strict=True) if other == kind) for kind in kinds}


def _corners_in(view: View, thing: Thing) -> int:
    spots = [project(view, (x, y, z)) for x, y in footprint(thing) for z in (thing.z, thing.z + thing.h)]
    return sum(depth > 0.3 and 0 <= u <= view.width and 0 <= v <= view.height for u, v, depth in spots)


def draw_clip(seed: int, k: dict) -> tuple[Ask, Clip]:
    """The question of a seed and a clip that makes it right. ValueError if the knobs leave no room."""
    draw = Draw(seed)
    ask = ASKS[draw.pick([name for name, weight in k["mix"].items() for _ in range(weight)])](draw, k)
    films = 0
    for _ in range(12000):
        furnished = furnish(draw, ask, k)
        if furnished is not None and all(_enters(furnished[1], thing, 6) is not None for thing in furnished[2]):
            films += 1
            clip = film(draw, *furnished, ask, k)
            if clip is not None:
                return ask, clip
        if films > 300:
            break
    raise ValueError(f"knobs leave no room for a {ask.task} question ({ask.question}): fewer objects, or a larger room")


def _enters(views: list[View], thing: Thing, corners: int) -> int | None:
    """The first frame that holds so many corners of its box, whatever stands before it."""
    return next((i for i, view in enumerate(views) if _corners_in(view, thing) >= corners), None)


def _in_order(views: list[View], things: list[Thing], ask: Ask) -> bool:
    """Without drawing: may the order of appearance come out right?"""
    if ask.task != "appearance_order":
        return True
    order = [_enters(views, _only(things, kind), 4) for kind in ask.answer.split(", ")]
    return None not in order and all(a < b for a, b in zip(order, order[1:], strict=False))


# ---- rows ------------------------------------------------------------------------------------------------------------


def grid_map(things: list[Thing], room: tuple) -> dict[str, list[list[int]]]:
    """The 10 x 10 map: the cells of the middles of all things, by category."""
    cells: dict[str, list[list[int]]] = {}
    for thing in things:
        spot = [min(GRID - 1, max(0, int(GRID * (v - low) / (high - low))))
                for v, low, high in ((thing.x, room[0], room[2]), (thing.y, room[1], room[3]))]  # fmt: skip
        cells.setdefault(thing.kind, []).append(spot)
    return cells


def annotation(clip: Clip) -> dict:
    """The room in the form of VSI-Bench's meta_info, with first_seen (frames) beside it. axesLengths belong to the rows
    of normalizedAxes (nine numbers); z is up."""
    boxes: dict[str, list[dict]] = {}
    first: dict[str, list[int]] = {}
    for thing, frame in zip(clip.things, clip.first, strict=True):
        c, s = TURNS[thing.turn]
        xs, ys = zip(*footprint(thing), strict=True)
        boxes.setdefault(thing.kind, []).append({
            "centroid": [thing.x, thing.y, thing.z + thing.h / 2], "axesLengths": [thing.w, thing.d, thing.h],
            "normalizedAxes": [c, s, 0, -s, c, 0, 0, 0, 1],
            "min": [min(xs), min(ys), thing.z], "max": [max(xs), max(ys), thing.z + thing.h],
        })  # fmt: skip
        first.setdefault(thing.kind, []).append(frame)
    x1, y1, x2, y2, height = clip.room
    return {
        "room_size": (x2 - x1) * (y2 - y1), "room_center": [(x1 + x2) / 2, (y1 + y2) / 2, height / 2],
        "object_counts": {kind: len(found) for kind, found in boxes.items()}, "object_bbox": boxes, "first_seen": first,
    }  # fmt: skip


def clip_row(seed: int, level: str, k: dict) -> dict:
    """One seed as a row (design section 3) whose `video` is a list of PIL frames; drawn, or as $SPATIAL_GRPO_SCENES has it."""
    if not (folder := os.environ.get("SPATIAL_GRPO_SCENES")):
        return drawn_row(seed, level, k)
    key = hashlib.sha256(json.dumps([VERSION, seed, level, k], sort_keys=True).encode()).hexdigest()[:32]
    file = Path(folder).expanduser() / key[:2] / f"{key}.npz"
    if file.is_file():
        with np.load(file) as data:
            row = json.loads(str(data["row"]))
            return {**row, "size": tuple(row["size"]), "video": [Image.fromarray(frame) for frame in data["frames"]]}
    row = drawn_row(seed, level, k)
    keep_arrays(file, frames=np.stack(row["video"]), row=json.dumps({**row, "video": None}))
    return row


def drawn_row(seed: int, level: str, k: dict) -> dict:
    ask, clip = draw_clip(seed, k)
    cameras = [{"place": list(view.place), "forward": list(view.forward)} for view in clip.views]
    return {
        "id": f"scenes-{level}-{seed}",
        "source": "scenes",
        "category": ask.task,
        "images": [],
        "video": [Image.fromarray(frame) for frame in clip.frames],
        "fps": k["fps"],
        "span": None,
        **({"frame_rule": k["rule"]} if k["rule"] else {}),
        "question": ask.question,
        "options": ask.options,
        "gold": "ABCD"[ask.options.index(ask.answer)] if ask.options else ask.gold(clip.things, clip.room),
        "kind": "choice" if ask.options else "number",
        "size": (k["width"], k["height"]),
        "scene": None,
        "map": grid_map(clip.things, clip.room),
        "problem": None,
        "style": None,
        "meta": {"level": level, "knobs": k, "seed": seed, "task": ask.task, "annotation": annotation(clip),
                 "room": list(clip.room), "cameras": cameras,
                 "steps": ask.steps(clip.things, clip.room, _by_kind(clip.things, clip.first))},
    }  # fmt: skip


