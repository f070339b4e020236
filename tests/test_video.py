"""Clips: which frames and how large (the published code's vectors), files of any kind, what is kept on disk.

python -m pytest tests/test_video.py
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_fixtures import film

from data import dataset, video
from data.video import BrokenVideo, clip_size, frame_count, frame_indices, load_clip, smart_resize

SPACER = [json.loads(line) for line in (Path(__file__).parent / "vectors" / "spacer.jsonl").read_text().splitlines()]
REAL = Path("/work/shared/realdata")


def vectors(function):
    found = [v for v in SPACER if v["function"] == function]
    assert found
    return [pytest.param(v["input"], v["expected"], id=v["id"]) for v in found]


@pytest.fixture(autouse=True)
def clips(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAL_GRPO_CLIPS", str(tmp_path / "clips"))
    return tmp_path / "clips"


def row(source, **more):
    return {"id": "r1", "video": source, **more}


def grey(frame):
    return round(np.asarray(frame)[:, : frame.width // 3].mean() / 8)


# ---- which frames and how large ----


@pytest.mark.parametrize("i, want", vectors("smart_nframes"))
def test_frame_count_as_published(i, want):
    how = {"frames": i["element"].get("nframes"), "max_frames": i["element"].get("max_frames", 16)}
    if "raises" in want:
        with pytest.raises(ValueError, match="give a clip of at least"):
            frame_count(i["total_frames"], i["video_fps"], **how)
    else:
        assert frame_count(i["total_frames"], i["video_fps"], **how) == want["value"]


@pytest.mark.parametrize("i, want", vectors("train_frame_indices"))
def test_training_frames_as_published(i, want):
    indices = frame_indices(i["total_frames"], i["video_fps"], rule="train")
    assert indices == want["value"]["indices"]
    assert len(indices) / i["total_frames"] * i["video_fps"] == pytest.approx(want["value"]["sample_fps"])


@pytest.mark.parametrize("i, want", vectors("smart_resize"))
def test_sizes_as_published(i, want):
    size = smart_resize(i["width"], i["height"], least=i["min_pixels"], most=i["max_pixels"], factor=i["factor"])
    assert [*size] == want["value"][::-1]


@pytest.mark.parametrize("i, want", vectors("train_video_tensor"))
def test_training_frames_have_the_published_size(i, want):
    count = frame_count(i["total_frames"], i["fps"])
    (size,) = clip_size(i["width"], i["height"], count, rule="train", max_pixels=i["element"].get("max_pixels"))
    assert (count, *size) == tuple(want["value"][key] for key in ("frames", "width", "height"))


@pytest.mark.parametrize("i, want", vectors("eval_frames"))
def test_evaluation_frames_as_published(i, want):
    if i["fps"] != 1:
        pytest.skip("the evaluation script has 1 frame a second throughout")
    assert frame_indices(i["total_frames"], i["avg_fps"], rule="eval") == want["value"]["indices"]
    assert clip_size(i["width"], i["height"], 32, rule="eval-published")[0] == tuple(want["value"]["size_wh"])


@pytest.mark.parametrize("i, want", vectors("eval_video_tensor"))
def test_evaluation_frames_have_the_published_size(i, want):
    published = (want["value"]["width"], want["value"]["height"])
    assert clip_size(i["width"], i["height"], 32, rule="eval-published")[-1] == published
    assert clip_size(i["width"], i["height"], 32, rule="eval")[-1] == published[::-1]  # mended: the shape is kept
    assert len(frame_indices(i["total_frames"], i["fps"], rule="eval")) == want["value"]["sampled"]


# ---- files ----


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("b.mkv", "mpeg4"), ("c.avi", "mpeg4"), ("d.mp4", "libx264")])
def test_a_file_gives_the_frames_that_were_asked_for(tmp_path, name, codec):
    path = film(tmp_path / name, codec=codec)
    clip = load_clip(row(path))
    assert len(clip.frames) == 6 and clip.indices == [0, 6, 12, 17, 23, 29]  # 3 s at 2 fps
    assert [grey(frame) for frame in clip.frames] == clip.indices
    assert clip.fps == pytest.approx(2) and clip.times == pytest.approx([0, 0.6, 1.2, 1.7, 2.3, 2.9], abs=0.01)
    assert {frame.size for frame in clip.frames} == {(392, 280)} and clip.frames[0].mode == "RGB"


def test_a_span_is_a_clip_of_its_own(tmp_path):
    path = film(tmp_path / "a.mp4")
    clip = load_clip(row(path, span=(1.0, 2.0)))
    assert clip.indices == [10, 13, 16, 19] and [grey(frame) for frame in clip.frames] == clip.indices
    assert load_clip(row(path)).indices[-1] == 29  # another span is another file in the cache
    with pytest.raises(BrokenVideo, match=r"row r1: video .*a.mp4: no frame between 7 and 9 s of 2.9: correct the span"):
        load_clip(row(path, span=(7, 9)))


def test_questions_about_one_clip_decode_it_once_and_do_not_fight_over_its_file(tmp_path, clips, monkeypatch):
    path, decoded, inner = film(tmp_path / "a.mp4"), [], video.read_clip
    monkeypatch.setattr(video, "read_clip", lambda *args: decoded.append(1) or inner(*args))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    broken = str(tmp_path / "broken.mp4")
    Path(broken).write_bytes(b"nothing")
    rows = [{"id": f"r{i}", "video": broken if i % 4 == 3 else path} for i in range(12)]
    counted = []
    found = dataset.measure_rows(rows, done=lambda: counted.append(1))
    assert len(counted) == 12 and len(list(clips.iterdir())) == 1
    assert [one == [(392, 280)] * 6 for one in found] == [i % 4 != 3 for i in range(12)]
    assert [str(found[i]).split(":")[0] for i in (3, 7, 11)] == ["row r3", "row r7", "row r11"]
    assert len(decoded) == 1 + 3, "the good one once, the broken one for each message"


def test_writers_of_one_kept_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "kept" / "a.npz"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: video.keep_arrays(file, x=np.full(50_000, i)), range(64)))  # raises what a thread raised
    with np.load(file) as data:
        assert len(set(data["x"].tolist())) == 1
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("left", [0, 50, 0.9])
def test_a_kept_file_that_was_cut_off_is_made_again(tmp_path, clips, left):
    path = film(tmp_path / "a.mp4")
    before = load_clip(row(path))
    [file] = clips.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    assert [frame.tobytes() for frame in load_clip(row(path)).frames] == [frame.tobytes() for frame in before.frames]
    assert file.read_bytes() == whole


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for k in range(12):
        Image.new("RGB", (56, 56), (20 * k, 0, 0)).save(tmp_path / f"scene_{k}.png")
    clip = load_clip(row(str(tmp_path), fps=2))
    assert [round(frame.getpixel((0, 0))[0] / 20) for frame in clip.frames] == list(range(12))


def test_a_file_whose_decoder_gives_nothing_is_one_line(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4")
    monkeypatch.setattr("av.container.InputContainer.decode", lambda self, stream: iter(()), raising=False)
    with pytest.raises(BrokenVideo, match="it ends after 0 frames, of 30 announced"):
        load_clip(row(path))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_flags_are_applied(tmp_path, degrees):
    plain = load_clip(row(film(tmp_path / "a.mp4"))).frames[0]
    turned = load_clip(row(film(tmp_path / "b.mp4", rotation=degrees))).frames[0]
    assert turned.size == (plain.size if degrees == 180 else plain.size[::-1])
    shown = {90: lambda a: np.rot90(a, -1), 180: lambda a: np.rot90(a, 2), 270: np.rot90}[degrees](np.asarray(plain))
    assert np.abs(shown.astype(int) - np.asarray(turned)).mean() < 3


def test_resizing_keeps_the_shape_unless_the_published_mistake_is_asked_for(tmp_path):
    path = film(tmp_path / "a.mp4", size=(640, 480), frames=10)
    assert load_clip(row(path), rule="eval").frames[0].size == (448, 336)
    assert load_clip(row(path), rule="eval-published").frames[0].size == (336, 448)


@pytest.mark.parametrize("break_it, message", [
    (lambda data: data[: len(data) // 2], "cannot be decoded"), (lambda data: b"not a film", "cannot be decoded"),
    (lambda data: b"", "cannot be decoded"),
])  # fmt: skip
def test_a_broken_file_is_one_clear_line(tmp_path, break_it, message):
    path = Path(film(tmp_path / "a.mp4"))
    path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(BrokenVideo, match=rf"row r1: video .*a.mp4: .*{message}.*: replace it, or remove the row") as info:
        load_clip(row(str(path)))
    assert "\n" not in str(info.value)


def test_other_wrong_sources_name_the_cure(tmp_path):
    with pytest.raises(BrokenVideo, match="no such file or folder: correct the path"):
        load_clip(row(str(tmp_path / "none.mp4")))
    with pytest.raises(BrokenVideo, match="no pictures in it"):
        load_clip(row(str(tmp_path), fps=2))
    with pytest.raises(BrokenVideo, match="give a clip of at least 2 frames"):
        load_clip(row([Image.new("RGB", (64, 48))], fps=2))
    with pytest.raises(BrokenVideo, match="fps is None: say how many"):
        load_clip(row([Image.new("RGB", (64, 48))] * 4))
    with pytest.raises(ValueError, match="unknown frame rule 'test'"):
        load_clip(row([]), rule="test")


def test_an_announced_end_that_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "frame_times", lambda path: ([k / 10 for k in range(40)], 10.0))
    with pytest.raises(BrokenVideo, match="ends after 30 frames, of 40 announced"):
        load_clip(row(film(tmp_path / "a.mp4")))


# ---- folders and lists of frames ----


def test_folders_and_lists_of_frames(tmp_path):
    frames = [Image.new("RGB", (224, 168), (8 * k, 0, 0)) for k in range(16)]
    for k, frame in enumerate(frames):
        frame.save(tmp_path / f"frame_{k:03}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    ours = load_clip(row(frames, fps=2))
    assert ours.indices == list(range(16)) and ours.fps == 2 and len(ours.frames) == 16
    folder = load_clip(row(str(tmp_path), fps=2))
    assert [a.tobytes() for a in folder.frames] == [b.tobytes() for b in ours.frames]
    few = load_clip(row(frames, fps=2), max_frames=4)
    assert few.indices == [0, 5, 10, 15] and few.fps == pytest.approx(0.5)


# ---- what is kept ----


def test_a_file_is_decoded_once(tmp_path, monkeypatch, clips):
    path = film(tmp_path / "a.mp4")
    first = load_clip(row(path))
    assert len(list(clips.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(video, "read_clip", lambda *_: pytest.fail("decoded again"))
        again = load_clip(row(path))
    assert (again.fps, again.indices, again.times) == (first.fps, first.indices, first.times)
    assert [a.tobytes() for a in again.frames] == [b.tobytes() for b in first.frames]
    film(path, frames=20)  # another film under the same name
    os.utime(path, ns=(1, 1))
    assert load_clip(row(path)).indices[-1] == 19


def test_nothing_is_kept_on_request(tmp_path, monkeypatch, clips):
    monkeypatch.setenv("SPATIAL_GRPO_CLIPS", "")
    assert len(load_clip(row(film(tmp_path / "a.mp4"))).frames) == 6 and not clips.exists()


# ---- real files ----


@pytest.mark.skipif(not (REAL / "videos").is_dir(), reason="no real clips here")
def test_every_real_clip_gives_frames_or_one_line():
    outcomes = {}
    for path in sorted((REAL / "videos").glob("*/*.m[kpo][4v]")):
        try:
            outcomes[path.name] = load_clip(row(str(path)))
        except BrokenVideo as error:
            assert "\n" not in str(error) and path.name in str(error)
            outcomes[path.name] = None
    assert len(outcomes) == 11 and [name for name, clip in outcomes.items() if clip is None] == ["corrupted.mp4"]
    sizes = [outcomes[f"video_{degrees}.mov"].frames[0].size for degrees in (0, 90, 180, 270)]
    assert sizes == [(420, 224), (224, 420)] * 2
    assert outcomes["open-eqa-hm3d-demo.mp4"].times[-1] == pytest.approx(16.67, abs=0.01)


@pytest.mark.skipif(not (REAL / "vsi").is_dir(), reason="no real frames here")
def test_a_real_folder_of_frames():
    clip = load_clip(row(str(REAL / "vsi/scene_47334096_frames"), fps=1))
    assert len(clip.frames) == 16 and clip.frames[0].size == (280, 364) and clip.fps == pytest.approx(Fraction(16, 28))
