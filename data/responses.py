"""What a perfect, or a careless, reader of a procedural scene would answer: the texts of a warm start."""

import json

from data.drawing import centre, shared
from data.questions import plural


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


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def mistaken_letter(row: dict) -> str:
    """The one wrong option that a careless reader takes: the opposite direction, otherwise the next option."""
    right = "ABCD".index(row["gold"])
    opposite = OPPOSITE.get(row["options"][right])
    wrong = row["options"].index(opposite) if opposite in row["options"] else (right + 1) % len(row["options"])
    return "ABCD"[wrong]
