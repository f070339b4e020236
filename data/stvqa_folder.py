"""The folder of a data set in the making: which files, what is appended, what is replaced, with which settings."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from files import cut_torn_line, json_lines, locked, replace_file


def file_of(out: str, name: str) -> Path:
    return Path(out) / f"{name}.jsonl"


def needed(out: str, name: str, stage: str) -> Path:
    """The file of an earlier stage; FileNotFoundError that names the stage if it is not there."""
    path = file_of(out, name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there: run {stage} --out {out} first")
    return path


def settings_of(out: str) -> dict:
    path = Path(out) / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextmanager
def appending(out: str, stage: str, name: str, settings: dict) -> Iterator[Path]:
    """The stage's file, ours alone until the end, its torn last line cut off. ValueError, one line, if its lines were
    made with other settings, or another process has it."""
    path = file_of(out, name)
    with locked(path):
        saved, settings = settings_of(out), json.loads(json.dumps(settings))
        old = saved.get(stage, settings)
        free = ("images", "limit")  # pictures may have moved, and more graphs are asked about by raising the limit
        differ = [key for key in settings if old.get(key) != settings[key] and key not in free]
        changed = [f"{key} was {old.get(key)!r}, now {settings[key]!r}" for key in differ]
        if changed and path.stat().st_size:
            raise ValueError(f"{path} was made with other settings ({'; '.join(changed)}): give the old ones, or "
                             "choose another --out")  # fmt: skip
        content = json.dumps({**saved, stage: settings}, indent=1)
        replace_file(path.with_name("settings.json"), content.encode())
        cut_torn_line(path)
        yield path


@contextmanager
def replacing(path: Path) -> Iterator[Callable[[dict], None]]:
    """A function that writes a line; the file is renamed into place when all went well."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb", buffering=1 << 20) as file:
        yield lambda record: file.write(json_lines([record]))
    os.replace(partial, path)


def records_of(path: Path) -> Iterator[tuple[int, dict]]:
    """(offset, record) of each whole line, one at a time. ValueError naming a line that is no record with an id."""
    at = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill
            try:
                record = json.loads(line)
                record["id"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: no record of this stage: delete the line") from None
            yield at, record
            at += len(line)


def record_at(file, offset: int) -> dict:
    file.seek(offset)
    return json.loads(file.readline())
