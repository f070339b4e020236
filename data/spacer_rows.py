"""Records of SpaceR-151k (section 4.2 of SpaceR's notes) as rows, with the maps of their videos.

A record has problem, problem_type, options ("A. left"), solution ("<answer>A</answer>"), path, data_type, data_source and
problem_id. Maps are in cognitive_map.jsonl, beside the records or in annotation/ there: a line a video, {"video_id": the
file's name without ending, "cognitive_map": {category: [[x, y], ...]}}.
"""
import json
import re
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase

from rewards import PROBLEM_TYPES, extract_answer

SPACER_REQUIRED = ("problem", "problem_type", "solution", "path", "data_type")
KIND_OF = {name: kind for kind, name in PROBLEM_TYPES.items() if kind != "number"}  # numerical is graded by MRA
SPATIAL = "SR_dataset"  # the data_source whose rows have maps
MAP_FILES = ("annotation/cognitive_map.jsonl", "cognitive_map.jsonl")
LETTER = re.compile(r"\s*\(?([A-Za-z])[.):]\s*")


def spacer_row(record: dict, *, folder: Path, index: int, source: str) -> dict:
    """One record as a row. Raises ValueError('problem: cure'). A path is looked for beside the file, then in the working
    directory, as published."""
    kind, path, media = KIND_OF.get(str(record["problem_type"])), record["path"], record["data_type"]
    if kind is None:
        raise ValueError(f"problem_type {str(record['problem_type'])[:60]!r} is unknown: use one of {', '.join(KIND_OF)}")
    if media not in ("image", "video"):
        raise ValueError(f"data_type {media!r} is unknown: use image or video")
    if not isinstance(path, str) or not path:
        raise ValueError(f"path is {str(path)[:60]!r}: give that of a picture or video")
    if not isinstance(record["solution"], str) or not extract_answer(record["solution"]):
        raise ValueError(f"solution is {str(record['solution'])[:60]!r}: write <answer>...</answer>")
    place = folder / path if (folder / path).exists() or not Path(path).exists() else Path(path)
    origin = record.get("data_source") or ""
    if not isinstance(origin, str):
        raise ValueError(f"data_source is {str(origin)[:60]}: give a text, {SPATIAL} for rows with maps, or leave it out")
    return {
        "id": f"{record.get('problem_id', 'spacer')}-{index}", "source": source, "category": origin,
        "images": [str(place)] if media == "image" else [], **({"video": str(place), "fps": None, "span": None}
                                                               if media == "video" else {}),
        "question": record["problem"], "options": option_texts(record.get("options") or []) if kind == "choice" else [],
        "gold": extract_answer(record["solution"]), "kind": kind, "size": None, "scene": None,
        "map": gold_map(folder, place.stem) if origin == SPATIAL else None, "problem": None, "style": None,
        "meta": {"problem_type": record["problem_type"], "data_source": origin},
    }  # fmt: skip


def option_texts(options: list[str]) -> list[str]:
    """["A. left", "B. right"] -> ["left", "right"]; options without letters stay as they are. Raises ValueError for letters
    out of order: the prompt would give them to other texts, and the gold letter with them."""
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"options are {str(options)[:60]}: give a list of texts, [\"A. left\", \"B. right\"]")
    marks = [LETTER.match(option) for option in options]
    if not any(marks):
        return options
    letters = [mark[1].upper() if mark else "none" for mark in marks]
    if letters != [*ascii_uppercase[: len(options)]]:
        raise ValueError(f"options have the letters {', '.join(letters)[:60]}: write A, B, C in this order, or none at all")
    return [option[mark.end() :] for option, mark in zip(options, marks)]


def gold_map(folder: Path, video: str) -> dict | None:
    """The map of a video; None where the file of maps is empty."""
    file = next((folder / name for name in MAP_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"no {' or '.join(MAP_FILES)} in {folder} with the maps of {SPATIAL}: put it there, or an empty "
                         "file to train without maps")
    maps = read_maps(str(file))
    if maps and video not in maps:
        raise ValueError(f"{file} has no map of {video}: add it, or leave the row out")
    return maps.get(video)


@lru_cache(maxsize=4)
def read_maps(file: str) -> dict[str, dict]:
    maps = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
                maps[record["video_id"]] = record["cognitive_map"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number}: no {{\"video_id\": ..., \"cognitive_map\": {{...}}}}: "
                                 "correct it") from None
    return maps
