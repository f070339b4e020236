"""The questions of procedural scenes: what is asked, the options, and what a scene must show to make one of them right.

The options come first, then the right one, uniformly among them, then the objects. data/scenes.py places these so that
the answer holds. `k` is a level's dict of knobs (LEVELS in data/scenes.py explains each).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.drawing import CELLS, CONTACTS, DIRECTIONS, Box, Draw, cell, clear_contact, direction, pixels


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


def object_names(k: dict) -> list[str]:
    return [f"{colour} {shape}" for colour in k["colours"] for shape in k["shapes"]]


def plural(name: str) -> str:
    return name[:-1] + "ves" if name.endswith("lf") else name + ("es" if name.endswith("ss") else "s")


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
            return len(boxes) != 2 or clear_contact((a, b), *boxes, k["margin"]) == gold
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
