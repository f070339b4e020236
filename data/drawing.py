"""What procedural scenes are drawn with: random integers, boxes, and coloured shapes as pixels.

Boxes are [x1, y1, x2, y2] in pixels, x2 and y2 one past the last pixel drawn, so width = x2 - x1. Everything is integer
arithmetic: one seed gives one picture, byte for byte, on every machine.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

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

Box = tuple[int, int, int, int]


class Draw:
    """Integers from one seed: PCG64's raw 64-bit stream and nothing else (rule 3 of data/scenes.py)."""

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


def paint(draw: Draw, names: list[str], boxes: list[Box], order: list[int], k: dict) -> np.ndarray:
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


def all_sides_seen(names: list[str], boxes: list[Box], order: list[int], k: dict) -> bool:
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


def clear_contact(names: Sequence[str], a: Box, b: Box, margin: int) -> str | None:
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
