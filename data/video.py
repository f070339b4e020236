"""Clips: a video file, a folder of pictures or a list of frames -> some upright RGB frames of the size a model sees.

A rule says how many frames, which and how large (section numbers: the specification notes of SpaceR):

    train            2 fps, 4 to 16 frames, even; sides multiples of 28, about 100,000 pixels                    (3.4)
    eval             1 fps, at most 32 frames; the longer side at most 448, then sides multiples of 28           (5.1)
    eval-published   as eval, but with width and height exchanged after that, as all published numbers were made (5.1)
    whole            every frame, as large as it is; sides rounded to multiples of 28. For small models; not published

row["frame_rule"], where a row has one, overrides what the caller asks for, as row["style"] does a prompt's style.

A file is decoded once: the sampled frames are kept under $SPATIAL_GRPO_CLIPS (default ~/.cache/spatial-grpo/clips; set it
to nothing to keep none), 5 MB for 16 frames of 364 x 280. Rotation flags are applied.
"""
import hashlib
import json
import math
import os
import re
import uuid
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.pictures import FACTOR, BrokenPicture, decode_picture

RULES = ("train", "eval", "eval-published", "whole")
VERSION = 1  # of what a kept file holds; raise it when the same source would give other frames
SPOILT = (zipfile.BadZipFile, EOFError, ValueError, KeyError)  # what numpy says of a kept file that a crash cut off
FRAME_PIXELS = 128 * FACTOR**2  # the least a frame has in training
CLIP_PIXELS = int(128_000 * FACTOR**2 * 0.9)  # the most all frames of a clip have together
EVAL_SIDE, EVAL_PIXELS = 448, (4 * FACTOR**2, 256 * FACTOR**2)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class BrokenVideo(BrokenPicture):
    """A clip that cannot be decoded or sampled; the message names row, file and cure."""


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """F sampled frames. fps: F / duration, so that frame k stands for the time about k / fps; indices: which frames of the
    source; times: s from its first frame."""
    frames: list[Image.Image]  # F RGB pictures of one size (W, H), multiples of 28
    fps: float
    indices: list[int]
    times: list[float]


# ---------------------------------------------------------------- which frames, and how large

def frame_count(total: int, fps: float, *, frames: int | None = None, max_frames: int = 16) -> int:
    """How many frames training takes of `total` at `fps` (3.4): 2 a second, at least 4, at most `max_frames`, even; or
    `frames`, rounded to even. ValueError where the clip has not as many, or fewer than 2."""
    if frames is not None:
        count = 2 * round(frames / 2)
    else:
        most = 2 * (min(max_frames, total) // 2)
        count = 2 * int(min(max(total / fps * 2, 4), most, total) // 2)
    if not 2 <= count <= total:
        raise ValueError(f"{count} frames of {total}: give a clip of at least {max(2, count)} frames")
    return count


def frame_indices(total: int, fps: float, *, rule: str, max_frames: int | None = None) -> list[int]:
    """The sampled frames of `total` at `fps`: training rounds an even spacing from first to last, evaluation cuts it."""
    if rule == "whole":
        return list(range(total))
    if rule == "train":
        count = frame_count(total, fps, max_frames=max_frames or 16)
        return np.linspace(0, total - 1, count).round().astype(int).tolist()
    count = max(1, min(max_frames or 32, int(total / fps)))  # 1 a second
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def smart_resize(width: int, height: int, *, least: int, most: int, factor: int = FACTOR) -> tuple[int, int]:
    """(W, H): sides rounded to multiples of `factor`, of `least` to `most` pixels if the shape allows it (3.4)."""
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"frames of {width} x {height} are thinner than 1:200, which the processor refuses: crop them")
    w, h = (max(factor, round(side / factor) * factor) for side in (width, height))
    if w * h > most:
        scale = math.sqrt(width * height / most)
        w, h = (max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
    elif w * h < least:
        scale = math.sqrt(least / (width * height))
        w, h = (math.ceil(side * scale / factor) * factor for side in (width, height))
    return w, h


def clip_size(width: int, height: int, frames: int, *, rule: str, max_pixels: int | None = None) -> list[tuple[int, int]]:
    """The sizes (W, H) that a frame is brought to, one after the other; the last is what the model sees.

    max_pixels: asked for a frame, in training; more than the clip's share is not granted (3.4)."""
    if rule == "train":
        share = max(min(FRAME_PIXELS, CLIP_PIXELS * 2 // frames), int(FRAME_PIXELS * 1.05))
        return [smart_resize(width, height, least=FRAME_PIXELS, most=min(max_pixels or share, share))]
    if rule == "whole":
        return [smart_resize(width, height, least=FACTOR**2, most=CLIP_PIXELS // frames)]
    steps = []
    if max(width, height) > EVAL_SIDE:
        scale = EVAL_SIDE / max(width, height)
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
        if rule == "eval-published":
            width, height = height, width
        steps.append((width, height))
    return [*steps, smart_resize(width, height, least=EVAL_PIXELS[0], most=EVAL_PIXELS[1])]


# ---------------------------------------------------------------- clips

def load_clip(row: dict, *, rule: str = "train", max_frames: int | None = None, max_pixels: int | None = None) -> Clip:
    """The clip of a row: row["video"] is a path of a file or of a folder of pictures, or a list of pictures (paths, bytes,
    PIL); row["fps"] is the rate of the latter two; row["span"] is (start, end) in seconds, or None for all of it.

    Raises BrokenVideo for whatever cannot be read or sampled, ValueError for an unknown rule."""
    rule = row.get("frame_rule") or rule
    if rule not in RULES:
        raise ValueError(f"unknown frame rule {rule!r}: choose one of {', '.join(RULES)}")
    video, span, how = row["video"], row.get("span"), {"max_frames": max_frames, "max_pixels": max_pixels, "rule": rule}
    try:
        if not isinstance(video, list) and Path(video).is_file():
            return kept_clip(Path(video), span, how)
        return picture_clip(row, span, how)
    except BrokenPicture as error:
        raise BrokenVideo(str(error)) from error
    except ValueError as error:
        name = f"of {len(video)} frames" if isinstance(video, list) else video
        raise BrokenVideo(f"row {row['id']}: video {name}: {error}") from error


def picture_clip(row: dict, span: tuple | None, how: dict) -> Clip:
    pictures, fps = row["video"], row.get("fps")
    if not isinstance(pictures, list):
        folder = Path(pictures)
        if not folder.is_dir():
            raise ValueError("no such file or folder: correct the path")
        pictures = [str(file) for file in sorted(folder.iterdir(), key=by_number) if file.suffix.lower() in PICTURES]
    if not pictures:
        raise ValueError("no pictures in it: give a video file, or a folder or list of frames")
    if not isinstance(fps, (int, float)) or not 0 < fps < 1e6:
        raise ValueError(f"fps is {fps}: say how many of these frames make a second")
    indices, rate, times = sampled([k / fps for k in range(len(pictures))], fps, span, how)
    frames = [decode_picture(pictures[k], row_id=row["id"]) for k in indices]
    return Clip(resized(frames, how), rate, indices, times)


def by_number(file: Path) -> list:
    """2.png before 10.png, as frames are often written."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def sampled(times: list[float], fps: float, span: tuple | None, how: dict) -> tuple[list[int], float, list[float]]:
    """Indices into `times`, frames a second among them, and their times."""
    start, end = span or (-math.inf, math.inf)
    inside = [k for k, time in enumerate(times) if start <= time < end]
    if not inside:
        raise ValueError(f"no frame between {start} and {end} s of {times[-1]:.1f}: correct the span")
    picks = frame_indices(len(inside), fps, rule=how["rule"], max_frames=how["max_frames"])
    indices = [inside[k] for k in picks]
    return indices, len(indices) / len(inside) * fps, [times[k] for k in indices]


def resized(frames: list[Image.Image], how: dict) -> list[Image.Image]:
    """All of one size: that of the first decides. Bicubic, as published; Pillow's filter widens when it shrinks."""
    for size in clip_size(*frames[0].size, len(frames), rule=how["rule"], max_pixels=how["max_pixels"]):
        frames = [frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
    return frames


# ---------------------------------------------------------------- video files

def kept_clip(path: Path, span: tuple | None, how: dict) -> Clip:
    """read_clip(), or what it gave the last time for the same file (path, length, time of change) and settings."""
    folder = os.environ.get("SPATIAL_GRPO_CLIPS", "~/.cache/spatial-grpo/clips")
    if not folder:
        return read_clip(path, span, how)
    stat = path.stat()
    key = json.dumps([VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, span, how], sort_keys=True)
    file = Path(folder).expanduser() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    with suppress(FileNotFoundError, *SPOILT):  # then it is decoded, and what is kept replaced
        with np.load(file) as data:
            frames = [Image.fromarray(frame) for frame in data["frames"]]
            return Clip(frames, float(data["fps"]), data["indices"].tolist(), data["times"].tolist())
    clip = read_clip(path, span, how)
    keep_arrays(file, frames=np.stack(clip.frames), fps=clip.fps, indices=clip.indices, times=clip.times)
    return clip


def keep_arrays(file: Path, **arrays) -> None:
    """Writes an .npz, whole or not at all; of several threads, processes or machines that do, any one's is right."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "wb") as out:  # a file object: to a name, numpy would add .npz
            np.savez(out, **arrays)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)  # a full disk


def read_clip(path: Path, span: tuple | None, how: dict) -> Clip:
    """Decodes the sampled frames of a video file. ValueError('problem: cure')."""
    import av  # here: rows of pictures need no decoder

    try:
        times, fps = frame_times(path)
        indices, rate, picked = sampled(times, fps, span, how)
        frames = decode_frames(path, indices)
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be decoded ({error.strerror}): replace it, or remove the row") from error
    return Clip(resized(frames, how), rate, indices, picked)


def frame_times(path: Path) -> tuple[list[float], float]:
    """When each frame is shown, in s from the first, and the mean rate: read from the packets, without decoding."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("it holds no video stream: give another file")
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        stamps = sorted(p.pts if p.pts is not None else p.dts for p in packets if (p.pts, p.dts) != (None, None))
        if not stamps or len(stamps) < len(packets):
            raise ValueError("its frames carry no times: convert it, such as with ffmpeg -i it.avi it.mp4")
        times = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
        fps = float(stream.average_rate or 0) or ((len(times) - 1) / times[-1] if times[-1] else 30.0)
    return times, fps


TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def decode_frames(path: Path, indices: list[int]) -> list[Image.Image]:
    """The frames of these ascending numbers (they may repeat), upright RGB; decoding ends with the last of them."""
    import av

    wanted, found, number = set(indices), {}, -1
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                turn = TURNS.get(frame.rotation % 360)  # counter-clockwise, by the file's display matrix
                picture = frame.to_image()
                found[number] = picture if turn is None else picture.transpose(turn)
            if number == indices[-1]:
                break
    if len(found) < len(wanted):
        raise ValueError(f"it ends after {number + 1} frames, of {indices[-1] + 1} announced: replace it, or remove the row")
    return [found[k] for k in indices]
