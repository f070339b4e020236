"""Questions about the three-dimensional world, in the nine categories of STVQA.

As in data/questions.py the options come first, then the right one, uniformly among them, then a world that makes it so:
letter, option texts and question say nothing about the answer. A Quiz knows how to cast the things (names, and hints for
where they go), how to find the answer from the facts (None for a near tie), how a flat reader would be misled (its
"lure"), and which single edits can turn the answer into another option (its "edits", for twins).
"""

from collections.abc import Callable
from dataclasses import dataclass

from data.drawing import CELLS, Draw, cell, centre
from data.questions import plural
from data.world import CARRIER, FACED, SIMPLE, World, between, direction, distance, facing, from_camera, heading, inside
from data.world import nearness, offset, own_side

SIDES = ("left of", "right of", "in front of", "behind")
HEADINGS = ("toward the camera", "away from the camera", "to the left", "to the right")
OWN_SIDES = ("in front of it", "behind it", "to its left", "to its right")
TILE = "A floor tile is one metre wide."
WIDE = ("bed", "sofa", "table")  # so wide that "closest", or a part of the picture, would be unclear
COMPACT = (*SIMPLE, "chair", "lamp")  # small enough for one metre from middle to middle

Edit = tuple[int, str, tuple | None]  # which thing; "move", "turn", "resize" or "rename blue cone"; hint for a move


@dataclass(frozen=True, slots=True)
class Quiz:
    """cast: (name, hint, small) of each thing in the order of placing; hints as data/staging.py: make. asked: how many of
    the first ones decide the answer. about(answer): the things of the gold scene, the subject first. triple: indices of
    subject and object, where the answer itself is the predicate."""

    category: str
    task: str
    question: str
    options: list[str]
    gold: str
    cast: list[tuple[str, tuple | None, bool]]
    asked: int
    answer: Callable[[World, list], str | None]
    lure: Callable[[World, list], str | None] | None = None
    edits: Callable[[str], list[Edit]] = lambda target: []
    about: Callable[[str], list[int]] = lambda answer: []
    triple: tuple[int, int] | None = None


# ---- small helpers ---------------------------------------------------------------------------------------------------


def kinds_of(k: dict) -> list[str]:
    return [*k["solids"], *k["furniture"]]


def _names(draw: Draw, k: dict, n: int, kinds: list[str] | None = None, without: list[str] = ()) -> list[str]:
    """n different names. A bed is only asked about where a kind is given: it seldom fits into the picture beside others."""
    kinds = kinds or [kind for kind in kinds_of(k) if kind != "bed"]
    pool = [f"{colour} {kind}" for colour in k["colours"] for kind in kinds]
    return draw.sample([name for name in pool if name not in without], n)


def _small(draw: Draw, k: dict, n: int, kinds: list[str], hosts: list[str]) -> list[str]:
    """Names of things that may stand on a host: of other colours, or one could not tell them from it."""
    taken = {host.split()[0] for host in hosts}
    return _names(draw, k, n, kinds, [f"{colour} {kind}" for colour in taken for kind in kinds])


def _choose(draw: Draw, k: dict, category: str, pool: list[str]) -> tuple[list[str], str]:
    low, high = k["options"][category]
    options = draw.sample(pool, min(draw.between(low, high), len(pool)))
    return options, draw.pick(options)


def _number_of(draw: Draw, k: dict, category: str) -> int:
    return draw.between(*k["options"][category])


def _fill(draw: Draw, k: dict, cast: list, without: list[str] = (), kinds: list[str] | None = None) -> list:
    """The cast and as many others as the scene is to have, each with a name of its own."""
    more = max(0, draw.between(*k["objects"]) - len(cast))
    names = _names(draw, k, more, kinds or kinds_of(k), [*without, *(name for name, _, _ in cast)])
    return [*cast, *_free(*names)]


def _free(*names: str) -> list:
    return [(name, None, False) for name in names]


def _listed(question: str, options: list[str], names: list[str]) -> str:
    """Two candidates are named in the question, more stand in the options alone."""
    if len(options) == 2:
        return f"{question}, the {names[0]} or the {names[1]}?"
    return f"{question.replace('Which', 'Which of these')}?"


def _these(*indices: int) -> Callable[[str], list[int]]:
    return lambda answer: list(indices)


def _one(answers: list[str]) -> str | None:
    return answers[0] if len(answers) == 1 else None


def _best(values: dict[str, float], margin: float, sign: int = 1) -> str | None:
    """The name with the least value (sign 1) or the greatest (-1); None if another is within the margin."""
    first, second = sorted(sign * value for value in values.values())[:2]
    return _one([name for name, value in values.items() if sign * value == first]) if second - first >= margin else None


def _pixels(box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


# ---- relation --------------------------------------------------------------------------------------------------------


def _flat_side(boxes: list, a: int, b: int, gold: str) -> str | None:
    """Where a lies in the picture. Depth is foreshortened there, so what is behind or in front may look beside; what is
    left or right never looks behind, so that no trap can be set."""
    (ax, ay), (bx, by) = centre(boxes[a]), centre(boxes[b])
    if gold not in ("behind", "in front of"):
        return None
    if abs(ax - bx) > abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "behind" if ay < by else "in front of"


def _direction(draw: Draw, k: dict) -> Quiz:
    options, gold = _choose(draw, k, "relation", SIDES)
    b, a = _names(draw, k, 2)
    return Quiz(
        "relation", "direction", f"As the camera sees it, where mainly is the {a} with respect to the {b}?", options, gold,
        _fill(draw, k, [*_free(b), (a, (gold, 0), False)]), 2,
        lambda w, boxes: direction(w.view, w.things[1], w.things[0], k["margin"] / 100),
        lambda w, boxes: _flat_side(boxes, 1, 0, gold), lambda to: [(1, "move", (to, 0))], _these(1, 0), (1, 0),
    )  # fmt: skip


def _table_side(w: World, margin: float) -> str | None:
    table, thing = w.things[:2]
    if thing.on == 0:
        return "on top of"
    return "under" if inside(thing, table) else direction(w.view, thing, table, margin)


def _support(draw: Draw, k: dict) -> Quiz:
    options, gold = _choose(draw, k, "relation", ["on top of", "under", *SIDES])
    (table,) = _names(draw, k, 1, ["table"])
    (thing,) = _small(draw, k, 1, k["solids"], [table])
    return Quiz(
        "relation", "support", f"As the camera sees it, where is the {thing} with respect to the {table}?", options, gold,
        _fill(draw, k, [*_free(table), (thing, ({"on top of": "on"}.get(gold, gold), 0), True)]), 2,
        lambda w, boxes: _table_side(w, k["margin"] / 100), lambda w, boxes: _flat_side(boxes, 1, 0, gold),
        lambda to: [(1, "move", ({"on top of": "on"}.get(to, to), 0))], _these(1, 0), (1, 0),
    )  # fmt: skip


def _facing(draw: Draw, k: dict) -> Quiz:
    options = draw.sample(["facing", "facing away"], 2)
    a = _names(draw, k, 1, [kind for kind in k["furniture"] if kind in FACED])[0]
    b = _names(draw, k, 1, without=[a])[0]
    return Quiz(
        "relation", "facing", f"How is the {a} turned with respect to the {b}?", options, draw.pick(options),
        _fill(draw, k, _free(a, b)), 2, lambda w, boxes: facing(*w.things[:2]),
        None, lambda to: [(0, "turn", None), (1, "move", None)], _these(0, 1), (0, 1),
    )  # fmt: skip


def _between(draw: Draw, k: dict) -> Quiz:
    n = _number_of(draw, k, "relation")
    a, b, *options = _names(draw, k, n + 2, [kind for kind in kinds_of(k) if kind not in WIDE])
    gold = draw.pick(options)

    def answer(w: World, boxes: list) -> str | None:
        held = [between(w.things[i], *w.things[:2]) for i in range(2, n + 2)]
        return None if None in held else _one([name for name, is_so in zip(placed, held, strict=True) if is_so])

    placed = [gold, *(name for name in options if name != gold)]
    cast = [*_free(a, b), (gold, ("between", 0, 1), False), *_free(*placed[1:])]
    return Quiz(
        "relation", "between", f"Which of these is between the {a} and the {b}?", options, gold, _fill(draw, k, cast),
        n + 2, answer, None, lambda to: [(1, "move", ("beyond", 2 + placed.index(to), 0)),
                                         (0, "move", ("beyond", 2 + placed.index(to), 1))],
        lambda name: [2 + placed.index(name), 0, 1],
    )  # fmt: skip


def _near(draw: Draw, k: dict) -> Quiz:
    options = draw.sample(["next to", "far from"], 2)
    gold, (b, a) = draw.pick(options), _names(draw, k, 2, list(COMPACT[: 4 + ("chair" in k["furniture"])]))
    return Quiz(
        "relation", "near", f"Is the {a} next to the {b} or far from it?", options, gold,
        _fill(draw, k, [*_free(b), (a, ("near", 0) if gold == "next to" else None, False)]), 2,
        lambda w, boxes: nearness(w.things[1], w.things[0]), lambda w, boxes: _flat_near(boxes),
        lambda to: [(1, "move", ("near", 0) if to == "next to" else None)], _these(1, 0), (1, 0),
    )  # fmt: skip


def _flat_near(boxes: list) -> str | None:
    """Boxes side by side, or one above the other, may be near or far; those far apart are far."""
    (ax, _), (bx, _) = centre(boxes[1]), centre(boxes[0])
    return "far from" if abs(ax - bx) > boxes[1][2] - boxes[1][0] + boxes[0][2] - boxes[0][0] else None


def _relation(draw: Draw, k: dict) -> Quiz:
    return draw.pick([_direction] * 4 + [_support] * 2 + [_facing, _between, _near])(draw, k)


# ---- reach and existence ---------------------------------------------------------------------------------------------


def _reach(draw: Draw, k: dict) -> Quiz:
    return draw.pick([_stands_on, _within])(draw, k)


def _stands_on(draw: Draw, k: dict) -> Quiz:
    hosts = _names(draw, k, _number_of(draw, k, "reach") - 1, [kind for kind in kinds_of(k) if kind in CARRIER])
    options = draw.sample([*(f"the {host}" for host in hosts), "the floor"], len(hosts) + 1)
    gold = draw.pick(options)
    (thing,) = _small(draw, k, 1, [kind for kind in k["solids"] if kind not in CARRIER], hosts)
    n, beside = len(hosts), draw.below(len(hosts))

    def hint(answer: str) -> tuple:
        return ("near", beside) if answer == "the floor" else ("on", hosts.index(answer.removeprefix("the ")))

    def answer(w: World, boxes: list) -> str | None:
        on = w.things[n].on
        return None if any(inside(w.things[n], w.things[i]) for i in range(n) if i != on) else (
            "the floor" if on is None else f"the {hosts[on]}")  # fmt: skip

    def lure(w: World, boxes: list) -> str | None:
        return None if any(_overlap(boxes[n], boxes[i]) for i in range(n)) else "the floor"

    cast = [*_free(*hosts), (thing, hint(gold), True)]
    return Quiz("reach", "stands_on", f"What does the {thing} stand on?", options, gold, _fill(draw, k, cast), n + 1, answer,
                lure, lambda to: [(n, "move", hint(to))], _these(n, *range(n)))  # fmt: skip


def _overlap(a, b) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _within(draw: Draw, k: dict) -> Quiz:
    n = _number_of(draw, k, "reach")
    anchor, *placed = _names(draw, k, n + 1, [kind for kind in kinds_of(k) if kind in COMPACT])
    options, gold = draw.sample(placed, n), placed[0]

    def answer(w: World, boxes: list) -> str | None:
        metres = [distance(w.things[0], w.things[1 + i]) for i in range(n)]
        sure = all(m < 1.0 - 0.05 or m > 1.35 for m in metres)
        return _one([name for name, m in zip(placed, metres, strict=True) if m < 1]) if sure else None

    cast = [*_free(anchor), (gold, ("near", 0), False), *_free(*placed[1:])]
    question = f"An arm at the {anchor} reaches one metre from the middle. The middle of which of these can it reach? {TILE}"
    return Quiz("reach", "within", question, options, gold, _fill(draw, k, cast), n + 1, answer,
                lambda w, boxes: _flat_extreme(boxes, {name: 1 + i for i, name in enumerate(placed)}, 1),
                lambda to: [(0, "move", ("near", 1 + placed.index(to)))], _these(*range(n + 1)))  # fmt: skip


def _flat_extreme(boxes: list, places: dict[str, int], sign: int) -> str | None:
    """Whose box is nearest (sign 1) to the first one in the picture, or farthest (-1)."""
    (x, y), spots = centre(boxes[0]), {name: centre(boxes[i]) for name, i in places.items()}
    return _best({name: (u - x) ** 2 + (v - y) ** 2 for name, (u, v) in spots.items()}, 0, sign)


def _existence(draw: Draw, k: dict) -> Quiz:
    return draw.pick([_exists, _exists_on, _exists_side])(draw, k)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _exists(draw: Draw, k: dict) -> Quiz:
    """Either way there is another thing of the kind and one of the colour."""
    options, gold = _choose(draw, k, "existence", ["yes", "no"])
    asked = _names(draw, k, 1)[0]
    colour, kind = asked.split()
    alike = draw.sample([f"{c} {kind}" for c in k["colours"] if c != colour], 2)
    same = f"{colour} {draw.pick([x for x in kinds_of(k) if x != kind])}"
    first = {"yes": asked, "no": alike[1]}
    cast = _fill(draw, k, _free(first[gold], alike[0], same), [asked, alike[1]], [x for x in kinds_of(k) if x != kind])

    def answer(w: World, boxes: list) -> str:
        return "yes" if any(thing.name == asked for thing in w.things) else "no"

    return Quiz("existence", "exists", f"Is there {_a(asked)}?", options, gold, cast, 3, answer, None,
                lambda to: [(0, f"rename {first[to]}", None)], _these(0, 1))  # fmt: skip


def _exists_on(draw: Draw, k: dict) -> Quiz:
    options, gold = _choose(draw, k, "existence", ["yes", "no"])
    table = _names(draw, k, 1, ["table"])[0]
    other = _names(draw, k, 1, [x for x in kinds_of(k) if x in CARRIER], [table])[0]
    kind, decoy = draw.sample([x for x in k["solids"] if x not in CARRIER], 2)
    (a,), (b,) = (_small(draw, k, 1, [x], [table, other]) for x in (kind, decoy))
    where = {"yes": ("on", 0), "no": draw.pick([("on", 1), ("near", 0)])}
    cast = [*_free(table, other), (b, ("on", 0), True), (a, where[gold], True)]

    def answer(w: World, boxes: list) -> str | None:
        on = w.things[3].on
        return "yes" if on == 0 else None if inside(w.things[3], w.things[0]) else "no"

    cast = _fill(draw, k, cast, kinds=[x for x in kinds_of(k) if x != kind])
    return Quiz("existence", "exists_on", f"Is there a {kind} on the {table}?", options, gold, cast, 4, answer,
                lambda w, boxes: "no" if gold == "no" and not _overlap(boxes[3], boxes[0]) else None,
                lambda to: [(3, "move", where[to])], _these(3, 0))  # fmt: skip


def _exists_side(draw: Draw, k: dict) -> Quiz:
    options, gold = _choose(draw, k, "existence", ["yes", "no"])
    b, a = _names(draw, k, 2)
    side, other = draw.sample(SIDES, 2)
    where = {"yes": (side, 0), "no": (other, 0)}

    def answer(w: World, boxes: list) -> str | None:
        found = direction(w.view, w.things[1], w.things[0], k["margin"] / 100)
        return None if found is None else "yes" if found == side else "no"

    question = f"As the camera sees it, is there {_a(a)} that is mainly {side} the {b}?"
    return Quiz("existence", "exists_side", question, options, gold,
                _fill(draw, k, [*_free(b), (a, where[gold], False)]), 2, answer,
                lambda w, boxes: gold if where[gold][0] == _flat_side(boxes, 1, 0, where[gold][0]) else None,
                lambda to: [(1, "move", where[to])], _these(1, 0))  # fmt: skip


# ---- depth, place, size ----------------------------------------------------------------------------------------------


def _depth(draw: Draw, k: dict) -> Quiz:
    n, nearest = _number_of(draw, k, "depth"), draw.below(2)
    names = _names(draw, k, n, [kind for kind in kinds_of(k) if kind not in WIDE])
    options, sign = draw.sample(names, n), 1 if nearest else -1

    def answer(w: World, boxes: list) -> str | None:
        metres = {name: from_camera(w.view, thing) for name, thing in zip(names, w.things, strict=False)}
        by_middle = _best({name: far for name, (far, _) in metres.items()}, k["margin"] / 100, sign)
        by_front = _best({name: far - half for name, (far, half) in metres.items()}, 0.05, sign)
        return by_middle if by_middle == by_front else None

    def lure(w: World, boxes: list) -> str | None:
        return _best({name: -_pixels(box) for name, box in zip(names, boxes, strict=False)}, 0, sign)

    question = _listed(f"Which is {'closest to' if nearest else 'farthest from'} the camera", options, names)
    return Quiz("depth", "nearest" if nearest else "farthest", question, options, draw.pick(options),
                _fill(draw, k, _free(*names)), n, answer, lure,
                lambda to: [(i, "move", None) for i in range(n)], _these(*range(n)))  # fmt: skip


def _location(draw: Draw, k: dict) -> Quiz:
    options, gold = _choose(draw, k, "instance_location", list(CELLS[k["grid"]]))
    name = _names(draw, k, 1, [kind for kind in kinds_of(k) if kind not in WIDE])[0]
    where = (k["width"], k["height"], k["grid"], k["grid_margin"])
    return Quiz("instance_location", f"grid_{k['grid']}", f"In which part of the image is the {name}?", options, gold,
                _fill(draw, k, _free(name)), 1, lambda w, boxes: cell(boxes[0], *where), None,
                lambda to: [(0, "move", None)], _these(0))  # fmt: skip


def _size(draw: Draw, k: dict) -> Quiz:
    """Heights of things whose kinds may have any of them: solids, or several of one kind of furniture."""
    n, tall = _number_of(draw, k, "size"), draw.below(2)
    kinds = draw.pick([k["solids"], *([kind] for kind in k["furniture"] if kind not in WIDE and n < 4)])
    names = _names(draw, k, n, kinds)
    options, sign = draw.sample(names, n), -1 if tall else 1

    def answer(w: World, boxes: list) -> str | None:
        heights = {name: thing.h for name, thing in zip(names, w.things, strict=False)}
        name = _best(heights, 0, sign)
        near = [h for other, h in heights.items() if other != name]
        ratio = (heights[name] / max(near) if tall else min(near) / heights[name]) if name else 0
        return name if ratio >= 1 + k["size_margin"] / 100 else None

    def lure(w: World, boxes: list) -> str | None:
        return _best({name: box[3] - box[1] for name, box in zip(names, boxes, strict=False)}, 0, sign)

    question = _listed(f"Which is really {'tallest' if tall else 'shortest'}", options, names)
    return Quiz("size", "tallest" if tall else "shortest", question, options, draw.pick(options),
                _fill(draw, k, _free(*names)), n, answer, lure,
                lambda to: [(i, "resize", None) for i in range(n)], _these(*range(n)))  # fmt: skip


# ---- distance, orientation, count ------------------------------------------------------------------------------------


def _distance(draw: Draw, k: dict) -> Quiz:
    return draw.pick([_nearest_to, _metres])(draw, k)


def _nearest_to(draw: Draw, k: dict) -> Quiz:
    n, near = _number_of(draw, k, "distance"), draw.below(2)
    anchor, *placed = _names(draw, k, n + 1, [kind for kind in kinds_of(k) if kind not in WIDE])
    options, sign = draw.sample(placed, n), 1 if near else -1
    places = {name: 1 + i for i, name in enumerate(placed)}

    def answer(w: World, boxes: list) -> str | None:
        metres = {name: distance(w.things[0], w.things[i]) for name, i in places.items()}
        edges = {name: metres[name] - max(w.things[i].w, w.things[i].d) / 2 for name, i in places.items()}
        by_middle = _best(metres, k["margin"] / 100, sign)
        return by_middle if by_middle == _best(edges, 0, sign) else None

    question = f"Which of these is {'closest to' if near else 'farthest from'} the {anchor}, measured on the floor?"
    return Quiz("distance", "closest_to" if near else "farthest_from", question, options, draw.pick(options),
                _fill(draw, k, _free(anchor, *placed)), n + 1, answer, lambda w, boxes: _flat_extreme(boxes, places, sign),
                lambda to: [(i, "move", None) for i in range(n + 1)],
                _these(*range(n + 1)))  # fmt: skip


def _metres(draw: Draw, k: dict) -> Quiz:
    options, gold = _choose(draw, k, "distance", ["1 m", "2 m", "3 m", "4 m"])
    a, b = _names(draw, k, 2, [kind for kind in kinds_of(k) if kind in COMPACT])

    def answer(w: World, boxes: list) -> str | None:
        far = distance(*w.things[:2])
        return f"{round(far)} m" if abs(far - round(far)) < 0.16 else None

    question = f"About how far apart are the middles of the {a} and the {b}? {TILE}"
    return Quiz("distance", "metres", question, options, gold,
                _fill(draw, k, [*_free(a), (b, ("metres", 0, int(gold[0])), False)]), 2, answer, None,
                lambda to: [(1, "move", ("metres", 0, int(to[0]))), (0, "move", ("metres", 1, int(to[0])))],
                _these(0, 1))  # fmt: skip


def _orientation(draw: Draw, k: dict) -> Quiz:
    name = _names(draw, k, 1, [kind for kind in k["furniture"] if kind in FACED])[0]
    if draw.below(2):
        options, gold = _choose(draw, k, "orientation", HEADINGS)
        question = f"As the camera sees it, which way is the {name} turned?"
        return Quiz("orientation", "heading", question, options, gold, _fill(draw, k, _free(name)), 1,
                    lambda w, boxes: heading(w.view, w.things[0]), None,
                    lambda to: [(0, "turn", None)], _these(0))  # fmt: skip
    options, gold = _choose(draw, k, "orientation", OWN_SIDES)
    other = _names(draw, k, 1, without=[name])[0]

    def lure(w: World, boxes: list) -> str:
        right, away = offset(w.view, w.things[1], w.things[0])
        side = abs(right) > abs(away)
        return OWN_SIDES[2 + (right > 0)] if side else OWN_SIDES[int(away > 0)]

    question = f"From the point of view of someone sitting on the {name}, where mainly is the {other}?"
    return Quiz("orientation", "own_side", question, options, gold,
                _fill(draw, k, _free(name, other)), 2,
                lambda w, boxes: own_side(w.things[1], w.things[0], k["margin"] / 100), lure,
                lambda to: [(0, "turn", None), (1, "move", None)], _these(0, 1))  # fmt: skip


def _count(draw: Draw, k: dict) -> Quiz:
    """Options are four numbers in a row, so that each has a neighbour of its own for a twin. The first things of the
    cast are counted, others take the places up to the highest number, so that the sum of things tells nothing."""
    by = draw.pick(["kind", "colour", "on"])
    low = 0 if by == "on" else draw.between(1, max(1, k["count_max"] - 3))
    numbers, most = [str(low + i) for i in range(4)], low + 3
    options = draw.sample(numbers, 4)
    gold = draw.pick(options)
    if by == "on":
        return _count_on(draw, k, options, gold)
    asked = _names(draw, k, 1)[0]
    colour, kind = asked.split()
    alike = [f"{c} {kind}" for c in k["colours"]] if by == "kind" else [f"{colour} {x}" for x in kinds_of(k)]
    rest = [f"{c} {x}" for c in k["colours"] for x in kinds_of(k) if kind != x and colour != c]
    counted, others = [draw.pick(alike) for _ in range(most)], draw.sample(rest, most)
    cast = _free(*counted[: int(gold)], *others[int(gold) :])
    cast = _fill(draw, k, cast, [*others, *alike], [x for x in kinds_of(k) if x != kind])

    def answer(w: World, boxes: list) -> str:
        return str(sum(thing.kind == kind if by == "kind" else thing.colour == colour for thing in w.things))

    def edits(to: str) -> list[Edit]:
        at = min(int(to), int(gold))
        return [(at, f"rename {(counted if int(to) > int(gold) else others)[at]}", None)]

    question = f"How many {plural(kind) if by == 'kind' else colour + ' things'} are there?"
    return Quiz("count", f"count_{by}", question, options, gold, cast, most, answer, None, edits,
                lambda n: list(range(int(n))))


def _count_on(draw: Draw, k: dict, options: list[str], gold: str) -> Quiz:
    table = _names(draw, k, 1, ["table"])[0]
    names = _small(draw, k, 3, k["solids"], [table])
    beside = [draw.pick([("near", 0), None]) for _ in names]
    hints = [("on", 0) if i < int(gold) else beside[i] for i in range(3)]
    cast = [*_free(table), *((name, hint, True) for name, hint in zip(names, hints, strict=True))]

    def answer(w: World, boxes: list) -> str | None:
        unsure = any(inside(thing, w.things[0]) and thing.on is None for thing in w.things[1:])
        return None if unsure else str(sum(thing.on == 0 for thing in w.things))

    def edits(to: str) -> list[Edit]:
        at = min(int(to), int(gold))
        return [(1 + at, "move", ("on", 0) if int(to) > int(gold) else beside[at])]

    return Quiz("count", "count_on", f"How many things stand on the {table}?", options, gold, _fill(draw, k, cast), 4,
                answer, None, edits, lambda n: [*range(1, int(n) + 1), 0])  # fmt: skip


QUIZZES = {
    "relation": _relation, "reach": _reach, "existence": _existence, "depth": _depth, "instance_location": _location,
    "size": _size, "distance": _distance, "orientation": _orientation, "count": _count,
}  # fmt: skip


def other_answer(draw: Draw, quiz: Quiz) -> str:
    """The answer of the twin: any other option, for a count the neighbour that makes a pair with it."""
    if quiz.category == "count":
        low = min(int(option) for option in quiz.options)
        return str(low + ((int(quiz.gold) - low) ^ 1))
    return draw.pick([option for option in quiz.options if option != quiz.gold])
