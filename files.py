"""Files that survive a stop: replaced whole or not at all, lines appended whole, a torn end cut off, one writer at a time.

A full disk is one line that says what is still there. JSONL throughout: a line a record.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Writes a whole file or leaves the old one: a reader never sees half of it. OSError (one line) on a full disk."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise not_written(error, path, "the old one, if any, is untouched") from error
    os.replace(tmp, path)


def json_lines(records: Iterable[dict]) -> bytes:
    """A line a record; ValueError for a number that JSON has not (nan)."""
    # a lone surrogate cannot be UTF-8, but its backslash form is exactly JSON's own escape for it
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")


def append_lines(path: Path, records: Iterable[dict]) -> None:
    """Appends a line a record to a JSONL file, all of them or none: OSError (one line) on a full disk."""
    data = memoryview(json_lines(records))
    with open(path, "ab", buffering=0) as file:  # unbuffered: a line is with the kernel before the next step begins
        start = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data):]
        except OSError as error:
            file.truncate(start)  # never half a line
            raise not_written(error, path, "the lines before are untouched") from error


def read_lines(path: str | Path) -> list[dict]:
    """Records of a JSONL file; [] if there is none. A last line cut off by a crash is left out.

    Raises ValueError naming file and line when another line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty, or a cut line
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): mend or delete the line") from error
    return records


def read_json(path: Path):
    """What a JSON file holds; ValueError naming it if that is none, or cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 is one as well
        raise ValueError(f"{path}: not JSON, or cut off ({error}): write it anew") from None


def cut_torn_line(path: Path) -> bool:
    """Cuts off what stands after the last line break, a line that a crash broke off; True if there was any."""
    whole = path.read_bytes().rfind(b"\n") + 1
    torn = path.stat().st_size > whole
    if torn:
        os.truncate(path, whole)
    return torn


@contextmanager
def locked(path: Path, *, who: str = "another process") -> Iterator[None]:
    """The file is there and ours alone until the end; ValueError, one line, if `who` has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: {who} is writing it: wait, or choose another --out") from None
        yield


class FullDisk(OSError):
    """The disk is full; the text is one line with the cure, and die_together() prints no more than that."""


def not_written(error: BaseException, path: Path, kept: str) -> OSError:
    """What to raise for an error while writing `path`: one line that says what is still there."""
    # safetensors and torch.save wrap the error in types of their own, the latter without any errno in the text
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full or isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < 2**20:
        return FullDisk(f"{path} was not written, the disk is full; {kept}: free some space, then the same command "
                        "goes on (training: with --resume)")
    return OSError(f"{path} was not written: {error}; {kept}")


def sync(*paths: Path) -> None:
    """Files and folders are on the disk when this returns."""
    for path in paths:
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
