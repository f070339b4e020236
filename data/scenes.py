"""Procedural scenes: pictures with an exact scene graph and a question whose answer follows from geometry.

    python -m data.scenes --out DIR --n 5000 --val 500 --level demo --seed 0     STVQA-schema parquet files
    python -m data.scenes --show sheet.png --level room                          twelve scenes to look at
    python -m data.scenes --bench                                                scenes drawn per second

Levels easy, demo, medium and hard are flat: coloured shapes, answers from boxes (this file, data/questions.py,
data/drawing.py). Levels plane and room are three-dimensional (data/quiz.py asks, data/staging.py places, data/world.py
knows the facts, data/solids.py draws); level clip is a walk through a room, as video (data/clips.py).

Boxes are [x1, y1, x2, y2] in pixels, x2 and y2 one past the last pixel drawn, so width = x2 - x1. A centre is
((x1 + x2) // 2, (y1 + y2) // 2). With these two sentences every flat answer can be recomputed from boxes alone; those
of plane and room follow from row["meta"]["world"]: camera, and every thing's place, extents and turn, in metres.

Three rules keep the world honest:
  1. The options are drawn first, the right one uniformly among them, and only then a scene that makes it right. So
     letter, option texts and question say nothing about the answer: a blind guess is at chance.
  2. Near ties are not asked: every question keeps a margin (a knob), and where boxes and drawn pixels could disagree
     (which of two shapes is larger, do they touch) both must say the same.
  3. Random integers only, on PCG64's raw stream, which NumPy keeps stable (NEP 19; Generator's own methods may change),
     and of float arithmetic what IEEE 754 fixes: one seed gives one picture, byte for byte, on every machine.
"""

import argparse
import json
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import clips, staging
from data.clips import CLIPS, clip_row
from data.drawing import CELLS, COLOURS, SHAPES, Box, Draw, all_sides_seen, clear_contact, direction, paint, shared
from data.questions import PLANS, Plan
from data.quiz import QUIZZES, Quiz, other_answer
from data.responses import response_text
from data.rows import write_stvqa
from data.staging import WORLDS, Shot, describe, scene_for

_DEMO = {
    "width": 112, "height": 112,
    "objects": [2, 4],              # how many, lowest and highest
    "side": [14, 34],               # pixels
    "shapes": ["circle", "square", "triangle", "diamond"],
    "colours": ["red", "green", "blue", "yellow", "purple", "orange"],
    "gap": 2,                       # least number of free pixels between two boxes, if they may not overlap
    "overlap": 0,                   # at most so many percent of the smaller box shared with another; 0: gap holds
    "noise": 10, "texture": 6, "tint": 8,   # amplitudes: every pixel, blotches of the background, colour of an object
    "margin": 6,                    # relation: least ||dx| - |dy||, or pixels of overlap, or of gap
    "size_margin": 4,               # size: least difference of sides
    "grid": 2, "grid_margin": 5,    # location: parts across and down, least distance of a centre from their borders
    "count_max": 4, "count_by": ["name"],   # "name": red circles; "colour": red shapes; "shape": circles
    "contact": 0,                   # percent of the relation questions that ask about overlapping and touching
    "smallest": 0,                  # percent of the size questions that ask for the smallest
    "options": {"relation": [4, 4], "size": [2, 2], "count": [4, 4], "existence": [2, 2], "instance_location": [4, 4]},
    "mix": {"relation": 48, "size": 13, "count": 13, "existence": 13, "instance_location": 13},
}  # fmt: skip
LEVELS: dict[str, dict] = {
    "easy": _DEMO | {
        "objects": [2, 3], "side": [22, 38], "noise": 5, "texture": 3, "margin": 16, "size_margin": 8,
        "grid_margin": 14, "count_max": 3,
        "options": {"relation": [2, 4], "size": [2, 2], "count": [2, 3], "existence": [2, 2],
                    "instance_location": [2, 4]},
    },
    "demo": _DEMO,
    "medium": _DEMO | {
        "width": 168, "height": 168, "objects": [3, 6], "side": [14, 44], "shapes": list(SHAPES[:5]),
        "colours": list(COLOURS)[:8], "noise": 18, "texture": 12, "margin": 4, "size_margin": 3, "grid": 3,
        "grid_margin": 3, "count_max": 5, "count_by": ["name", "colour", "shape"], "overlap": 20, "contact": 15,
        "smallest": 40,
        "options": {"relation": [3, 4], "size": [2, 4], "count": [4, 4], "existence": [2, 2],
                    "instance_location": [4, 4]},
    },
    "hard": _DEMO | {
        "width": 224, "height": 168, "objects": [4, 8], "side": [10, 48], "shapes": list(SHAPES),
        "colours": list(COLOURS), "noise": 30, "texture": 20, "tint": 14, "margin": 2, "size_margin": 2, "grid": 3,
        "grid_margin": 2, "count_max": 7, "count_by": ["name", "colour", "shape"], "overlap": 25, "contact": 30,
        "smallest": 50,
        "options": {"relation": [3, 4], "size": [3, 4], "count": [4, 4], "existence": [2, 2],
                    "instance_location": [4, 4]},
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, all that is in it, and its question.

    image: (H, W, 3) uint8. objects: [{"id": "red_circle.1", "bbox": [x1, y1, x2, y2]}], left to right. relations: every
    triple of two objects that holds by the margin. gold_scene: the part of the graph that plan.question is about.
    """

    image: np.ndarray
    objects: list[dict]
    relations: list[dict]
    gold_scene: dict
    plan: Plan


# ---- placing ---------------------------------------------------------------------------------------------------------


def _propose(draw: Draw, plan: Plan, side: int, boxes: list[Box], k: dict) -> Box:
    """A place for the next object: anywhere, or beside the first one if the answer says that they meet."""
    if len(boxes) == 1 and plan.gold in ("touching", "overlapping"):
        x1, y1, x2, y2 = boxes[0]
        x, y = draw.between(x1 - side, x2), draw.between(y1 - side, y2)
        if plan.gold == "touching":  # two shapes seldom meet by chance: put one edge to edge
            x, y = draw.pick([(x1 - side, y), (x2, y), (x, y1 - side), (x, y2)])
    else:
        x, y = draw.between(1, k["width"] - 1 - side), draw.between(1, k["height"] - 1 - side)
    return x, y, x + side, y + side


def _fits(box: Box, boxes: list[Box], k: dict) -> bool:
    if box[0] < 1 or box[1] < 1 or box[2] >= k["width"] or box[3] >= k["height"]:
        return False
    for other in boxes:
        x, y = shared(box, other)
        if not k["overlap"]:
            if x > -k["gap"] and y > -k["gap"]:
                return False
        elif x > 0 and y > 0 and 100 * x * y > k["overlap"] * min(box[2] - box[0], other[2] - other[0]) ** 2:
            return False
    return True


def _layout(draw: Draw, plan: Plan, k: dict) -> list[Box] | None:
    boxes: list[Box] = []
    for side in plan.sides():
        for _ in range(40):
            box = _propose(draw, plan, side, boxes, k)
            if _fits(box, boxes, k) and plan.holds([*boxes, box]):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _place(draw: Draw, plan: Plan, k: dict) -> tuple[list[Box], list[int]]:
    """Boxes, and the order in which they are painted."""
    for _ in range(400):
        boxes = _layout(draw, plan, k)
        order = draw.sample(range(len(plan.names)), len(plan.names))
        if boxes and (not k["overlap"] or all_sides_seen(plan.names, boxes, order, k)):
            return boxes, order
    raise ValueError(
        f"knobs leave no room: {len(plan.names)} objects of side {k['side']} in {k['width']}x{k['height']} "
        f"(gap {k['gap']}, overlap {k['overlap']}); fewer or smaller objects, or smaller margins"
    )


def draw_scene(seed: int, knobs: dict) -> Scene:
    """The flat scene and the question of a seed. knobs: a whole dict, as in LEVELS or as resolve_knobs returns it.

    Raises ValueError if the knobs leave no room for such a scene.
    """
    draw = Draw(seed)
    plan = PLANS[draw.pick([c for c, weight in knobs["mix"].items() for _ in range(weight)])](draw, knobs)
    boxes, order = _place(draw, plan, knobs)
    image = paint(draw, plan.names, boxes, order, knobs)

    left_to_right = sorted(range(len(boxes)), key=lambda i: boxes[i])
    ids: dict[int, str] = {}
    for i in left_to_right:
        number = 1 + sum(plan.names[j] == plan.names[i] for j in ids)
        ids[i] = f"{plan.names[i].replace(' ', '_')}.{number}"
    objects = {i: {"id": ids[i], "bbox": list(boxes[i])} for i in left_to_right}

    relations = []
    for i in left_to_right:
        for j in left_to_right:
            pair = (plan.names[i], plan.names[j])
            found = [direction(boxes[i], boxes[j], knobs["margin"]), clear_contact(pair, boxes[i], boxes[j], 1)]
            relations += [_triple(ids[i], p, ids[j]) for p in found if i != j and p not in (None, "apart from")]

    asked = plan.relevant if plan.category in ("relation", "size") else [i for i in left_to_right if i in plan.relevant]
    gold_scene = {
        "objects": [{"id": ids[i], "bbox": list(boxes[i])} for i in asked],
        "relationships": [_triple(ids[0], plan.gold, ids[1])] if plan.category == "relation" else [],
    }
    return Scene(image, list(objects.values()), relations, gold_scene, plan)


def _triple(subject: str, predicate: str, other: str) -> dict:
    return {"subject": subject, "predicate": predicate, "object": other}


# ---- rows ------------------------------------------------------------------------------------------------------------


def resolve_knobs(level: str = "demo", knobs: dict | None = None) -> dict:
    """A level's knobs with some replaced. ValueError, one line, for an unknown name or a value that cannot work."""
    if level in WORLDS or level in CLIPS:
        return _resolve_world(level, knobs or {})
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join([*LEVELS, *WORLDS, *CLIPS])}")
    given = knobs or {}
    for name in given:
        if name not in _DEMO:
            raise ValueError(f"unknown knob {name!r}; known: {', '.join(_DEMO)}")
        if isinstance(_DEMO[name], dict) and not set(given[name]) <= set(PLANS):
            raise ValueError(f"knob {name}={given[name]} names no known category; known: {', '.join(PLANS)}")
    k = json.loads(json.dumps(LEVELS[level] | given))  # a copy of one's own, and proof that it can be stored
    k["options"] = LEVELS[level]["options"] | k["options"]
    # A count question fills up with objects that are not of the asked shape, or not of the asked colour.
    n_shapes, n_colours = len(k["shapes"]), len(k["colours"])
    most = min(n_colours * (n_shapes - 1), (n_colours - 1) * n_shapes)
    wrong = [
        ("shapes", len(set(k["shapes"])) < 2 or not set(k["shapes"]) <= set(SHAPES)),
        ("colours", len(set(k["colours"])) < 3 or not set(k["colours"]) <= set(COLOURS)),
        ("side", not 4 <= k["side"][0] <= k["side"][1] <= min(k["width"], k["height"]) - 2),
        ("objects", not 1 <= k["objects"][0] <= k["objects"][1] <= most),
        ("noise", not 0 <= k["noise"] <= 60), ("texture", not 0 <= k["texture"] <= 60),
        ("margin", k["margin"] < 1), ("size_margin", k["size_margin"] < 1), ("gap", k["gap"] < 0),
        ("grid", k["grid"] not in CELLS), ("count_max", not 2 <= k["count_max"] <= max(2, k["objects"][1])),
        ("count_by", not k["count_by"] or not set(k["count_by"]) <= {"name", "colour", "shape"}),
        ("overlap", not 0 <= k["overlap"] <= 100
         or (k["contact"] > 0 and 100 * k["margin"] ** 2 > k["overlap"] * k["side"][1] ** 2)),
        ("options", any(not 2 <= low <= high <= 4 for low, high in k["options"].values())),
        ("mix", sum(k["mix"].values()) < 1 or min(k["mix"].values()) < 0),
    ]  # fmt: skip
    for name, bad in wrong:
        if bad:
            raise ValueError(f"knob {name}={k[name]} cannot work; level demo has {name}={_DEMO[name]}")
    return k


def _resolve_world(level: str, given: dict) -> dict:
    known = (WORLDS | CLIPS)[level]
    for name in given:
        if name not in known:
            raise ValueError(f"unknown knob {name!r}; known: {', '.join(known)}")
        if isinstance(known[name], dict) and not set(given[name]) <= set(known[name]):
            raise ValueError(f"knob {name}={given[name]} names no known category; known: {', '.join(known[name])}")
    k = json.loads(json.dumps(known | given))
    if level in WORLDS:
        k["options"] = known["options"] | k["options"]
    for name, bad in (staging if level in WORLDS else clips).wrong_knobs(k):
        if bad:
            raise ValueError(f"knob {name}={k[name]} cannot work; level {level} has {name}={known[name]}")
    return k


def draw_shots(seed: int, knobs: dict, *, twin: bool = False) -> tuple[Quiz, list[str], list[Shot]]:
    """The question of a seed in a three-dimensional level, the answers, and as many pictures: one, or two twins that
    differ in a single fact and in the answer. ValueError if the knobs leave no room."""
    draw = Draw(seed)
    quiz = QUIZZES[draw.pick([c for c, weight in knobs["mix"].items() for _ in range(weight)])](draw, knobs)
    answers = [quiz.gold, other_answer(draw, quiz)] if twin else [quiz.gold]
    return quiz, answers, scene_for(draw, quiz, knobs, *answers[1:])


def scene_row(seed: int, *, level: str = "demo", knobs: dict | None = None) -> dict:
    """One seed as a row (design section 3). knobs replaces single knobs of the level; meta keeps all of them."""
    return _row(seed, level, resolve_knobs(level, knobs))


def scene_twins(seed: int, *, level: str = "room", knobs: dict | None = None) -> tuple[dict, dict]:
    """Two rows with one question and the same options, whose pictures differ in one fact (a thing moved, turned, resized
    or replaced) and so in the answer. meta["pair"] is the same in both; meta["edited"] names the thing, as it is there."""
    if level not in WORLDS:
        raise ValueError(f"level {level!r} has no twins; known: {', '.join(WORLDS)}")
    k = resolve_knobs(level, knobs)
    quiz, answers, shots = draw_shots(seed, k, twin=True)
    pairs = enumerate(zip(*(shot.world.things for shot in shots), strict=True))
    (changed,) = [i for i, (a, b) in pairs if a != b]
    rows = []
    for answer, shot in zip(answers, shots, strict=True):
        row = _world_row(seed, level, k, quiz, answer, shot)
        name = f"{row['id']}-{'ab'[len(rows)]}"
        rows.append(row | {"id": name, "meta": row["meta"] | {"pair": row["id"], "edited": shot.ids[changed]}})
    return rows[0], rows[1]


def _world_row(seed: int, level: str, k: dict, quiz: Quiz, answer: str, shot: Shot) -> dict:
    about = quiz.about(answer)
    triples = [_triple(shot.ids[quiz.triple[0]], answer, shot.ids[quiz.triple[1]])] if quiz.triple else []
    return {
        "id": f"scenes-{level}-{seed}",
        "source": "scenes",
        "category": quiz.category,
        "images": [Image.fromarray(shot.picture.image)],
        "question": quiz.question,
        "options": quiz.options,
        "gold": "ABCD"[quiz.options.index(answer)],
        "kind": "choice",
        "size": (k["width"], k["height"]),
        "scene": {
            "objects": [{"id": shot.ids[i], "bbox": list(shot.boxes[i])} for i in about],
            "relationships": triples,
        },
        "map": None,
        "problem": None,
        "style": None,
        "meta": {"level": level, "knobs": k, "seed": seed, "task": quiz.task, "world": describe(shot)},
    }


def _row(seed: int, level: str, k: dict) -> dict:
    if level in WORLDS:
        quiz, (answer,), (shot,) = draw_shots(seed, k)
        return _world_row(seed, level, k, quiz, answer, shot)
    if level in CLIPS:
        return clip_row(seed, level, k)
    scene = draw_scene(seed, k)
    plan = scene.plan
    return {
        "id": f"scenes-{level}-{seed}",
        "source": "scenes",
        "category": plan.category,
        "images": [Image.fromarray(scene.image)],
        "question": plan.question,
        "options": plan.options,
        "gold": "ABCD"[plan.options.index(plan.gold)],
        "kind": "choice",
        "size": (k["width"], k["height"]),
        "scene": scene.gold_scene,
        "map": None,
        "problem": None,
        "style": None,
        "meta": {"level": level, "knobs": k, "seed": seed, "task": plan.task},
    }


def scene_rows(
    n: int, *, seed: int = 0, level: str = "demo", split: str = "train", start: int = 0, knobs: dict | None = None
) -> list[dict]:
    """Rows start .. start+n-1 of an endless list. Seeds and splits have ranges of their own (2**32 rows each), so
    train and val never share a scene seed."""
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; known: train, val")
    if seed < 0 or n < 0 or start < 0:
        raise ValueError(f"n={n}, seed={seed} and start={start} must not be negative")
    k = resolve_knobs(level, knobs)
    first = ((2 * seed + (split == "val")) << 32) + start
    return [_row(first + i, level, k) for i in range(n)]


# ---- command line ----------------------------------------------------------------------------------------------------


def contact_sheet(rows: list[dict], path: str | Path, *, columns: int = 4) -> None:
    """Small pictures three times as large, gold boxes outlined, question and options below, the right one with a star;
    of a clip every fourth frame, half as large."""
    width, height = rows[0]["size"]
    zoom, text_height = 3 if width < 230 and rows[0]["images"] else 1, 120
    tile_w, tile_h = max(zoom * width, 330) + 10, zoom * height + text_height
    sheet = Image.new("RGB", (columns * tile_w, -(-len(rows) // columns) * tile_h), "white")
    pen = ImageDraw.Draw(sheet)
    for n, row in enumerate(rows):
        left, top = n % columns * tile_w, n // columns * tile_h
        for i, frame in enumerate(row.get("video", [])[::4]):
            small = frame.resize((width // 2, height // 2))
            sheet.paste(small, (left + i % 2 * width // 2, top + i // 2 * height // 2))
        for picture in row["images"]:
            sheet.paste(picture.resize((zoom * width, zoom * height), Image.Resampling.NEAREST), (left, top))
        scene = row["scene"] or {"objects": [], "relationships": []}
        for thing in scene["objects"]:
            x1, y1, x2, y2 = (zoom * c for c in thing["bbox"])
            pen.rectangle((left + x1 - 1, top + y1 - 1, left + x2, top + y2), outline="black")
        triples = ["{subject} {predicate} {object}".format(**r) for r in scene["relationships"]]
        options = [f"{'*' if c == row['gold'] else ' '}({c}) {o}" for c, o in zip("ABCD", row["options"], strict=False)]
        think = response_text(row).split("<think>")[1].split("</think>")[0]
        lines = [*textwrap.wrap(row["question"], 56), *options, *textwrap.wrap(think, 56)[:3], *triples]
        pen.multiline_text((left + 4, top + zoom * height + 2), "\n".join(line for line in lines if line), "black")
    sheet.save(path)


def bench(level: str, *, seconds: float = 3.0) -> float:
    """Rows per second of processor time, one thread: what else runs on the machine hardly counts."""
    n, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        scene_rows(10, level=level, start=n)
        n += 10
    return n / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw scenes with questions and write them in the STVQA schema.")
    parser.add_argument("--out", type=Path, help="folder for train- and val-00000-of-00001.parquet")
    parser.add_argument("--n", type=int, default=1000, help="training rows")
    parser.add_argument("--val", type=int, default=0, help="validation rows")
    parser.add_argument("--level", default="demo", help=", ".join([*LEVELS, *WORLDS, *CLIPS]))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=Path, help="PNG file for a sheet of twelve scenes")
    parser.add_argument("--bench", action="store_true", help="print scenes per second")
    args = parser.parse_args()
    if not (args.out or args.show or args.bench):
        parser.error("say what to do: --out DIR, --show FILE.png or --bench")
    resolve_knobs(args.level)  # an unknown level is told before anything slow
    if args.bench:
        print(f"level {args.level}: {bench(args.level):.0f} scenes/s on one core")
    if args.show:
        contact_sheet(scene_rows(12, seed=args.seed, level=args.level), args.show)
        print(f"wrote {args.show}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for split, n in (("train", args.n), ("val", args.val)):
            if n:
                path = args.out / f"{split}-00000-of-00001.parquet"
                some = {"seed": args.seed, "level": args.level, "split": split}
                starts = range(0, n, 256)  # a generator: a million pictures need not be in memory at once
                write_stvqa((row for at in starts for row in scene_rows(min(256, n - at), start=at, **some)), path)
                print(f"wrote {path}: {n} rows")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
