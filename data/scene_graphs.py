"""Scene graphs from files: one small reader for each layout, one Graph for all that follow.

    for graph in read_graphs("vg/scene_graphs.json", "vg/images"): ...

    Visual Genome   scene_graphs.json as released, image_data.json beside it, pictures in VG_100K, VG_100K_2 or one folder
    VG150           .parquet, .jsonl or .json: image_id, objects [{id, bbox}], relationships; picture in it or in a folder
    COCO            instances_*.json: boxes only, so the relations are those of the boxes in the picture
    scenes:LEVEL    the procedural world (data/scenes.py), drawn as it is read

What a reader hands out is clean: ids that the format reward takes, boxes inside the picture, one box an object.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

from data.dataset import jsonl_records, parquet_records
from data.drawing import COLOURS, centre, mask
from data.pictures import picture_size
from data.scenes import draw_scene, resolve_knobs
from data.words import identifier_name, label, name_key
from rewards import iou, is_valid_id

Box = list[float]


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """objects: [{"id": "traffic_light.1", "bbox": [x1, y1, x2, y2]}] in pixels of the picture; relations: [{"subject",
    "predicate", "object"}] between these ids."""

    id: str
    picture: str | bytes | Image.Image
    size: tuple[int, int]  # (W, H)
    objects: list[dict]
    relations: list[dict]
    boxes_only: bool = False  # the relations follow from the boxes, nobody looked at the picture
    uncounted: frozenset[str] = frozenset()  # names of which more may be there than have boxes


def read_graphs(source: str, images: str | None = None, *, limit: int | None = None, seed: int = 0,
                skipped: Counter | None = None) -> Iterator[Graph]:  # fmt: skip
    """The graphs of a file in its order, `limit` at most. Those whose picture is not there are left out (nobody should
    pay for a question that cannot be packed) and counted in `skipped` by reason.

    Raises FileNotFoundError, or ValueError('file, record: problem: cure')."""
    if re.fullmatch(r"scenes(:\w+)?", source):
        yield from read_scenes(source.partition(":")[2] or "hard", limit, seed=seed)
        return
    path, folder = Path(source), Path(images) if images else Path(source).parent
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file: give scene_graphs.json, a VG150 or COCO file, or scenes:hard")
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {images}: no such folder")
    skipped = Counter() if skipped is None else skipped
    reader = READERS[layout(path)]
    for number, graph in enumerate(whole(reader(path, folder, skipped), skipped)):
        if limit is not None and number >= limit:
            return
        yield graph


def layout(path: Path) -> str:
    """vg, vg150 or coco, from the beginning of a file."""
    if path.suffix in (".parquet", ".jsonl"):
        return "vg150"
    with opened(path) as file:
        first = file.read(1).strip()
    if first == "{":
        return "coco"
    if first != "[":
        raise ValueError(f"{path}: neither a JSON list nor an object: give scene_graphs.json, a VG150 or a COCO file")
    record = next(json_array(path), {})
    objects = record.get("objects") if isinstance(record, dict) else None
    thing = objects[0] if isinstance(objects, list) and objects else None
    return "vg150" if isinstance(objects, str) or isinstance(thing, dict) and "bbox" in thing else "vg"


def whole(graphs: Iterator[Graph], skipped: Counter) -> Iterator[Graph]:
    """Without the graphs that nothing can be asked about, and with each id once: items are kept under it."""
    seen = set()
    for graph in graphs:
        if graph.id in seen:
            raise ValueError(f"image_id {graph.id} comes twice: give each picture one graph")
        seen.add(graph.id)
        if graph.objects:
            yield graph
        else:
            skipped["no object with a usable name and box"] += 1


# ---- Visual Genome ---------------------------------------------------------------------------------------------------


def read_vg(path: Path, folder: Path, skipped: Counter) -> Iterator[Graph]:
    """scene_graphs.json as released: objects {object_id, names, x, y, w, h}, relationships {predicate, subject_id,
    object_id}. Streamed: the file has 740 MB."""
    sizes, image_data = {}, path.with_name("image_data.json")
    if image_data.is_file():
        for number, entry in enumerate(json_array(image_data), start=1):
            try:
                sizes[str(entry["image_id"])] = size_in(entry)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{image_data}, record {number}: no picture's size ({error!r}): is it image_data.json as "
                                 "released?") from None  # fmt: skip
    for number, record in enumerate(json_array(path), start=1):
        try:
            image_id = str(record["image_id"])
            things = [
                (key(thing["object_id"]), first_name(thing), corners(thing["x"], thing["y"], thing["w"], thing["h"]))
                for thing in record["objects"]
            ]
            links = [(key(r["subject_id"]), r["predicate"], key(r["object_id"])) for r in record["relationships"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, record {number}: no Visual Genome graph ({error!r}): is it scene_graphs.json "
                             "as released?") from None
        places = [folder / part / f"{image_id}.jpg" for part in ("", "VG_100K", "VG_100K_2")]
        picture = next((place for place in places if place.is_file()), places[0])
        yield from graph_of(image_id, picture, sizes.get(image_id), things, links, skipped, drop_copies=True)


def first_name(thing: dict) -> str:
    return (thing.get("names") or [thing.get("name", "")])[0]


def key(value):
    """What tells objects apart: anything that can. Raises TypeError for a list or dict."""
    hash(value)
    return value


def size_in(entry: dict) -> tuple[int, int]:
    """Raises KeyError or TypeError where width and height are no whole numbers."""
    size = entry["width"], entry["height"]
    if not all(isinstance(side, int | float) and side > 0 and side % 1 == 0 for side in size):
        raise TypeError(f"width {size[0]!r}, height {size[1]!r}")
    return int(size[0]), int(size[1])


def corners(x: float, y: float, w: float, h: float) -> Box:
    return [x, y, x + w, y + h]


# ---- VG150, the layout of the paper ----------------------------------------------------------------------------------


def read_vg150(path: Path, folder: Path, skipped: Counter) -> Iterator[Graph]:
    """Records {image_id, objects: [{id: "man.1", bbox}], relationships (or relations): [{subject, predicate, object}]};
    the lists may be JSON texts. The picture is in `image`, as bytes or a path, else it is image_id.jpg in the folder."""
    if path.suffix == ".parquet":
        records = parquet_records(path)
    elif path.suffix == ".jsonl":
        records = jsonl_records(path)
    else:
        records = ((str(path), number, record) for number, record in enumerate(json_array(path), start=1))
    for _, number, record in records:
        try:
            image_id = str(record["image_id"])
            objects = as_list(record["objects"])
            relations = as_list(record["relationships"] if "relationships" in record else record["relations"])
            things = [(thing["id"], label(thing["id"]), list(thing["bbox"])) for thing in objects]
            links = [(key(r["subject"]), r["predicate"], key(r["object"])) for r in relations]
            picture = record.get("image")
            picture = (picture.get("bytes") or picture.get("path")) if isinstance(picture, dict) else picture
            picture = picture if isinstance(picture, bytes) else folder / (picture or f"{image_id}.jpg")
            size = size_in(record) if record.get("width") and record.get("height") else None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}, record {number}: no VG150 graph ({error!r}): give image_id, objects with id and "
                             "bbox, relationships with subject, predicate, object") from None  # fmt: skip
        yield from graph_of(image_id, picture, size, things, links, skipped)


def as_list(value: list | str) -> list:
    return json.loads(value) if isinstance(value, str) else value


# ---- COCO ------------------------------------------------------------------------------------------------------------


def read_coco(path: Path, folder: Path, skipped: Counter) -> Iterator[Graph]:
    """instances_*.json, in the order of the image ids. A class with a crowd region is not counted there."""
    try:
        with opened(path) as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON, or cut off ({error}): download it again") from None
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        entries = [(key(entry["id"]), folder / entry["file_name"], size_in(entry))
                   for entry in sorted(content["images"], key=lambda entry: entry["id"])]  # fmt: skip
        things, uncounted = defaultdict(list), defaultdict(set)
        for mark in content["annotations"]:
            name = names[mark["category_id"]]
            if mark.get("iscrowd"):
                uncounted[mark["image_id"]].add(name)
            else:
                things[mark["image_id"]].append((key(mark["id"]), name, corners(*mark["bbox"])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no COCO instances file ({error!r}): give instances_*.json") from None
    for image_id, picture, size in entries:
        for graph in graph_of(str(image_id), picture, size, things[image_id], [], skipped):
            relations = box_relations(graph.objects, size)
            yield Graph(graph.id, graph.picture, size, graph.objects, relations, True, frozenset(uncounted[image_id]))


def box_relations(objects: list[dict], size: tuple[int, int], *, most: int = 12) -> list[dict]:
    """What the boxes alone say of the `most` largest objects, two of one name left out: direction, size, inside. All of
    it is about the picture: inside says that one box lies in the other, not that a cup is in a table."""
    largest = sorted(objects, key=lambda thing: -area(thing["bbox"]))[:most]
    relations = []
    for big, small in combinations(largest, 2):
        if label(big["id"]) == label(small["id"]):
            continue
        a, b = small["bbox"], big["bbox"]
        said = [direction(a, b)]
        if area(b) >= 2 * area(a):
            said.append("smaller")
        if a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3] and area(b) >= 2 * area(a):
            said = ["smaller", "inside"]
        relations += [{"subject": small["id"], "predicate": p, "object": big["id"]} for p in said if p]
    return relations


# ---- the procedural world --------------------------------------------------------------------------------------------


def read_scenes(level: str, n: int | None, *, seed: int) -> Iterator[Graph]:
    """n scenes of a level (None: without end), each with the triples that hold, a pair in one direction; which of two
    overlapping shapes is in front is read off the drawn pixels. The seeds are those of scene_rows(split="train"): a val
    split there shares no scene with these."""
    knobs = resolve_knobs(level)
    first = 2 * seed << 32
    for number in count(first) if n is None else range(first, first + n):
        scene = draw_scene(number, knobs)
        boxes = {thing["id"]: thing["bbox"] for thing in scene.objects}
        order, relations = list(boxes), []
        for triple in scene.relations:
            first = order.index(triple["subject"]) < order.index(triple["object"])
            overlap = triple["predicate"] == "overlapping"
            if first:
                relations.append({**triple, "predicate": "touching"} if overlap else triple)
            if overlap and in_front(scene.image, boxes, triple["subject"], triple["object"]):
                relations.append({**triple, "predicate": "in front of"})
        picture = Image.fromarray(scene.image)
        yield Graph(f"scenes-{level}-{number}", picture, picture.size, scene.objects, relations)


def in_front(image: np.ndarray, boxes: dict, front: str, back: str) -> bool:
    """Whether the pixels that both shapes cover have the colour of the first; not asked of two of one colour.
    image: (H, W, 3) uint8."""
    cover = np.ones(image.shape[:2], dtype=bool)
    for name in (front, back):
        x1, y1, x2, y2 = boxes[name]
        drawn = np.zeros_like(cover)
        drawn[y1:y2, x1:x2] = mask(label(name).split()[1], x2 - x1)
        cover &= drawn
    colours = [np.array(COLOURS[label(name).split()[0]]) for name in (front, back)]
    if not cover.any() or (colours[0] == colours[1]).all():
        return False
    seen = image[cover].mean(axis=0)  # (3,)
    distance = [float(np.abs(seen - colour).max()) for colour in colours]
    return distance[0] < 45 and 2 * distance[0] < distance[1]


# ---- boxes -----------------------------------------------------------------------------------------------------------


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def direction(a: Box, b: Box) -> str | None:
    """Where a lies from b in the picture, None unless it is plain: apart along one axis, level along the other."""
    (ax, ay), (bx, by) = centre(a), centre(b)
    if a[2] <= b[0] or b[2] <= a[0]:
        return ("left of" if ax < bx else "right of") if abs(ay - by) <= 0.35 * abs(ax - bx) else None
    if a[3] <= b[1] or b[3] <= a[1]:
        return ("above" if ay < by else "below") if abs(ax - bx) <= 0.35 * abs(ay - by) else None
    return None


def graph_of(image_id: str, picture: Path | bytes, size: tuple | None, things: list[tuple], links: list[tuple],
             skipped: Counter, *, drop_copies: bool = False) -> Iterator[Graph]:  # fmt: skip
    """One Graph, or none when the picture is not there. things: (key, name, box); links: (key, predicate, key).

    Boxes are clipped to the picture; objects without a name or an area go, and their relations. drop_copies: two boxes
    of one name that agree to 0.7 become one object, as Visual Genome's annotators often drew a thing twice."""
    if isinstance(picture, Path):
        if not picture.is_file():
            skipped[f"no picture ({picture.parent}/...)"] += 1
            return
        picture = str(picture)
    size = size or picture_size(picture)
    if size is None:
        skipped["a picture that cannot be read"] += 1
        return
    objects, ids, numbers = [], {}, Counter()
    for key, name, box in things:
        name, box = identifier_name(str(name)), clipped(box, size)
        if not name or box is None:
            continue
        copy = next((o for o in objects if drop_copies and same_name(o["id"], name) and iou(o["bbox"], box) >= 0.7), None)
        if copy:
            ids[key] = copy["id"]
            continue
        numbers[name] += 1
        ids[key] = f"{name}.{numbers[name]}"
        objects.append({"id": ids[key], "bbox": box})
        assert is_valid_id(ids[key])
    relations = {
        (ids[a], " ".join(str(predicate).lower().split()), ids[b]): None
        for a, predicate, b in links if a in ids and b in ids and ids[a] != ids[b] and str(predicate).strip()
    }  # fmt: skip
    yield Graph(image_id, picture, tuple(size), objects,
                [{"subject": a, "predicate": predicate, "object": b} for a, predicate, b in relations])  # fmt: skip


def same_name(identifier: str, name: str) -> bool:
    return name_key(label(identifier)) == name_key(name.replace("_", " "))


def clipped(box: Box, size: tuple[int, int]) -> Box | None:
    """The part of a box that is in the picture, to a tenth of a pixel; None if it is no box, or none of it is."""
    if len(box) != 4 or not all(isinstance(v, int | float) and -1e6 < v < 1e6 for v in box):
        return None
    x1, y1, x2, y2 = (round(min(max(v, 0), side), 1) for v, side in zip(box, (*size, *size), strict=True))
    x1, y1, x2, y2 = (int(v) if v == int(v) else v for v in (x1, y1, x2, y2))
    return [x1, y1, x2, y2] if x2 - x1 >= 1 and y2 - y1 >= 1 else None


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The file as text. Raises ValueError naming it where it is not UTF-8."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}): write it in UTF-8, or download it again") from None


def json_array(path: Path) -> Iterator:
    """The items of a JSON list, one at a time: the file need not fit in memory. Raises ValueError naming the file."""
    decode, chunk, number = json.JSONDecoder().raw_decode, 1 << 20, 1
    between, size = re.compile(r"\s*[\[,]?\s*"), chunk
    with opened(path) as file:
        text, at = file.read(size), 0
        while True:
            at = between.match(text, at).end()
            if text[at : at + 1] == "]":
                return
            try:
                item, at = decode(text, at)
            except ValueError as error:
                more = file.read(size)
                if not more:
                    raise ValueError(f"{path}, record {number}: not JSON, or cut off ({error}): "
                                     "download it again") from None  # fmt: skip
                text, at, size = text[at:] + more, 0, 2 * size  # growing: a long item would cost its square
                continue
            yield item
            number, size = number + 1, chunk


READERS = {"vg": read_vg, "vg150": read_vg150, "coco": read_coco}
