"""The three-dimensional world: things on a floor, what they are made of, and the facts about them, in metres.

Axes as in data/solids.py. A thing's own axes: x to its right, y to its front, z up; its place is the middle of its
underside. Left, right, in front of and behind are the viewer's, except in own_side(). A fact is None for a near tie.
"""

from dataclasses import dataclass
from math import cos, radians, sin, sqrt

from data.solids import Solid, Vector, View, project

SIMPLE = ("cube", "sphere", "cylinder", "cone")
FURNITURE = {  # width, depth, height in cm, lowest and highest
    "chair": ((44, 60), (44, 58), (80, 110)),
    "table": ((80, 150), (65, 100), (55, 85)),
    "lamp": ((34, 60), (34, 60), (100, 175)),
    "shelf": ((60, 120), (28, 45), (90, 180)),
    "sofa": ((130, 210), (75, 100), (65, 95)),
    "bed": ((90, 170), (180, 220), (60, 95)),
}
FACED = ("chair", "sofa")  # one can see which way these are turned
CARRIER = {"table": 1.0, "cube": 1.0, "bed": 0.55}  # the share of its height at which a thing can stand on it
TURNS = [(round(cos(radians(15 * i)), 9), round(sin(radians(15 * i)), 9)) for i in range(24)]


@dataclass(frozen=True, slots=True)
class Thing:
    """x, y: metres, z: of its underside; turn: 15-degree steps anticlockwise; w, d, h: metres; on: the thing below it."""

    name: str  # "red chair"
    x: float
    y: float
    z: float
    turn: int
    w: float
    d: float
    h: float
    on: int | None = None

    @property
    def kind(self) -> str:
        return self.name.split()[1]

    @property
    def colour(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True, slots=True)
class World:
    """room: (x1, y1, x2, y2, height) in metres, None for a plane. light: unit vector towards it."""

    view: View
    room: tuple | None
    light: Vector
    things: list[Thing]


# ---- what a thing is made of -----------------------------------------------------------------------------------------


def _parts(kind: str, w: float, d: float, h: float) -> list[tuple]:
    """(shape, x, y, z, a, b, half height, brightness) of each part, in the thing's own axes, z from its underside."""
    leg = 0.035

    def legs(height: float) -> list[tuple]:
        return [("box", i * (w / 2 - leg), j * (d / 2 - leg), height / 2, leg, leg, height / 2, 0.72)
                for i in (-1, 1) for j in (-1, 1)]  # fmt: skip

    def block(x1, x2, y1, y2, z1, z2, brightness=1.0):  # in shares of the extents
        return ("box", (x1 + x2) / 2 * w, (y1 + y2) / 2 * d, (z1 + z2) / 2 * h,
                (x2 - x1) / 2 * w, (y2 - y1) / 2 * d, (z2 - z1) / 2 * h, brightness)  # fmt: skip

    match kind:
        case "cube":
            return [block(-0.5, 0.5, -0.5, 0.5, 0, 1)]
        case "sphere":
            return [("ball", 0, 0, h / 2, w / 2, w / 2, h / 2, 1.0)]
        case "cylinder":
            return [("round", 0, 0, h / 2, w / 2, w / 2, h / 2, 1.0)]
        case "cone":
            return [("round", 0, 0, h / 2, w / 2, 0.0, h / 2, 1.0)]
        case "table":
            return [block(-0.5, 0.5, -0.5, 0.5, 0.9, 1), *legs(0.9 * h)]
        case "chair":
            return [block(-0.5, 0.5, -0.5, 0.5, 0.44, 0.5), block(-0.5, 0.5, -0.5, -0.38, 0.5, 1, 0.9), *legs(0.44 * h)]
        case "lamp":
            return [("round", 0, 0, 0.015, w / 2.6, w / 2.6, 0.015, 0.7),
                    ("round", 0, 0, 0.4 * h, 0.025, 0.025, 0.4 * h, 0.6),
                    ("round", 0, 0, 0.86 * h, w / 2, w / 3.6, 0.14 * h, 1.0)]  # fmt: skip
        case "shelf":
            boards = [block(-0.45, 0.45, -0.4, 0.5, z, z + 0.04, 0.95) for z in (0.03, 0.34, 0.65)]
            return [block(-0.5, -0.45, -0.5, 0.5, 0, 1), block(0.45, 0.5, -0.5, 0.5, 0, 1),
                    block(-0.5, 0.5, -0.5, 0.5, 0.96, 1), block(-0.45, 0.45, -0.5, -0.4, 0, 0.96, 0.6), *boards]  # fmt: skip
        case "sofa":
            return [block(-0.4, 0.4, -0.3, 0.5, 0, 0.5, 0.92), block(-0.5, 0.5, -0.5, -0.3, 0, 1),
                    block(-0.5, -0.4, -0.3, 0.5, 0, 0.7), block(0.4, 0.5, -0.3, 0.5, 0, 0.7)]  # fmt: skip
        case "bed":  # its head is at the back
            return [block(-0.5, 0.5, -0.46, 0.5, 0, 0.45, 0.75), block(-0.5, 0.5, -0.46, 0.5, 0.45, 0.55),
                    block(-0.5, 0.5, -0.5, -0.46, 0, 1, 0.8)]  # fmt: skip
    raise ValueError(f"unknown kind {kind!r}")


def solids(thing: Thing, colour: tuple[int, int, int]) -> list[Solid]:
    c, s = TURNS[thing.turn]
    return [
        Solid(shape, thing.x + c * x - s * y, thing.y + s * x + c * y, thing.z + z, a, b, half, (c, s),
              tuple(int(channel * bright) for channel in colour))
        for shape, x, y, z, a, b, half, bright in _parts(thing.kind, thing.w, thing.d, thing.h)
    ]  # fmt: skip


# ---- facts, from places and extents alone ----------------------------------------------------------------------------


def footprint(thing: Thing, more: float = 0.0) -> list[tuple[float, float]]:
    """The four corners of what it covers on the floor, anticlockwise, made wider by `more` metres on each side."""
    c, s = TURNS[thing.turn]
    a, b = thing.w / 2 + more, thing.d / 2 + more
    return [(thing.x + c * x - s * y, thing.y + s * x + c * y) for x, y in ((-a, -b), (a, -b), (a, b), (-a, b))]


def _split(a: list, b: list) -> bool:
    """Is there an edge of polygon a with all of polygon b outside?"""
    for i, (x1, y1) in enumerate(a):
        x2, y2 = a[(i + 1) % 4]
        if all((x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) < 0 for x, y in b):
            return True
    return False


def collide(a: Thing, b: Thing, gap: float = 0.04) -> bool:
    """Do two things come nearer than about `gap` metres? One that carries the other, or stands over it, does not."""
    if a.z >= b.z + b.h - 1e-6 or b.z >= a.z + a.h - 1e-6:
        return False
    far = (a.w + a.d + b.w + b.d) / 2 + gap  # more than both half diagonals
    if abs(a.x - b.x) > far or abs(a.y - b.y) > far:
        return False
    return not (_split(footprint(a, gap), footprint(b)) or _split(footprint(b), footprint(a, gap)))


def gap(a: Thing, b: Thing) -> float:
    """Metres between the closest points of the upright boxes of two things; 0 if they meet."""
    up = max(a.z - b.z - b.h, b.z - a.z - a.h, 0.0)
    p, q = footprint(a), footprint(b)
    if not (_split(p, q) or _split(q, p)):
        return up
    across = min(_to_edge(x, y, other[i - 1], other[i]) for corners, other in ((p, q), (q, p)) for x, y in corners
                 for i in range(4))  # fmt: skip
    return sqrt(across * across + up * up)


def _to_edge(x: float, y: float, a: tuple[float, float], b: tuple[float, float]) -> float:
    ex, ey = b[0] - a[0], b[1] - a[1]
    part = min(1.0, max(0.0, ((x - a[0]) * ex + (y - a[1]) * ey) / (ex * ex + ey * ey)))
    return sqrt((x - a[0] - part * ex) ** 2 + (y - a[1] - part * ey) ** 2)


def shows_itself(thing: Thing, eye: tuple[float, float]) -> bool:
    """A shelf is only known as one from its open side."""
    if thing.kind != "shelf":
        return True
    (c, s), x, y = TURNS[thing.turn], eye[0] - thing.x, eye[1] - thing.y
    return c * y - s * x > 0.4 * sqrt(x * x + y * y)


def distance(a: Thing, b: Thing) -> float:
    """Metres between the middles of two things on the floor plan."""
    return sqrt((a.x - b.x) ** 2 + (a.y - b.y) ** 2)


def from_camera(view: View, thing: Thing) -> tuple[float, float]:
    """Metres from the camera to a thing's middle, and half its extent along that line (a bound)."""
    x, y, z = (thing.x - view.place[0], thing.y - view.place[1], thing.z + thing.h / 2 - view.place[2])
    return sqrt(x * x + y * y + z * z), sqrt(thing.w**2 + thing.d**2) / 2


def offset(view: View, a: Thing, b: Thing) -> tuple[float, float]:
    """Metres that a lies to the viewer's right of b, and farther away than b, on the floor plan."""
    x, y, (rx, ry, _) = a.x - b.x, a.y - b.y, view.right
    return rx * x + ry * y, rx * y - ry * x


def direction(view: View, a: Thing, b: Thing, margin: float) -> str | None:
    """Where a is, mainly, with respect to b, as the viewer sees it; None for a near tie, or where the floor plan and the
    picture disagree about the side."""
    right, away = offset(view, a, b)
    if abs(abs(right) - abs(away)) < margin:
        return None
    if abs(right) < abs(away):
        return "behind" if away > 0 else "in front of"
    shift = project(view, (a.x, a.y, a.z))[0] - project(view, (b.x, b.y, b.z))[0]
    return ("right of" if right > 0 else "left of") if shift * right > 0 else None


def own_side(a: Thing, b: Thing, margin: float) -> str | None:
    """Where a is from b's own point of view: in front of, behind, to the left or to the right of b."""
    c, s = TURNS[b.turn]
    right, ahead = c * (a.x - b.x) + s * (a.y - b.y), c * (a.y - b.y) - s * (a.x - b.x)
    if abs(abs(right) - abs(ahead)) < margin:
        return None
    if abs(right) < abs(ahead):
        return "in front of it" if ahead > 0 else "behind it"
    return "to its right" if right > 0 else "to its left"


def heading(view: View, thing: Thing) -> str | None:
    """Which way a thing is turned, as the viewer sees it: within 20 degrees, along the line of sight to it and
    along the camera's axis alike, else None."""
    c, s = TURNS[thing.turn]
    front, ways = (-s, c), []
    x, y = thing.x - view.place[0], thing.y - view.place[1]
    n = sqrt(x * x + y * y)
    for ax, ay in ((x / n, y / n), (-view.right[1], view.right[0])):
        along, across = front[0] * ax + front[1] * ay, front[0] * ay - front[1] * ax
        if abs(along) > 0.94:
            ways.append("away from the camera" if along > 0 else "toward the camera")
        elif abs(across) > 0.94:
            ways.append("to the right" if across > 0 else "to the left")
    return ways[0] if len(ways) == 2 and ways[0] == ways[1] else None


def facing(a: Thing, b: Thing) -> str | None:
    """Is a turned towards b or away from it? None in between."""
    c, s = TURNS[a.turn]
    straight = (-s * (b.x - a.x) + c * (b.y - a.y)) / max(distance(a, b), 1e-9)
    return "facing" if straight > 0.92 else "facing away" if straight < -0.92 else None


def relations(world: World, ids: list[str], margin: float) -> list[dict]:
    """Every triple of two things that geometry decides, in the words of the canonical table (spec 3.3)."""
    found = []
    for i, a in enumerate(world.things):
        for j, b in enumerate(world.things):
            if i == j:
                continue
            over = a.z - b.z - b.h  # metres of air between a and the top of b
            words = [direction(world.view, a, b, margin)] if i not in (b.on,) and a.on != j else []
            words += ["on top of"] if a.on == j else ["above"] if a.on is not None and over > 0 and inside(a, b) else []
            words += ["below", "touching"] if b.on == i else ["touching"] if a.on == j else []
            words += ["under"] if b.kind == "table" and a.on is None and inside(a, b) else []
            words += [facing(a, b)] if a.kind in FACED and a.on != j else []
            words += [nearness(a, b)]
            words += ["taller"] if a.h > b.h * 1.2 else ["shorter"] if b.h > a.h * 1.2 else []
            if a.kind == b.kind:
                words += ["bigger"] if min(a.w / b.w, a.d / b.d, a.h / b.h) > 1.15 else []
                words += ["smaller"] if max(a.w / b.w, a.d / b.d, a.h / b.h) < 1 / 1.15 else []
            if a.kind in FACED and b.kind in FACED and (a.turn - b.turn) % 6 == 0:
                words.append("parallel to" if (a.turn - b.turn) % 12 == 0 else "perpendicular to")
            found += [{"subject": ids[i], "predicate": word, "object": ids[j]} for word in words if word]
    return found


def nearness(a: Thing, b: Thing) -> str | None:
    """By the air between the circles around two things on the floor: under 25 cm, or over two metres."""
    air = distance(a, b) - (sqrt(a.w**2 + a.d**2) + sqrt(b.w**2 + b.d**2)) / 2
    if a.on is not None or b.on is not None or inside(a, b) or inside(b, a):
        return None
    return "next to" if air < 0.25 else "far from" if air > 2 else None


def inside(a: Thing, b: Thing) -> bool:
    """Is the middle of a over or under the footprint of b?"""
    c, s = TURNS[b.turn]
    x, y = c * (a.x - b.x) + s * (a.y - b.y), c * (a.y - b.y) - s * (a.x - b.x)
    return abs(x) < b.w / 2 and abs(y) < b.d / 2


def between(x: Thing, a: Thing, b: Thing) -> bool | None:
    """Is x between a and b on the floor plan? None for a near tie."""
    ux, uy, n = b.x - a.x, b.y - a.y, max(distance(a, b), 1e-9)
    along = ((x.x - a.x) * ux + (x.y - a.y) * uy) / (n * n)
    beside = abs((x.x - a.x) * uy - (x.y - a.y) * ux) / n
    if 0.25 < along < 0.75 and beside < 0.15 * n:
        return True
    return False if not -0.1 < along < 1.1 or beside > 0.5 * n else None
