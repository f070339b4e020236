"""data/benchmarks.py: every entry of the table on a clone of its hub repository in small, through the `datasets` loader.

python -m pytest tests/test_benchmarks.py
"""

import csv
import gzip
import json
import re
from pathlib import Path

import pytest
from benchmark_fixtures import FIXTURES, png, write

from data.benchmarks import BENCHMARKS, LEFT_OUT, bench_row, chosen, listing, load_benchmark
from data.options import split_options
from data.prompts import build_prompt
from rewards import MODES, grade

REAL = Path("/work/shared/realdata")


@pytest.fixture(scope="session")
def clones(tmp_path_factory):
    """root/NAME for every benchmark; the loader's cache beside it."""
    import datasets

    root = tmp_path_factory.mktemp("clones")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        for name, bench in BENCHMARKS.items():
            write(name, bench.split, root / "data" / name)
        yield root / "data"


@pytest.fixture(scope="session")
def rows_of(clones):
    found = {}

    def load(name):
        if name not in found:
            found[name] = load_benchmark(name, root=str(clones))
        return found[name]

    return load


def records(name, configs):
    fixture = FIXTURES[name]
    return fixture if isinstance(fixture, list) else [r for config in configs for r in fixture[config or "default"]]


def dresses(row) -> list[str]:
    """Five ways to say gold."""
    gold, thought = row["gold"], "<think>17 or not?</think>\n"
    if row["kind"] != "choice":
        return [gold, f"{gold}.", f"<answer>{gold}</answer>", f"{thought}<answer> {gold} </answer>", f"Answer: {gold}"]
    text = row["options"][ord(gold) - 65]
    return [gold, f"({gold}) {text}", text, f"The answer is {gold}.", f"{thought}<answer>({gold}) {text}</answer>"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_gold_in_five_dresses_is_right_and_all_else_is_wrong(rows_of, name):
    rows = rows_of(name)
    assert len(rows) == len(records(name, BENCHMARKS[name].configs))
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        for text in dresses(row):
            assert grade(row, text)["correct"] == 1, (row, text)
        for i, option in enumerate(row["options"]):
            if (letter := chr(65 + i)) != row["gold"]:
                for text in (letter, f"({letter}) {option}", f"<answer>{letter}</answer>"):
                    assert grade(row, text) == {"correct": False, "answer": letter}, (row, text)
        verdict = grade(row, "")
        assert verdict["correct"] == 0 and verdict["answer"] is None, row
        assert isinstance(grade(row, dresses(row)[0], mode=MODES[0])["correct"], bool | float)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_are_whole_and_ask_what_the_records_ask(rows_of, name):
    bench = BENCHMARKS[name]
    for row in rows_of(name):
        assert row["source"] == name and row["meta"]["rule"] == bench.rule and not row.get("video")
        assert 1 <= len(row["images"]) <= (5 if bench.video or name == "spatialscore" else bench.images), row["images"]
        assert row["size"] == (40, 30)
        prompt = build_prompt(row, "spatialthinker")
        for option in row["options"]:
            assert sum(line.endswith(f") {option}") for line in prompt.splitlines()) == 1, prompt
        left = re.search(r"Options:\s+Options:|Select from|directly with only|^\(A\)", row["question"], re.M)
        assert not left, row["question"]
        assert ("frames of a video" in prompt) == (len(row["images"]) == 5)
        for key in (*bench.macro, *bench.by, *bench.together):
            assert key == "category" or key in row["meta"], (name, key)


def test_what_single_entries_make_of_their_records(rows_of):
    def of(name, n):
        row = rows_of(name)[n]
        return row["kind"], row["gold"], row["options"], row["category"]

    assert of("cv-bench", 0) == ("choice", "C", ["0", "3", "2", "1"], "Count") and of("cv-bench-3D", 0)[1] == "B"
    assert rows_of("blink-depth")[0]["question"] == "Look closely, points A and B are marked. Which of these is it?"
    assert [row["kind"] for row in rows_of("realworld_qa")] == ["choice", "number", "yes_no", "text"]
    assert of("realworld_qa", 0)[:3] == ("choice", "C", ["Left", "Right", "Straight"])
    assert of("spatialbench", 2)[:3] == ("choice", "B", ["the sofa", "the table", "the lamp", "the door"])
    assert of("mmvp", 1)[:3] == ("choice", "B", ["Open", "Closed"])
    assert rows_of("mmvp")[0]["question"] == "Are the wings open or closed?"
    assert [row["meta"]["pair"] for row in rows_of("mmvp")] == [0, 0, 1, 1]
    assert of("robospatial", 0)[:2] == ("choice", "A") and len(rows_of("robospatial")[0]["images"]) == 2
    assert len(rows_of("robospatial_rgb")[0]["images"]) == 1 and len(rows_of("lego")[0]["images"]) == 2
    assert of("hallusionbench", 0) == ("choice", "A", ["Yes", "No"], "chart")
    assert len({row["meta"]["figure"] for row in rows_of("hallusionbench")}) == 3
    assert of("mm-star", 0)[2] == ["the sofa", "the table", "the lamp", "the door"]
    assert of("mindcube", 1)[3] == "around" and rows_of("mindcube")[0]["question"].startswith("Based on")
    assert of("vsi-bench", 2) == ("mra", "3", [], "object_counting")
    assert rows_of("vsi-bench")[1]["meta"]["task"] == "object_rel_direction"
    said = [build_prompt(row, "spacer_map") for row in (rows_of("vsi-bench")[0], rows_of("sti-bench")[0])]
    assert "'computer mouse', 'radiator', 'telephone'" in said[0] and "<map>" in said[0] and "map" not in said[1]
    assert len(of("sti-bench", 0)[2]) == 5 and "From 1.5 seconds to 4.0 seconds." in rows_of("sti-bench")[0]["question"]
    assert [row["kind"] for row in rows_of("spar-bench")] == ["mra", "mra", "choice", "view_change", "choice"]
    assert "scale from 0 to 1000" in rows_of("spar-bench")[2]["question"]
    assert [row["kind"] for row in rows_of("tempcompass")] == ["choice", "yes_no", "yes_no", "choice", "choice"]
    assert of("tempcompass", 4)[1:3] == ("B", ["It falls.", "It rises."])
    assert rows_of("tempcompass")[3]["meta"] | {} == {"aspect": "order", "format": "caption_matching", "rule": "tempcompass",
                                                      "raw_gold": "Caption B: First a bowl, then a cup."}  # fmt: skip
    assert of("longvideobench", 0)[:3] == ("choice", "B", ["a clock", "a map", "a mirror"])
    assert [row["kind"] for row in rows_of("spatialscore")] == ["choice", "yes_no", "mra", "length", "number"]
    assert rows_of("stvqa")[0]["scene"]["objects"][0]["id"] == "cup.1"
    dsr = rows_of("3dsrbench-circular")
    assert [row["meta"]["circular"] for row in dsr[:4]] == ["AAAAAAAA", "AAAAAAAA", "AAAAAAAA-flip", "AAAAAAAA-flip"]
    assert [row["meta"]["flip"] for row in dsr[:4]] == ["AAAAAAAA", "AAAAAAAA-1", "AAAAAAAA", "AAAAAAAA-1"]


@pytest.mark.parametrize("text, question, options", [
    ("Which?\n(A) one\n(B) two", "Which?", ["one", "two"]),
    ("Which? (a) one (b) two", "Which?", ["one", "two"]),
    ("Which?\n\nA. one\nB. two\nPlease answer directly with only the letter.", "Which?", ["one", "two"]),
    ("Which?\nOptions: A: one., B: two., C: three.", "Which?", ["one.", "two.", "three."]),
    ("Which? Choices:\nA) one\nB) two", "Which?", ["one", "two"]),
    ("Which?\nSentence A: It falls.\nSentence B: It rises.", "Which?", ["It falls.", "It rises."]),
    ("Which?\nOption 1: up\nOption 2: down", "Which?", ["up", "down"]),
    ("An example: (A) x (B) y\nNow which?\n(A) one\n(B) two", "An example: (A) x (B) y\nNow which?", ["one", "two"]),
    ("Points A and B are marked. Which is closer?", "Points A and B are marked. Which is closer?", []),
    ("Is it 1. or 2. here?", "Is it 1. or 2. here?", []),
    ("Which?\n(A) one\n(B) two\nThe boxes are in pixels.", "Which?\nThe boxes are in pixels.", ["one", "two"]),
    ("What is U.S.A. short for?", "What is U.S.A. short for?", []),
    ("Is it? Select from the following choices.(A) yes (B) no", "Is it?", ["yes", "no"]),
])  # fmt: skip
def test_options_in_a_text(text, question, options):
    assert split_options(text) == (question, options)


# ---------------------------------------------------------------- places


def test_a_table_of_jsonl_or_parquet_and_limit(tmp_path, rows_of):
    (tmp_path / "a.png").write_bytes(png())
    lines = [{"image": "a.png", "text": "Is it?", "answer": "Yes", "category": "existence"},
             {"image": "a.png", "text": "How many?", "answer": "3", "category": "counting"}]  # fmt: skip
    file = tmp_path / "spatialbench.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    for root in (file, tmp_path):
        rows = load_benchmark("spatialbench", root=str(root))
        assert [row["images"] for row in rows] == [[str(tmp_path / "a.png")]] * 2 and rows[0]["size"] == (40, 30)
    assert len(load_benchmark("spatialbench", root=str(file), limit=1)) == 1


def test_a_row_knows_its_groups_though_limit_cuts_them(clones, rows_of):
    for name, key in (("mmvp", "pair"), ("hallusionbench", "figure"), ("3dsrbench-circular", "both")):
        [row], rows = load_benchmark(name, root=str(clones), limit=1), rows_of(name)
        whole = [other["meta"][key] for other in rows].count(row["meta"][key])
        assert row["meta"]["rows_of"][key] == whole and row == rows[0]
        assert name != "mmvp" or whole == 2


def test_hub_tables_without_a_readme_and_the_authors_own_files(tmp_path):
    folder = write("mm-star", "val", tmp_path / "MMStar")
    (folder / "README.md").unlink()
    (folder / "default").rename(folder / "data")
    assert len(load_benchmark("mm-star", root=str(tmp_path))) == 2  # by the repository's name
    assert len(load_benchmark("mm-star", root=str(folder))) == 2  # the clone itself
    raw = tmp_path / "mindcube" / "data" / "raw" / "MindCube_tinybench.jsonl"
    raw.parent.mkdir(parents=True)
    record = FIXTURES["mindcube"]["tiny"][0] | {"images": ["other_all_image/among/a.png"]}
    raw.write_text(json.dumps(record) + "\n")
    (tmp_path / "mindcube/data/other_all_image/among").mkdir(parents=True)
    (tmp_path / "mindcube/data/other_all_image/among/a.png").write_bytes(png())
    assert load_benchmark("mindcube", root=str(tmp_path))[0]["size"] == (40, 30)


def test_one_file_for_several_configs_is_read_once(tmp_path):
    lines = [line for config in FIXTURES["tempcompass"].values() for line in config]
    (tmp_path / "tempcompass.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_benchmark("tempcompass", root=str(tmp_path))
    assert [row["meta"]["format"] for row in rows] == ["multi-choice", "yes_no", "yes_no", *["caption_matching"] * 2]


def test_videos_are_frames_a_path_or_missing(tmp_path):
    folder = write("vsi-bench", "test", tmp_path / "vsi-bench")
    row = load_benchmark("vsi-bench", root=str(tmp_path), limit=1, frames=3)[0]
    assert [Path(frame).stem[-1] for frame in row["images"]] == ["0", "2", "4"] and "video" not in row
    frames = folder / "scannet" / "scene0000_00"
    for frame in frames.iterdir():
        frame.unlink()
    frames.rmdir()
    (folder / "scannet" / "scene0000_00.mp4").write_bytes(b"video")
    row = load_benchmark("vsi-bench", root=str(tmp_path), limit=1)[0]
    assert row["images"] == [] and row["video"] == str(folder / "scannet" / "scene0000_00.mp4")


@pytest.mark.parametrize("change, named", [
    (lambda r: r.pop("answer"), "row 1: no column 'answer': hunarbatra/3DSRBench has it"),
    (lambda r: r.update(answer="the bed"), "row 1: answer 'the bed' is none of"),
    (lambda r: r.update(choices=None), "row 1: "),
    (lambda r: r.update(prompt=" "), "row 1: the question is empty"),
])  # fmt: skip
def test_a_bad_record_is_named(tmp_path, change, named):
    record = {"image": "a.png", "prompt": "Which?", "choices": ["x", "y"], "answer": "A", "task": "height"}
    change(record)
    (tmp_path / "rows.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(f"rows.jsonl, {named}")) as error:
        load_benchmark("3dsrbench", root=str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(error.value)


def test_a_cut_file_and_a_gold_beyond_the_options_are_named(tmp_path):
    (tmp_path / "spatialscore.json").write_text('[{"index": 1, "quest')
    with pytest.raises(ValueError, match="spatialscore.json: not JSON, or cut off"):
        load_benchmark("spatialscore", root=str(tmp_path))
    record = FIXTURES["longvideobench"][0] | {"correct_choice": 77}
    (tmp_path / "lvb_val.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="lvb_val.json, row 1: answer 'number 77' is none of"):
        load_benchmark("longvideobench", root=str(tmp_path))


def test_missing_places_say_what_to_do(tmp_path, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_benchmark("mmvp", root=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="no mmvp there: clone hunarbatra/MMVP into .*, or give mmvp.jsonl"):
        load_benchmark("mmvp", root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hunarbatra/MMVP@train: not loaded .*reach the Hub.*--data-root"):
        load_benchmark("mmvp")


def test_names():
    assert chosen("mmvp,cv-bench,mmvp") == ["mmvp", "cv-bench"] and chosen("rows.jsonl@val") == ["rows.jsonl@val"]
    every = chosen("all-image,all-video")
    assert set(BENCHMARKS) - set(every) == {"cv-bench-2D", "cv-bench-3D"}
    assert chosen("all-video") == ["vsi-bench", "sti-bench", "video-mme", "tempcompass", "longvideobench"]
    for name in LEFT_OUT:
        with pytest.raises(ValueError, match=f"--dataset {name}: left out"):
            chosen(name)
    lines = "\n".join(listing())
    assert all(re.search(rf"^{re.escape(name)} ", lines, re.M) for name in BENCHMARKS) and "2638" in lines


# ---------------------------------------------------------------- the real questions, where they are at hand


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/realdata is not here")
@pytest.mark.parametrize("name, file", [
    ("viewspatial", "ViewSpatial-Bench.json.gz"), ("spatialscore", "SpatialScore-Hard.json"),
])  # fmt: skip
def test_every_real_question_is_read(name, file):
    data = (REAL / "benchmark_qa" / file).read_bytes()
    items = json.loads(gzip.decompress(data) if file.endswith("gz") else data)
    rows = [bench_row(name, BENCHMARKS[name], item, n, [], 8) for n, item in enumerate(items)]
    for row in rows:
        for text in dresses(row):
            assert grade(row, text)["correct"] == 1, (row, text)
    choices = [row for row, item in zip(rows, items) if item.get("question_type") == "multi-choice" or name == "viewspatial"]
    assert all(row["kind"] == "choice" for row in choices), [row for row in choices if row["kind"] != "choice"][:3]


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/realdata is not here")
def test_every_real_question_of_tempcompass_and_hallusionbench_is_read():
    for config, file in (("multi-choice", "TempCompass_multi-choice.json.gz"), ("yes_no", "TempCompass_yes_no.json.gz")):
        videos = json.loads(gzip.decompress((REAL / "benchmark_qa" / file).read_bytes()))
        items = [{"video_id": video, "dim": dim, **q}
                 for video, dims in videos.items() for dim, qs in dims.items() for q in qs]  # fmt: skip
        for n, item in enumerate(items):
            row = bench_row("tempcompass", BENCHMARKS["tempcompass"], item, n, [], 8)
            assert row["kind"] == {"multi-choice": "choice", "yes_no": "yes_no"}[config], item
            assert row["meta"]["format"] == config
            assert all(grade(row, text)["correct"] == 1 for text in dresses(row)), row
    items = json.loads((REAL / "benchmark_qa" / "HallusionBench.json").read_text())
    rows = [bench_row("hallusionbench", BENCHMARKS["hallusionbench"], item, n, [], 8) for n, item in enumerate(items)]
    assert len(rows) == 1129 and {row["gold"] for row in rows} == {"A", "B"}


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/realdata is not here")
def test_the_real_blink_spatial_relation_end_to_end(tmp_path):
    """143 questions and photos in the hub's columns, the answers that GPT-4o gave, and the authors' own scores."""
    place, gold = REAL / "blink_spatial_relation", json.loads((REAL / "blink_spatial_relation/val_answers.json").read_text())
    with open(place / "prompt.csv", newline="") as file:
        items = list(csv.DictReader(file))
    lines = [{"idx": item["idx"], "prompt": item["prompt"], "choices": ["yes", "no"], "answer": gold[item["idx"]],
              "image_1": str(place / "images" / f"{item['idx']}.jpg")} for item in items]  # fmt: skip
    (tmp_path / "blink-spatial.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_benchmark("blink-spatial", root=str(tmp_path))
    assert len(rows) == 143 and all(row["size"] for row in rows) and [row["gold"] for row in rows].count("A") == 77
    assert not any("(A)" in row["question"] or "choices" in row["question"] for row in rows)
    outputs = REAL / "model_outputs" / "blink" / "saved_outputs" / "GPT4o" / "Spatial_Relation.json"
    said = {item["idx"]: item for item in json.loads(outputs.read_text())["val"]}
    for row in rows:
        item = said[row["id"].split("-", 1)[1]]
        assert grade(row, item["full_prediction"])["correct"] == (item["prediction"] == item["answer"]), item
