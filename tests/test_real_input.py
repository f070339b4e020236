"""examples/real_input.py: its row builders and, where the real data is, what they make of it and the whole script.

    python -m pytest tests/test_real_input.py             # the tests on real data skip without ../shared/realdata
"""

import json
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data.dataset import load_rows
from examples import real_clips, real_input
from rewards import grade, solution_text, spatialthinker_reward

REAL = real_input.ROOT.parent / "shared" / "realdata"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")


# ---------------------------------------------------------------- without the data


def test_yolo_boxes_become_pixels_inside_the_photo():
    assert real_input.pixels([0.5, 0.5, 0.5, 0.25], (200, 100)) == [50, 38, 150, 62]
    assert real_input.pixels([0.99, 0.0, 0.1, 0.1], (200, 100)) == [188, 0, 200, 5]  # beyond two sides
    assert real_input.pixels([0.5, 0.5, 0.0001, 0.0001], (200, 100)) == [100, 50, 101, 51]  # never empty


def test_the_longest_class_names_on_both_sides_of_the_relation():
    names = ["dog", "hot dog", "table", "dining table", "cat"]
    assert real_input.named_classes("The hot dog is on the dining table.", "on", names) == ("hot dog", "dining table")
    with pytest.raises(ValueError, match="no COCO class on both sides of 'on'"):
        real_input.named_classes("The hot dog is on the roof.", "on", names)


def test_a_relation_is_gold_only_when_true_and_unambiguous():
    entry = dict(idx="7", image="a.jpg", width=9, height=9, relation="on", caption="The cat is on the dog.", label=1)
    cat, dog = ("cat", [0.2, 0.2, 0.2, 0.2]), ("dog", [0.6, 0.6, 0.4, 0.4])

    def relations(entry, boxes):
        return real_input.vsr_row(entry, boxes, ["cat", "dog"], Path("x"))["scene"]["relationships"]

    assert relations(entry, [dog, cat]) == [{"subject": "cat.1", "predicate": "on", "object": "dog.1"}]
    assert relations(entry | {"label": 0}, [dog, cat]) == []
    assert relations(entry, [dog, cat, dog]) == []


def test_unusable_folders_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vsr/dev_index.jsonl there: give the folder"):
        real_input.main(["--realdata", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    for name in real_input.NEEDED:
        (tmp_path / "real" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="inside the repository"):
        real_input.check_folders(tmp_path / "real", real_input.ROOT / "runs" / "x")
    with pytest.raises(ValueError, match="is not empty"):
        real_input.check_folders(tmp_path / "real", tmp_path)
    assert not (tmp_path / "out").exists() and not (real_input.ROOT / "runs" / "x").exists()


def test_letters_reward_is_a_share():
    assert real_input.letters("", {}) == {"total": 0.0}
    assert real_input.letters("ab 1é?", {}) == {"total": 0.5}


# ---------------------------------------------------------------- on the data


@real
def test_vsr_rows_are_what_the_index_says():
    rows = real_input.vsr_rows(REAL / "vsr")
    entries = {entry["idx"]: entry for entry in real_input.read_lines(REAL / "vsr" / "dev_index.jsonl")}
    assert len(rows) == len(entries) == 340
    for row in rows:
        said = row["options"]["AB".index(row["gold"])]
        assert said == ("right" if entries[row["id"]]["label"] else "wrong")
        with Image.open(row["images"][0]) as picture:
            assert picture.size == row["size"]
    photos = {row["meta"]["photo"] for row in rows}
    relations = sum(len(row["scene"]["relationships"]) for row in rows)
    assert (len(photos), relations, sum(len(row["scene"]["objects"]) for row in rows)) == (227, 167, 680)
    assert Counter(row["gold"] for row in rows) == {"A": 175, "B": 165}
    for row in rows:
        for relation in row["scene"]["relationships"]:
            words = [relation[end].removesuffix(".1").replace("_", " ") for end in ("subject", "object")]
            before, behind = entries[row["id"]]["caption"].lower().split(f" {relation['predicate']} ", 1)
            assert entries[row["id"]]["label"] and words[0] in before and words[1] in behind


@real
def test_vsr_parquet_reads_back_and_keeps_photos_apart(tmp_path):
    rows = real_input.vsr_rows(REAL / "vsr")[:60]
    assert real_input.write_vsr(rows, tmp_path) == ["train", "val"]  # compares what it reads with what it wrote
    train, val = load_rows(f"{tmp_path}@train"), load_rows(f"{tmp_path}@val")
    assert len(train) + len(val) == 60 and val
    assert not {zlib.crc32(row["images"][0]) for row in train} & {zlib.crc32(row["images"][0]) for row in val}
    # a response that says what the gold says earns all there is
    row = next(row for row in train if row["scene"]["relationships"])
    scene, answer = solution_text(row).split("\n")
    response = f"<observe>two things</observe>\n{scene}\n<think>so</think>\n{answer}"
    score = spatialthinker_reward(response, solution_text(row), row["size"], mode="upstream", options=row["options"])
    assert score["total"] == pytest.approx(1.0, abs=1e-6)


@real
def test_blink_rows_and_the_stored_answers():
    rows = real_input.blink_rows(REAL / "blink_spatial_relation")
    assert len(rows) == 143 and Counter(row["gold"] for row in rows) == {"A": 77, "B": 66}
    assert all(row["options"] == ["yes", "no"] and Path(row["images"][0]).is_file() for row in rows)
    assert {f"val_Spatial_Relation_{n}" for n in real_input.SHARED_PHOTOS} <= {row["id"] for row in rows}
    read = {}
    for folder in (REAL / "model_outputs" / "blink" / "saved_outputs").iterdir():
        stored = {entry["idx"]: entry for entry in json.loads((folder / "Spatial_Relation.json").read_text())["val"]}
        for row in rows:
            entry = stored[row["id"]]
            verdict = grade({**row, "kind": "choice"}, entry["full_prediction"])
            read[folder.name, row["id"]] = (verdict["answer"], entry["prediction"].strip("()"), row["gold"], verdict)
    assert len(read) == 5 * 143
    assert all(verdict["correct"] == (ours == gold) for ours, _, gold, verdict in read.values())
    apart = {key: (ours, theirs) for key, (ours, theirs, *_) in read.items() if (ours or "Z") != theirs}
    assert len(apart) <= 5, apart
    # where we differ, one of the two found no letter at all: never A against B
    assert all(ours is None or theirs == "Z" for ours, theirs in apart.values()), apart


@real
@pytest.mark.slow
def test_the_whole_script(tmp_path, monkeypatch, capfd):
    small = real_input.SMALL.replace("--prompts-per-step 8", "--prompts-per-step 4")
    small = small.replace("--group-size 4", "--group-size 2").replace("tokens 32", "tokens 12")
    assert small.count("tokens 12") == 1 and "step 4 --group-size 2" in small
    monkeypatch.setattr(real_input, "SMALL", small)
    out, before = tmp_path / "out", set(real_input.ROOT.glob("runs/real*"))
    real_input.main(["--realdata", str(REAL), "--out", str(out), "--vsr", "30", "--blink", "4"])
    printed = capfd.readouterr().out
    assert "0 bad" in printed and "QwenVLMax         143" in printed

    flat, moved = (real_input.read_lines(out / "runs" / name / "metrics.jsonl") for name in ("real", "real-letters"))
    assert len(flat) == len(moved) == real_input.STEPS
    assert all(line["optim/grad_norm"] > 1e-3 for line in moved)
    assert moved[-1]["loss/kl"] > 0  # away from the frozen start
    assert all(line["rollout/logprob_gap"] < 1e-4 for line in flat + moved)
    samples = real_input.read_lines(out / "runs" / "real" / "samples.jsonl")
    assert all(line["id"].startswith("val_Spatial_Reasoning") for line in samples)
    answers = real_input.read_lines(out / "blink-random" / "transcripts.jsonl")
    assert len(answers) == 4 and not any("skipped" in line for line in answers)
    assert set(real_input.ROOT.glob("runs/real*")) == before  # all of it went to --out


@real
@pytest.mark.slow
def test_the_whole_script_on_clips(tmp_path, monkeypatch):
    small = real_clips.SMALL.replace("step 4 --group-size 4", "step 2 --group-size 2").replace("tokens 32", "tokens 8")
    assert "step 2 --group-size 2" in small and "tokens 8" in small
    monkeypatch.setattr(real_clips, "SMALL", small)
    out, before = tmp_path / "out", set(real_input.ROOT.glob("runs/*"))
    monkeypatch.setenv("SPATIAL_GRPO_CLIPS", "")  # main sets its own: back to what it was afterwards
    real_clips.main(["--realdata", str(REAL), "--out", str(out), "--engines", "hf", "--limit", "2"])
    lines = real_input.read_lines(out / "runs" / "hf" / "metrics.jsonl")
    assert len(lines) == real_clips.STEPS and all(line["optim/grad_norm"] > 0 for line in lines)
    assert all(0 < line["shuffled/accuracy"] < 1 and line["rollout/logprob_gap"] < 0.052 for line in lines)
    assert len(list((out / "clips").glob("*.npz"))) == 1, "the walk; ready frames are not kept"
    answers = real_input.read_lines(out / "asked" / "transcripts.jsonl")
    assert len(answers) == 2 and not any("skipped" in line for line in answers)
    assert set(real_input.ROOT.glob("runs/*")) == before
