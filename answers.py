"""What a row is asked with and who answers it: the controls, a checkpoint in this process, or a served model."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

import providers
from command import StopSignal, check_shadowed_kernels, until_stopped
from data.benchmarks import AS_FRAMES
from data.dataset import encode, sizes_or_error
from data.pictures import BrokenPicture, decode_picture, open_picture
from data.prompts import build_prompt
from data.video import load_clip

if TYPE_CHECKING:
    from evaluate import Config

SERVED = providers.PROVIDERS
BATCH = {"hf": 16, "vllm": 4096}  # a served model has none: its answers come one by one

# ---------------------------------------------------------------- controls


def controlled(row: dict, control: str, donor: dict | None, frames: int = 32, clips: str | None = None) -> dict | str:
    """The row as the model gets it, or why it cannot be asked. Its text stays as it is, the printed size too; a video
    becomes at most `frames` pictures, or with `clips`, a frame rule, stays what it is."""
    if problem := video_problem(row):
        return problem
    try:
        if not clips:
            row, donor = with_frames(row, frames), donor and control == "swapped" and with_frames(donor, frames)
    except BrokenPicture as error:
        return str(error)
    if control == "none":
        return row
    own = sizes_or_error(row, frame_rule=clips or "eval", max_frames=frames)
    if isinstance(own, BrokenPicture):  # left out of the controls as well, or they would be over other rows
        return str(own)
    if control == "blind":
        return {**row, "images": [], "video": None}
    if not donor:
        return f"row {row['id']}: no other row of its kind has another picture to swap with"
    # without its frame: encode compares the one noted there with the picture shown, which here is another row's
    meta = {key: value for key, value in row["meta"].items() if key != "resized_frame"}
    shown = {key: donor[key] for key in ("images", "video", "fps", "span") if key in donor}
    return {**row, **shown, "meta": meta}


def swapped_pictures(rows: list[dict], seed: int) -> dict[str, dict | None]:
    """For each row's id the row whose pictures it gets: never its own nor equal ones, of the same kind and number, each
    used once; None where there is none. The same rows and seed give the same pairs."""
    groups: dict[tuple, list[tuple[str, dict]]] = {}
    for row in rows:
        shown = (row["kind"], len(row["images"]), bool(row.get("video")))
        groups.setdefault(shown, []).append((picture_key(row, seed), row))
    donors = {}
    for group in groups.values():
        # Rows of one picture stand together in hash order; a step as long as the longest such block leaves any block.
        group.sort(key=lambda pair: pair[0])
        longest = max(Counter(key for key, _ in group).values())
        for i, (key, row) in enumerate(group):
            other_key, other = group[(i + longest) % len(group)]
            donors[row["id"]] = other if other_key != key else None
    return donors


def picture_key(row: dict, seed: int) -> str:
    """A number of the pictures' content: one photo may stand in many rows, and under several names."""
    video = row.get("video") or ""
    frames = video if isinstance(video, list) else []
    digest = hashlib.sha256(f"{seed}{'' if frames else video}".encode())  # a file's path: its content is gigabytes
    for picture in [*frames, *row["images"]]:
        digest.update(picture_digest(picture).encode())
    return digest.hexdigest()


def picture_digest(picture: Image.Image | bytes | str) -> str:
    """Of what a picture shows; of a file its bytes, of a name without file itself."""
    if isinstance(picture, Image.Image):
        picture = repr(picture.size).encode() + picture.tobytes()
    elif isinstance(picture, str):
        picture = Path(picture).read_bytes() if Path(picture).is_file() else picture.encode()
    return hashlib.sha256(picture).hexdigest()


ABSENT = "absent"


def files_state(row: dict) -> str | None:
    """What the files of a row show, as a hash: of pictures their content, of a video its name, for that may be gigabytes.
    ABSENT if one is not there, None if it has none."""
    files = [file for file in (row.get("video"), *row["images"]) if isinstance(file, str)]
    if not all(Path(file).exists() for file in files):
        return ABSENT
    content = [Path(file).name if file == row.get("video") else file_digest(file, *size_and_time(file)) for file in files]
    return hashlib.sha256(" ".join(content).encode()).hexdigest()[:16] if files else None


def size_and_time(file: str) -> tuple[int, int]:
    found = Path(file).stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=2**16)  # the frames of a video stand in many rows
def file_digest(file: str, size: int, time: int) -> str:
    return picture_digest(file)


def video_problem(row: dict) -> str | None:
    """Why a row's video cannot be shown: its file is not there. None for other rows."""
    video = row.get("video")
    if not video or isinstance(video, list) or Path(video).exists():
        return None
    return f"row {row['id']}: video {video}: no such file; with --data-root give the folder that holds it, or put it there"


def with_frames(row: dict, frames: int) -> dict:
    """A row with a video as one with pictures: sampled and resized as SpaceR's evaluation does it (spacer 5.1), which
    every provider can be sent. Raises BrokenVideo."""
    if not row.get("video"):
        return row
    shown = load_clip(row, rule="eval", max_frames=frames).frames
    return {**row, "video": None, "images": shown, "question": AS_FRAMES + row["question"]}


# ---------------------------------------------------------------- who answers
# A provider is a function of a Config, rows, a seed and the answers there are. It yields bundles, one at least, of (number
# of the row, sample, reply). A reply is {"text", "finished", "tokens"}, {"skipped": why} for good, {"failed": why} for now.


def open_provider(cfg: "Config", pictures: int) -> Callable:
    """pictures: at most, of a row. A checkpoint answers in this process, through the rollout that training samples with."""
    if cfg.provider in SERVED:
        providers.access_key(cfg.provider, cfg.base_url)  # now: nothing is written where it cannot go on
        return ask_served
    check_shadowed_kernels()  # before transformers is imported
    from rollout import hf_rollout, vllm_rollout  # here: regrading needs no model code

    where = {"processor": cfg.processor, "dtype": cfg.dtype, "device": cfg.device}
    if cfg.provider == "hf":
        rollout, processor = hf_rollout(cfg.model, **where)
    else:
        rollout, processor = vllm_rollout(
            cfg.model, **where, max_prompt_tokens=cfg.max_prompt_tokens, max_tokens=cfg.max_tokens,
            max_sequences=min(cfg.batch or 256, 256), max_images=pictures, max_clips=int(bool(cfg.clips)),
        )  # fmt: skip
    return partial(answer_batch, rollout, processor)


def answer_batch(rollout, processor, cfg: "Config", rows: list[dict], seed: int, have: set) -> Iterator[list[tuple]]:
    """One bundle: all rows in one call of the engine."""
    prompts, skipped = {}, []
    for n, row in enumerate(rows):
        try:
            prompt = encode(row, processor, style=cfg.style, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels,
                            frame_rule=cfg.clips or "eval", max_frames=cfg.frames)  # fmt: skip
        except BrokenPicture as error:
            skipped.append((n, 0, {"skipped": str(error)}))
            continue
        if len(prompt.expanded) <= cfg.max_prompt_tokens:
            # vLLM computes pixels itself, and those of thousands of rows would not fit in memory
            prompts[n] = replace(prompt, pixels=None) if cfg.provider == "vllm" else prompt
        else:
            length = f"{len(prompt.expanded)} tokens, more than --max-prompt-tokens {cfg.max_prompt_tokens}"
            skipped.append((n, 0, {"skipped": f"row {row['id']}: a prompt of {length}"}))
    settings = {"n": cfg.k, "max_tokens": cfg.max_tokens, "temperature": cfg.temperature, "seed": seed}
    try:
        found = rollout.generate([*prompts.values()], **settings) if prompts else []
    except torch.OutOfMemoryError as error:
        size = cfg.batch or BATCH[cfg.provider]
        raise ValueError(f"--batch {size} does not fit the GPU: lower it, the run goes on") from error
    yield skipped + [
        (n, sample, {"text": c.text, "finished": c.finished, "tokens": len(c.token_ids)})
        for n, group in zip(prompts, found, strict=True) for sample, c in enumerate(group)
    ]  # fmt: skip


def ask_served(cfg: "Config", rows: list[dict], seed: int, have: set) -> Iterator[list[tuple]]:
    """A bundle an answer, as they come. Pictures go as they are: how a server resizes them is its own affair. After a
    SIGTERM or Ctrl-C nothing more is asked, what is under way and paid for comes in, and KeyboardInterrupt follows."""
    skipped, places, stop = [], {}, StopSignal()

    def requests() -> Iterator[providers.Request]:
        for n, row in enumerate(rows):
            missing = [sample for sample in range(cfg.k) if (row["id"], sample) not in have]
            try:
                images = tuple(sendable(picture, row["id"]) for picture in row["images"]) if missing else ()
            except BrokenPicture as error:
                skipped.append((n, 0, {"skipped": str(error)}))
                continue
            for sample in missing:
                name = f"{n} {sample}"
                places[name] = (n, sample)
                yield providers.Request(name, build_prompt(row, cfg.style), images, max_tokens=cfg.max_tokens,
                                        temperature=cfg.temperature, seed=seed + n * cfg.k + sample)  # fmt: skip

    where = {"provider": cfg.provider, "model": cfg.model, "base_url": cfg.base_url}
    try:
        asked = until_stopped(requests(), stop)
        for reply in providers.ask(asked, **where, parallel=cfg.parallel, timeout=cfg.timeout):
            place = places[reply.id]
            if reply.error:
                yield [(*place, {"failed": reply.error})]
                continue
            yield [(*place, {"text": reply.text, "finished": reply.finish != "length", "tokens": reply.tokens_out,
                             "tokens_in": reply.tokens_in})]  # fmt: skip
        yield skipped
    finally:
        stop.restore()
    if stop.requested:
        raise KeyboardInterrupt


def sendable(picture, row_id: str):
    """The picture itself if every server shows it as it is stored, else as RGB. Raises BrokenPicture."""
    try:
        with open_picture(picture) as image:
            image.load()  # a header alone may stand before nothing
            plain = image.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1  # not to be turned
    except Exception:  # decode_picture names it; Pillow raises nearly anything on foreign bytes
        plain = False
    return picture if plain else decode_picture(picture, row_id=row_id)
