"""Levels plane and room: answers recomputed from the stored world by a checker of its own, pixels by marching rays."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare
from test_scenes import blind_accuracy

from data.quiz import QUIZZES
from data.responses import response_text
from data.scenes import contact_sheet, draw_shots, resolve_knobs, scene_row, scene_rows, scene_twins
from data.solids import Solid, look, project, render, visible_box
from data.staging import SURFACES, WORLDS, draw_world
from data.world import relations, solids
from rewards import solution_text, spatialthinker_reward

EVEN = {"mix": dict.fromkeys(QUIZZES, 1)}
SMALL_ROOM = EVEN | {"width": 160, "height": 160, "least": 5, "grid_margin": 8}
GOLDEN = {  # first 16 hex digits of sha256; a change here is a change of everybody's data
    ("plane", 0): "627ee46911941d12",
    ("plane", 1): "61b8323c23cb5a94",
    ("plane", 1099511627783): "47854e163bed46f1",
    ("room", 0): "4666e566d1105d72",
    ("room", 3): "0b96b8ab3daa4ed5",
}
LEVELS = [("plane", EVEN), ("room", SMALL_ROOM)]


@pytest.fixture(scope="module")
def plane_rows() -> list[dict]:
    return [{**row, "images": None} for row in scene_rows(1800, level="plane", knobs=EVEN)]


# ---- the independent checker: question text, options and the stored world; nothing of data/world.py or quiz.py -------


def named(world: dict, name: str) -> list[dict]:
    return [t for t in world["things"] if name in (f"{t['colour']} {t['kind']}", t["kind"])]


def only(world: dict, name: str) -> dict:
    (thing,) = named(world, name.removeprefix("the "))
    return thing


def flat(thing: dict) -> complex:
    return complex(*thing["place"][:2])


def ahead(world: dict) -> complex:
    """The camera's heading on the floor; times -1j it is the viewer's right."""
    way = complex(*world["camera"]["forward"][:2])
    return way / abs(way)


def in_frame(of: complex, axis: complex) -> complex:
    """A floor vector as (to the right) + i (ahead) of someone who looks along the axis."""
    return of * 1j / axis


def quarter(v: complex) -> str:
    assert abs(abs(v.real) - abs(v.imag)) > 0.1
    if abs(v.real) > abs(v.imag):
        return "right of" if v.real > 0 else "left of"
    return "behind" if v.imag > 0 else "in front of"


def front(thing: dict) -> complex:
    return 1j * complex(math.cos(math.radians(thing["degrees"])), math.sin(math.radians(thing["degrees"])))


def covers(table: dict, thing: dict) -> bool:
    """Is the middle of a thing over or under a table?"""
    v = (flat(thing) - flat(table)) * 1j / front(table)
    return abs(v.real) < table["extent"][0] / 2 and abs(v.imag) < table["extent"][1] / 2


def stands_on(thing: dict, table: dict) -> bool:
    share = 0.55 if table["kind"] == "bed" else 1
    return covers(table, thing) and abs(thing["place"][2] - share * table["extent"][2]) < 1e-9 and thing["place"][2] > 0


def first(values: dict, *, most: bool, gap: float) -> str:
    ranked = sorted(values, key=values.get, reverse=most)
    assert abs(values[ranked[0]] - values[ranked[1]]) > gap, values
    return ranked[0]


def side_or_table(a: dict, b: dict, world: dict) -> str:
    if b["kind"] == "table" and covers(b, a):
        return "on top of" if stands_on(a, b) else "under"
    return quarter(in_frame(flat(a) - flat(b), ahead(world)))


def from_its_seat(a: dict, seat: dict) -> str:
    words = {"right of": "to its right", "left of": "to its left", "behind": "in front of it", "in front of": "behind it"}
    return words[quarter(in_frame(flat(a) - flat(seat), front(seat)))]


def turned(thing: dict, world: dict) -> str:
    seen = set()
    sight = flat(thing) - complex(*world["camera"]["place"][:2])
    for axis in (ahead(world), sight / abs(sight)):
        angle = math.degrees(np.angle(in_frame(front(thing), axis)))  # 0: right, 90: away
        near = [(abs((angle - at + 180) % 360 - 180), word) for at, word in (
            (0, "to the right"), (90, "away from the camera"), (180, "to the left"),
            (270, "toward the camera"))]  # fmt: skip
        assert min(near)[0] < 26
        seen.add(min(near)[1])
    return only_of(seen)


def only_of(values) -> str:
    (value,) = values
    return value


def counted(world: dict, what: str) -> int:
    singular = {"shelves": "shelf"}.get(what, what.removesuffix("s"))
    if what.endswith(" things"):
        return sum(t["colour"] == what.split()[0] for t in world["things"])
    assert any(t["kind"] == singular for t in world["things"])
    return sum(t["kind"] == singular for t in world["things"])


def recompute(row: dict, grid: int) -> str:
    """The answer as text."""
    q, options, world = row["question"], row["options"], row["meta"]["world"]
    if m := re.fullmatch(r"As the camera sees it, where(?:, | )(?:mainly )?is the (.+) with respect to the (.+)\?", q):
        return side_or_table(only(world, m[1]), only(world, m[2]), world)
    if m := re.fullmatch(r"How is the (.+) turned with respect to the (.+)\?", q):
        a, b = only(world, m[1]), only(world, m[2])
        way = (flat(b) - flat(a)) / abs(flat(b) - flat(a)) / front(a)
        assert abs(way.real) > 0.9
        return "facing" if way.real > 0 else "facing away"
    if m := re.fullmatch(r"Which of these is between the (.+) and the (.+)\?", q):
        a, b = flat(only(world, m[1])), flat(only(world, m[2]))
        spots = {name: (flat(only(world, name)) - a) / (b - a) for name in options}  # 0 at a, 1 at b
        assert all(0.2 < s.real < 0.8 and abs(s.imag) < 0.16 or not -0.1 < s.real < 1.1 or abs(s.imag) > 0.49
                   for s in spots.values())  # fmt: skip
        return only_of(name for name, s in spots.items() if 0.2 < s.real < 0.8 and abs(s.imag) < 0.16)
    if m := re.fullmatch(r"Is the (.+) next to the (.+) or far from it\?", q):
        a, b = only(world, m[1]), only(world, m[2])
        metres = abs(flat(a) - flat(b))
        halves = sum(math.hypot(*t["extent"][:2]) / 2 for t in (a, b))
        assert metres - halves < 0.25 or metres - halves > 2
        return "next to" if metres - halves < 0.25 else "far from"
    if m := re.fullmatch(r"What does the (.+) stand on\?", q):
        thing = only(world, m[1])
        return next((o for o in options if o != "the floor" and stands_on(thing, only(world, o))), "the floor")
    if m := re.fullmatch(r"An arm at the (.+) reaches one metre from the middle\. The middle of which .*", q):
        metres = {name: abs(flat(only(world, name)) - flat(only(world, m[1]))) for name in options}
        assert sum(v < 0.96 for v in metres.values()) == 1 and sum(v > 1.3 for v in metres.values()) == len(options) - 1
        return min(metres, key=metres.get)
    if m := re.fullmatch(r"Is there an? (\w+) on the (.+)\?", q):
        return "yes" if any(stands_on(t, only(world, m[2])) for t in named(world, m[1])) else "no"
    if m := re.fullmatch(r"As the camera sees it, is there an? (.+) that is mainly (.+?) the (.+)\?", q):
        return "yes" if side_or_table(only(world, m[1]), only(world, m[3]), world) == m[2] else "no"
    if m := re.fullmatch(r"Is there an? (\w+ \w+)\?", q):
        return "yes" if named(world, m[1]) else "no"
    if m := re.fullmatch(r"Which (?:of these )?is (closest to|farthest from) the camera(?:, the .+ or the .+)?\?", q):
        eye = np.array(world["camera"]["place"])
        metres = {o: float(np.linalg.norm(np.array(only(world, o)["place"]) + [0, 0, only(world, o)["extent"][2] / 2] - eye))
                  for o in options}  # fmt: skip
        return first(metres, most=m[1] == "farthest from", gap=0.25)
    if m := re.fullmatch(r"In which part of the image is the (.+)\?", q):
        x1, y1, x2, y2 = only(world, m[1])["bbox"]
        assert grid == 2
        return ("bottom" if y1 + y2 >= row["size"][1] else "top") + (" right" if x1 + x2 >= row["size"][0] else " left")
    if m := re.fullmatch(r"Which (?:of these )?is really (tallest|shortest)(?:, the .+ or the .+)?\?", q):
        return first({o: only(world, o)["extent"][2] for o in options}, most=m[1] == "tallest", gap=0.05)
    if m := re.fullmatch(r"Which of these is (closest to|farthest from) the (.+), measured on the floor\?", q):
        metres = {o: abs(flat(only(world, o)) - flat(only(world, m[2]))) for o in options}
        return first(metres, most=m[1] == "farthest from", gap=0.25)
    if m := re.fullmatch(r"About how far apart are the middles of the (.+) and the (.+)\? .*", q):
        metres = abs(flat(only(world, m[1])) - flat(only(world, m[2])))
        return only_of(o for o in options if abs(float(o.split()[0]) - metres) < 0.17)
    if m := re.fullmatch(r"As the camera sees it, which way is the (.+) turned\?", q):
        return turned(only(world, m[1]), world)
    if m := re.fullmatch(r"From the point of view of someone sitting on the (.+), where mainly is the (.+)\?", q):
        return from_its_seat(only(world, m[2]), only(world, m[1]))
    if m := re.fullmatch(r"How many things stand on the (.+)\?", q):
        return str(sum(stands_on(t, only(world, m[1])) for t in world["things"]))
    return str(counted(world, re.fullmatch(r"How many (.+) are there\?", q)[1]))


def text(row: dict) -> str:
    return row["options"]["ABCD".index(row["gold"])]


def test_every_answer_on_the_plane_follows_from_the_world(plane_rows):
    for row in plane_rows:
        assert text(row) == recompute(row, 2), (row["id"], row["question"])
    tasks = {row["meta"]["task"] for row in plane_rows}
    assert {row["category"] for row in plane_rows} == set(QUIZZES) and len(tasks) >= 22


def test_every_answer_in_a_room_follows_from_the_world():
    for row in scene_rows(300, level="room", knobs=SMALL_ROOM, seed=3, split="val"):
        assert text(row) == recompute(row, 2), (row["id"], row["question"])


@pytest.mark.parametrize(("level", "knobs"), LEVELS)
def test_twins_differ_in_one_thing_and_in_the_answer(level, knobs):
    letters = Counter()
    for seed in range(120):
        a, b = scene_twins(seed, level=level, knobs=knobs)
        assert (a["question"], a["options"], a["meta"]["pair"]) == (b["question"], b["options"], b["meta"]["pair"])
        assert a["gold"] != b["gold"] and a["id"] != b["id"]
        assert text(a) == recompute(a, 2) and text(b) == recompute(b, 2)
        keys = ("kind", "colour", "place", "extent", "degrees", "on")
        facts = [[[t[key] for key in keys] for t in row["meta"]["world"]["things"]] for row in (a, b)]
        changed = [i for i, (p, q) in enumerate(zip(*facts, strict=True)) if p != q]
        assert len(changed) == 1
        p, q = (dict(zip(keys, fact[changed[0]], strict=True)) for fact in facts)
        if (p["kind"], p["colour"]) == (q["kind"], q["colour"]):  # moved, turned or resized, nothing else
            assert (p["place"] != q["place"]) + (p["extent"] != q["extent"]) + (p["degrees"] != q["degrees"]) == 1
        else:
            assert p["place"] == q["place"]
        assert all(row["meta"]["edited"] == row["meta"]["world"]["things"][changed[0]]["id"] for row in (a, b))
        assert all(a["meta"]["world"][key] == b["meta"]["world"][key] for key in ("camera", "room", "light"))
        pictures = [np.asarray(row["images"][0]).astype(int) for row in (a, b)]
        assert 0 < (np.abs(pictures[0] - pictures[1]).max(-1) > 0).mean() < 0.8
        letters[b["gold"]] += 1
    assert max(letters.values()) < 0.5 * sum(letters.values())


# ---- pixels: rays marched in small steps through solids given by what is inside them ---------------------------------


def inside(solid: Solid, points: np.ndarray) -> np.ndarray:
    """points (n, 3) -> which lie within the solid."""
    x, y, z = (points - [solid.x, solid.y, solid.z]).T
    if solid.shape == "ball":
        return x * x + y * y + z * z < solid.a**2
    if solid.shape == "round":
        return (np.abs(z) < solid.h) & (np.hypot(x, y) < np.interp(z, [-solid.h, solid.h], [solid.a, solid.b]))
    c, s = solid.turn
    return (np.abs(c * x + s * y) < solid.a) & (np.abs(c * y - s * x) < solid.b) & (np.abs(z) < solid.h)


@pytest.mark.parametrize(("level", "knobs"), LEVELS)
def test_pixels_show_what_rays_meet(level, knobs):
    """A random pixel's ray, marched in steps of 4 mm: the first solid it enters is the owner, there is the depth."""
    k, checked, misses = resolve_knobs(level, knobs), Counter(), 0
    for seed in range(12):
        _, _, (shot,) = draw_shots(seed, k)
        view, draw = shot.world.view, np.random.default_rng(seed)
        bodies = [solids(thing, (0, 0, 0)) for thing in shot.world.things]
        spots = np.argwhere(shot.picture.owner >= 0)
        spots = np.concatenate([spots[draw.integers(len(spots), size=25)], draw.integers(k["width"], size=(8, 2))])
        for row, column in spots:
            u, v = (column + 0.5 - k["width"] / 2) / view.focal, (k["height"] / 2 - row - 0.5) / view.focal
            way = np.array(view.forward) + u * np.array(view.right) + v * np.array(view.up)
            depths = np.arange(0.3, 12, 0.004)
            points = np.array(view.place) + depths[:, None] * way
            hits = [(depths[found.argmax()], i) for i, body in enumerate(bodies) for solid in body
                    if (found := inside(solid, points)).any()]  # fmt: skip
            depth, owner = min(hits, default=(math.inf, -1))
            misses += owner != shot.picture.owner[row, column]  # an edge that a step leaps over
            if owner == shot.picture.owner[row, column] >= 0:
                assert shot.picture.depth[row, column] == pytest.approx(depth, abs=0.02)
                checked[shot.world.things[owner].kind] += 1
            elif owner == shot.picture.owner[row, column] and level == "room":
                x1, y1, x2, y2, height = shot.world.room
                x, y, z = np.array(view.place) + float(shot.picture.depth[row, column]) * way
                assert min(abs(x - x1), abs(x - x2), abs(y - y1), abs(y - y2), abs(z), abs(z - height)) < 1e-3
    assert misses <= 4 and sum(checked.values()) > 250 and len(checked) >= 5


@pytest.mark.parametrize(("level", "knobs"), LEVELS)
def test_boxes_are_tight_and_shares_are_what_others_leave(level, knobs):
    k, hidden = resolve_knobs(level, knobs), 0
    for seed in range(20):
        quiz, _, (shot,) = draw_shots(seed, k)
        for i, (x1, y1, x2, y2) in enumerate(shot.boxes):
            own = shot.picture.owner == i
            assert own[y1:y2, x1:x2].sum() == own.sum()
            assert own[y1, x1:x2].any() and own[y2 - 1, x1:x2].any() and own[y1:y2, x1].any() and own[y1:y2, x2 - 1].any()
            thing = replace(shot.world.things[i], on=None)
            alone = draw_world(replace(shot.world, things=[thing]), k).seen[0]
            assert own.sum() / alone == pytest.approx(shot.shares[i])
            assert shot.shares[i] >= k["seen" if i < quiz.asked else "glimpse"] / 100
            hidden += shot.shares[i] < 1
    assert hidden > 10


def test_shadows_lie_where_something_stands_before_the_light():
    """Floor pixels with and without things: darker exactly where a ray towards the light meets a solid."""
    k = resolve_knobs("plane", EVEN | {"width": 160, "height": 160})
    wrong = dark = total = 0
    for seed in range(8):
        _, _, (shot,) = draw_shots(seed, k)
        full, bare = draw_world(shot.world, k), draw_world(replace(shot.world, things=[]), k)
        floor = np.argwhere((full.owner < 0) & (full.depth < 9))
        view = shot.world.view
        rows, columns = floor[np.random.default_rng(seed).integers(len(floor), size=400)].T
        u, v = (columns + 0.5 - 80) / view.focal, (80 - rows - 0.5) / view.focal
        way = np.array(view.forward) + u[:, None] * np.array(view.right) + v[:, None] * np.array(view.up)
        ground = np.array(view.place) + full.depth[rows, columns][:, None] * way
        lit = np.zeros(len(rows), dtype=bool)
        for step in np.arange(0.005, 4, 0.01):
            points = ground + step * np.array(shot.world.light)
            for thing in shot.world.things:
                for solid in solids(thing, (0, 0, 0)):
                    lit |= inside(solid, points)
        darker = full.image[rows, columns].sum(-1) < 0.8 * bare.image[rows, columns].sum(-1)
        wrong, dark, total = wrong + (darker != lit).sum(), dark + darker.sum(), total + len(rows)
    assert dark > 100 and wrong < 0.01 * total


def test_a_ball_straight_ahead_is_a_circle_of_the_right_size():
    view = look((0.0, 0.0, 1.0), (0.0, 1.0), 0.0, 100.0, 101, 101)
    ball = Solid("ball", 0.0, 5.0, 1.0, 0.5, 0.5, 0.5, (1.0, 0.0), (200, 0, 0))
    shown = render(view, [[ball]], [None], [1.5], room=None, light=(0.0, 0.0, 1.0), surfaces=SURFACES)
    assert shown.depth[50, 50] == pytest.approx(4.5, abs=1e-5)
    radius = 100 * math.tan(math.asin(0.1))
    assert shown.whole[0] == shown.seen[0] == pytest.approx(math.pi * radius**2, rel=0.05)
    x1, y1, x2, y2 = visible_box(shown.owner, 0)
    assert (x1, y1, x2, y2) == (40, 40, 61, 61)
    assert project(view, (0.0, 5.0, 1.0)) == pytest.approx((50.5, 50.5, 5.0))
    u, v, depth = project(view, (1.0, 5.0, 2.0))
    assert (u, v, depth) == pytest.approx((70.5, 30.5, 5.0))


# ---- relations -------------------------------------------------------------------------------------------------------


def test_relations_hold_in_the_stored_world():
    seen = Counter()
    for row in scene_rows(60, level="plane", knobs=EVEN, seed=8):
        _, _, (shot,) = draw_shots(row["meta"]["seed"], row["meta"]["knobs"])
        world = row["meta"]["world"]
        by_id = {t["id"]: t for t in world["things"]}
        for r in relations(shot.world, shot.ids, 0.45):
            a, b, word = by_id[r["subject"]], by_id[r["object"]], r["predicate"]
            seen[word] += 1
            if word in ("left of", "right of", "behind", "in front of"):
                assert quarter(in_frame(flat(a) - flat(b), ahead(world))) == word
            elif word in ("below", "touching"):
                assert stands_on(b, a) or (word == "touching" and stands_on(a, b))
            elif word in ("on top of", "under"):
                assert stands_on(a, b) == (word == "on top of") and covers(b, a)
            elif word in ("taller", "shorter"):
                assert (a["extent"][2] > b["extent"][2]) == (word == "taller")
            elif word in ("bigger", "smaller"):
                assert a["kind"] == b["kind"] and (math.prod(a["extent"]) > math.prod(b["extent"])) == (word == "bigger")
            elif word in ("facing", "facing away"):
                straight = ((flat(b) - flat(a)) / front(a)).real / abs(flat(b) - flat(a))
                assert abs(straight) > 0.9 and (straight > 0) == (word == "facing")
            elif word in ("parallel to", "perpendicular to"):
                assert abs((front(a) / front(b)).imag) == pytest.approx(float(word == "perpendicular to"), abs=1e-6)
            else:
                assert word in ("next to", "far from", "above")
    assert {"left of", "behind", "on top of", "below", "touching", "facing", "taller", "next to", "far from"} <= set(seen)


# ---- nothing to be had blind, and no flat shortcut -------------------------------------------------------------------


def test_letters_and_categories_are_balanced(plane_rows):
    groups = defaultdict(list)
    for row in plane_rows:
        for what in ("all", row["category"], row["meta"]["task"]):
            groups[len(row["options"]), what].append(row["gold"])
    for (n, what), letters in groups.items():
        if len(letters) >= 8 * n:
            assert chisquare([letters.count(letter) for letter in "ABCD"[:n]]).pvalue > 1e-4, (n, what)
    assert chisquare(list(Counter(row["category"] for row in plane_rows).values())).pvalue > 0.001


@pytest.mark.parametrize("strategy", ["A", "last", "longest", "shortest", "alphabet", "middle", "first named"])
def test_simple_blind_strategies_are_at_chance(plane_rows, strategy):
    def guess(row: dict) -> int:
        o = row["options"]
        numbers = [float(m[0]) if (m := re.match(r"\d+", x)) else len(x) for x in o]
        return {"A": 0, "last": len(o) - 1, "longest": o.index(max(o, key=len)), "shortest": o.index(min(o, key=len)),
                "alphabet": o.index(min(o)), "middle": numbers.index(sorted(numbers)[len(o) // 2]),
                "first named": min(range(len(o)), key=lambda i: row["question"].find(o[i]))}[strategy]  # fmt: skip

    hits = sum("ABCD"[guess(row)] == row["gold"] for row in plane_rows)
    chance = [1 / len(row["options"]) for row in plane_rows]
    error = math.sqrt(sum(p * (1 - p) for p in chance))
    assert abs(hits - sum(chance)) < 3.5 * error


def test_a_blind_learner_is_at_chance(plane_rows):
    by_category = defaultdict(list)
    for row in plane_rows:
        by_category[row["category"]].append(row)
    for category, rows in by_category.items():
        accuracy, chance, error = blind_accuracy(rows[: len(rows) // 2 * 2])
        assert abs(accuracy - chance) < 3.5 * error, (category, accuracy, chance)


def test_twins_give_a_blind_guess_nothing():
    rows = [row for seed in range(250) for row in scene_twins(seed, level="plane", knobs=EVEN)]
    for n in (2, 3, 4):
        letters = [row["gold"] for row in rows if len(row["options"]) == n]
        assert chisquare([letters.count(letter) for letter in "ABCD"[:n]]).pvalue > 0.001, n
    knobs = {"mix": {"count": 1}}
    ranks = Counter(sorted(row["options"]).index(text(row)) for seed in range(100)
                    for row in scene_twins(seed, level="plane", knobs=knobs))  # fmt: skip
    assert chisquare([ranks[i] for i in range(4)]).pvalue > 0.001, ranks  # the middle numbers come no more often


def test_a_reader_of_flat_boxes_is_misled():
    """The largest box is often not the nearest thing, the tallest box not the tallest thing, and so on."""
    rates = defaultdict(list)
    for row in scene_rows(500, level="plane", knobs={"mix": {"depth": 1, "size": 1, "distance": 1}}, seed=4):
        boxes = {name: only(row["meta"]["world"], name)["bbox"] for name in row["options"] if " m" not in name}
        if row["meta"]["task"] in ("nearest", "farthest"):
            pick = {"nearest": max, "farthest": min}[row["meta"]["task"]]
            answer = pick(boxes, key=lambda name: (boxes[name][2] - boxes[name][0]) * (boxes[name][3] - boxes[name][1]))
        elif row["category"] == "size":
            pick = {"tallest": max, "shortest": min}[row["meta"]["task"]]
            answer = pick(boxes, key=lambda name: boxes[name][3] - boxes[name][1])
        else:
            continue
        rates[row["category"]].append(answer == text(row))
    assert all(0.2 < sum(hits) / len(hits) < 0.75 for hits in rates.values()) and len(rates) == 2, rates


# ---- rows, determinism, knobs ----------------------------------------------------------------------------------------


def fingerprint(level: str, seed: int) -> str:
    row = scene_row(seed, level=level)
    facts = json.dumps([row["question"], row["options"], row["gold"], row["scene"], row["meta"]["world"]])
    return hashlib.sha256(row["images"][0].tobytes() + facts.encode()).hexdigest()[:16]


@pytest.mark.parametrize(("level", "seed"), list(GOLDEN))
def test_one_seed_one_scene_on_every_machine(level, seed):
    assert fingerprint(level, seed) == GOLDEN[level, seed]


@pytest.mark.parametrize("mode", ["upstream", "corrected"])
@pytest.mark.parametrize(("level", "knobs"), LEVELS)
def test_rows_have_the_shape_of_a_row_and_the_gold_response_earns_all(level, knobs, mode):
    for row in scene_rows(80, level=level, knobs=knobs, seed=11):
        assert list(row) == "id source category images question options gold kind size scene map problem style meta".split()
        assert row["images"][0].size == row["size"] and len(set(row["options"])) == len(row["options"])
        json.dumps(row["meta"])
        ids = [t["id"] for t in row["meta"]["world"]["things"]]
        assert len(set(ids)) == len(ids) and {o["id"] for o in row["scene"]["objects"]} <= set(ids)
        assert bool(row["scene"]["relationships"]) == (row["category"] == "relation" and row["meta"]["task"] != "between")
        parts = spatialthinker_reward(response_text(row), solution_text(row), row["size"], mode=mode)
        assert parts["total"] == pytest.approx(1, abs=1e-5), (row["id"], parts)


def test_levels_load_by_name(tmp_path):
    from data.dataset import load_rows

    contact_sheet(scene_rows(2, level="room", knobs=SMALL_ROOM), tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 600
    assert [row["meta"]["level"] for row in load_rows("scenes:plane@val", limit=2)] == ["plane"] * 2
    assert load_rows("scenes:room@train", limit=1)[0]["size"] == (448, 448)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(knobs={"sides": 1}), "unknown knob 'sides'; known: width"),
    (dict(knobs={"furniture": ["chair"]}), "knob furniture="),
    (dict(knobs={"solids": ["cube", "sphere"]}), "knob solids="),
    (dict(knobs={"mix": {"colour": 1}}), "names no known category"),
    (dict(knobs={"trap": 200}), "knob trap=200 cannot work; level plane has trap=50"),
    (dict(knobs={"side": [900, 990], "mix": EVEN["mix"] | {"relation": 9}}), "knobs leave no room"),
])  # fmt: skip
def test_knobs_that_cannot_work_are_told_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        scene_row(3, level="plane", **arguments)
    assert "\n" not in str(error.value)


def test_flat_levels_have_no_twins():
    with pytest.raises(ValueError, match="level 'demo' has no twins; known: plane, room"):
        scene_twins(0, level="demo")


def test_a_seed_gives_one_world():
    a, b = (scene_row(9, level="plane") for _ in range(2))
    assert a["images"][0].tobytes() == b["images"][0].tobytes() and a["meta"] == b["meta"]
    assert WORLDS["plane"] == a["meta"]["knobs"]
