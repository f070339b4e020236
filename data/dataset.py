"""Rows from anywhere, and the ids and pixels a model sees.

`load_rows` reads the STVQA-7K schema (hub, folder, parquet, JSONL), rows written by hand, or procedural scenes;
`encode` turns a row into ids and pixels once, for the engine and for the trainer. In between: what a row holds and how
it is checked is data/rows.py, its wording data/prompts.py, its pictures data/pictures.py.

    python -m data.dataset --check my_rows.jsonl        # one line for every bad row, exit status 1 if there is any

Pictures stay as paths or bytes until `encode`.
"""
import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.noise import noise_rows
from data.pictures import FACTOR, MAX_PIXELS, MIN_PIXELS, BrokenPicture, decode_picture, process_image, resized_size
from data.prompts import build_messages
from data.rows import to_resized_frame, to_row
from data.scenes import scene_rows
from data.video import load_clip
from rewards import extract_size

if TYPE_CHECKING:  # seconds to import, and only named here: --check starts at once without it
    import torch


# ---------------------------------------------------------------- sources: where records come from

def load_rows(source: str, *, limit: int | None = None, box_frame: str = "original", min_pixels: int = MIN_PIXELS,
              max_pixels: int = MAX_PIXELS, factor: int = FACTOR, skip_bad: bool = False) -> list[dict]:
    """Rows (design section 3) of a hub id, a folder of `split-*.parquet` or `.jsonl`, one such file, `scenes@split`, or
    `noise:588x448:270` or `noise:364x280x16:270` for measurements.

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
        level = {"level": name.partition(":")[2]} if ":" in name else {}
        for number, row in enumerate(scene_rows(limit or 1024, seed=0, split=split or "train", **level), start=1):
            yield f"{source}, row {number}", row, None
        return
    if noise := re.fullmatch(r"noise:(\d+)x(\d+)(?:x(\d+))?:(\d+)", name):
        width, height, frames, words = (part and int(part) for part in noise.groups())
        for number, row in enumerate(noise_rows(limit or 64, width=width, height=height, words=words, frames=frames), start=1):
            yield f"{source}, row {number}", row, None
        return
    seen = {}
    for count, (file, number, record) in enumerate(read_records(name, split)):
        if limit is not None and count >= limit:
            return
        place = f"{file}, row {number}"
        try:
            record = json_object(record) if isinstance(record, bytes) else record
            row = to_row(record, folder=Path(file).parent, index=count, source=name)
        except ValueError as error:
            yield place, None, str(error)
            continue
        if row["id"] in seen:
            yield place, None, f"id {row['id']!r} is already that of row {seen[row['id']]}: give each row its own id"
            continue
        seen[row["id"]] = number
        yield place, row, None


def read_records(name: str, split: str | None) -> Iterator[tuple[str, int, dict | bytes]]:
    """Yields (file, row number from 1, record) in file order, pictures as {bytes, path} or path strings; of JSONL the line
    as it stands: one that is not JSON is then a bad row like any other."""
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
        yield from parquet_records(file) if file.suffix == ".parquet" else jsonl_lines(file)


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


def jsonl_lines(file: Path) -> Iterator[tuple[str, int, bytes]]:
    with open(file, "rb") as lines:
        yield from ((str(file), number, line) for number, line in enumerate(lines, start=1) if line.strip())


def json_object(line: bytes) -> dict:
    """The record of a line. Raises ValueError('problem: cure')."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): write one object a line, in UTF-8") from None
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object: write {{...}}")
    return record


def jsonl_records(file: Path) -> Iterator[tuple[str, int, dict]]:
    """Yields (file, line number from 1, record); raises ValueError at the first line that holds none."""
    for place, number, line in jsonl_lines(file):
        try:
            yield place, number, json_object(line)
        except ValueError as error:
            raise ValueError(f"{place}, row {number}: {error}") from None


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


# ---------------------------------------------------------------- encoding

@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What trainer and engine both use, decided once."""
    ids: list[int]  # one placeholder a picture, or one for a clip: the engine expands it
    expanded: list[int]  # (P,) as many placeholders as the picture or clip has merged patches
    pixels: "torch.Tensor | None"  # (patches, C * temporal * patch * patch) float32
    grid: "torch.Tensor | None"  # (pictures, 3) int64: t, h, w in patches; (1, 3) for a clip
    images: list[Image.Image]  # the engine's input: after the loader's resize, before the processor's; or a clip's frames
    row: dict
    fps: float | None = None  # of a clip's frames: temporal patch / seconds; None for pictures
    seconds: float | None = None  # of a clip, by step of t; a number that bfloat16 holds, to which the engine rounds it

    @property
    def engine_media(self) -> dict:
        """What vLLM takes beside `prompt_token_ids`: pictures, a clip, or nothing. Without video_metadata it would take a
        clip's frames for 24 a second, whatever `fps` is given: docs/video.md."""
        if self.seconds is None:
            return {"multi_modal_data": {"image": self.images}} if self.images else {}
        count = len(self.images)
        metadata = {"fps": self.fps, "total_num_frames": count, "frames_indices": list(range(count))}
        return {"multi_modal_data": {"video": np.stack(self.images)},
                "mm_processor_kwargs": {"video_metadata": [metadata], **NO_CHANGE}}  # fmt: skip


def encode(row: dict, processor, *, style: str, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS,
           frame_rule: str = "train", max_frames: int | None = None) -> Prompt:
    """Row -> Prompt with a Hugging Face Qwen-VL processor. `frame_rule` and `max_frames` (data/video.py) are for rows with a
    clip, the pixel bounds for those with pictures. Raises BrokenPicture, or ValueError naming the row."""
    if row.get("video"):
        return encode_clip(row, processor, style=style, frame_rule=frame_rule, max_frames=max_frames)
    images = [process_image(decode_picture(picture, row_id=row["id"]), min_pixels=min_pixels, max_pixels=max_pixels)
              for picture in row["images"]]
    ids, pixels, grid, counts = prompt_ids(row, processor, style), None, None, []
    if images:
        batch = processor.image_processor(images=images, return_tensors="pt")
        pixels, grid = batch["pixel_values"], batch["image_grid_thw"]  # (patches, C*t*p*p), (pictures, 3)
        counts = (grid.prod(-1) // processor.image_processor.merge_size ** 2).tolist()
        check_frame(row, images[0], grid, processor, bounds=[min_pixels, max_pixels])
    return Prompt(ids, expand(ids, counts, processor.image_token_id, row_id=row["id"]), pixels, grid, images, row)


def encode_clip(row: dict, processor, *, style: str, frame_rule: str, max_frames: int | None) -> Prompt:
    """encode() of a row with a clip: frames are sampled and resized here, once, and never again by processor or engine."""
    clip = load_clip(row, rule=frame_rule, max_frames=max_frames)
    pixels, grid = clip_pixels(clip.frames, processor)  # (patches, C*t*p*p), (1, 3)
    ids, tool = prompt_ids(row, processor, style), processor.video_processor
    expanded = expand(ids, (grid.prod(-1) // tool.merge_size ** 2).tolist(), processor.video_token_id, row_id=row["id"])
    seconds = float(pixels.new_tensor(tool.temporal_patch_size / clip.fps).bfloat16())
    return Prompt(ids, expanded, pixels, grid, clip.frames, row, tool.temporal_patch_size / seconds, seconds)


NO_CHANGE = {"do_sample_frames": False, "do_resize": False, "cap_pixels_per_frame": False}  # for the video processor


def clip_pixels(frames: list[Image.Image], processor) -> tuple["torch.Tensor", "torch.Tensor"]:
    """F frames of one size -> pixels (patches, C*t*p*p) and grid (1, 3); of an odd number the last is repeated."""
    video = np.stack(frames).transpose(0, 3, 1, 2)  # (F, C, H, W)
    batch = processor.video_processor(videos=[video], return_tensors="pt", **NO_CHANGE)
    return batch["pixel_values_videos"], batch["video_grid_thw"]


def shuffled_clip(prompt: Prompt, processor, *, seed: int) -> Prompt:
    """The same prompt with its frames in random order, for SpaceR's temporal term (2.5 of its notes)."""
    frames = [prompt.images[k] for k in np.random.default_rng(seed).permutation(len(prompt.images))]
    return replace(prompt, pixels=clip_pixels(frames, processor)[0], images=frames)


def prompt_ids(row: dict, processor, style: str) -> list[int]:
    """Chat-templated ids with one placeholder a picture or clip; the generation prompt included."""
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
    """Each placeholder repeated as often as its picture or clip has merged patches: [5, I, 6], [3] -> [5, I, I, I, 6]."""
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
                max_pixels: int = MAX_PIXELS, frame_rule: str = "train", measured: list | None = None,
                verbose: bool = True) -> tuple[list[dict], dict[str, int]]:
    """The rows whose pictures decode and whose expanded prompt fits, and {"kept", "overlong", "broken"}.

    A prompt is dropped, never cut: cutting loses the question, or half a picture (design rule 9). Tokens are counted without
    computing pixels. `measured` is what measure_rows(rows) gave, where ranks shared that work.
    """
    kept, overlong, broken = [], [], []
    for row, sizes in zip(rows, measured or measure_rows(rows, frame_rule=frame_rule), strict=True):
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


def measure_rows(rows: list[dict], *, frame_rule: str = "train",
                 done: Callable[[], None] = lambda: None) -> list[list[tuple[int, int]] | BrokenPicture]:
    """What sizes_or_error() says of every row, in threads: pictures are decoded once to know that they can be, and not kept;
    the frames of clips are (data/video.py). done() is called after every row."""
    first: dict = {}  # row of each file: many questions are about one clip, and it is decoded once
    shown = [(row["video"], tuple(row.get("span") or ()), row.get("fps")) if isinstance(row.get("video"), str) else i
             for i, row in enumerate(rows)]  # fmt: skip
    for key, row in zip(shown, rows):
        first.setdefault(key, row)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun
    with ThreadPoolExecutor(max(1, os.cpu_count() // ranks_here)) as pool:
        jobs = {key: pool.submit(sizes_or_error, row, frame_rule=frame_rule) for key, row in first.items()}
        out = []
        for key, row in zip(shown, rows):
            found = jobs[key].result()
            if isinstance(found, BrokenPicture) and row is not first[key]:
                found = sizes_or_error(row, frame_rule=frame_rule)  # again, for the message names the row
            out.append(found)
            done()
    return out


def sizes_or_error(row: dict, *, frame_rule: str = "train",
                   max_frames: int | None = None) -> list[tuple[int, int]] | BrokenPicture:  # fmt: skip
    """(W, H) of every picture, or of every sampled frame of the clip."""
    try:
        if row.get("video"):
            return [frame.size for frame in load_clip(row, rule=frame_rule, max_frames=max_frames).frames]
        return [decode_picture(picture, row_id=row["id"]).size for picture in row["images"]]
    except BrokenPicture as error:
        return error


def prompt_length(row: dict, sizes: list[tuple[int, int]], processor, *, style: str, min_pixels: int,
                  max_pixels: int) -> int:
    """P, the length of `encode(...).expanded`, from the (W, H) of the pictures or frames alone."""
    counts = []
    if row.get("video"):
        tool = processor.video_processor
        (width, height), merged = sizes[0], tool.patch_size * tool.merge_size
        counts, sizes = [math.ceil(len(sizes) / tool.temporal_patch_size) * (width // merged) * (height // merged)], []
    for size in sizes:
        width, height = resized_size(*size, min_pixels=min_pixels, max_pixels=max_pixels)
        patches = processor.image_processor.get_number_of_image_patches(height, width, {})
        counts.append(patches // processor.image_processor.merge_size ** 2)
    return len(prompt_ids(row, processor, style)) - len(counts) + sum(counts)


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
