"""The row, the prompt and the encoding: everything between a file on disk and the ids a model sees.

`load_rows` reads the STVQA-7K schema (hub, folder, parquet, JSONL) or rows written by hand; `build_prompt` words a
row for training and evaluation alike; `encode` turns it into ids and pixels once, for the engine and for the trainer.

    python -m data.dataset --check my_rows.jsonl        # one line for every bad row, exit status 1 if there is any

Pictures stay as paths or bytes until `encode`; an EXIF orientation is left unapplied, as Pillow and the published
loader leave it, so boxes are pixels of the stored picture.
"""
import argparse
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rewards import extract_answer, extract_scene, extract_size, solution_text

if TYPE_CHECKING:  # seconds to import, and only named here: --check and data.scenes start at once without it
    import torch

MIN_PIXELS, MAX_PIXELS = 512 * 512, 2048 * 2048  # published loader bounds (spec 1.4)
FACTOR = 28  # patch 14 x merge 2 of Qwen2.5-VL: the sides a model sees are multiples of it
KINDS = ("choice", "number", "ocr", "text", "regression")
STVQA_REQUIRED = ("images", "question_only", "options", "answer_only", "answer_option_text")
ROW_REQUIRED = ("images", "question", "gold")
ROW_KEYS = ("id", "source", "category", "images", "question", "options", "gold", "kind", "size", "scene", "map",
            "problem", "style", "meta")


class BrokenPicture(ValueError):
    """A picture that cannot be decoded; the message names row, picture and cure."""


# ---------------------------------------------------------------- sources: where records come from

def load_rows(source: str, *, limit: int | None = None, box_frame: str = "original", min_pixels: int = MIN_PIXELS,
              max_pixels: int = MAX_PIXELS, factor: int = FACTOR, skip_bad: bool = False) -> list[dict]:
    """Rows (design section 3) of a hub id, a folder of `split-*.parquet` or `.jsonl`, one such file, or `scenes@split`.

    `name@split` picks a split (default train). `box_frame="resized"` moves size and scene boxes to the frame the model
    sees: the loader's resize, then sides rounded to `factor` = patch * merge. Without it boxes stay in pixels of the
    original picture, as published (spec 1.2). A bad row raises ValueError naming file, row and cure; `skip_bad=True`
    drops and prints it instead. Pictures are not decoded: only their headers are read, for the size.
    """
    if box_frame not in ("original", "resized"):
        raise ValueError(f"box_frame {box_frame!r} is unknown: use original or resized")
    rows, bad = [], []
    for place, row, problem in iter_rows(source, limit=limit):
        if problem is None:
            resize = box_frame == "resized" and row["size"] is not None
            rows.append(to_resized_frame(row, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor) if resize
                        else row)
        elif skip_bad:
            bad.append(f"{place}: {problem}")
        else:
            raise ValueError(f"{place}: {problem}")
    if bad:
        print(f"{source}: {len(bad)} bad rows left out, the first: {bad[0]}")
    if not rows:
        raise ValueError(f"{source}: no usable row: python -m data.dataset --check says why")
    return rows


def iter_rows(source: str, *, limit: int | None) -> Iterator[tuple[str, dict | None, str | None]]:
    """Yields (place, row, None), or (place, None, problem) for a record that is not a valid row."""
    name, _, split = source.rpartition("@")
    if not name or Path(source).exists():  # without a split; a path that exists as it stands keeps its @
        name, split = source, None
    if re.fullmatch(r"scenes(:\w+)?", name):
        from data.scenes import scene_rows  # here: data.scenes writes its parquet with this file
        level = {"level": name.partition(":")[2]} if ":" in name else {}
        for number, row in enumerate(scene_rows(limit or 1024, seed=0, split=split or "train", **level), start=1):
            yield f"{source}, row {number}", row, None
        return
    seen = {}
    for count, (file, number, record) in enumerate(read_records(name, split)):
        if limit is not None and count >= limit:
            return
        place = f"{file}, row {number}"
        try:
            row = to_row(record, folder=Path(file).parent, index=count, source=name)
        except ValueError as error:
            yield place, None, str(error)
            continue
        if row["id"] in seen:
            yield place, None, f"id {row['id']!r} is already that of row {seen[row['id']]}: give each row its own id"
            continue
        seen[row["id"]] = number
        yield place, row, None


def read_records(name: str, split: str | None) -> Iterator[tuple[str, int, dict]]:
    """Yields (file, row number from 1, record) in file order, pictures as {bytes, path} or path strings."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = split_files(path, split or "train")
    elif path.is_file():
        # One file holds one split: reading it for another name would validate on the training rows unnoticed.
        if split is not None and path.stem != split and not path.stem.startswith(f"{split}-"):
            raise ValueError(f"{path} is a single file, it has no split {split!r}: leave out '@{split}'")
        files = [path]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (".parquet", ".jsonl"):
        yield from hub_records(name, split or "train")
        return
    else:
        raise FileNotFoundError(f"{name}: no such file or folder, and not a hub id (owner/name): check the path")
    for file in files:
        if file.suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"{file}: unknown kind of file: give .parquet or .jsonl")
        yield from parquet_records(file) if file.suffix == ".parquet" else jsonl_records(file)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of one split in the hub's layout: split-*.parquet or split.parquet, in the folder or its data/."""
    for base in (folder, folder / "data"):
        for kind in ("parquet", "jsonl"):
            files = sorted([*base.glob(f"{split}-*.{kind}"), *base.glob(f"{split}.{kind}")])
            if files:
                return files
    found = sorted({f.stem.split("-")[0] for f in folder.rglob("*") if f.suffix in (".parquet", ".jsonl")})
    raise FileNotFoundError(f"{folder}: no {split}-*.parquet or {split}.jsonl: "
                            + (f"use @split with one of {', '.join(found)}" if found else "the folder holds no rows"))


def jsonl_records(file: Path) -> Iterator[tuple[str, int, dict]]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, row {number}: not JSON ({error}): write one object a line") from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}, row {number}: a {type(record).__name__}, not an object: write {{...}}")
            yield str(file), number, record


def parquet_records(file: Path) -> Iterator[tuple[str, int, dict]]:
    import pyarrow.parquet as pq  # here: rows written by hand need no parquet reader

    # Plain Arrow, not datasets.load_dataset: it decodes no picture, streams, and leaves no second copy in a cache.
    try:
        batches = pq.ParquetFile(file).iter_batches(batch_size=64)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({one_line(error)}): download it again") from None
    yield from numbered(str(file), batches)


def hub_records(name: str, split: str) -> Iterator[tuple[str, int, dict]]:
    import datasets  # here: a second to import, and only the hub needs it

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # hub, network, split and file errors share no class; all become one line
        raise FileNotFoundError(f"{name}@{split}: not loaded from the hub ({type(error).__name__}: {one_line(error)}): "
                                "check name, split and network, or give a local folder") from error
    # The Arrow view hands pictures out as {bytes, path}; the default view would decode them, and stop at a broken one.
    yield from numbered(f"{name}@{split}", table.with_format("arrow").iter(batch_size=64))


def numbered(file: str, batches: Iterable) -> Iterator[tuple[str, int, dict]]:
    for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), start=1):
        yield file, number, record


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------- records to rows

def to_row(record: dict, *, folder: Path, index: int, source: str) -> dict:
    """One record, in the STVQA-7K columns or in our own keys, as a checked row. Raises ValueError('problem: cure')."""
    if all(key in record for key in STVQA_REQUIRED):
        row = stvqa_row(record, folder=folder, index=index, source=source)
    elif all(key in record for key in ROW_REQUIRED):
        row = own_row(record, folder=folder, index=index, source=source)
    else:
        nearest = STVQA_REQUIRED if "question" not in record else ROW_REQUIRED
        missing = ", ".join(key for key in nearest if key not in record)
        raise ValueError(f"missing column {missing}: give the STVQA-7K columns ({', '.join(STVQA_REQUIRED)}) "
                         f"or row keys ({', '.join(ROW_REQUIRED)}, options)")
    check_answer(row)
    if row["scene"] is not None:
        row["scene"] = clean_scene(row["scene"], row["size"])
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
    unknown = [key for key in record if key not in ROW_KEYS]
    if unknown:  # a misspelt key would be lost without a word
        raise ValueError(f"unknown key {', '.join(unknown)}: known are {', '.join(ROW_KEYS)}; extras go under meta")
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
                problem=record.get("problem"), style=record.get("style"), meta=record.get("meta") or {})


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
    if row["kind"] != "choice":
        return
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"a choice with {len(options)} options: give 2 to 26, or another kind")
    letters = ascii_uppercase[:len(options)]
    if all(re.match(rf"\(?{letter}[).]", option) for letter, option in zip(letters, options)):
        raise ValueError(f"options carry their letters ({options[0]!r}): leave the letters out")
    if len(gold) != 1 or gold not in letters:
        raise ValueError(f"gold letter {gold!r} is out of range A to {letters[-1]}: correct the letter or the options")


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


def picture_size(picture) -> tuple[int, int] | None:
    """(W, H) from the header alone; None when it cannot be read, which `encode` reports as a broken picture."""
    try:
        with open_picture(picture) as image:
            return image.size
    except Exception:  # see decode_picture: Pillow raises nearly anything on foreign bytes
        return None


# ---------------------------------------------------------------- sizes and frames

def resized_size(width: int, height: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(W, H) after the published loader (spec 1.4): shrink to max_pixels, then grow to min_pixels, sides truncated."""
    if width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    if width * height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        width, height = int(width * scale), int(height * scale)
    return width, height


def frame_size(width: int, height: int, *, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """(W, H) the model sees: the loader's resize, then the processor's rounding of each side to `factor`."""
    width, height = resized_size(width, height, min_pixels=min_pixels, max_pixels=max_pixels)
    return max(factor, round(width / factor) * factor), max(factor, round(height / factor) * factor)


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


# ---------------------------------------------------------------- pictures

def decode_picture(picture, *, row_id: str) -> Image.Image:
    """Path, bytes or PIL -> RGB picture. Raises BrokenPicture naming row and picture."""
    name = f"of {len(picture)} bytes" if isinstance(picture, bytes) else picture
    try:
        with open_picture(picture) as image:
            rgb = to_rgb(image)
    except Exception as error:  # OSError, SyntaxError, struct.error, bomb errors: whatever a plugin meets in the bytes
        raise BrokenPicture(f"row {row_id}: picture {name} cannot be read ({type(error).__name__}: {one_line(error)}): "
                            "replace it or remove the row") from error
    if max(rgb.size) > 200 * min(rgb.size):
        raise BrokenPicture(f"row {row_id}: picture {name} is {rgb.width} x {rgb.height}, thinner than 1:200, which "
                            "the processor refuses: crop it or remove the row")
    return rgb


def open_picture(picture):
    """A context that yields the Pillow picture, header read; a picture in memory is not closed on leaving."""
    if isinstance(picture, Image.Image):
        return nullcontext(picture)
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16-bit grey keeps its high byte, transparency goes over white (Pillow alone would clip, or show
    what was hidden). Palettes become colours before any resize, or interpolation would mix palette numbers."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def process_image(image: Image.Image, *, min_pixels: int, max_pixels: int) -> Image.Image:
    """The published loader's resize (spec 1.4), RGB in and out, Pillow's default resampling."""
    size = resized_size(*image.size, min_pixels=min_pixels, max_pixels=max_pixels)
    return image if size == image.size else image.resize(size)


# ---------------------------------------------------------------- prompts

# Structure after spec 1.3, wording ours. {question} holds the question and its options; the size line keeps the exact
# form that the SpatialThinker reward reads (spec 2.1).
PROMPTS = {
    "spatialthinker": """\
You answer questions about where things are in a picture. You look for the things that matter, note them and their \
relations as a scene graph, and reason over that graph.

Do this:
- Find every object the question depends on, its place in the picture, and how these objects relate.
- Put only what the question needs into the graph.
- Give an object an id made of its name, a dot and a number, such as `cup.1`, and a box `[x1, y1, x2, y2]` in pixels \
of the picture: left, top, right, bottom.
- Think with what you saw and with the graph, then decide.

Write these four blocks in this order, each once:
<observe>what the picture shows, as far as it matters</observe>
<scene>
{
  "objects": [
    {"id": "name.number", "bbox": [x1, y1, x2, y2]},
    ...
  ],
  "relationships": [
    {"subject": "name.number", "predicate": "relation", "object": "name.number"},
    ...
  ]
}
</scene>
<think>your reasoning, one step after another</think>
<answer>(LETTER) text of that option, or the bare answer if no options are given</answer>

An example:
Q. On which side of the sofa does the lamp stand?
Options: (A) left (B) right (C) behind it (D) on top of it
<observe>A grey sofa fills the left half of the room. A tall lamp stands on the floor past its right arm.</observe>
<scene>
{
  "objects": [
    {"id": "lamp.1", "bbox": [412, 60, 498, 330]},
    {"id": "sofa.1", "bbox": [36, 182, 405, 341]}
  ],
  "relationships": [
    {"subject": "lamp.1", "predicate": "right of", "object": "sofa.1"}
  ]
}
</scene>
<think>The box of the lamp begins at x = 412, where the sofa has ended at x = 405. Both reach the floor at nearly the \
same height, so the lamp is beside the sofa, on its right.</think>
<answer>(B) right</answer>

Image size: ({width} x {height})
Now the question to answer:
Q. {question}""",
    "reasoning": """\
Reason about the question as an inner monologue between <think> and </think>. After that write the answer between \
<answer> and </answer>: the letter of the right option in parentheses and its text, as in \
<answer>(LETTER) text</answer>.
Question: {question}""",
    "no_reasoning": "Question: {question}",
    "reasoning_end": """\
{question}
First put your reasoning between <think> and </think>, then put the answer alone between <answer> and </answer>.""",
    "short": "Question: {question}",
}


def options_text(options: list[str]) -> str:
    """['left', 'right'] -> '(A) left\\n(B) right'."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options))


def question_text(row: dict, *, inline: bool = False) -> str:
    """The question and, below it, `Options:` with one lettered line each (spec 1.3), or all on one line."""
    question = row["question"].replace("<image>", "").strip()
    if not row["options"]:
        return question
    options = options_text(row["options"])
    return f"{question}\nOptions: " + options.replace("\n", " ") if inline else f"{question}\nOptions:\n{options}"


def build_prompt(row: dict, style: str) -> str:
    """The text part of a row's prompt; `row["style"]` overrides `style`.

    A style is a key of PROMPTS, `row` (the row's own problem text), or the path of a text file with {question} and, if
    wanted, {width} and {height}. `<image>` marks are dropped: pictures always come first, and all of them.
    Raises ValueError naming row and cure.
    """
    style = row["style"] or style
    if style == "row":
        if not row["problem"]:
            raise ValueError(f"row {row['id']}: style row, but the row has no problem text: choose another style")
        return row["problem"].replace("<image>", "")
    template = PROMPTS.get(style) or read_template(style)
    fields = {"question": question_text(row, inline=style == "short")}
    if "{width}" in template or "{height}" in template:
        if row["size"] is None:
            raise ValueError(f"row {row['id']}: style {style} prints the picture's size, which is unknown: "
                             "choose another style, or give the row a size")
        fields["width"], fields["height"] = (str(side) for side in row["size"])
    # One pass over the template: a question may itself contain {width}, and JSON braces are no fields.
    return re.sub(r"\{(question|width|height)\}", lambda match: fields[match[1]], template)


@lru_cache(maxsize=8)
def read_template(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"prompt style {path!r} is unknown: use {', '.join([*PROMPTS, 'row'])}, or a text file")
    template = Path(path).read_text(encoding="utf-8").replace("<image>", "")
    if "{question}" not in template:
        raise ValueError(f"{path}: a prompt file without {{question}} asks nothing: add it")
    return template


def build_messages(row: dict, style: str) -> list[dict]:
    """One user turn, pictures first, then the text (spec 3.2); no system turn, the chat template adds its own."""
    text = build_prompt(row, style)
    if not row["images"]:
        return [{"role": "user", "content": text.strip()}]
    return [{"role": "user", "content": [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": text}]}]


# ---------------------------------------------------------------- encoding

@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What trainer and engine both use, decided once."""
    ids: list[int]  # one placeholder a picture: the engine expands it
    expanded: list[int]  # (P,) as many placeholders as the picture has merged patches
    pixels: "torch.Tensor | None"  # (patches, C * temporal * patch * patch) float32
    grid: "torch.Tensor | None"  # (pictures, 3) int64: t, h, w in patches
    images: list[Image.Image]  # the engine's input: after the loader's resize, before the processor's
    row: dict


def encode(row: dict, processor, *, style: str, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Prompt:
    """Row -> Prompt with a Hugging Face Qwen-VL processor. Raises BrokenPicture, or ValueError naming the row."""
    images = [process_image(decode_picture(picture, row_id=row["id"]), min_pixels=min_pixels, max_pixels=max_pixels)
              for picture in row["images"]]
    ids, pixels, grid, counts = prompt_ids(row, processor, style), None, None, []
    if images:
        batch = processor.image_processor(images=images, return_tensors="pt")
        pixels, grid = batch["pixel_values"], batch["image_grid_thw"]  # (patches, C*t*p*p), (pictures, 3)
        counts = (grid.prod(-1) // processor.image_processor.merge_size ** 2).tolist()
        check_frame(row, images[0], grid, processor, bounds=[min_pixels, max_pixels])
    return Prompt(ids, expand(ids, counts, processor.image_token_id, row_id=row["id"]), pixels, grid, images, row)


def prompt_ids(row: dict, processor, style: str) -> list[int]:
    """Chat-templated ids with one placeholder a picture; the generation prompt included."""
    messages, tokenizer = build_messages(row, style), processor.tokenizer
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    content = messages[0]["content"]
    said = content if isinstance(content, str) else content[-1]["text"]
    if not any(token in said for token in tokenizer.all_special_tokens):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    # The question itself says <|image_pad|> or <|im_end|>: tokenised as ordinary letters it neither adds a picture nor
    # ends the turn.
    before, found, after = text.rpartition(said)
    if not found:
        raise ValueError(f"row {row['id']}: the chat template alters a text with special tokens: remove them from it")
    return [token for part, plain in ((before, False), (said, True), (after, False))
            for token in tokenizer(part, add_special_tokens=False, split_special_tokens=plain)["input_ids"]]


def expand(ids: list[int], counts: list[int], image_token_id: int, *, row_id: str) -> list[int]:
    """Each placeholder repeated as often as its picture has merged patches: [5, I, 6], [3] -> [5, I, I, I, 6]."""
    if ids.count(image_token_id) != len(counts):
        raise ValueError(f"row {row_id}: {ids.count(image_token_id)} picture placeholders for {len(counts)} pictures: "
                         "the checkpoint's chat template does not place pictures")
    each = iter(counts)
    return [token for i in ids for token in ([i] * next(each) if i == image_token_id else [i])]


def check_frame(row: dict, image: Image.Image, grid: "torch.Tensor", processor, *, bounds: list[int]) -> None:
    """Boxes of a row loaded with box_frame="resized" must be pixels of the very frame that the processor shows."""
    if "resized_frame" not in row["meta"]:
        return
    patch = processor.image_processor.patch_size
    factor = patch * processor.image_processor.merge_size
    seen = (int(grid[0, 2]) * patch, int(grid[0, 1]) * patch)  # (W, H)
    rounded = tuple(max(factor, round(side / factor) * factor) for side in image.size)
    if row["meta"]["resized_frame"] != [*bounds, factor] or seen != rounded:
        raise ValueError(f"row {row['id']}: boxes are in the frame of min_pixels, max_pixels, factor "
                         f"{row['meta']['resized_frame']}, the model sees {seen} under {[*bounds, factor]}: give "
                         "load_rows and encode the same, within the processor's own bounds")


def encode_rows(rows: list[dict], processor, *, style: str, max_prompt_tokens: int, min_pixels: int = MIN_PIXELS,
                max_pixels: int = MAX_PIXELS, verbose: bool = True) -> tuple[list[dict], dict[str, int]]:
    """The rows whose pictures decode and whose expanded prompt fits, and {"kept", "overlong", "broken"}.

    A prompt is dropped, never cut: cutting loses the question, or half a picture (design rule 9). Pictures are decoded
    once to know that they can be, in threads, and not kept; tokens are counted without computing pixels.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(sizes_or_error, rows))
    kept, overlong, broken = [], [], []
    for row, sizes in zip(rows, outcomes):
        if isinstance(sizes, BrokenPicture):
            broken.append(sizes)
            continue
        length = prompt_length(row, sizes, processor, style=style, min_pixels=min_pixels, max_pixels=max_pixels)
        if length > max_prompt_tokens:
            overlong.append(row["id"])
        else:
            kept.append(row)
    if verbose:
        print(f"rows: {len(kept)} kept, {len(overlong)} overlong (prompt above {max_prompt_tokens} tokens), "
              f"{len(broken)} with a broken picture")
        if overlong:
            print(f"  overlong: {', '.join(overlong[:5])}{' ...' if len(overlong) > 5 else ''}")
        for error in broken[:5]:
            print(f"  broken: {error}")
    return kept, {"kept": len(kept), "overlong": len(overlong), "broken": len(broken)}


def sizes_or_error(row: dict) -> list[tuple[int, int]] | BrokenPicture:
    try:
        return [decode_picture(picture, row_id=row["id"]).size for picture in row["images"]]
    except BrokenPicture as error:
        return error


def prompt_length(row: dict, sizes: list[tuple[int, int]], processor, *, style: str, min_pixels: int,
                  max_pixels: int) -> int:
    """P, the length of `encode(...).expanded`, from the (W, H) of the pictures alone."""
    counts = []
    for size in sizes:
        width, height = resized_size(*size, min_pixels=min_pixels, max_pixels=max_pixels)
        patches = processor.image_processor.get_number_of_image_patches(height, width, {})
        counts.append(patches // processor.image_processor.merge_size ** 2)
    return len(prompt_ids(row, processor, style)) - len(counts) + sum(counts)


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


# ---------------------------------------------------------------- python -m data.dataset --check FILE

def row_problem(row: dict) -> str | None:
    """What only --check looks at, because it costs a decode or is a matter of taste; None if all is well."""
    sizes = sizes_or_error(row)
    if isinstance(sizes, BrokenPicture):
        return str(sizes)
    printed = extract_size(row["problem"] or "")
    if printed and sizes and printed != sizes[0]:
        return (f"problem says Image size {printed[0]} x {printed[1]}, the picture is {sizes[0][0]} x {sizes[0][1]}: "
                "boxes are in one of the two, correct the other")
    if len(set(row["options"])) < len(row["options"]):
        return f"two options read the same ({', '.join(row['options'])}): reword one"
    return None


def check(source: str, *, limit: int | None = None) -> int:
    """Prints one line for every bad row of `source` and a summary; returns the number of bad rows."""
    total = bad = scenes = 0
    for place, row, problem in iter_rows(source, limit=limit):
        problem = problem or row_problem(row)
        total, bad = total + 1, bad + (problem is not None)
        scenes += problem is None and row["scene"] is not None
        if problem:
            print(f"{place}: {problem}")
    print(f"{source}: {total} rows, {total - bad} good ({scenes} with a gold scene), {bad} bad")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description="Check rows before training on them.")
    parser.add_argument("--check", metavar="FILE", required=True, help="file, folder or hub id, with @split if wanted")
    parser.add_argument("--limit", type=int, help="look at the first rows only")
    args = parser.parse_args()
    try:
        bad = check(args.check, limit=args.limit)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
