"""Files: whole or untouched on a full disk, a torn end cut off, a broken line named."""

import errno
import io
import os

import pytest

import files


def test_broken_line_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="x.jsonl, line 2: not JSON"):
        files.read_lines(tmp_path / "x.jsonl")


def test_what_a_crash_broke_off_is_cut_and_whole_lines_stay(tmp_path):
    path = tmp_path / "x.jsonl"
    files.append_lines(path, [{"text": "a\nb \ud800"}, {"text": "é"}])
    whole = path.read_bytes()
    assert not files.cut_torn_line(path) and path.read_bytes() == whole == files.json_lines(files.read_lines(path))
    path.write_bytes(whole + b'{"text": "c')
    assert len(files.read_lines(path)) == 2
    assert files.cut_torn_line(path) and path.read_bytes() == whole
    path.write_bytes(b'{"te')
    assert files.cut_torn_line(path) and path.read_bytes() == b""
    with pytest.raises(ValueError):
        files.append_lines(path, [{"fine": 1}, {"x": float("nan")}])
    assert path.read_bytes() == b""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.replace_file(path, b"old")
    monkeypatch.setattr(files, "open", lambda path, mode: io.BufferedWriter(FullAfter(path, mode)), raising=False)
    with pytest.raises(files.FullDisk, match="x.json was not written, the disk is full; the old one, if any, is .*"):
        files.replace_file(path, b"new" * 10)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


class FullAfter(io.FileIO):
    """A file on a disk with room for `room` more bytes."""

    room = 20

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = bytes(data)[: self.room]
        self.room -= len(data)
        return super().write(data)


def test_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    files.append_lines(path, [{"x": 1.0}])
    before = path.read_bytes()

    def open_on_a_full_disk(path, mode, **options):
        return FullAfter(path, mode) if mode == "ab" else open(path, mode, **options)

    monkeypatch.setattr(files, "open", open_on_a_full_disk, raising=False)
    with pytest.raises(files.FullDisk, match="disk is full; the lines before are untouched: free some space") as caught:
        files.append_lines(path, [{"x": 1.0, "a longer name": 2.0}])
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
