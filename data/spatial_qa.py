"""Questions and maps from 3-D annotations: the seven kinds that SpaceR trains on, whose generator was never released.

    python -m data.spatial_qa --annotations rooms.json --videos scans --exclude vsi_test.json list.txt --out train.jsonl

An annotation is a room in the form of VSI-Bench's meta_info (a JSON object of them by scene, or one procedural clip's,
row["meta"]["annotation"]); z is up, lengths are metres:

    object_bbox   {category: [{"centroid": [3], "axesLengths": [3], "normalizedAxes": [9]}, ...]}: the box is centroid +-
                  half of each length along that row of the 3 x 3 axes; other keys are not read
    object_counts {category: number}, optional: a category of which there are fewer or more boxes is left out of questions
    room_size     square metres of floor; without it there is no question about it
    first_seen    {category: [time of each thing]}, optional, in any one unit: without it there is no appearance order

Rules (section 4.4 of SpaceR's notes names the kinds; where the benchmark's rule is not known, ours is chosen and said so):

    distance      between closest points of two oriented boxes, exact; of categories, between the nearest two things. Metres,
                  one decimal. VSI-Bench gives up to 0.2 m more on one pair in three, as if it had sampled points of them
    size          longest side of the box, whole centimetres; room: square metres, one decimal
    direction     between the centres, seen from above; left is counter-clockwise; "back" is 135 degrees or more
    order         a category comes into view when the first thing of it does
    map           cell = floor(10 (v - low) / (high - low)), kept within 0..9: x grows with the world's x, y with its y. low
                  and high are the least and greatest centre of all things, or the `bounds` given

Asked is only what has one answer: things that stand alone in their category, counts from 2 on, and no near ties (MARGINS).
"""
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
from scipy.optimize import lsq_linear

GRID = 10
VAGUE = ("wall", "floor", "ceiling", "object", "doorframe", "structure", "otherfurniture", "otherstructure", "otherprop")
MARGINS = {"degrees": 10, "apart": 0.3, "closest": 0.15, "distance": 0.1, "seen": 1}  # deg, m, m, m, unit of first_seen
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
PER_SCENE = {"rel_direction": 26, "abs_distance": 13, "appearance_order": 13, "object_size": 11, "room_size": 1,
             "rel_distance": 10, "counting": 4}  # at most; in the proportions of SR-91k (4.3)  # fmt: skip
DIRECTIONS = {"easy": ("left", "right"), "medium": ("left", "right", "back"),
              "hard": ("front-left", "front-right", "back-left", "back-right")}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    centre: np.ndarray  # (3,) metres
    half: np.ndarray  # (3, 3), columns: half of each side, as a vector
    sides: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    boxes: dict[str, list[Box]]
    area: float | None
    seen: dict[str, float]  # by category, when the first of it comes into view; {} if unknown
    clear: list[str]  # the categories to ask about: a name that says what it is, and as many boxes as are counted
    apart: dict  # distances found so far, by pair of categories


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    text: str
    options: list[str]  # [] where a number is asked for
    gold: str  # the letter, or the number
    things: tuple[str, ...]  # the categories that it names


# ---------------------------------------------------------------- annotations

def read_annotations(path: str | Path) -> dict[str, dict]:
    """{scene: annotation} of a JSON file. ValueError naming file, scene and cure."""
    try:
        scenes = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): write one object, {{scene: annotation}}") from None
    if not isinstance(scenes, dict) or not all(isinstance(scene, dict) for scene in scenes.values()):
        raise ValueError(f"{path}: not {{scene: annotation}}: write one object with an annotation by scene name")
    for name, annotation in scenes.items():
        try:
            read_room(annotation)
        except ValueError as error:
            raise ValueError(f"{path}, scene {name}: {error}") from None
    return scenes


def read_room(annotation: dict) -> Room:
    """An annotation, checked. ValueError('problem: cure')."""
    boxes, listed, area = {}, annotation.get("object_bbox"), annotation.get("room_size")
    seen, counts = (annotation.get(key) or {} for key in ("first_seen", "object_counts"))
    if not isinstance(listed, dict):
        raise ValueError("object_bbox is no object: give {category: [box, ...]}")
    for name, found in listed.items():
        if not isinstance(found, list):
            raise ValueError(f"object_bbox has {str(found)[:60]} for {name}: give a list of boxes")
        boxes[name] = [read_box(name, box) for box in found]
    if area is not None and not (isinstance(area, (int, float)) and 0 < area < 1e6):
        raise ValueError(f"room_size is {area}: give square metres, or leave it out")
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        raise ValueError("object_counts is no object of numbers: give {category: number}, or leave it out")
    if not isinstance(seen, dict):
        raise ValueError("first_seen is no object: give {category: [time, ...]}, or leave it out")
    for name, times in seen.items():
        if not isinstance(times, list) or not all(type(time) in (int, float) and abs(time) < math.inf for time in times):
            raise ValueError(f"first_seen has {str(times)[:60]} for {name}: give a list of times, in numbers")
        if len(times) != len(boxes.get(name, ())):
            there = len(boxes.get(name, ()))
            raise ValueError(f"first_seen has {len(times)} times for {there} of {name}: give one for each")
    clear = sorted(name for name, found in boxes.items() if len(found) == counts.get(name, len(found)) and name not in VAGUE)
    return Room({name: found for name, found in boxes.items() if found}, area, {n: min(t) for n, t in seen.items() if t},
                [name for name in clear if boxes[name]], {})  # fmt: skip


def read_box(name: str, box: dict) -> Box:
    values = [box.get(key) if isinstance(box, dict) else None for key in ("centroid", "axesLengths", "normalizedAxes")]
    try:
        centre, sides, axes = (np.array(value, dtype=float) for value in values)
        good = (centre.shape, sides.shape, axes.shape) == ((3,), (3,), (9,)) and np.isfinite([*centre, *sides, *axes]).all()
    except (TypeError, ValueError):
        good = False
    if not good or (sides < 0).any():
        raise ValueError(f"a box of {name} has not centroid (3), axesLengths (3), normalizedAxes (9): give these numbers")
    axes = axes.reshape(3, 3)
    if np.abs(axes @ axes.T - np.eye(3)).max() > 0.01:
        raise ValueError(f"normalizedAxes of a box of {name} are not orthogonal unit rows: normalise them")
    return Box(centre, (axes * sides[:, None] / 2).T, tuple(sides.tolist()))


def room_of(scene: str) -> str:
    """The room of a scan: ScanNet numbers the scans of one, scene0050_01 -> scene0050; elsewhere a scan is its own room."""
    room, cut, scan = scene.rpartition("_")
    return room if cut and room.startswith("scene") and scan.isdigit() else scene


def read_exclusions(path: str | Path) -> set[str]:
    """The rooms of a file: a scene or room a line (# begins a comment), a JSON list of them, or an annotation file's scenes.
    Raises ValueError naming file and cure for any other form: a name read wrongly would let test rooms into training."""
    text = Path(path).read_text(encoding="utf-8-sig")
    cure = "write one scene or room a line, a JSON list of them, or {scene: annotation}"
    names = [line.split("#")[0].strip() for line in text.splitlines()]
    if text.lstrip().startswith(("{", "[")):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}): {cure}") from None
        if isinstance(names, dict) and not all(isinstance(scene, dict) for scene in names.values()):
            raise ValueError(f"{path}: an object, but not of annotations by scene: {cure}")
    for name in names:
        if not isinstance(name, str) or set(name) & set("\"[]{},;\t"):
            raise ValueError(f"{path}: {str(name)[:60]!r} is no name of a scene or room: {cure}")
    return {room_of(Path(name).stem) for name in names if name}


def scene_videos(folder: str | Path) -> dict[str, Path]:
    """{scene: its video, or its folder of frames}; other files, such as ScanNet's X.txt beside X.mp4, are passed over.
    Raises ValueError for a scene with two."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_dir() or path.suffix.lower() in VIDEOS:
            scene = path.name if path.is_dir() else path.stem
            if scene in found:
                raise ValueError(f"{folder}: scene {scene} has two videos, {found[scene].name} and {path.name}: keep one")
            found[scene] = path
    return found


# ---------------------------------------------------------------- geometry

def box_distance(a: Box, b: Box) -> float:
    """Metres between the closest points of two boxes; 0 where they overlap. Exact: least squares over the six shares of
    the half sides, each within -1..1."""
    apart = b.centre - a.centre
    found = lsq_linear(np.hstack([a.half, -b.half]), apart, (-1, 1), method="bvls", tol=1e-12)
    return math.sqrt(2 * found.cost)


def category_distance(room: Room, a: str, b: str) -> float:
    """Between the nearest two things of two categories."""
    key = (a, b) if a < b else (b, a)
    if key not in room.apart:
        room.apart[key] = min(box_distance(x, y) for x in room.boxes[a] for y in room.boxes[b])
    return room.apart[key]


def turn_angle(place: np.ndarray, facing: np.ndarray, target: np.ndarray) -> float:
    """Degrees from facing to target, seen from above at place: positive to the left, in (-180, 180]."""
    (ux, uy), (vx, vy) = (facing - place)[:2], (target - place)[:2]
    return math.degrees(math.atan2(ux * vy - uy * vx, ux * vx + uy * vy))


def direction(angle: float, level: str) -> str | None:
    """The word for an angle, None within a margin of a border between two words."""
    borders = {"easy": (0, 180), "medium": (0, 135), "hard": (0, 90, 180)}[level]
    if min(abs(abs(angle) - border) for border in borders) < MARGINS["degrees"]:
        return None
    side = "left" if angle > 0 else "right"
    if level == "hard":
        return f"{'front' if abs(angle) < 90 else 'back'}-{side}"
    return "back" if level == "medium" and abs(angle) > 135 else side


def room_map(annotation: dict, *, bounds: tuple[float, float, float, float] | None = None, grid: int = GRID) -> dict:
    """{category: [[x, y], ...]} in cells of a grid x grid map, see above. bounds: (x low, y low, x high, y high) in metres,
    such as the walls; None: those of all centres. A room without extent along an axis has all its things in cell 0 of it."""
    boxes = read_room(annotation).boxes
    centres = np.array([box.centre[:2] for found in boxes.values() for box in found])
    if not len(centres):
        return {}
    low, high = (np.array(bounds[:2]), np.array(bounds[2:4])) if bounds else (centres.min(0), centres.max(0))
    extent = np.where(high > low, high - low, np.inf)

    def cell(box: Box) -> list[int]:
        return np.floor(grid * (box.centre[:2] - low) / extent).clip(0, grid - 1).astype(int).tolist()
    return {name: [cell(box) for box in found] for name, found in boxes.items()}


# ---------------------------------------------------------------- the seven kinds: each yields questions in random order

def alone(room: Room) -> list[str]:
    """The categories that a question can call "the" chair."""
    return [name for name in room.clear if len(room.boxes[name]) == 1]


def shuffled(items, draw: random.Random) -> list:
    items = list(items)
    draw.shuffle(items)
    return items


def choice(task: str, text: str, options: list[str], right: str, things: tuple, draw: random.Random) -> Question:
    options = shuffled(options, draw)
    return Question(task, text, options, "ABCD"[options.index(right)], things)


def ask_rel_direction(room: Room, draw: random.Random) -> Iterator[Question]:
    """The answers of each level in turn, so that none of them is the likely one."""
    asked = {
        "easy": "is the {r} on my left or on my right?",
        "medium": "is the {r} on my left, on my right or at my back? At my back means that I would have to turn by 135 degrees "
        "or more to face it.",
        "hard": "in which quadrant is the {r}: front-left, front-right, back-left or back-right? Take my place as the origin of "
        "the plane and the way I face as its positive y-axis."}  # fmt: skip
    found: dict[tuple[str, str], list] = {}
    for names in shuffled(permutations(alone(room), 3), draw):
        centres = [room.boxes[name][0].centre for name in names]
        if min(float(np.hypot(*(a - b)[:2])) for a, b in combinations(centres, 2)) < MARGINS["apart"]:
            continue
        angle = turn_angle(*centres)
        for level in DIRECTIONS:
            if word := direction(angle, level):
                found.setdefault((level, word), []).append(names)
    turns = {level: [found.get((level, word), []) for word in words] for level, words in DIRECTIONS.items()}
    while any(any(lists) for lists in turns.values()):
        for level, words in DIRECTIONS.items():
            word, names = draw.choice([(w, t) for w, t in zip(words, turns[level], strict=True)])
            if not names:
                continue
            p, f, r = names.pop()
            text = f"I stand at the {p} and look towards the {f}. Seen from there, {asked[level].format(r=r)}"
            yield choice(f"rel_direction_{level}", text, [*words], word, (p, f, r), draw)


def ask_rel_distance(room: Room, draw: random.Random) -> Iterator[Question]:
    anchors = alone(room)
    for _ in range(50 if anchors and len(room.clear) > 4 else 0):
        anchor = draw.choice(anchors)
        options = draw.sample([name for name in room.clear if name != anchor], 4)
        near = sorted(options, key=lambda name: category_distance(room, anchor, name))
        first, second = (category_distance(room, anchor, name) for name in near[:2])
        if second - first >= MARGINS["closest"]:
            text = f"Which of these is nearest to the {anchor}, measured between the closest points: {', '.join(options)}?"
            yield choice("rel_distance", text, options, near[0], (anchor, *sorted(options)), draw)


def ask_abs_distance(room: Room, draw: random.Random) -> Iterator[Question]:
    for a, b in shuffled(combinations(alone(room), 2), draw):
        metres = category_distance(room, a, b)
        if metres >= MARGINS["distance"]:
            text = f"How far is it from the {a} to the {b} in a straight line between their closest points, in metres?"
            yield Question("abs_distance", text, [], f"{metres:.1f}", (a, b))


def ask_object_size(room: Room, draw: random.Random) -> Iterator[Question]:
    for name in shuffled(alone(room), draw):
        text = f"Of the length, width and height of the {name}, how many centimetres is the greatest?"
        yield Question("object_size", text, [], str(round(100 * max(room.boxes[name][0].sides))), (name,))


def ask_room_size(room: Room, draw: random.Random) -> Iterator[Question]:
    if room.area:
        text = "How many square metres of floor are shown? If there are several rooms, add them up."
        yield Question("room_size", text, [], f"{room.area:.1f}", ())


def ask_counting(room: Room, draw: random.Random) -> Iterator[Question]:
    for name in shuffled(room.clear, draw):
        if len(room.boxes[name]) >= 2:
            text = f"How many of these does the room hold: {name}?"
            yield Question("counting", text, [], str(len(room.boxes[name])), (name,))


def ask_appearance_order(room: Room, draw: random.Random) -> Iterator[Question]:
    names = [name for name in room.clear if name in room.seen]
    for _ in range(100 if len(names) >= 4 else 0):
        four = draw.sample(names, 4)
        order = sorted(four, key=room.seen.get)
        if min(room.seen[b] - room.seen[a] for a, b in zip(order, order[1:])) < MARGINS["seen"]:
            continue
        wrong = [list(other) for other in permutations(four) if list(other) != order]
        options = [", ".join(some) for some in [order, *draw.sample(wrong, 3)]]
        text = f"In what order do these come into view for the first time: {', '.join(sorted(four))}?"
        yield choice("appearance_order", text, options, options[0], tuple(sorted(four)), draw)


ASKS = {"rel_direction": ask_rel_direction, "abs_distance": ask_abs_distance, "appearance_order": ask_appearance_order,
        "object_size": ask_object_size, "room_size": ask_room_size, "rel_distance": ask_rel_distance,
        "counting": ask_counting}  # fmt: skip


def make_questions(annotation: dict, *, seed: str | int, per_scene: dict[str, int] = PER_SCENE) -> list[Question]:
    """At most so many questions of each kind about a room, none twice; the same for the same seed."""
    room, questions, asked = read_room(annotation), [], set()
    for kind, most in per_scene.items():
        left = most
        for question in ASKS[kind](room, random.Random(f"{seed} {kind}")):
            if left == 0:
                break
            if (question.task, question.things) not in asked:
                asked.add((question.task, question.things))
                questions.append(question)
                left -= 1
    return questions


# ---------------------------------------------------------------- rows

def make_rows(annotation: dict, *, scene: str, video, fps: float | None = None, bounds: tuple | None = None, seed: int = 0,
              per_scene: dict[str, int] = PER_SCENE) -> list[dict]:
    """The questions of a scene as rows (design section 3) with its map; numbers are graded by MRA. video: a path, or frames
    with their rate."""
    plan = room_map(annotation, bounds=bounds)
    rows = []
    for number, q in enumerate(make_questions(annotation, seed=f"{seed} {scene}", per_scene=per_scene)):
        rows.append({
            "id": f"{scene}-{number}", "source": "spatial_qa", "category": q.task, "images": [], "video": video, "fps": fps,
            "span": None, "question": q.text, "options": q.options, "gold": q.gold, "kind": "choice" if q.options else "mra",
            "size": None, "scene": None, "map": plan, "problem": None, "style": None,
            "meta": {"task": q.task, "scene": scene, "room": room_of(scene), "things": list(q.things)},
        })  # fmt: skip
    return rows


def clip_rows(row: dict, *, seed: int = 0, per_scene: dict[str, int] = PER_SCENE) -> list[dict]:
    """More questions about a procedural clip (data/clips.py): from its annotation, with its walls as the map's bounds."""
    return make_rows(row["meta"]["annotation"], scene=row["id"], video=row["video"], fps=row["fps"],
                     bounds=tuple(row["meta"]["room"][:4]), seed=seed, per_scene=per_scene)  # fmt: skip


@dataclass(frozen=True)
class Config:
    annotations: tuple[str, ...]  # JSON files, {scene: annotation}
    videos: str  # folder with SCENE.mp4, or another of VIDEOS, or a folder SCENE of frames; scenes without are left out
    out: str  # JSONL of rows
    exclude: tuple[str, ...] = ()  # rooms not to be trained on: lists, a benchmark's annotations, see read_exclusions
    fps: float | None = None  # of scenes that are folders of frames
    scale: float = 1.0  # of the number of questions a scene, see PER_SCENE
    seed: int = 0


def main(cfg: Config) -> None:
    excluded = set().union(*(read_exclusions(path) for path in cfg.exclude))
    files = scene_videos(cfg.videos)
    per_scene = {kind: max(1, round(cfg.scale * most)) for kind, most in PER_SCENE.items()}
    kept, counts, missing, dropped = [], dict.fromkeys(PER_SCENE, 0), 0, []
    for path in cfg.annotations:
        for scene, annotation in read_annotations(path).items():
            if room_of(scene) in excluded:
                dropped.append(room_of(scene))
            elif scene not in files:
                missing += 1
            else:
                fps = cfg.fps if files[scene].is_dir() else None
                kept += make_rows(annotation, scene=scene, video=str(files[scene].resolve()), fps=fps, seed=cfg.seed,
                                  per_scene=per_scene)  # fmt: skip
    for row in kept:
        counts[next(kind for kind in PER_SCENE if row["category"].startswith(kind))] += 1
    partial = Path(cfg.out + ".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(cfg.out)
    met = f"{len(set(dropped))} of the {len(excluded)} rooms to exclude"
    print(f"{cfg.out}: {len(kept)} rows; {len(dropped)} scenes excluded ({met}), {missing} without a video")
    print("  " + ", ".join(f"{kind} {count}" for kind, count in counts.items()))


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
