"""Worlds for questions: a camera, a room, and things placed so that an answer holds; the picture; twins of it.

Two rules of data/scenes.py hold here too: the question and its answer are drawn before the world, and near ties are not
asked. `k` is a level's dict of knobs (WORLDS).
"""

from dataclasses import asdict, dataclass, replace
from math import sqrt

from data.drawing import CELLS, COLOURS, Draw
from data.quiz import Quiz
from data.solids import Rendered, View, look, project, render, visible_box
from data.world import CARRIER, FACED, FURNITURE, SIMPLE, TURNS, Thing, World, collide, footprint, shows_itself, solids

SURFACES = [(196, 216, 236), (190, 186, 178), (236, 234, 228), (214, 206, 192), (226, 220, 208)]

# Knobs of the levels. Lengths in centimetres; angles and ratios in percent; "seen" is the least visible share of a
# thing that is asked about, "glimpse" of any other; "trap" the share of the questions (where there is such a shortcut)
# that a reader of flat boxes would get wrong.
_ROOM = {
    "width": 448, "height": 448, "objects": [4, 7], "solids": list(SIMPLE), "furniture": list(FURNITURE),
    "colours": ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink"],
    "side": [40, 80], "small": [20, 36],           # of a cube; on the floor, on a table
    "margin": 30, "size_margin": 20, "least": 12,  # cm between candidates; percent of size; pixels of a box's sides
    "noise": 6, "tint": 8, "grid": 2, "grid_margin": 20, "count_max": 5, "seen": 60, "glimpse": 35, "trap": 50,
    "room": [480, 780], "camera": [165, 235], "drop": [34, 50], "focal": [78, 95],
    "options": {"relation": [3, 4], "size": [2, 4], "existence": [2, 2], "instance_location": [4, 4],
                "depth": [2, 4], "distance": [3, 4], "orientation": [3, 4], "reach": [3, 4]},
    "mix": {"relation": 48, "reach": 7, "existence": 7, "depth": 7, "instance_location": 7, "size": 6, "distance": 6,
            "orientation": 6, "count": 6},
}  # fmt: skip
WORLDS: dict[str, dict] = {
    "plane": _ROOM | {
        "width": 112, "height": 112, "objects": [3, 5], "furniture": ["chair", "table"], "side": [50, 95],
        "small": [26, 42], "margin": 45, "size_margin": 25, "least": 8, "noise": 4, "grid_margin": 5,
        "count_max": 4, "seen": 70, "room": [0, 0], "camera": [170, 260],
    },
    "room": _ROOM,
}  # fmt: skip


def ranges(k: dict) -> list[tuple[str, bool]]:
    """(knob, is it wrong?) of every pair of a lowest and a highest value."""
    pairs = [name for name, value in k.items() if isinstance(value, list) and value and isinstance(value[0], int)]
    return [(name, len(k[name]) != 2 or not 0 <= k[name][0] <= k[name][1]) for name in pairs]


def wrong_knobs(k: dict) -> list[tuple[str, bool]]:
    """(knob, can it not work?) of a level of WORLDS."""
    return [
        *ranges(k),
        ("solids", len(set(k["solids"]) - set(CARRIER)) < 2 or not set(k["solids"]) <= set(SIMPLE)),
        ("furniture", "table" not in k["furniture"] or not set(k["furniture"]) & set(FACED)
         or not set(k["furniture"]) <= set(FURNITURE)),
        ("colours", len(set(k["colours"])) < 5 or not set(k["colours"]) <= set(COLOURS)),
        ("width", min(k["width"], k["height"]) < 56), ("noise", not 0 <= k["noise"] <= 60),
        ("margin", k["margin"] < 1), ("size_margin", k["size_margin"] < 1), ("grid", k["grid"] not in CELLS),
        ("count_max", not 4 <= k["count_max"] <= 9), ("seen", not 1 <= k["seen"] <= 100),
        ("glimpse", not 1 <= k["glimpse"] <= 100), ("trap", not 0 <= k["trap"] <= 100),
        ("options", any(not 2 <= low <= high <= 4 for low, high in k["options"].values())),
        ("mix", sum(k["mix"].values()) < 1 or min(k["mix"].values()) < 0),
    ]  # fmt: skip


# ---- making and placing ----------------------------------------------------------------------------------------------


def stage(draw: Draw, k: dict) -> World:
    """An empty world: camera, room and light."""
    x, y = draw.below(1000) / 1000, draw.below(1000) / 1000
    lean = draw.between(-300, 300)
    ahead = (lean / 1000, 1.0)
    height, drop = draw.between(*k["camera"]) / 100, draw.between(*k["drop"]) / 100
    focal = draw.between(*k["focal"]) / 100 * k["width"]
    room = None
    if k["room"][1]:
        wide, deep = draw.between(*k["room"]) / 100, draw.between(*k["room"]) / 100
        # The camera stands at the near wall, on the side from which its leaning view crosses the room.
        left = wide * (0.5 + 0.8 * lean / 1000) * (0.85 + draw.below(300) / 1000)
        room = (x - left, y - 0.3, x - left + wide, y - 0.3 + deep, 2.6)
    lx, ly = draw.pick([-1, 1]) * draw.between(350, 650) / 1000, -draw.between(100, 450) / 1000
    n = sqrt(lx * lx + ly * ly + 1)
    view = look((x, y, height), ahead, drop, focal, k["width"], k["height"])
    return World(view, room, (lx / n, ly / n, 1 / n), [])


def extents(draw: Draw, kind: str, k: dict, small: bool) -> tuple[float, float, float]:
    if kind in FURNITURE:
        w, d, h = (draw.between(*limits) / 100 for limits in FURNITURE[kind])
        return (w, w, h) if kind == "lamp" else (w, d, h)
    side = draw.between(*k["small" if small else "side"]) / 100
    return side, side, side if kind in ("cube", "sphere") else 1.2 * side


def _beside(draw: Draw, world: World, hint: tuple | None) -> tuple[float, float]:
    """A place on the floor: where the hint says, or anywhere before the camera. Hints are wishes: the answer is checked
    afterwards, on the facts."""
    view, things = world.view, world.things
    rx, ry, _ = view.right
    how, which = (hint[0], things[hint[1]]) if hint else ("anywhere", None)
    if how == "between":
        other, part = things[hint[2]], draw.between(350, 650) / 1000
        x, y = which.x + part * (other.x - which.x), which.y + part * (other.y - which.y)
        return x + draw.between(-150, 150) / 1000, y + draw.between(-150, 150) / 1000
    if how == "anywhere":
        far = 6500 if world.room is None else min(7500, int(1000 * (world.room[3] - view.place[1])))
        away = draw.between(1800, far) / 1000
        right = draw.between(-1000, 1000) / 1000 * 0.5 * away * view.width / view.focal
        return view.place[0] + right * rx - away * ry, view.place[1] + right * ry + away * rx
    if how == "metres":
        c, s = TURNS[draw.below(24)]
        return which.x + hint[2] * c, which.y + hint[2] * s
    if how == "beyond":
        other, part = things[hint[2]], draw.between(500, 1400) / 1000
        return which.x + part * (which.x - other.x), which.y + part * (which.y - other.y)
    if how == "near":
        return which.x + draw.between(-1000, 1000) / 1000, which.y + draw.between(-1000, 1000) / 1000
    step, slip = draw.between(700, 3000) / 1000, draw.between(-500, 500) / 1000
    right, away = {"right of": (step, slip * step), "left of": (-step, slip * step), "behind": (slip * step, step),
                   "in front of": (slip * step, -step)}[how]  # fmt: skip
    return which.x + right * rx - away * ry, which.y + right * ry + away * rx


def make(draw: Draw, world: World, name: str, hint: tuple | None, small: bool, k: dict) -> Thing:
    """One thing, drawn as the hint wishes: ("on", i), ("under", i), ("left of", i), ... (see _beside), or None."""
    w, d, h = extents(draw, name.split()[1], k, small)
    turn = draw.below(24)
    if hint is None or hint[0] not in ("on", "under"):
        return Thing(name, *_beside(draw, world, hint), 0.0, turn, w, d, h)
    host = world.things[hint[1]]
    c, s = TURNS[host.turn]
    x = draw.between(-1000, 1000) / 1000 * max(host.w / 2 - 0.75 * w, 0)
    y = draw.between(-1000, 1000) / 1000 * max(host.d / 2 - 0.75 * d, 0)
    z, on = (CARRIER[host.kind] * host.h, hint[1]) if hint[0] == "on" else (0.0, None)
    return Thing(name, host.x + c * x - s * y, host.y + s * x + c * y, z, turn, w, d, h, on)


def box_of(view: View, thing: Thing) -> tuple[int, int, int, int] | None:
    """The rectangle of the picture around a thing's upright box; None unless it is wholly in the picture."""
    spots = [project(view, (x, y, z)) for x, y in footprint(thing) for z in (thing.z, thing.z + thing.h)]
    us, vs = [spot[0] for spot in spots], [spot[1] for spot in spots]
    if min(spot[2] for spot in spots) < 0.5 or min(us) < 1 or min(vs) < 1:
        return None
    if max(us) > view.width - 1 or max(vs) > view.height - 1:
        return None
    return int(min(us)), int(min(vs)), int(max(us)) + 1, int(max(vs)) + 1


def fits(world: World, thing: Thing, ignore: set, boxes: list, k: dict) -> tuple | None:
    """The thing's rectangle if it may stand there: in the room, in the picture, touching nothing, hiding little."""
    if world.room is not None:
        x1, y1, x2, y2, _ = world.room
        if not all(x1 + 0.03 < x < x2 - 0.03 and y1 + 0.03 < y < y2 - 0.03 for x, y in footprint(thing)):
            return None
    if not shows_itself(thing, world.view.place[:2]):
        return None
    box = box_of(world.view, thing)
    if box is None or min(box[2] - box[0], box[3] - box[1]) < k["least"]:
        return None
    for i, (other, theirs) in enumerate(zip(world.things, boxes, strict=True)):
        if i not in ignore and i != thing.on:
            if collide(thing, other):
                return None
            x, y = min(box[2], theirs[2]) - max(box[0], theirs[0]), min(box[3], theirs[3]) - max(box[1], theirs[1])
            least = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, theirs))
            if x > 0 and y > 0 and 100 * x * y > (100 - k["glimpse"]) * least:
                return None
    return box


def draw_world(world: World, k: dict, draw: Draw | None = None) -> Rendered:
    """The picture. draw: for tints and noise; None draws none of either."""
    tints = [[draw.between(-k["tint"], k["tint"]) for _ in range(3)] if draw else (0, 0, 0) for _ in world.things]
    bodies = [
        solids(thing, tuple(min(255, max(0, c + t)) for c, t in zip(COLOURS[thing.colour], tint, strict=True)))
        for thing, tint in zip(world.things, tints, strict=True)
    ]
    tops = [thing.z + CARRIER.get(thing.kind, 1.0) * thing.h for thing in world.things]
    noise = draw.noise(world.view.height, world.view.width, k["noise"]) if draw and k["noise"] else None
    return render(world.view, bodies, [thing.on for thing in world.things], tops, room=world.room, light=world.light,
                  surfaces=SURFACES, noise=noise)  # fmt: skip


# ---- a world for a question ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shot:
    """A world as its picture shows it: boxes of the visible part, ids numbered from left to right, visible shares."""

    world: World
    picture: Rendered
    boxes: list[tuple[int, int, int, int]]
    ids: list[str]
    shares: list[float]


def _cast(draw: Draw, quiz: Quiz, n: int, trapped: bool, k: dict) -> tuple[World, list] | None:
    """The first n things of the cast, placed; None as soon as it does not work out."""
    world, boxes = stage(draw, k), []
    for i, (name, hint, small) in enumerate(quiz.cast[:n]):
        for _ in range(25):
            thing = make(draw, world, name, hint, small, k)
            box = fits(world, thing, {hint[1]} if hint and hint[0] == "under" else set(), boxes, k)
            if box is not None:
                world.things.append(thing)
                boxes.append(box)
                break
        else:
            return None
        if i + 1 == quiz.asked:
            if quiz.answer(world, boxes) != quiz.gold:
                return None
            if trapped and quiz.lure is not None and quiz.lure(world, boxes) == quiz.gold:
                return None
    return world, boxes


def shoot(world: World, quiz: Quiz, gold: str, paint: int, k: dict) -> Shot | None:
    """The picture, if it shows enough of everything and the answer still holds for the boxes of what is visible."""
    picture = draw_world(world, k, Draw(paint))
    shares = [seen / max(whole, 1) for seen, whole in zip(picture.seen, picture.whole, strict=True)]
    if any(100 * share < k["seen" if i < quiz.asked else "glimpse"] for i, share in enumerate(shares)):
        return None
    boxes = [visible_box(picture.owner, i) for i in range(len(world.things))]
    if any(min(x2 - x1, y2 - y1) < k["least"] - 2 for x1, y1, x2, y2 in boxes) or quiz.answer(world, boxes) != gold:
        return None
    ids: dict[int, str] = {}
    for i in sorted(range(len(boxes)), key=lambda i: boxes[i]):
        number = 1 + sum(world.things[j].name == world.things[i].name for j in ids)
        ids[i] = f"{world.things[i].name.replace(' ', '_')}.{number}"
    return Shot(world, picture, boxes, [ids[i] for i in range(len(boxes))], shares)


def scene_for(draw: Draw, quiz: Quiz, k: dict, other: str | None = None) -> list[Shot]:
    """[a shot for which quiz.gold holds], or with its twin, one single edit away, for which `other` holds.

    The question, its options and both answers stay as they were drawn, however many worlds it takes: a choice that
    depended on what is easy to place would be a hint. What is no part of the text may go: the trap after 300 worlds,
    the things that are not asked about after 1,000. ValueError after 6,000.
    """
    trapped = draw.below(100) < k["trap"]
    for attempt in range(6000):
        n = len(quiz.cast) if attempt < 1000 else quiz.asked
        placed = _cast(draw, quiz, n, trapped and attempt < 300, k)
        if placed is None:
            continue
        paint = draw.below(2**60)
        first = shoot(placed[0], quiz, quiz.gold, paint, k)
        if first is None:
            continue
        if other is None:
            return [first]
        second = _twin(draw, first, quiz, other, paint, k)
        if second is not None:
            return [first, second]
    raise ValueError(f"knobs leave no room for a {quiz.task} question ({quiz.question}): fewer objects, or smaller margins")


def _twin(draw: Draw, first: Shot, quiz: Quiz, other: str, paint: int, k: dict) -> Shot | None:
    world = first.world
    for _ in range(40):
        i, how, hint = draw.pick(quiz.edits(other))
        old = world.things[i]
        if any(thing.on == i for thing in world.things):
            continue
        name = how.removeprefix("rename ") if how.startswith("rename") else old.name
        new = make(draw, world, name, hint, quiz.cast[i][2], k)
        if how == "move":
            new = replace(new, turn=old.turn, w=old.w, d=old.d, h=old.h)
        elif how == "turn":
            new = replace(old, turn=new.turn)
        elif how == "resize":
            scale = draw.between(50, 200) / 100
            new = replace(old, w=scale * old.w, d=scale * old.d, h=scale * old.h)
        else:
            new = replace(new, x=old.x, y=old.y, z=old.z, on=old.on)
        things, boxes = [*world.things], [*first.boxes]
        things[i] = new
        ignore = {i, hint[1]} if hint and hint[0] == "under" else {i}
        box = fits(world, new, ignore, boxes, k)
        if box is None:
            continue
        boxes[i] = box
        edited = replace(world, things=things)
        if quiz.answer(edited, boxes) == other:
            second = shoot(edited, quiz, other, paint, k)
            if second is not None:
                return second
    return None


def describe(shot: Shot) -> dict:
    """The world as JSON: camera, room, light and every thing (metres, degrees) with its box and visible share. The
    depth is that of the thing's middle along the optical axis."""
    things = []
    for thing, name, box, share in zip(shot.world.things, shot.ids, shot.boxes, shot.shares, strict=True):
        depth = project(shot.world.view, (thing.x, thing.y, thing.z + thing.h / 2))[2]
        things.append({
            "id": name, "kind": thing.kind, "colour": thing.colour, "place": [thing.x, thing.y, thing.z],
            "extent": [thing.w, thing.d, thing.h], "degrees": 15 * thing.turn, "on": thing.on, "bbox": list(box),
            "visible": round(share, 4), "depth": depth,
        })  # fmt: skip
    room = None if shot.world.room is None else list(shot.world.room)
    camera = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(shot.world.view).items()}
    return {"camera": camera, "room": room, "light": list(shot.world.light), "things": things}
