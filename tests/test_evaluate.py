"""evaluate.py: resume, grading again, controls, standard errors, one picture, bad input.

python -m pytest tests/test_evaluate.py
"""

import errno
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_vllm, new_policy
from PIL import Image
from video_fixtures import film

import evaluate
import files
import rollout
import scores
import train_grpo
from data.pictures import COLOURS, draw_boxes
from data.prompts import build_prompt
from data.responses import response_text
from data.rows import to_row
from data.scenes import scene_row, scene_rows
from evaluate import Config
from model import save_hf
from rollout import Completion

SMALL = dict(
    model="random:tiny", style="short", box_frame="original", min_pixels=784, max_pixels=112 * 112, max_tokens=6
)
# Sampled, because an untrained model says the same to everything when it is greedy.
TINY = Config(**SMALL, dataset="scenes:easy@val", limit=10, batch=4, temperature=1.0)


@pytest.fixture(scope="module")
def tiny():
    """One random model for all tests; its settings are those of TINY."""
    torch.set_num_threads(1)
    return evaluate.open_provider(TINY, 1)


@pytest.fixture
def model(tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: tiny)


def saying(monkeypatch, text_of):
    """The provider answers text_of(row); returns the list of rows it was asked."""
    asked = []

    def answer(cfg, rows, seed, have):
        asked.extend(rows)
        yield [(n, 0, {"text": text_of(row), "finished": True, "tokens": 1}) for n, row in enumerate(rows)]

    monkeypatch.setattr(evaluate, "open_provider", lambda *_: answer)
    return asked


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]


def scores_of(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "scores.json").read_text()).items() if k != "evaluation"}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choice(i: int, picture: Path, **changes) -> dict:
    return {"id": f"r{i}", "images": [str(picture)], "question": "Where?", "options": ["left", "right"], "gold": "A",
            "category": "relation", **changes}  # fmt: skip


def picture(path: Path, colour: str, size=(60, 40)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


# ---------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "open_provider", lambda *_: tiny)
        evaluate.main(replace(TINY, out=str(out)))
    return out


@pytest.mark.parametrize("keep", [0, 10, "line 1", "line 4", "line 6", "inside line 6", "last byte"])
def test_resume_after_a_cut_gives_the_file_of_an_unbroken_run(unbroken, model, tmp_path, keep):
    whole = (unbroken / "transcripts.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 10 and len({line["text"] for line in lines_of(unbroken)}) > 5, "the answers must differ"
    cut = {"line 1": ends[0], "line 4": ends[3], "line 6": ends[5], "inside line 6": ends[5] - 30, "last byte": -1}.get(
        keep, keep
    )
    (tmp_path / "transcripts.jsonl").write_bytes(whole[:cut])
    (tmp_path / "config.json").write_bytes((unbroken / "config.json").read_bytes())
    evaluate.main(replace(TINY, out=str(tmp_path)))
    assert (tmp_path / "transcripts.jsonl").read_bytes() == whole
    assert scores_of(tmp_path) == scores_of(unbroken)


def test_ctrl_c_loses_one_batch_and_the_same_command_goes_on(unbroken, tiny, tmp_path, monkeypatch):
    def breaks_in_batch_three(cfg, rows, seed, have):
        if seed % 1_000_003 >= 8:
            raise KeyboardInterrupt
        return tiny(cfg, rows, seed, have)

    cfg = replace(TINY, out=str(tmp_path))
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: breaks_in_batch_three)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(cfg)
    assert len(lines_of(tmp_path)) == 8
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: tiny)
    evaluate.main(cfg)
    assert (tmp_path / "transcripts.jsonl").read_bytes() == (unbroken / "transcripts.jsonl").read_bytes()


def test_a_finished_evaluation_needs_no_model_and_a_deleted_line_is_asked_again(unbroken, tiny, tmp_path, monkeypatch):
    lines = (unbroken / "transcripts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "config.json").write_bytes((unbroken / "config.json").read_bytes())
    (tmp_path / "transcripts.jsonl").write_bytes(b"".join(lines))
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: pytest.fail("nothing to ask"))
    evaluate.main(replace(TINY, out=str(tmp_path)))
    (tmp_path / "transcripts.jsonl").write_bytes(b"".join(lines[:2] + lines[3:]))
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: tiny)
    evaluate.main(replace(TINY, out=str(tmp_path)))
    found = (tmp_path / "transcripts.jsonl").read_bytes().splitlines(keepends=True)
    assert found == lines[:2] + lines[3:] + [lines[2]]


@pytest.mark.parametrize("change, named", [
    (dict(control="blind"), "control was 'none', now 'blind'"),
    (dict(model="random:demo"), "model was 'random:tiny', now 'random:demo'"),
    (dict(style="no_reasoning"), "style was 'short', now 'no_reasoning'"),
    (dict(seed=2), "seed was 1, now 2"),
    (dict(limit=11), "limit was 10, now 11"),
    (dict(dataset="scenes:demo@val"), "dataset was"),
])  # fmt: skip
def test_answers_of_other_settings_are_refused_before_a_model_is_loaded(unbroken, monkeypatch, change, named):
    before = (unbroken / "transcripts.jsonl").read_bytes()
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: pytest.fail("no model needed to refuse"))
    with pytest.raises(ValueError) as error:
        evaluate.main(replace(TINY, out=str(unbroken), **change))
    assert named in str(error.value) and "--out" in str(error.value) and "\n" not in str(error.value)
    assert (unbroken / "transcripts.jsonl").read_bytes() == before


def test_rows_edited_under_their_old_name_are_refused(tmp_path, monkeypatch):
    saying(monkeypatch, lambda row: "A")
    rows = [choice(i, picture(tmp_path / "a.png", "red")) for i in range(2)]
    cfg = replace(TINY, dataset=str(write_rows(tmp_path / "rows.jsonl", rows)), limit=None, out=str(tmp_path / "out"))
    evaluate.main(cfg)
    write_rows(tmp_path / "rows.jsonl", [rows[0], {**rows[1], "gold": "B"}])
    with pytest.raises(ValueError, match="rows and prompt text was"):
        evaluate.main(cfg)


def test_another_picture_under_the_old_name_is_refused(tmp_path, monkeypatch):
    saying(monkeypatch, lambda row: "A")
    rows = [choice(i, picture(tmp_path / f"{i}.png", "red")) for i in range(2)]
    cfg = replace(TINY, dataset=str(write_rows(tmp_path / "rows.jsonl", rows)), limit=None, out=str(tmp_path / "out"))
    evaluate.main(cfg)
    red = (tmp_path / "1.png").read_bytes()
    picture(tmp_path / "1.png", "blue")
    with pytest.raises(ValueError, match="the picture of row r1 is another than the one asked about: put the old one back"):
        evaluate.main(cfg)
    (tmp_path / "1.png").write_bytes(red)
    evaluate.main(cfg)
    (tmp_path / "1.png").unlink()  # nothing is asked of it any more
    evaluate.main(cfg)


def test_skipped_rows_are_asked_again_once_their_files_are_there(tmp_path, monkeypatch, capsys):
    """A video and a picture that were missing, and a torn picture."""
    good, late, torn = (tmp_path / f"{name}.png" for name in ("good", "late", "torn"))
    data = picture(good, "red").read_bytes()
    torn.write_bytes(data[:60])
    rows = [choice(0, good), choice(1, late), choice(2, torn), choice(3, good, images=[], video="late.mp4")]
    cfg = replace(TINY, dataset=str(write_rows(tmp_path / "rows.jsonl", rows)), limit=None, out=str(tmp_path / "out"))
    evaluate.main(cfg)
    assert [line["id"] for line in lines_of(tmp_path / "out") if "skipped" in line] == ["r1", "r2", "r3"]
    late.write_bytes(data)
    film(tmp_path / "late.mp4")
    evaluate.main(cfg)
    assert "2 rows were skipped and have other files now" in capsys.readouterr().out
    assert [line["id"] for line in lines_of(tmp_path / "out") if "skipped" in line] == ["r2"]
    torn.write_bytes(data)
    evaluate.main(cfg)
    lines = lines_of(tmp_path / "out")
    assert sorted(line["id"] for line in lines) == ["r0", "r1", "r2", "r3"] and all("text" in line for line in lines)
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: pytest.fail("all is answered"))
    evaluate.main(cfg)


def test_weights_trained_anew_under_the_old_name_count_as_another_model(tmp_path, monkeypatch):
    saying(monkeypatch, lambda row: "A")
    (tmp_path / "step_5").mkdir()
    weights = tmp_path / "step_5" / "model.safetensors"
    cfg = replace(TINY, model=str(weights.parent), out=str(tmp_path / "out"))
    weights.write_bytes(b"one" * 1000)
    evaluate.main(cfg)
    evaluate.main(cfg)
    weights.write_bytes(b"one" * 999 + b"two")
    with pytest.raises(ValueError, match="weights was '.*', now '.*--out"):
        evaluate.main(cfg)


def test_a_failed_start_leaves_no_settings_behind(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: (_ for _ in ()).throw(ValueError("no model there")))
    with pytest.raises(ValueError):
        evaluate.main(replace(TINY, out=str(tmp_path / "out"), seed=2))
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: tiny)
    evaluate.main(replace(TINY, out=str(tmp_path / "out"), limit=2))


def test_two_at_once_are_refused(tmp_path):
    path = tmp_path / "transcripts.jsonl"
    with evaluate.locked(path), pytest.raises(ValueError, match="another evaluate.py"), evaluate.locked(path):
        pytest.fail("two have it")
    with evaluate.locked(path):
        pass


@pytest.mark.parametrize("text, named", [
    (b'{"id": "a"}\n{"id": "b\n{"id": "c"}\n', "line 2: not JSON .* delete the line"),
    (b'{"id": "a"}\n[1]\n', "line 2: not a transcript"),
    (b'{"id": "a"}\n{"id": "b"}\n{"id": "a"}\n', "line 3: the id 'a' of line 1"),
])  # fmt: skip
def test_a_spoilt_transcript_file_is_named_with_its_line(tmp_path, text, named):
    (tmp_path / "transcripts.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=named):
        evaluate.read_transcripts(tmp_path / "transcripts.jsonl")


@pytest.mark.parametrize("text, named", [
    ("{}", "not what evaluate.py saves there: choose another --out"), ("[1]", "not what evaluate.py"),
    ('{"settings": {"mod', "not JSON, or cut off"),
])  # fmt: skip
def test_a_spoilt_settings_file_is_named(tmp_path, text, named):
    (tmp_path / "transcripts.jsonl").write_text('{"id": "a"}\n')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: {named}"):
        evaluate.main(replace(TINY, out=str(tmp_path)))


def test_to_compare_a_line_without_a_verdict_is_named(unbroken, tmp_path):
    lines = lines_of(unbroken)
    del lines[2]["correct"], lines[2]["gold"]
    (tmp_path / "transcripts.jsonl").write_bytes(files.json_lines(lines))
    with pytest.raises(ValueError, match="transcripts.jsonl, line 3: no gold, correct: this is no transcript"):
        evaluate.main(Config(compare=(str(unbroken), str(tmp_path))))


def test_a_full_disk_leaves_whole_lines_and_the_same_command_goes_on(unbroken, model, tmp_path, monkeypatch):
    class Full:
        """A file that takes half of the second batch and no more."""

        room = len(b"".join((unbroken / "transcripts.jsonl").read_bytes().splitlines(keepends=True)[:6]))

        def __init__(self, file):
            self.file, self.fileno, self.truncate = file, file.fileno, file.truncate

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if Full.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = self.file.write(data[: Full.room])
            Full.room -= taken
            return taken

    def opened(path, mode="r", **options):
        return Full(open(path, mode, **options)) if "a" in mode else open(path, mode, **options)

    cfg = replace(TINY, out=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", opened, raising=False)
        with pytest.raises(OSError, match="transcripts.jsonl was not written, .*the same command goes on") as error:
            evaluate.main(cfg)
    assert "\n" not in str(error.value) and len(lines_of(tmp_path)) == 4
    evaluate.main(cfg)
    assert (tmp_path / "transcripts.jsonl").read_bytes() == (unbroken / "transcripts.jsonl").read_bytes()


def test_any_text_can_be_kept(tmp_path, monkeypatch):
    text = "\ud800 line\u2028break"
    saying(monkeypatch, lambda row: text)
    evaluate.main(replace(TINY, out=str(tmp_path)))
    assert [record["text"] for record in evaluate.read_transcripts(tmp_path / "transcripts.jsonl")] == [text] * 10


# ---------------------------------------------------------------- scores


def test_gold_responses_score_one_and_wrong_letters_zero(tmp_path, monkeypatch):
    rows = {row["id"]: row for row in scene_rows(40, level="easy", split="val")}
    saying(monkeypatch, response_text)
    cfg = replace(TINY, limit=40)
    evaluate.main(replace(cfg, out=str(tmp_path / "gold")))
    scores = json.loads((tmp_path / "gold" / "scores.json").read_text())
    assert (scores["n"], scores["accuracy"], scores["unparsed"], scores["format"]) == (40, 1.0, 0.0, 1.0)
    assert (
        scores["scene"]["iou"] == pytest.approx(1.0)
        and scores["scene"]["object_f1"] == scores["scene"]["relation_f1"] == 1.0
    )
    assert scores["scene"]["n_relation"] == sum(bool(row["scene"]["relationships"]) for row in rows.values()) > 0
    assert scores["chance"] == pytest.approx(sum(1 / len(row["options"]) for row in rows.values()) / 40)
    assert sum(part["n"] for part in scores["by_category"].values()) == 40 and len(scores["by_category"]) > 2
    assert scores["evaluation"]["config"]["model"] == "random:tiny" and scores["graded_with"]["torch"]

    saying(monkeypatch, lambda row: response_text(row, letter="A" if row["gold"] == "B" else "B"))
    evaluate.main(replace(cfg, out=str(tmp_path / "wrong")))
    scores = json.loads((tmp_path / "wrong" / "scores.json").read_text())
    assert scores["accuracy"] == 0.0 and scores["unparsed"] == 0.0 and scores["scene"]["iou"] == pytest.approx(1.0)


def test_standard_error_by_hand():
    def records(*correct):
        return [{"correct": value} for value in correct] + [{"skipped": "broken"}]

    assert scores.accuracy(records(True, True, True, False)) == {
        "n": 4,
        "accuracy": 0.75,
        "se": math.sqrt(0.75 * 0.25 / 4),
    }
    assert scores.accuracy(records(True)) == {"n": 1, "accuracy": 1.0, "se": 0.0}
    assert scores.accuracy(records()) == {"n": 0, "accuracy": None, "se": None}
    # a grader that gives parts of a point: deviation of 0, 0.5, 1 is sqrt(1 / 6)
    assert scores.accuracy(records(0.0, 0.5, 1.0))["se"] == pytest.approx(math.sqrt(1 / 6 / 3))


def test_broken_and_overlong_rows_are_named_and_not_in_the_denominator(tmp_path, monkeypatch, capsys):
    torn = tmp_path / "torn.png"
    torn.write_bytes(picture(tmp_path / "good.png", "red").read_bytes()[:60])
    good, absent = tmp_path / "good.png", tmp_path / "absent.png"
    rows = [
        choice(0, good),
        choice(1, torn),
        choice(2, good, question="where " * 400),
        choice(3, absent),
        choice(4, good),
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = replace(TINY, dataset=str(data), limit=None, max_prompt_tokens=300)
    for control in ("none", "blind"):
        evaluate.main(replace(cfg, out=str(tmp_path / control), control=control))
        scores = json.loads((tmp_path / control / "scores.json").read_text())
        assert scores["n"] == 2 and [row["id"] for row in scores["skipped"]] == ["r1", "r2", "r3"], scores["skipped"]
        assert len(lines_of(tmp_path / control)) == 5
        printed = capsys.readouterr().out
        assert "3 rows skipped, not counted" in printed and "absent.png cannot be read" in printed
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: pytest.fail("skipped rows are not asked again"))
    evaluate.main(replace(cfg, out=str(tmp_path / "none")))


def test_a_file_with_no_answer_at_all_still_reports(tmp_path, monkeypatch, capsys):
    def torn(cfg, rows, seed, have):
        yield [(n, 0, {"skipped": "torn"}) for n in range(len(rows))]

    monkeypatch.setattr(evaluate, "open_provider", lambda *_: torn)
    evaluate.main(replace(TINY, out=str(tmp_path)))
    assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] is None
    assert "10 rows skipped" in capsys.readouterr().out


# ---------------------------------------------------------------- grading again


def test_grading_again_gives_the_same_file_and_mends_verdicts(unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "open_provider", lambda *_: pytest.fail("grading needs no model"))
    evaluate.main(Config(rescore=str(unbroken / "transcripts.jsonl"), out=str(tmp_path)))
    assert (tmp_path / "transcripts.jsonl").read_bytes() == (unbroken / "transcripts.jsonl").read_bytes()
    assert (tmp_path / "scores.json").read_bytes() == (unbroken / "scores.json").read_bytes()

    lines = lines_of(tmp_path)
    lines[3]["correct"] = not lines[3]["correct"]
    (tmp_path / "transcripts.jsonl").write_bytes(files.json_lines(lines))
    evaluate.main(Config(rescore=str(tmp_path / "transcripts.jsonl")))
    assert f"1 of 10 verdicts changed: {lines[3]['id']}" in capsys.readouterr().out
    assert (tmp_path / "transcripts.jsonl").read_bytes() == (unbroken / "transcripts.jsonl").read_bytes()


def test_grading_again_overwrites_no_other_file_and_names_what_is_no_transcript(unbroken, tmp_path):
    other = tmp_path / "transcripts.jsonl"
    other.write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="exists already"):
        evaluate.main(Config(rescore=str(unbroken / "transcripts.jsonl"), out=str(tmp_path)))
    with pytest.raises(ValueError, match="line 1: no category, options, .* no transcript"):
        evaluate.main(Config(rescore=str(other)))
    assert other.read_text() == '{"id": "x"}\n'


# ---------------------------------------------------------------- controls


@pytest.mark.parametrize("control", ["none", "blind", "swapped"])
def test_controls_change_the_picture_and_nothing_else(tmp_path, monkeypatch, control):
    rows = scene_rows(10, level="easy", split="val")
    asked = saying(monkeypatch, lambda row: "A")
    evaluate.main(replace(TINY, out=str(tmp_path), control=control, style="spatialthinker"))
    lines = lines_of(tmp_path)
    for row, seen, line in zip(rows, asked, lines, strict=True):
        assert build_prompt(seen, "spatialthinker") == build_prompt(row, "spatialthinker") == line["prompt"]
        own, shown = row["images"][0].tobytes(), [image.tobytes() for image in seen["images"]]
        assert {"none": shown == [own], "blind": shown == [], "swapped": len(shown) == 1 and shown != [own]}[control]
        assert ("picture_of" in line) == (control == "swapped") and line.get("picture_of") != line["id"]
        assert line["control"] == control
    if control == "swapped":
        assert sorted(line["picture_of"] for line in lines) == sorted(row["id"] for row in rows), "each picture once"


@pytest.mark.parametrize("seed", range(20))
def test_swapped_never_gives_a_row_its_own_photo_though_many_rows_share_one(tmp_path, seed):
    """Photos of 1, 2, 3 and 4 rows; two of the files hold the same photo under two names."""
    rows = []
    for name, colour, times in (
        ("a", "red", 1),
        ("b", "blue", 2),
        ("c", "green", 3),
        ("d", "black", 2),
        ("e", "black", 2),
    ):
        path = str(picture(tmp_path / f"{name}.png", colour))
        rows += [{"id": f"{name}{i}", "images": [path], "kind": "choice"} for i in range(times)]
    donors = evaluate.swapped_pictures(rows, seed)
    assert donors == evaluate.swapped_pictures(rows, seed)
    assert len({donor["id"] for donor in donors.values()}) == len(rows)
    for row in rows:
        assert {row["id"][0], donors[row["id"]]["id"][0]} not in ({row["id"][0]}, {"d", "e"})


def test_swapped_knows_clips_in_memory_by_what_they_show():
    """Two loads of the same rows: the frames are other objects, the pairs must be the same."""
    pairs = []
    for _ in range(2):
        frames = [[Image.new("RGB", (8, 8), (40 * i, 10 * k, 0)) for k in range(3)] for i in range(6)]
        rows = [{"id": i, "images": [], "video": own, "kind": "choice"} for i, own in enumerate(frames)]
        donors = evaluate.swapped_pictures(rows, 1)
        pairs.append({key: donor["id"] for key, donor in donors.items()})
    assert pairs[0] == pairs[1] and all(key != other for key, other in pairs[0].items())


@pytest.mark.parametrize("changed", [dict(span=(1, 3)), dict(map={"bed": [[1, 1]]}), dict(video="other/b.mp4"), dict(fps=2.0)])
def test_answers_are_not_taken_over_when_the_rows_show_or_ask_something_else(changed):
    row = {key: None for key in ("id", "question", "options", "gold", "kind", "size", "scene", "problem", "style", "map")}
    row |= {"images": ["p.png"], "video": "a/a.mp4", "span": (0, 3), "map": {"pan": [[1, 1]]}}
    cfg = replace(TINY, style="spacer_map")
    assert evaluate.identity(cfg, [row]) == evaluate.identity(cfg, [row | {"video": "elsewhere/a.mp4"}]), "only the place is new"
    assert evaluate.identity(cfg, [row]) != evaluate.identity(cfg, [row | changed])


def test_swapped_says_when_there_is_nothing_to_swap_with(tmp_path):
    a, b = (str(picture(tmp_path / f"{name}.png", name)) for name in ("red", "blue"))
    rows = [{"id": f"a{i}", "images": [a], "kind": "choice"} for i in range(3)]
    others = [("b", [b], "choice"), ("two", [a, b], "choice"), ("number", [b], "number"), ("text", [], "choice")]
    rows += [{"id": key, "images": images, "kind": kind} for key, images, kind in others]
    donors = evaluate.swapped_pictures(rows, 1)
    assert [donors[key] for key in ("two", "number", "text")] == [None] * 3
    found = [donor["images"] for key, donor in donors.items() if donor and key[0] == "a"]
    assert found == [[b]] and donors["b"]["images"] == [a], "one blue photo can stand in for one red one"
    assert "no other row" in evaluate.controlled(rows[4], "swapped", None)


def test_swapped_works_with_boxes_in_the_resized_frame(model, tmp_path):
    big, wide = picture(tmp_path / "big.png", "red", (150, 90)), picture(tmp_path / "wide.png", "blue", (90, 60))
    data = write_rows(tmp_path / "rows.jsonl", [choice(0, big), choice(1, wide)])
    cfg = replace(
        TINY, dataset=str(data), limit=None, box_frame="resized", control="swapped", out=str(tmp_path / "out")
    )
    evaluate.main(cfg)
    assert [line["picture_of"] for line in lines_of(tmp_path / "out")] == ["r1", "r0"]


def test_swapped_asks_in_the_same_words(tmp_path):
    """The categories of a map are in the prompt, and come from the row's meta."""
    row, donor = (to_row(choice(i, picture(tmp_path / f"{c}.png", c)), folder=tmp_path, index=i, source="t")
                  for i, c in enumerate(("red", "blue")))  # fmt: skip
    row["meta"] |= {"map_names": ["sofa", "tv"], "resized_frame": [1, 2, 28]}
    asked = evaluate.controlled(row, "swapped", donor)
    assert asked["images"] == donor["images"] != row["images"] and "resized_frame" not in asked["meta"]
    assert build_prompt(asked, "spacer_map") == build_prompt(row, "spacer_map") and "'sofa', 'tv'" in build_prompt(asked, "spacer_map")


# ---------------------------------------------------------------- settings


def test_settings_left_out_are_those_that_the_checkpoint_was_trained_with(tmp_path, capsys):
    checkpoint = tmp_path / "demo" / "step_40"
    checkpoint.mkdir(parents=True)
    trained = {"style": "short", "box_frame": "resized", "min_pixels": 784, "max_pixels": 448 * 448}
    trained["max_completion_tokens"] = 160
    assert set(trained) == set(train_grpo.ASKED_WITH)
    (checkpoint / train_grpo.PROMPTING).write_text(json.dumps(trained))
    cfg = evaluate.with_trained_settings(Config(model=str(checkpoint), max_pixels=50_000))
    assert (cfg.style, cfg.min_pixels, cfg.max_pixels, cfg.box_frame, cfg.max_tokens) == (
        "short",
        784,
        50_000,
        "resized",
        160,
    )
    printed = capsys.readouterr().out
    assert "style short" in printed and "max_pixels" not in printed
    assert evaluate.default_out(replace(cfg, control="blind")) == "evaluations/scenes-demo-val_demo-step_40_blind"

    copied = shutil.copytree(checkpoint, tmp_path / "assets" / "my-model")  # alone, without its run
    assert evaluate.with_trained_settings(Config(model=str(copied))) == replace(
        Config(model=str(copied)),
        style="short",
        box_frame="resized",
        min_pixels=784,
        max_pixels=448 * 448,
        max_tokens=160,
    )
    cfg = evaluate.with_trained_settings(Config(model="random:tiny"))
    assert (cfg.style, cfg.min_pixels, cfg.box_frame, cfg.max_tokens) == ("spatialthinker", 512 * 512, "original", 2048)


def test_a_checkpoint_of_another_program_gets_the_defaults_and_a_spoilt_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"style": "short"}}))
    (tmp_path / "step_1").mkdir()
    assert evaluate.with_trained_settings(Config(model=str(tmp_path / "step_1"))).style == "spatialthinker"
    for text in ('["some other file"]', '{"style": "short"}', '{"style": "sho'):
        (tmp_path / "step_1" / "prompting.json").write_text(text)
        with pytest.raises(ValueError, match="prompting.json: not what train_grpo.py saves there: delete it, and give"):
            evaluate.with_trained_settings(Config(model=str(tmp_path / "step_1")))
    everything = replace(TINY, model=str(tmp_path / "step_1"))
    assert evaluate.with_trained_settings(everything) == everything, "nothing left out, nothing read"


def test_style_row_gives_way_where_rows_have_no_prompt_of_their_own():
    rows = [{"problem": "Image size: (4 x 4)\nQ. Where?"}, {"problem": None}]
    assert evaluate.with_worded_style(Config(style="row"), rows).style == "spatialthinker"
    assert evaluate.with_worded_style(Config(style="row"), rows[:1]).style == "row"
    assert evaluate.with_worded_style(Config(style="short"), rows).style == "short"


# ---------------------------------------------------------------- vLLM


def test_vllm_that_cannot_run_here_is_one_line(tmp_path, monkeypatch):
    cfg = replace(TINY, provider="vllm", out=str(tmp_path / "out"))
    monkeypatch.setattr(rollout, "vllm_kind", lambda: "cuda")
    with pytest.raises(ValueError, match="--device cpu: the installed vLLM runs on cuda.*leave --device out"):
        evaluate.main(replace(cfg, device="cpu"))
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.0")
    monkeypatch.setattr("answers.check_shadowed_kernels", lambda: None)  # or 0.1.0 of that is installed too
    with pytest.raises(ValueError, match="vllm 0.1.0 is installed, .*--provider hf"):
        evaluate.main(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_vllm_answers_as_hf_does_and_goes_on_after_a_cut(tmp_path):
    """The command line, on the CPU: a checkpoint with spiky weights, asked as its prompting.json says."""
    needs_vllm()
    policy, processor = new_policy()
    with torch.no_grad():
        policy.language.embed_tokens.weight *= 0.5  # not so sure that it says one thing to everything
    save_hf(policy, processor, tmp_path / "model")
    asked = {"style": "short", "box_frame": "resized", "min_pixels": 784, "max_pixels": 112 * 112}
    (tmp_path / "model" / "prompting.json").write_text(json.dumps(asked | {"max_completion_tokens": 12}))

    def ask() -> bytes:
        about = "--model model --dataset scenes:easy@val --limit 8 --batch 4 --max-prompt-tokens 300 --out vllm"
        command = [sys.executable, str(ROOT / "evaluate.py"), "--provider", "vllm", *about.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "vllm" / "transcripts.jsonl").read_bytes()

    whole = ask()
    evaluate.main(Config(model=str(tmp_path / "model"), dataset="scenes:easy@val", limit=8, out=str(tmp_path / "hf")))
    hf, vllm = lines_of(tmp_path / "hf"), lines_of(tmp_path / "vllm")
    assert len(vllm) == 8 and len({line["text"] for line in vllm}) > 5, "the answers must differ"
    assert [line["text"] for line in vllm] == [line["text"] for line in hf]
    assert {line["tokens"] for line in vllm + hf} == {12}, "as prompting.json says"
    (tmp_path / "vllm" / "transcripts.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    assert ask() == whole


# ---------------------------------------------------------------- one picture


def test_one_picture_is_answered_and_saved_with_the_boxes_of_the_answer(tmp_path, monkeypatch, capsys):
    row = scene_row(7, level="easy")
    row["images"][0].save(tmp_path / "photo.png")
    seen = []

    def generate(self, prompts, *, n, max_tokens, temperature, seed):
        seen.extend(prompts)
        return [[Completion([1], [0.0], response_text(row), True)] for _ in prompts]

    monkeypatch.setattr(rollout.HFRollout, "generate", generate)
    about = dict(image=str(tmp_path / "photo.png"), question=row["question"], options=tuple(row["options"]))
    evaluate.main(Config(**SMALL, **about, out=str(tmp_path / "out")))
    [prompt] = seen
    assert len(prompt.images) == 1 and row["question"] in build_prompt(prompt.row, "short")
    printed = capsys.readouterr().out
    assert f"answer: ({row['gold']}) {row['options']['ABCD'.index(row['gold'])]}" in printed
    assert json.dumps(row["scene"]) in printed
    with Image.open(tmp_path / "out" / "answer.png") as drawn:
        zoom = drawn.width // row["size"][0]
        assert drawn.size == (row["size"][0] * zoom, row["size"][1] * zoom)
        for colour, thing in zip(COLOURS, row["scene"]["objects"], strict=False):
            x1, y1, x2, y2 = (v * zoom for v in thing["bbox"])
            rgb = tuple(bytes.fromhex(colour[1:]))
            assert all(drawn.getpixel(xy) == rgb for xy in ((x1, y2), (x2, y1), (x2, y2), ((x1 + x2) // 2, y2)))
            assert drawn.getpixel((x1 - 3, y2)) != rgb


def test_one_picture_in_the_resized_frame(tmp_path, model, monkeypatch):
    """Boxes are pixels of the picture that the model sees; they are drawn on the one that was given."""
    photo = picture(tmp_path / "photo.png", "white", (600, 450))
    scene = {"objects": [{"id": "cup.1", "bbox": [70, 0, 140, 84]}], "relationships": []}
    asked = saying(monkeypatch, lambda row: f"<scene>{json.dumps(scene)}</scene>")
    evaluate.main(
        Config(**SMALL | {"box_frame": "resized"}, image=str(photo), question="What?", out=str(tmp_path / "out"))
    )
    [row] = asked
    assert row["size"] == (140, 84) and row["meta"]["original_size"] == [600, 450]
    red = tuple(bytes.fromhex(COLOURS[0][1:]))
    with Image.open(tmp_path / "out" / "answer.png") as drawn:
        assert drawn.size == (600, 450) and drawn.getpixel((300, 400)) == red and drawn.getpixel((290, 400)) != red


def test_an_open_question_and_an_answer_without_a_scene(tmp_path, monkeypatch, capsys):
    saying(monkeypatch, lambda row: "no tags here")
    evaluate.main(
        Config(**SMALL, image=str(picture(tmp_path / "p.png", "red")), question="What?", out=str(tmp_path / "out"))
    )
    assert "none that could be read" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "answer.png") as drawn:
        assert len(drawn.getcolors()) == 1


def test_any_boxes_can_be_drawn():
    boxes = [[50, 30, 10, 5], [10**400, -(10**400), 5, 5], [math.nan, math.inf, -math.inf, 3.5], [-50, -50, 500, 500],
             [7, 7, 7, 7], [True, 0, 0, 0]]  # fmt: skip
    objects = [{"id": f"thing.{i}", "bbox": box} for i, box in enumerate(boxes)]
    drawn = draw_boxes(Image.new("RGB", (60, 40), "white"), objects, (60, 40))
    assert drawn.width >= 448 and len(drawn.getcolors(10**6)) > len(boxes)


def test_boxes_of_a_resized_frame_land_on_the_original_picture():
    drawn = draw_boxes(
        Image.new("RGB", (500, 500), "white"), [{"id": "a.1", "bbox": [50, 0, 100, 100]}], (100, 100)
    )
    red = tuple(bytes.fromhex(COLOURS[0][1:]))
    assert (
        drawn.size == (500, 500) and drawn.getpixel((250, 400)) == red and drawn.getpixel((240, 400)) == (255, 255, 255)
    )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("change, named", [
    (dict(model=None), "--model is missing"),
    (dict(model="runs/none/such/step_9"), "runs/none/such/step_9"),
    (dict(dataset="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (dict(dataset="scenes:nolevel@val"), "unknown level 'nolevel'"),
    (dict(provider="carrier-pigeon"), "--provider carrier-pigeon: unknown"),
    (dict(control="deaf"), "--control deaf: unknown, choose none, blind or swapped"),
    (dict(style="haiku"), "'haiku' is unknown"),
    (dict(mode="upstream"), "--mode upstream: scenes:easy@val has no published rule, only the benchmarks"),
    (dict(dtype="int4"), "--dtype int4"),
    (dict(limit=0), "--limit 0: give 1 or more"),
    (dict(max_tokens=0), "--max-tokens 0: give 1 or more"),
    (dict(temperature=-1.0), "--temperature -1.0"),
    (dict(image="absent.jpg", question="Where?"), "--image absent.jpg: no such file"),
    (dict(image="absent.jpg"), "--image needs --question"),
    (dict(image=__file__, question="Where?"), "test_evaluate.py cannot be read"),
    (dict(rescore="absent.jsonl"), "--rescore absent.jsonl: no such file"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, change, named):
    with pytest.raises((ValueError, OSError)) as error:
        evaluate.main(replace(TINY, out=str(tmp_path / "out"), **change))
    assert named in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_single_option_is_one_line(tmp_path):
    about = {"image": str(picture(tmp_path / "p.png", "red")), "question": "Where?", "options": ("left",)}
    with pytest.raises(ValueError, match="1 options: give 2 to 26"):
        evaluate.main(replace(TINY, **about, out=str(tmp_path / "out")))


def test_an_unreadable_picture_is_one_line(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="text.jpg cannot be read"):
        evaluate.main(replace(TINY, image=str(tmp_path / "text.jpg"), question="Where?", out=str(tmp_path / "out")))


def test_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")

    small = ["--style", "short", "--min-pixels", "784", "--max-pixels", "12544", "--max-tokens", "4"]
    out = str(tmp_path / "out")
    run("--model", "random:tiny", "--dataset", "scenes:easy@val", "--limit", "3", *small, "--out", out)
    printed = capsys.readouterr()
    assert "chance" in printed.out and "row 3/3" in printed.err and len(lines_of(tmp_path / "out")) == 3
    with pytest.raises(SystemExit) as stop:
        run("--model", "random:tiny", "--image", "absent.jpg", "--question", "Where?", "--options", "left", "right")
    assert stop.value.code == "error: --image absent.jpg: no such file"
