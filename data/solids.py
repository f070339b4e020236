"""A small renderer: solids on a floor, in metres, through a pinhole camera; per-object ray casting into a depth buffer.

World axes: x and y on the floor, z up. A pixel's ray is place + t * (forward + right * u + up * v), so t is the depth
along the optical axis. Shading is Lambert's law with one far light; shadows fall on the floor and on what carries a
thing. Only + - * / and sqrt on float32, elementwise, so that one scene gives one picture on every machine (IEEE 754;
no sine, no power, no matrix product whose order of sums is the library's).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt

import numpy as np

NEAR, FAR = 0.05, 80.0  # metres: nothing nearer is drawn, the floor beyond is sky
AMBIENT, DIRECT, SHADOW = 0.46, 0.54, 0.58  # tone = AMBIENT + DIRECT * cosine; a shadow multiplies the tone
SKY, FLOOR, CEILING, WALL_X, WALL_Y = range(5)  # the first surfaces; solids are numbered behind them

Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class View:
    """A pinhole camera: place in metres, three unit vectors, focal length in pixels, size of the picture."""

    place: Vector
    right: Vector
    up: Vector
    forward: Vector
    focal: float
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Solid:
    """shape "box": half extents a, b, h along its own axes, turned by (cos, sin). "round": upright, radius a at the
    bottom, b at the top, half height h (cylinder, cone). "ball": radius a. x, y, z: its middle. colour: RGB 0..255."""

    shape: str
    x: float
    y: float
    z: float
    a: float
    b: float
    h: float
    turn: tuple[float, float]
    colour: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """image (H, W, 3) uint8; depth (H, W) float32 metres along the optical axis; owner (H, W) int16, the index of the
    thing seen, -1 for none; whole[i]: pixels that thing i would cover alone; seen[i]: pixels it has."""

    image: np.ndarray
    depth: np.ndarray
    owner: np.ndarray
    whole: list[int]
    seen: list[int]


def look(place: Vector, heading: tuple[float, float], drop: float, focal: float, width: int, height: int) -> View:
    """A camera without roll. heading: its direction on the floor (any length); drop: metres it looks down per metre."""
    n = sqrt(heading[0] ** 2 + heading[1] ** 2)
    hx, hy = heading[0] / n, heading[1] / n
    n = sqrt(1 + drop * drop)
    fx, fy, fz = hx / n, hy / n, -drop / n
    rx, ry = hy, -hx
    return View(place, (rx, ry, 0.0), (ry * fz, -rx * fz, rx * fy - ry * fx), (fx, fy, fz), focal, width, height)


def project(view: View, point: Sequence[float]) -> tuple[float, float, float]:
    """(u, v, depth): pixels from the left and the top, metres. Only depth means something where it is below NEAR."""
    x, y, z = point[0] - view.place[0], point[1] - view.place[1], point[2] - view.place[2]
    depth = x * view.forward[0] + y * view.forward[1] + z * view.forward[2]
    scale = view.focal / max(depth, NEAR)
    u = view.width / 2 + scale * (x * view.right[0] + y * view.right[1])
    return u, view.height / 2 - scale * (x * view.up[0] + y * view.up[1] + z * view.up[2]), depth


def frame(view: View, corners: list[Vector]) -> tuple[int, int, int, int] | None:
    """The pixels [x1, y1, x2, y2) around a convex body, inside the picture; None if it is behind or outside."""
    spots = [project(view, corner) for corner in corners]
    if max(spot[2] for spot in spots) < NEAR:
        return None
    if min(spot[2] for spot in spots) < NEAR:  # it reaches behind the camera: no rectangle is safe
        return 0, 0, view.width, view.height
    us, vs = [spot[0] for spot in spots], [spot[1] for spot in spots]
    x1, y1 = max(0, floor(min(us))), max(0, floor(min(vs)))
    x2, y2 = min(view.width, ceil(max(us))), min(view.height, ceil(max(vs)))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def corners(s: Solid) -> list[Vector]:
    """The eight corners of a solid's upright box."""
    a, b = (s.a, s.b) if s.shape == "box" else (max(s.a, s.b),) * 2
    (c, t), h = s.turn, s.a if s.shape == "ball" else s.h
    across = [(c * i * a - t * j * b, t * i * a + c * j * b) for i in (-1, 1) for j in (-1, 1)]
    return [(s.x + x, s.y + y, s.z + z) for x, y in across for z in (-h, h)]


# ---- rays against solids ---------------------------------------------------------------------------------------------


class _Rays:
    """Directions of all pixels, as a column and a row whose sum they are. light: unit vector towards the light."""

    def __init__(self, view: View, light: Vector):
        u = ((np.arange(view.width, dtype=np.float32) + np.float32(0.5 - view.width / 2)) / np.float32(view.focal))[None]
        v = ((np.float32(view.height / 2 - 0.5) - np.arange(view.height, dtype=np.float32)) / np.float32(view.focal))
        self.column = [np.float32(f) + np.float32(w) * v[:, None] for f, w in zip(view.forward, view.up, strict=True)]
        self.row = [np.float32(r) * u for r in view.right[:2]]
        self.view, self.light = view, light

    def along(self, turn: tuple[float, float], box: tuple[int, int, int, int]) -> list[np.ndarray]:
        """Directions (h, w), (h, w), (h, 1) of a rectangle of pixels, in axes turned by (cos, sin)."""
        x1, y1, x2, y2 = box
        c, s = map(np.float32, turn)
        x, y = self.column[0][y1:y2], self.column[1][y1:y2]
        u, v = self.row[0][:, x1:x2], self.row[1][:, x1:x2]
        return [(c * x + s * y) + (c * u + s * v), (c * y - s * x) + (c * v - s * u), self.column[2][y1:y2]]


def _tone(cosine: float) -> float:
    return AMBIENT + DIRECT * max(cosine, 0.0)


def _hit_box(s: Solid, rays: _Rays, box: tuple) -> tuple[np.ndarray, np.ndarray]:
    """(depth, tone), each (h, w); depth is inf where the ray misses. Slabs: the last entry before the first exit."""
    (c, t), light = s.turn, rays.light
    dx, dy, dz = (rays.view.place[i] - m for i, m in enumerate((s.x, s.y, s.z)))
    origin, half = (c * dx + t * dy, c * dy - t * dx, dz), (s.a, s.b, s.h)
    lit = (c * light[0] + t * light[1], c * light[1] - t * light[0], light[2])
    enters, exits = [], []
    for o, e, way, cosine in zip(origin, half, rays.along(s.turn, box), lit, strict=True):
        side = 1 if o > 0 else -1
        first, last = np.float32(side * e - o) / way, np.float32(-side * e - o) / way
        if abs(o) > e:
            enters.append((first, _tone(side * cosine)))
            exits.append(last)
        else:  # between the two planes: it only leaves through one of them
            exits.append(np.maximum(first, last))
    enter, tone = enters[0]
    for other, lighter in enters[1:]:
        tone = np.where(other > enter, np.float32(lighter), np.float32(tone) if isinstance(tone, float) else tone)
        enter = np.maximum(enter, other)
    exit_ = exits[0]
    for other in exits[1:]:
        exit_ = np.minimum(exit_, other)
    return np.where((enter < exit_) & (enter > NEAR), enter, np.float32(np.inf)), tone


def _hit_ball(s: Solid, rays: _Rays, box: tuple) -> tuple[np.ndarray, np.ndarray]:
    x, y, z = rays.along((1.0, 0.0), box)
    ox, oy, oz = (np.float32(rays.view.place[i] - m) for i, m in enumerate((s.x, s.y, s.z)))
    radius = np.float32(s.a)
    square = x * x + y * y + z * z
    half = ox * x + oy * y + oz * z
    inside = half * half - square * (ox * ox + oy * oy + oz * oz - radius * radius)
    depth = (-half - np.sqrt(np.maximum(inside, 0))) / square
    lx, ly, lz = map(np.float32, rays.light)
    cosine = ((ox * lx + oy * ly + oz * lz) + depth * (x * lx + y * ly + z * lz)) / radius
    tone = np.float32(AMBIENT) + np.float32(DIRECT) * np.maximum(cosine, 0)
    return np.where((inside > 0) & (depth > NEAR), depth, np.float32(np.inf)), tone


def _hit_round(s: Solid, rays: _Rays, box: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The side is x^2 + y^2 = r(z)^2 with r linear in z: two roots, each kept if z is within the solid; then a lid."""
    x, y, z = rays.along((1.0, 0.0), box)
    ox, oy, oz = (np.float32(rays.view.place[i] - m) for i, m in enumerate((s.x, s.y, s.z)))
    lx, ly, lz = map(np.float32, rays.light)
    h, slope = np.float32(s.h), np.float32((s.b - s.a) / (2 * s.h))
    radius = np.float32((s.a + s.b) / 2) + slope * oz  # of the cone at the eye's height
    square = x * x + y * y - slope * slope * z * z
    half = ox * x + oy * y - slope * radius * z
    inside = half * half - square * (ox * ox + oy * oy - radius * radius)
    root = np.sqrt(np.maximum(inside, 0))
    depth = np.full(square.shape, np.inf, dtype=np.float32)
    for t in ((-half - root) / square, (root - half) / square):
        good = (inside > 0) & (t > NEAR) & (t < depth) & (np.abs(oz + t * z) <= h) & (radius + slope * t * z >= 0)
        np.copyto(depth, t, where=good)
    at = np.where(depth < np.inf, depth, 0)
    across = np.maximum(radius + slope * at * z, np.float32(1e-6))
    cosine = ((ox + at * x) * lx + (oy + at * y) * ly - slope * across * lz) / across
    tone = np.float32(AMBIENT) + np.float32(DIRECT / sqrt(1 + float(slope) ** 2)) * np.maximum(cosine, 0)
    if abs(oz) > s.h:
        side = 1 if oz > 0 else -1
        lid = np.float32(side * s.h - oz) / z  # (h, 1)
        px, py = ox + lid * x, oy + lid * y
        on = (px * px + py * py <= np.float32((s.b if side > 0 else s.a) ** 2)) & (lid > NEAR) & (lid < depth)
        np.copyto(depth, np.broadcast_to(lid, depth.shape), where=on)
        np.copyto(tone, np.float32(_tone(side * rays.light[2])), where=on)
    return depth, tone


_HIT = {"box": _hit_box, "ball": _hit_ball, "round": _hit_round}


# ---- background and shadows ------------------------------------------------------------------------------------------


def _background(rays: _Rays, room: tuple | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(depth, tone, surface) without things. room: (x1, y1, x2, y2, height) in metres, or None for an endless plane.
    Floor tiles are one metre wide."""
    view = rays.view
    ox, oy, oz = map(np.float32, view.place)
    x, y, z = rays.along((1.0, 0.0), (0, 0, view.width, view.height))
    if room is None:
        down = np.where(z < 0, -oz / z, np.float32(np.inf))
        depth = np.broadcast_to(np.where(down < FAR, down, np.float32(np.inf)), x.shape).copy()
        surface = np.where(depth < np.inf, np.int16(FLOOR), np.int16(SKY))
        tone = np.broadcast_to(np.float32(1) - np.float32(0.25) * np.clip(z, 0, 1), x.shape).copy()
    else:
        x1, y1, x2, y2, height = room
        along_x = np.maximum(np.float32(x1 - ox) / x, np.float32(x2 - ox) / x)
        along_y = np.maximum(np.float32(y1 - oy) / y, np.float32(y2 - oy) / y)
        along_z = np.maximum(-oz / z, np.float32(height - oz) / z)  # (h, 1)
        wall = np.minimum(along_x, along_y)
        flat = along_z < wall
        depth = np.where(flat, along_z, wall)
        surface = np.where(along_x < along_y, np.int16(WALL_X), np.int16(WALL_Y))
        np.copyto(surface, np.where(z < 0, np.int16(FLOOR), np.int16(CEILING)), where=flat)
        tone = np.ones_like(depth)
        np.copyto(tone, np.float32(0.7), where=~flat & (oz + depth * z < np.float32(0.08)))  # skirting board
    rows = np.s_[int(np.count_nonzero(z >= 0)) :]  # those that look down
    reach, x, y = np.minimum(depth[rows], np.float32(FAR)), x[rows], y[rows]
    tiles = (ox + reach * x + np.float32(1024)).astype(np.int32) ^ (oy + reach * y + np.float32(1024)).astype(np.int32)
    contrast = np.minimum(np.float32(0.45) / reach, np.float32(0.08))  # far tiles are smaller than a pixel
    np.copyto(tone[rows], np.float32(1) - contrast * (tiles & 1), where=surface[rows] == FLOOR)
    return depth, tone, surface


def _shaded(s: Solid, x: np.ndarray, y: np.ndarray, ground: float, light: Vector) -> np.ndarray:
    """Which points (x, y) of the level z = ground does a solid above it hide from the light?"""
    if s.shape == "ball":
        dx, dy, dz = np.float32(s.x) - x, np.float32(s.y) - y, np.float32(s.z - ground)
        lx, ly, lz = map(np.float32, light)
        along = dx * lx + dy * ly + dz * lz
        return dx * dx + dy * dy + dz * dz - along * along < np.float32(s.a**2)
    low, high = s.z - s.h - ground, s.z + s.h - ground
    shift_x, shift_y = -light[0] / light[2], -light[1] / light[2]  # of the shadow, per metre of height
    if s.shape == "round":  # discs from the bottom's shadow to the lid's
        dx, dy = x - np.float32(s.x + low * shift_x), y - np.float32(s.y + low * shift_y)
        ex, ey = 2 * s.h * shift_x, 2 * s.h * shift_y
        part = np.clip((dx * np.float32(ex) + dy * np.float32(ey)) / np.float32(ex * ex + ey * ey + 1e-9), 0, 1)
        dx, dy = dx - part * np.float32(ex), dy - part * np.float32(ey)
        radius = np.float32(s.a) + part * np.float32(s.b - s.a)
        return dx * dx + dy * dy < radius * radius
    c, t = s.turn
    px, py = x - np.float32(s.x), y - np.float32(s.y)
    enter, exit_ = np.float32(low), np.float32(high)
    c32, t32 = np.float32(c), np.float32(t)
    for p, per_metre, half in ((c32 * px + t32 * py, c * shift_x + t * shift_y, s.a),
                               (c32 * py - t32 * px, c * shift_y - t * shift_x, s.b)):  # fmt: skip
        per_metre = per_metre if abs(per_metre) > 1e-6 else 1e-6
        side = half if per_metre > 0 else -half
        enter = np.maximum(enter, (p - np.float32(side)) * np.float32(1 / per_metre))
        exit_ = np.minimum(exit_, (p + np.float32(side)) * np.float32(1 / per_metre))
    return enter < exit_


def _cast_shadow(solid: Solid, ground: float, rays: _Rays, depth: np.ndarray, open_to: np.ndarray, dark: np.ndarray):
    """Marks in dark (H, W) bool the pixels where open_to holds and the solid stands before the light."""
    light, view = rays.light, rays.view
    slide = [(x - (z - ground) * light[0] / light[2], y - (z - ground) * light[1] / light[2], ground)
             for x, y, z in corners(solid)]  # fmt: skip
    box = frame(view, slide)
    if box is None:
        return
    x1, y1, x2, y2 = box
    if not open_to[y1:y2, x1:x2].any():
        return
    wx, wy, _ = rays.along((1.0, 0.0), box)
    far = np.minimum(depth[y1:y2, x1:x2], np.float32(FAR))
    hit = _shaded(solid, np.float32(view.place[0]) + far * wx, np.float32(view.place[1]) + far * wy, ground, light)
    dark[y1:y2, x1:x2] |= hit & open_to[y1:y2, x1:x2]


# ---- the picture -----------------------------------------------------------------------------------------------------


def render(
    view: View, things: list[list[Solid]], carriers: list[int | None], tops: list[float], *,
    room: tuple | None, light: Vector, surfaces: list[tuple[int, int, int]], noise: np.ndarray | None = None,
) -> Rendered:  # fmt: skip
    """things: the solids of each; carriers[i]: the index of the thing that i stands on, or None for the floor; tops[i]:
    the height of its upper side. surfaces: five colours (sky, floor, ceiling, walls along y, walls along x).
    noise: (H, W) int16, added to all three channels."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rays = _Rays(view, light)
        depth, tone, surface = _background(rays, room)
        owner = np.full(depth.shape, -1, dtype=np.int16)
        colours, whole = list(surfaces), []
        for number, solids in enumerate(things):
            alone = np.zeros(depth.shape, dtype=bool)
            for solid in solids:
                box = frame(view, corners(solid))
                if box is not None:
                    x1, y1, x2, y2 = box
                    at = np.s_[y1:y2, x1:x2]
                    far, shade = _HIT[solid.shape](solid, rays, box)
                    alone[at] |= far < np.inf
                    nearer = far < depth[at]
                    np.copyto(depth[at], far, where=nearer)
                    np.copyto(tone[at], shade, where=nearer)
                    np.copyto(surface[at], np.int16(len(colours)), where=nearer)
                    np.copyto(owner[at], np.int16(number), where=nearer)
                colours.append(solid.colour)
            whole.append(int(np.count_nonzero(alone)))
        dark = np.zeros(depth.shape, dtype=bool)
        floor_seen = surface == FLOOR
        for solids, carrier in zip(things, carriers, strict=True):
            for solid in solids:
                _cast_shadow(solid, 0.0, rays, depth, floor_seen, dark)
            if carrier is not None:
                level = np.float32(view.place[2]) + depth * rays.column[2]
                lid = (owner == carrier) & (np.abs(level - np.float32(tops[carrier])) < np.float32(2e-3))
                for solid in solids:
                    _cast_shadow(solid, tops[carrier], rays, depth, lid, dark)
        np.multiply(tone, np.float32(SHADOW), out=tone, where=dark)
    image = np.take(np.asarray(colours, dtype=np.float32), surface, axis=0)
    image *= tone[:, :, None]
    if noise is not None:
        image += noise[:, :, None]
    counts = np.bincount(owner.ravel() + 1, minlength=len(things) + 1)[1:]
    return Rendered(np.clip(image, 0, 255, out=image).astype(np.uint8), depth, owner, whole, counts.tolist())


def visible_box(owner: np.ndarray, number: int) -> tuple[int, int, int, int] | None:
    """[x1, y1, x2, y2) of the pixels that a thing has in the owner buffer; None if it has none."""
    own = owner == number
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
