"""What a perfect, or a careless, reader of a procedural scene would answer: the texts of a warm start."""

import json
import random
from math import sqrt

from data.drawing import centre, shared
from data.questions import plural


def _compare(a: int, b: int) -> str:
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b} by {abs(a - b)}"


def _world_derivation(row: dict) -> str:
    """The same for a three-dimensional row, whole centimetres: x to the right of the camera, y away from it, z up."""
    world, task = row["meta"]["world"], row["meta"]["task"]
    by_id = {thing["id"]: thing for thing in world["things"]}
    about = [by_id[o["id"]] for o in row["scene"]["objects"]]
    eye, (rx, ry, _) = world["camera"]["place"], world["camera"]["right"]

    def place(thing: dict) -> tuple[int, int, int]:
        x, y, z = (a - b for a, b in zip(thing["place"], eye, strict=True))
        return round(100 * (rx * x + ry * y)), round(100 * (rx * y - ry * x)), round(100 * thing["place"][2])

    def apart(a, b) -> int:
        return round(100 * sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True))))

    if task in ("count_kind", "count_colour"):
        return ", ".join(str(i + 1) for i in range(len(about)))
    if task in ("tallest", "shortest"):
        return ", ".join(str(round(100 * thing["extent"][2])) for thing in about)
    if task in ("nearest", "farthest"):
        middles = [(*thing["place"][:2], thing["place"][2] + thing["extent"][2] / 2) for thing in about]
        return ", ".join(str(apart(middle, eye)) for middle in middles)
    if task in ("near", "metres", "within", "closest_to", "farthest_from"):
        return ", ".join(str(apart(thing["place"][:2], about[0]["place"][:2])) for thing in about[1:])
    if task in ("stands_on", "exists_on"):
        return f"z {place(about[0])[2]}"
    if task == "count_on":
        return ", ".join(str(place(thing)[2]) for thing in about[:-1]) or "0 found"
    if task == "heading":
        return f"turned {about[0]['degrees']}"
    if task in ("direction", "support", "exists_side"):
        (ax, ay, az), (bx, by, _) = map(place, about)
        return f"x {_compare(ax, bx)}; y {_compare(ay, by)}" + (f"; z {az}" if task == "support" else "")
    spots = "; ".join("x {} y {}".format(*place(thing)[:2]) for thing in about)  # facing, own_side, between
    return spots if task == "between" else f"{spots}; turned {about[0]['degrees']}"


def _derivation(row: dict) -> str:
    """The steps from the gold boxes to the answer, as few words as possible."""
    boxes = [o["bbox"] for o in row["scene"]["objects"]]
    task = row["meta"]["task"]
    if "world" in row["meta"] and task != "exists" and row["category"] != "instance_location":
        return _world_derivation(row)
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
    if row["meta"]["task"] == "count_on":
        return row["question"].removeprefix("How many ").removesuffix("?").replace("stand", "that stand")
    if row["category"] == "count":
        return "all " + row["question"].removeprefix("How many ").removesuffix(" are there?")
    if row["meta"]["task"] == "exists":
        return "all " + plural(row["question"].rstrip("?").split()[-1])
    return " and ".join("the " + o["id"].split(".")[0].replace("_", " ") for o in row["scene"]["objects"])


def _clip_response(row: dict, think: str | None, letter: str, *, mirrored: bool = False, closed: bool = True) -> str:
    """Map imagination (spec of SpaceR, 1.1): the map inside the thinking, the numbers that the answer follows from, the
    answer in words; then the bare letter or number. mirrored: left and right of the map exchanged; not closed: the
    thinking has no end, which breaks the format."""
    if think is None:
        cells = {name: [[9 - x if mirrored else x, y] for x, y in spots] for name, spots in row["map"].items()}
        found = f"{row['options']['ABCD'.index(letter)]}({letter}) " if row["options"] else letter
        steps = ", ".join(map(str, row["meta"].get("steps", [])))
        think = f"<map>{json.dumps(cells)}</map>{f'; {steps}' if steps else ''}; so {found}"
    return f"<think>{think}{'</think>' if closed else ''}\n<answer>{letter}</answer>"


def response_text(row: dict, *, observe: str | None = None, think: str | None = None, letter: str | None = None) -> str:
    """The whole four-tag response to a procedural row, for a warm start: short text, gold scene, short derivation; of a
    clip, think and answer with the gold map.

    The derivation ends with the word it found and, glued to it, the option's letter ("so below(A) "): a small model
    learns the look-up from word to letter far more easily where the two are neighbours. letter: a careless teacher's
    answer, right or wrong; boxes and derivation stay right, the conclusion and the answer follow the letter.
    Raises ValueError if there is no such option.
    """
    letter = letter or row["gold"]
    if "video" in row:
        return _clip_response(row, think, letter)
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


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def mistaken_letter(row: dict) -> str:
    """The one wrong option that a careless reader takes: the opposite direction, otherwise the next option; of a number
    the double."""
    if not row["options"]:
        return f"{2 * float(row['gold']):g}"
    right = "ABCD".index(row["gold"])
    opposite = OPPOSITE.get(row["options"][right])
    wrong = row["options"].index(opposite) if opposite in row["options"] else (right + 1) % len(row["options"])
    return "ABCD"[wrong]


def careless_text(row: dict, share: float) -> str:
    """The response of a teacher who is wrong in this share of the rows, always in the same ones: about the answer; of a clip
    also, each by itself, about left and right on the map, and in forgetting to end the thinking."""
    draw = random.Random(row["id"])
    letter = mistaken_letter(row) if draw.random() < share else row["gold"]
    if "video" not in row:
        return response_text(row, letter=letter)
    mirrored, closed = draw.random() < share, draw.random() >= share
    return _clip_response(row, None, letter, mirrored=mirrored, closed=closed)
