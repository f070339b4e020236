"""The row (design section 3): made from a record of a file, checked, moved to another frame, written again.

A record is in the STVQA-7K columns (spec 3.1), in those of SpaceR-151k (data/spacer_rows.py) or in the row's own keys.
Whatever is wrong with it is one ValueError('problem: cure'); the caller, who knows file and row number, puts these in front.
"""
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from string import ascii_uppercase

from PIL import Image

from data.pictures import frame_size, picture_size
from data.prompts import build_prompt, question_text
from data.spacer_rows import SPACER_REQUIRED, spacer_row
from rewards import LENGTH, extract_answer, extract_scene, extract_size, read_number, solution_text

KINDS = ("choice", "number", "ocr", "text", "regression", "mra", "length", "yes_no", "view_change")
STVQA_REQUIRED = ("images", "question_only", "options", "answer_only", "answer_option_text")
ROW_REQUIRED = ("images", "question", "gold")
FORMATS = {"own": ROW_REQUIRED, "STVQA-7K": STVQA_REQUIRED, "SpaceR-151k": SPACER_REQUIRED}
ROW_KEYS = ("id", "source", "category", "images", "question", "options", "gold", "kind", "size", "scene", "map",
            "problem", "style", "meta")
VIDEO_KEYS = ("video", "fps", "span")  # instead of images


# ---------------------------------------------------------------- records to rows

def to_row(record: dict, *, folder: Path, index: int, source: str) -> dict:
    """One record, in the columns of one of FORMATS, as a checked row. Raises ValueError('problem: cure')."""
    if "video" in record and "images" not in record:
        record = {"images": None, **record}
    if all(key in record for key in STVQA_REQUIRED):
        row = stvqa_row(record, folder=folder, index=index, source=source)
    elif all(key in record for key in SPACER_REQUIRED):
        row = spacer_row(record, folder=folder, index=index, source=source)
    elif all(key in record for key in ROW_REQUIRED):
        row = own_row(record, folder=folder, index=index, source=source)
    else:
        nearest = max(FORMATS, key=lambda name: sum(key in record for key in FORMATS[name]) / len(FORMATS[name]))
        missing = ", ".join(key for key in FORMATS[nearest] if key not in record)
        raise ValueError(f"missing column {missing}: {nearest} rows need {', '.join(FORMATS[nearest])} (other formats: "
                         f"{', '.join(name for name in FORMATS if name != nearest)})")
    check_answer(row)
    check_number(row)
    if row["scene"] is not None:
        row["scene"] = clean_scene(row["scene"], row["size"])
    if row["map"] is not None:
        check_map(row["map"])
    return row


def stvqa_row(record: dict, *, folder: Path, index: int, source: str) -> dict:
    """STVQA-7K columns (spec 3.1) -> row. Gold scene and letter come from answer_option_text and answer_only."""
    images = picture_list(record["images"], folder)
    gold = str(record["answer_only"] or "").strip(" ().").upper()
    solution, problem = record["answer_option_text"] or "", record.get("problem")
    if not isinstance(solution, str) or not isinstance(problem, str | None):
        raise ValueError("answer_option_text or problem is no text: correct the column")
    scene = extract_scene(solution) or None
    if scene is None and "<scene>" in solution:
        raise ValueError("the <scene> of answer_option_text is not a JSON object: repair it, or remove the block")
    written = re.match(r"\(([A-Za-z])\)", extract_answer(solution))
    if written and written[1].upper() != gold:
        raise ValueError(f"answer_only says {gold!r}, answer_option_text says {written[0]}: make them agree")
    size = picture_size(images[0]) if images else None
    if size is None and problem:
        size = extract_size(problem)  # the picture is unreadable; encode will say so
    image_id = record.get("image_id")
    return dict(id=f"{index}" if image_id is None else f"{image_id}-{index}", source=source,
                category=record.get("category") or "", images=images, question=record["question_only"],
                options=record["options"], gold=gold, kind="choice", size=size, scene=scene, map=None,
                problem=problem, style=None,
                meta={key: record[key] for key in ("level", "rating") if record.get(key) is not None})


def own_row(record: dict, *, folder: Path, index: int, source: str) -> dict:
    """A record in our own keys -> row; pictures are looked for beside the file, everything left out has a default."""
    unknown = [key for key in record if key not in (*ROW_KEYS, *VIDEO_KEYS)]
    if unknown:  # a misspelt key would be lost without a word
        raise ValueError(f"unknown key {', '.join(unknown)}: known are {', '.join(ROW_KEYS)}, or for a clip "
                         f"{', '.join(VIDEO_KEYS)} instead of images; extras go under meta")
    images = picture_list(record["images"], folder)
    options = record.get("options") or []
    gold = record["gold"] if not isinstance(record["gold"], (int, float)) else str(record["gold"])
    size = picture_size(images[0]) if images else None
    given = record.get("size")
    if given is not None and (not isinstance(given, list) or len(given) != 2 or (size and tuple(given) != size)
                              or not all(isinstance(side, int) and side > 0 for side in given)):
        raise ValueError(f"size is {given}, the picture {size or 'unreadable'}: correct it or leave it out")
    for key, kind in (("problem", str), ("style", str), ("category", str), ("source", str), ("meta", dict)):
        if not isinstance(record.get(key), kind | None):
            raise ValueError(f"{key} is no {'text' if kind is str else 'object'}: correct it or leave it out")
    name = f"{Path(source).stem}-{index}" if record.get("id") in (None, "") else str(record["id"])
    return dict(id=name, source=record.get("source") or source,
                category=record.get("category") or "", images=images, question=record["question"], options=options,
                gold=gold, kind=record.get("kind") or ("choice" if options else "text"),
                size=size or (tuple(given) if given else None), scene=record.get("scene"), map=record.get("map"),
                problem=record.get("problem"), style=record.get("style"), meta=record.get("meta") or {},
                **video_keys(record, folder))


def video_keys(record: dict, folder: Path) -> dict:
    """video, fps and span of a record, paths made complete; {} for a record of pictures."""
    video, fps, span = (record.get(key) for key in VIDEO_KEYS)
    if video is None:
        return {}
    if record.get("images"):
        raise ValueError("images and a video in one row: give one of them")
    if not isinstance(video, (str, list)) or not video:
        raise ValueError(f"the video is {str(video)[:60]!r}: give a path, or a list of frames with their fps")
    if isinstance(fps, bool) or not (fps is None or isinstance(fps, (int, float)) and 0 < fps < 1e6):
        raise ValueError(f"fps is {fps}: give frames a second, or leave it out for a video file")
    if span is not None and not (
            isinstance(span, list) and [type(v) in (int, float) and -1e9 < v < 1e9 for v in span] == [True, True]
            and span[0] < span[1]):  # fmt: skip
        raise ValueError(f"span is {str(span)[:60]}: give [start, end] in seconds, or leave it out")
    video = picture_list(video, folder) if isinstance(video, list) else str(folder / os.path.expanduser(video))
    return {"video": video, "fps": fps, "span": span and tuple(span)}


def picture_list(value, folder: Path) -> list:
    """Pictures of a record (path, bytes, {bytes, path} or a list of these) as paths and bytes, paths made complete."""
    if value is None:
        return []
    if isinstance(value, list):
        return [picture for item in value for picture in picture_list(item, folder)]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return [value]
    if not isinstance(value, str) or not value:
        raise ValueError(f"a picture is {str(value)[:60]!r}: give a path, or {{bytes, path}}")
    return [str(folder / os.path.expanduser(value))]


# ---------------------------------------------------------------- checks

def check_answer(row: dict) -> None:
    """Question, options, kind and gold fit together, or ValueError('problem: cure')."""
    options, gold = row["options"], row["gold"]
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError("the question is empty: write one")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("options are not a list of texts: write [\"left\", \"right\"], without letters")
    if row["kind"] not in KINDS:
        raise ValueError(f"kind {row['kind']!r} is unknown: use one of {', '.join(KINDS)}")
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(f"gold is {str(gold)[:60]!r}: write a text, the letter 'B' for a choice")
    if row["kind"] == "length" and not LENGTH.fullmatch(gold):
        raise ValueError(f"gold {gold!r} is no length: write a number with its unit, '1.72 m'")
    if row["kind"] != "choice":
        return
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"a choice with {len(options)} options: give 2 to 26, or another kind")
    letters = ascii_uppercase[:len(options)]
    if all(re.match(rf"\(?{letter}[).]", option) for letter, option in zip(letters, options)):
        raise ValueError(f"options carry their letters ({options[0]!r}): leave the letters out")
    if len(gold) != 1 or gold not in letters:
        raise ValueError(f"gold letter {gold!r} is out of range A to {letters[-1]}: correct the letter or the options")


def check_number(row: dict) -> None:
    """A gold of a number kind is one finite number that upstream's graders (float(), for a regression without its commas)
    and the corrected ones (read_number) read alike, or ValueError('problem: cure'): with another no answer scores in one of
    the modes. Not for benchmarks, which keep the golds that were published."""
    if row["kind"] not in ("number", "mra", "regression"):
        return
    try:
        number = float(row["gold"].replace(",", "") if row["kind"] == "regression" else row["gold"])
    except ValueError:
        number = None
    if number is None or number != read_number(row["gold"]):
        raise ValueError(f"gold {row['gold'][:60]!r} of kind {row['kind']} is not one plain number: write it in digits, "
                         "1200 or 0.5, without unit or comma, or use kind text")


def check_map(plan: dict) -> None:
    """A gold map is {category: [[x, y], ...]} in numbers, or ValueError('problem: cure')."""
    if not isinstance(plan, dict):
        raise ValueError("the map is no object: write {\"chair\": [[x, y], ...]}")
    for name, spots in plan.items():
        if not isinstance(spots, list) or not all(
                isinstance(spot, list) and [type(v) in (int, float) and -1e6 < v < 1e6 for v in spot] == [True, True]
                for spot in spots):
            raise ValueError(f"the map has {str(spots)[:60]} for {name}: give a list of cells, [[x, y], ...]")


def clean_scene(scene: dict, size: tuple[int, int] | None) -> dict:
    """A gold scene with only the keys the reward knows (spec 1.1), or ValueError('problem: cure').

    Boxes are [x1, y1, x2, y2] in pixels of a `size` (W, H) picture; one that leaves it by more than a tenth of a side
    is taken for a box of another frame (annotators overshoot by some pixels, never by that much).
    """
    if not isinstance(scene, dict) or set(scene) - {"objects", "relationships"}:
        raise ValueError("the scene is not {\"objects\": [...], \"relationships\": [...]}: correct its keys")
    objects, relations = scene.get("objects", []), scene.get("relationships", [])
    for part in (objects, relations):
        if not isinstance(part, list) or not all(isinstance(item, dict) for item in part):
            raise ValueError("objects and relationships of a scene are not lists of objects: write [{...}, ...]")
    ids = set()
    for thing in objects:
        name, box = thing.get("id"), thing.get("bbox")
        if not isinstance(name, str) or not name.strip() or name in ids:
            raise ValueError(f"scene object id {name!r} is empty or used twice: number them, man.1, man.2")
        ids.add(name)
        # The range also refuses NaN and integers too large for a float.
        if not isinstance(box, list) or len(box) != 4 or not all(
                isinstance(v, (int, float)) and not isinstance(v, bool) and -1e6 < v < 1e6 for v in box):
            raise ValueError(f"bbox of {name} is {str(box)[:60]}: give four numbers [x1, y1, x2, y2] in pixels")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"bbox of {name} is {box}: x1 < x2 and y1 < y2 must hold")
        if size and not all(-0.1 * s <= v <= 1.1 * s for v, s in zip(box, (*size, *size))):
            raise ValueError(f"bbox of {name} is {box}, the picture is {size[0]} x {size[1]}: give pixels of it")
    for relation in relations:
        if not isinstance(relation.get("predicate"), str):
            raise ValueError(f"scene relation {relation} has no predicate: give subject, predicate, object")
        for end in (relation.get("subject"), relation.get("object")):
            if not isinstance(end, str) or end not in ids:
                raise ValueError(f"scene relation names {end!r}, not an object of it: add that, or drop the relation")
    return {"objects": [{"id": thing["id"], "bbox": list(thing["bbox"])} for thing in objects],
            "relationships": [{key: r[key] for key in ("subject", "predicate", "object")} for r in relations]}


# ---------------------------------------------------------------- another frame

def to_resized_frame(row: dict, *, min_pixels: int, max_pixels: int, factor: int) -> dict:
    """The row with size, scene boxes and printed size in the frame the model sees; meta keeps the original size."""
    width, height = frame_size(*row["size"], min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    sx, sy = width / row["size"][0], height / row["size"][1]

    def scaled(box: list) -> list[int]:
        x1, y1 = round(box[0] * sx), round(box[1] * sy)
        return [x1, y1, max(x1 + 1, round(box[2] * sx)), max(y1 + 1, round(box[3] * sy))]  # never without area

    scene = row["scene"] and {**row["scene"], "objects": [{**thing, "bbox": scaled(thing["bbox"])}
                                                          for thing in row["scene"]["objects"]]}
    problem = row["problem"]
    if problem and (printed := extract_size(problem)):
        problem = problem.replace(f"({printed[0]} x {printed[1]})", f"({width} x {height})")
    meta = {**row["meta"], "original_size": list(row["size"]), "resized_frame": [min_pixels, max_pixels, factor]}
    return {**row, "size": (width, height), "scene": scene, "problem": problem, "meta": meta}


# ---------------------------------------------------------------- writing the STVQA-7K schema

def stvqa_record(row: dict) -> dict:
    """A choice row as one record of the STVQA-7K columns (spec 3.1), the picture as PNG or as the bytes it came in."""
    if row["kind"] != "choice" or len(row["images"]) != 1:
        raise ValueError(f"row {row['id']}: STVQA-7K holds choices over one picture, "
                         f"this is a {row['kind']} over {len(row['images'])}: keep it as JSONL")
    picture, gold = row["images"][0], row["gold"]
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        picture = buffer.getvalue()
    elif isinstance(picture, str):
        picture = Path(picture).read_bytes()
    text = row["options"][ascii_uppercase.index(gold)]
    scene = solution_text(row).removesuffix(f"<answer>({gold}) {text}</answer>")
    return dict(
        image_id=str(row["meta"].get("image_id", row["id"])), images={"bytes": picture, "path": None},
        problem=row["problem"] or "<image>" + build_prompt(row, "spatialthinker"), question_only=row["question"],
        question_with_options=question_text(row), options=row["options"],
        answer=f"{scene}<answer>{gold}</answer>", answer_only=gold,
        answer_text=f"{scene}<answer>{text}</answer>", answer_text_only=text,
        answer_option_text=solution_text(row), answer_option_text_only=f"({gold}) {text}",
        category=row["category"], level=row["meta"].get("level"), rating=row["meta"].get("rating"))


def write_stvqa(rows: Iterable[dict], path: str | Path) -> int:
    """Writes rows as one parquet file that the hub shows with pictures; returns their number. Whole or not at all."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, path = datasets.Value("string"), Path(path)
    columns = ("image_id images problem question_only question_with_options options answer answer_only answer_text "
               "answer_text_only answer_option_text answer_option_text_only category level rating").split()
    special = {"images": datasets.Image(), "options": datasets.List(text), "rating": datasets.Value("int32")}
    schema = datasets.Features({name: special.get(name, text) for name in columns}).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count = path.with_name(path.name + ".tmp"), 0
    with pq.ParquetWriter(partial, schema) as writer:
        batch = []
        for row in rows:
            batch.append(stvqa_record(row))
            if len(batch) == 256:  # a row group: rows may come from a generator and need not fit in memory
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch, count = [], count + len(batch)
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    partial.replace(path)
    return count + len(batch)
