"""data/dataset.py, rows.py, prompts.py, pictures.py: schema, sources, frames, prompts, encoding, bad input.

    python -m pytest tests/test_dataset.py
"""
import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.dataset import check, encode, encode_rows, expand, load_rows
from data.pictures import BrokenPicture, decode_picture, frame_size, process_image, resized_size
from data.prompts import PROMPTS, build_messages, build_prompt, options_text
from data.rows import FORMATS, ROW_KEYS, clean_scene, stvqa_record, to_resized_frame, to_row, write_stvqa
from rewards import grade

ROOT = Path(__file__).resolve().parent.parent
VECTORS = Path(__file__).parent / "vectors" / "spatialthinker.jsonl"
REAL_QWEN = ROOT.parent / "shared" / "realdata" / "qwen" / "Qwen2.5-VL-7B-Instruct"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
            "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
            "<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SMALL = dict(min_pixels=56 * 56, max_pixels=112 * 112)  # loader bounds that keep the tests quick


@pytest.fixture(scope="module")
def processor():
    """A Qwen2.5-VL processor with a byte-level tokenizer made on the spot: no download."""
    from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(["where is the red cube? Options: (A) left (B) right"], trainer)
    tokenizer = Qwen2TokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL)
    size = {"shortest_edge": 56 * 56, "longest_edge": 2048 * 2048}
    return Qwen2_5_VLProcessor(image_processor=Qwen2VLImageProcessor(size=size), tokenizer=tokenizer,
                               video_processor=Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def picture(width=100, height=60, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scene():
    return {"objects": [{"id": "man.1", "bbox": [10, 5, 40, 50]}, {"id": "bike.1", "bbox": [35.5, 20, 90, 58]}],
            "relationships": [{"subject": "man.1", "predicate": "left of", "object": "bike.1"}]}


def make_row(**changes) -> dict:
    row = dict(id="r0", source="test", category="relation", images=[png(picture())], question="Where is the man?",
               options=["left", "right"], gold="A", kind="choice", size=(100, 60), scene=scene(), map=None,
               problem=None, style=None, meta={"level": "easy", "rating": 7})
    return {**row, **changes}


def stvqa(**changes) -> dict:
    """A row of STVQA-7K as its columns say (spec 3.1), written by hand and not by our writer."""
    solution = f"<scene>{json.dumps(scene())}</scene>\n<answer>(A) left</answer>"
    record = dict(image_id="2331", images={"bytes": png(picture()), "path": None}, category="relation", level="easy",
                  problem="<image> Words. Image size: (100 x 60)\nQ. Where is the man?",
                  question_only="Where is the man?", options=["left", "right"],
                  answer_only="A", answer_option_text=solution, rating=7)
    return {**record, **changes}


def write_parquet(path: Path, records: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def own(folder: Path, **changes) -> dict:
    picture().save(folder / "a.png")
    return {"images": ["a.png"], "question": "Where is the man?", "options": ["left", "right"], "gold": "A", **changes}


def vectors(function: str) -> list[dict]:
    if not VECTORS.exists():
        pytest.skip(f"{VECTORS} is not there")
    found = [v for v in map(json.loads, VECTORS.read_text(encoding="utf-8").splitlines()) if v["function"] == function]
    assert found, f"no vector of {function}"
    return found


# ---------------------------------------------------------------- published behaviour

def test_resized_size_agrees_with_the_published_loader():
    for vector in vectors("loader.process_image_size"):
        size = resized_size(vector["input"]["width"], vector["input"]["height"],
                            min_pixels=vector["input"]["min_pixels"], max_pixels=vector["input"]["max_pixels"])
        assert list(size) == vector["expected"], vector["id"]
    # 100 x 60 times 6.6098 is 660.98 x 396.59: truncated, as spec 1.4 says; no vector tells that from rounding.
    assert resized_size(100, 60, min_pixels=512 * 512, max_pixels=2048 * 2048) == (660, 396)


# Published: without a picture column a literal "<image>" stays in the text the model reads. Ours takes it out.
MENDED_MESSAGES = {"loader.build_messages-006": [{"role": "user", "content": "hello"}]}


def test_build_messages_agrees_with_the_published_loader(tmp_path):
    for vector in vectors("loader.build_messages"):
        asked = vector["input"]
        images = [png(picture())] if asked["has_image"] and not asked["text_only"] else []
        row, style = make_row(images=images, problem=asked["problem"]), "row"
        if asked["format_prompt"]:  # theirs joins format prompt and question by one space: as a prompt file of ours
            file = tmp_path / f"{vector['id']}.txt"
            file.write_text(asked["format_prompt"].strip() + " {question}")
            row, style = make_row(images=images, question=asked["problem"], options=[]), str(file)
        assert build_messages(row, style) == MENDED_MESSAGES.get(vector["id"], vector["expected"]), vector["id"]


def test_a_picture_is_never_dropped_for_want_of_an_image_mark():
    # Published: a prompt without a literal "<image>" silently becomes text only (spec 3.2, step 4).
    content = build_messages(make_row(problem="no mark here"), "row")[0]["content"]
    assert content == [{"type": "image"}, {"type": "text", "text": "no mark here"}]


# ---------------------------------------------------------------- schema and sources

def test_stvqa_columns_become_a_row(tmp_path):
    row, second = load_rows(str(write_parquet(tmp_path / "train-0.parquet", [stvqa(), stvqa()])))
    assert row == {**make_row(), "id": "2331-0", "source": str(tmp_path / "train-0.parquet"), "scene": scene(),
                   "problem": stvqa()["problem"], "images": [stvqa()["images"]["bytes"]]}
    assert second["id"] == "2331-1"  # one picture may carry several questions


def test_every_form_of_picture_is_read(tmp_path):
    picture().save(tmp_path / "a.png")
    data = png(picture())
    forms = [{"bytes": data, "path": "gone.jpg"}, {"bytes": None, "path": "a.png"}, "a.png", data, ["a.png"],
             [{"bytes": data, "path": None}], str(tmp_path / "a.png")]
    for number, form in enumerate(forms):
        row, = load_rows(str(write_parquet(tmp_path / f"{number}.parquet", [stvqa(images=form)])))
        assert row["size"] == (100, 60), form
        assert decode_picture(row["images"][0], row_id="x").tobytes() == picture().tobytes(), form


def test_folder_file_and_split_find_the_same_rows(tmp_path, monkeypatch):
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", [stvqa(image_id="1")])
    write_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", [stvqa(image_id="2")])
    val = write_parquet(tmp_path / "hub" / "data" / "val-00000-of-00001.parquet", [stvqa(image_id="3")])
    flat = tmp_path / "flat@home"  # an @ in a folder's name is no split
    flat.mkdir()
    write_jsonl(flat / "train.jsonl", [own(flat, id="4")])

    def ids(source, **limit):
        return [row["id"] for row in load_rows(str(source), **limit)]

    assert ids(tmp_path / "hub") == ids(f"{tmp_path}/hub@train") == ["1-0", "2-1"]
    assert ids(f"{tmp_path}/hub@val") == ids(val) == ids(f"{val}@val") == ["3-0"]
    assert ids(flat) == ids(f"{flat}@train") == ["4"]
    assert ids(tmp_path / "hub", limit=1) == ["1-0"]
    monkeypatch.chdir(tmp_path)
    assert ids("hub") == ["1-0", "2-1"]


def test_hub_rows_load_with_a_broken_picture_among_them(monkeypatch):
    import datasets

    records = [stvqa(), stvqa(images={"bytes": b"not a picture", "path": None})]
    features = datasets.Features({**datasets.Dataset.from_list(records).features, "images": datasets.Image()})
    table = datasets.Dataset.from_list(records, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    rows = load_rows("someone/stvqa@val")
    assert asked == [("someone/stvqa", "val")] and [row["id"] for row in rows] == ["2331-0", "2331-1"]
    assert isinstance(rows[0]["images"][0], bytes)  # undecoded
    assert rows[1]["size"] == (100, 60)  # from the printed size, since the picture has none
    with pytest.raises(BrokenPicture, match="row 2331-1: picture of 13 bytes cannot be read"):
        decode_picture(rows[1]["images"][0], row_id=rows[1]["id"])


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import datasets

    def fail(name, split):
        raise ConnectionError("no route\n to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FileNotFoundError) as error:
        load_rows("someone/nowhere")
    assert "someone/nowhere@train" in str(error.value) and "no route to host" in str(error.value)
    assert "\n" not in str(error.value) and "local folder" in str(error.value)


def test_own_rows_need_three_keys(tmp_path):
    (tmp_path / "sub").mkdir()
    picture(30, 20).save(tmp_path / "sub" / "b.png")
    file = write_jsonl(tmp_path / "mine.jsonl", [
        {"images": "sub/b.png", "question": "How many men?", "gold": 2, "kind": "number"},
        own(tmp_path, id="x", scene=scene(), size=[100, 60], style="short", meta={"task": "t"}),
        {"images": [], "question": "Say yes", "gold": "yes"}])
    number, choice, text = load_rows(str(file))
    assert (number["gold"], number["kind"], number["size"], number["id"]) == ("2", "number", (30, 20), "mine-0")
    assert number["images"] == [str(tmp_path / "sub" / "b.png")]
    assert (choice["id"], choice["kind"], choice["scene"], choice["style"]) == ("x", "choice", scene(), "short")
    assert (text["kind"], text["size"], text["images"], text["options"]) == ("text", None, [], [])
    assert all(set(row) == set(ROW_KEYS) for row in (number, choice, text))


def test_procedural_rows_come_from_data_scenes():
    pytest.importorskip("data.scenes")
    rows = load_rows("scenes@val", limit=3)
    assert len({row["id"] for row in rows}) == 3 and all(set(ROW_KEYS) <= set(row) for row in rows)
    assert not {row["id"] for row in rows} & {row["id"] for row in load_rows("scenes@train", limit=3)}


# ---------------------------------------------------------------- bad input: one line with file, row and cure

def gold(**changes) -> str:
    return f"<scene>{json.dumps({**scene(), **changes})}</scene>\n<answer>(A) left</answer>"


def thing(box, name="man.1") -> dict:
    return {"objects": [{"id": name, "bbox": box}, {"id": "bike.1", "bbox": [1, 2, 3, 4]}]}


BAD_STVQA = {
    "letter out of range": (dict(answer_only="C", answer_option_text=""), "gold letter 'C' is out of range A to B"),
    "no letter": (dict(answer_only=None), "''"),
    "two letters": (dict(answer_only="B"), "answer_only says 'B'"),
    "scene no json": (dict(answer_option_text="<scene>{oops</scene>"), "not a JSON object"),
    "wrong key": (dict(answer_option_text=gold(relations=[])), "correct its keys"),
    "no lists": (dict(answer_option_text=gold(objects={})), "not lists"),
    "three numbers": (dict(answer_option_text=gold(**thing([1, 2, 3]))), "four numbers"),
    "nan": (dict(answer_option_text=gold(**thing([1, 2, float("nan"), 4]))), "four numbers"),
    "huge": (dict(answer_option_text=gold(**thing([1, 2, 10 ** 400, 4]))), "four numbers"),
    "text": (dict(answer_option_text=gold(**thing([1, 2, "3", 4]))), "four numbers"),
    "truth value": (dict(answer_option_text=gold(**thing([True, 2, 3, 4]))), "four numbers"),
    "inverted": (dict(answer_option_text=gold(**thing([9, 2, 3, 4]))), "x1 < x2"),
    "outside": (dict(answer_option_text=gold(**thing([1, 2, 3, 400]))), "the picture is 100 x 60"),
    "double id": (dict(answer_option_text=gold(**thing([1, 2, 3, 4], "bike.1"))), "used twice"),
    "loose end": (dict(answer_option_text=gold(**thing([1, 2, 3, 4], "dog.1"))), "'man.1'"),
    "no predicate": (dict(answer_option_text=gold(relationships=[{"subject": "man.1"}])), "predicate"),
    "no question": (dict(question_only=" "), "question is empty"),
    "lettered": (dict(options=["(A) left", "(B) right"]), "carry their letters"),
    "one option": (dict(options=["left"]), "1 options"),
    "no picture": (dict(images={"bytes": None, "path": None}), "a picture is"),
}


@pytest.mark.parametrize("name", BAD_STVQA)
def test_a_bad_stvqa_row_is_named(name, tmp_path):
    changes, words = BAD_STVQA[name]
    file = write_jsonl(tmp_path / "train.jsonl", [
        {**stvqa(images="a.png"), "id": None}, {**stvqa(images="a.png"), **changes}])
    picture().save(tmp_path / "a.png")
    with pytest.raises(ValueError) as error:
        load_rows(str(file))
    message = str(error.value)
    assert message.startswith(f"{file}, row 2: ") and words in message and "\n" not in message, message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: st.lists(part, max_size=5) | st.dictionaries(st.text(max_size=4), part, max_size=3), max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.integers(0, 3), st.integers(0, 20), JSON_VALUES)
def test_any_value_anywhere_gives_a_row_or_one_value_error(ours, where, key, value):
    graph = scene()
    record = dict(id="x", images=[], question="q", options=["left", "right"], gold="A", scene=graph, size=[100, 60],
                  category="c", source="s", kind="choice", problem="p", style="short", map=None, meta={})
    if not ours:
        record = {**stvqa(images=[]), "answer_option_text": gold()}
    target = (record, graph, graph["objects"][0], graph["relationships"][0])[where]
    target[list(target)[key % len(target)]] = value
    if not ours and where:
        record["answer_option_text"] = gold(**graph)
    try:
        row = to_row(record, folder=Path("."), index=0, source="s")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert set(row) == set(ROW_KEYS) and row["id"] and row["gold"]
        build_prompt({**row, "style": None}, "short")


BAD_OWN = {
    "missing column": ({"gold": ...}, "missing column gold: own rows need images, question, gold"),
    "unknown key": ({"answers": "A"}, "unknown key answers"),
    "kind": ({"kind": "guess"}, "kind 'guess' is unknown"),
    "lower-case letter": ({"gold": "a"}, "gold letter 'a'"),
    "size": ({"size": [60, 100]}, "size is [60, 100], the picture (100, 60)"),
    "options": ({"options": "left, right"}, "not a list of texts"),
    "double id": ({"id": "first"}, "already that of row 1"),
    **{f"{kind} {gold}": ({"kind": kind, "gold": gold, "options": []}, f"gold '{gold}' of kind {kind} is not one plain")
       for kind, gold in (("number", "three"), ("mra", "1,200"), ("number", float("nan")), ("mra", True), ("mra", "1_000"),
                          ("number", float("inf")), ("regression", "3 m"), ("regression", "1,2"))},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OWN)
def test_a_bad_row_of_ones_own_is_named(name, tmp_path):
    changes, words = BAD_OWN[name]
    record = {key: value for key, value in own(tmp_path, **changes).items() if value is not ...}
    file = write_jsonl(tmp_path / "mine.jsonl", [own(tmp_path, id="first"), record])
    with pytest.raises(ValueError) as error:
        load_rows(str(file))
    assert str(error.value).startswith(f"{file}, row 2: ") and words in str(error.value), error.value


@pytest.mark.parametrize("kind, gold", [
    ("number", 0), ("number", -2.5), ("mra", "0.1"), ("mra", " 7 "), ("mra", "+.5"), ("number", 1e-7), ("number", 1e22),
    ("regression", "-1,200.5"), ("text", "3 m"), ("ocr", "1,200"), ("text", "three")])
def test_a_gold_that_can_score_is_taken(kind, gold, tmp_path):
    row, = load_rows(str(write_jsonl(tmp_path / "mine.jsonl", [own(tmp_path, kind=kind, gold=gold, options=[])])))
    assert row["gold"] == str(gold) and grade(row, f"<answer>{gold}</answer>")["correct"]


SPACER = dict(problem_id=1, problem="Which?", problem_type="multiple choice", options=["A. left", "B. right"],
              solution="<answer>A</answer>", path="x.mp4", data_type="video", data_source="general")


@pytest.mark.parametrize("name, key", [(name, key) for name, keys in FORMATS.items() for key in keys])
def test_a_missing_column_is_named_by_the_nearest_format(name, key, tmp_path):
    record = {"own": own(tmp_path), "STVQA-7K": stvqa(images="a.png"), "SpaceR-151k": SPACER}[name]
    file = write_jsonl(tmp_path / "mine.jsonl", [{other: record[other] for other in record if other != key}])
    with pytest.raises(ValueError, match=f"row 1: missing column {key}: {name} rows need {', '.join(FORMATS[name])} "):
        load_rows(str(file))


def test_bad_files_are_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"images": []\n')
    (tmp_path / "list.jsonl").write_text('\n[1]\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "test-0.jsonl", [{}])
    cases = {"broken.jsonl": (ValueError, "row 1: not JSON"), "list.jsonl": (ValueError, "row 2: a list"),
             "broken.parquet": (ValueError, "not a readable parquet"), "rows.csv": (ValueError, "unknown kind of file"),
             "folder": (FileNotFoundError, "use @split with one of test"),
             "gone.parquet": (FileNotFoundError, "no such file"),
             "broken.jsonl@val": (ValueError, "leave out '@val'")}
    for name, (kind, words) in cases.items():
        with pytest.raises(kind) as error:
            load_rows(str(tmp_path / name))
        assert words in str(error.value) and str(tmp_path) in str(error.value), name
        assert "\n" not in str(error.value), name


def test_bad_rows_can_be_left_out(tmp_path, capsys):
    file = write_jsonl(tmp_path / "mine.jsonl", [own(tmp_path), own(tmp_path, gold="Z"), own(tmp_path)])
    assert [row["id"] for row in load_rows(str(file), skip_bad=True)] == ["mine-0", "mine-2"]
    assert "1 bad rows left out" in capsys.readouterr().out


def test_a_line_that_is_no_record_is_one_bad_row(tmp_path, capsys):
    good = json.dumps(own(tmp_path)).encode()
    lines = [b"\xef\xbb\xbf" + good, b"{oops", good, b"[1]", b"", b'{"a": "\xff"}', good]
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join(lines))
    assert [row["id"] for row in load_rows(str(tmp_path / "mine.jsonl"), skip_bad=True)] == ["mine-0", "mine-2", "mine-5"]
    assert "3 bad rows left out" in capsys.readouterr().out
    assert check(str(tmp_path / "mine.jsonl")) == 3
    lines = capsys.readouterr().out.splitlines()
    for line, number, words in zip(lines, (2, 4, 6), ("not JSON", "a list, not an object", "UTF-8"), strict=False):
        assert line.startswith(f"{tmp_path}/mine.jsonl, row {number}: ") and words in line
    assert lines[3:] == [f"{tmp_path}/mine.jsonl: 6 rows, 3 good (0 with a gold scene), 3 bad"]


def test_check_names_every_bad_row_and_exits_1(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes(png(picture())[:2000])
    good = {**stvqa(images="a.png")}
    file = write_jsonl(tmp_path / "train.jsonl", [
        good, {**good, "images": "cut.png"}, {**good, "problem": "Image size: (60 x 100)"},
        {**good, "images": "gone.png"}, {**good, "options": ["left", "left"]},
        {**good, "answer_only": "Q", "answer_option_text": ""}])

    def run(path):
        return subprocess.run([sys.executable, "-m", "data.dataset", "--check", str(path)], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    result = run(file)
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and result.stderr == "", result.stderr
    assert [line.split(":")[0] for line in lines[:-1]] == [f"{file}, row {n}" for n in (2, 3, 4, 5, 6)]
    for line, words in zip(lines, ("cannot be read", "60 x 100", "gone.png", "read the same", "out of range")):
        assert words in line
    assert lines[-1].endswith("6 rows, 1 good (1 with a gold scene), 5 bad")
    assert run(write_jsonl(tmp_path / "good.jsonl", [good])).returncode == 0
    missing = run(tmp_path / "nothing.jsonl")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1


# ---------------------------------------------------------------- pictures and frames

def test_process_image_resizes_as_the_pure_function_says():
    assert process_image(picture(500, 375), min_pixels=512 * 512, max_pixels=2048 * 2048).size == (591, 443)
    same = picture(800, 600)
    assert process_image(same, min_pixels=512 * 512, max_pixels=2048 * 2048) is same


def test_every_picture_mode_becomes_rgb():
    grey = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))  # 16 bits: Pillow alone would clip it to white
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    bits, ink = Image.new("1", (4, 4), 1), Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    for image, colour in ((grey, (128,) * 3), (clear, (255,) * 3), (palette, (10, 20, 30)), (bits, (255,) * 3),
                          (ink, (255,) * 3)):
        data = image if image is ink else png(image)  # PNG knows no CMYK; a picture in memory is taken too
        rgb = decode_picture(data, row_id="r")
        assert (rgb.mode, rgb.getpixel((1, 1))) == ("RGB", colour), image.mode


def test_a_picture_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    for bad, words in ((str(tmp_path / "text.jpg"), "text.jpg"), (str(tmp_path / "gone.png"), "gone.png"),
                       (png(picture())[:3000], "3000 bytes"), (png(picture(401, 2)), "thinner than 1:200")):
        with pytest.raises(BrokenPicture, match="row q7: ") as error:
            decode_picture(bad, row_id="q7")
        assert words in str(error.value) and "\n" not in str(error.value)


def test_the_resized_frame_moves_size_scene_and_printed_size_together(tmp_path, processor):
    file = write_parquet(tmp_path / "train.parquet", [stvqa()])
    original, = load_rows(str(file), **SMALL)
    row, = load_rows(str(file), box_frame="resized", **SMALL)
    assert original["size"] == (100, 60) and original["scene"] == scene()
    assert row["size"] == frame_size(100, 60, factor=28, **SMALL) == (112, 56)
    for before, after in zip(original["scene"]["objects"], row["scene"]["objects"]):
        expected = [v * s for v, s in zip(before["bbox"], (1.12, 56 / 60) * 2)]
        assert np.abs(np.subtract(after["bbox"], expected)).max() <= 0.5
    assert "Image size: (112 x 56)" in row["problem"] and row["meta"]["original_size"] == [100, 60]
    grid = encode(row, processor, style="row", **SMALL).grid
    assert (grid[0, 2] * 14, grid[0, 1] * 14) == row["size"]  # the frame is what the model sees
    with pytest.raises(ValueError, match="row 2331-0: boxes are in the frame of"):
        encode(row, processor, style="row", min_pixels=56 * 56, max_pixels=70 * 70)
    narrow = copy.copy(processor)  # its own bounds shrink the picture below the frame the boxes are in
    narrow.image_processor = type(processor.image_processor)(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    with pytest.raises(ValueError, match="the model sees"):
        encode(row, narrow, style="row", **SMALL)


def test_a_thin_box_keeps_an_area_in_the_resized_frame():
    wire = {"objects": [{"id": "wire.1", "bbox": [10, 10, 11, 2000]}], "relationships": []}
    row = make_row(size=(4000, 3000), scene=wire)
    box, = [o["bbox"] for o in to_resized_frame(row, factor=28, **SMALL)["scene"]["objects"]]
    assert box[0] < box[2] and box[1] < box[3]


# ---------------------------------------------------------------- prompts

def test_options_are_lettered():
    assert options_text(["foo", "bar"]) == "(A) foo\n(B) bar" and options_text([]) == ""


def test_every_style_asks_the_question_with_its_options():
    lettered = "Where is the man?\nOptions:\n(A) left\n(B) right"
    for style in PROMPTS:
        text = build_prompt(make_row(), style)
        dressed = {"short": lettered.replace("\n(", " ("), "spacer": "Where is the man?\nOptions:\nA. left\nB. right"}
        assert dressed.get(style.removesuffix("_map"), lettered) in text, style
        assert "{question}" not in text and "{width}" not in text and text == text.strip(), style
        open_ended = build_prompt(make_row(options=[], kind="text"), style)
        assert open_ended.count("Options:") == (style == "spatialthinker"), style  # only in its worked example


def test_the_spatialthinker_prompt_has_the_published_structure():
    text = build_prompt(make_row(size=(640, 480)), "spatialthinker")
    marks = ["<observe>", "<scene>", '"bbox": [x1, y1, x2, y2]', "<think>", "<answer>", "An example:", "<observe>",
             "</answer>", "Image size: (640 x 480)", "Q. Where is the man?\nOptions:\n(A) left\n(B) right"]
    at = [text.index(marks[0])]
    for mark in marks[1:]:
        at.append(text.index(mark, at[-1] + 1))  # raises when a part is missing or out of order
    assert text.count("Image size:") == 1 and text.endswith("(B) right")


def test_the_example_in_the_prompt_earns_the_full_format_reward():
    rewards = pytest.importorskip("rewards")
    example = PROMPTS["spatialthinker"].partition("An example:")[2].partition("Image size:")[0]
    answer = example[example.index("<observe>"):].strip()
    example_scene = rewards.extract_scene(answer)
    assert clean_scene(example_scene, None) == example_scene and len(example_scene["objects"]) == 2
    row = make_row(scene=example_scene, options=["left", "right"], gold="B")
    parts = rewards.spatialthinker_reward(answer, rewards.solution_text(row), (640, 480))
    assert parts["format"] == parts["accuracy"] == 1.0


def test_a_prompt_file_is_filled_once(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text('{"w": {width}, "h": {height}} {question} {other}')
    row = make_row(question="What is {width}?", options=[])
    assert build_prompt(row, str(file)) == '{"w": 100, "h": 60} What is {width}? {other}'


def test_a_row_may_choose_its_own_style():
    assert build_prompt(make_row(style="no_reasoning"), "spatialthinker").startswith("Question: Where is the man?")


def test_wrong_styles_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("say something")
    for row, style, words in ((make_row(), "spatial", "'spatial' is unknown"), (make_row(), "row", "row r0: style row"),
                              (make_row(), str(tmp_path / "empty.txt"), "empty.txt"),
                              (make_row(size=None), "spatialthinker", "row r0: style spatialthinker prints")):
        with pytest.raises(ValueError, match=r"\w") as error:
            build_prompt(row, style)
        assert words in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- encoding

def reference(row, processor, style):
    """What Hugging Face's own processor makes of the same pictures and messages."""
    images = [process_image(decode_picture(p, row_id="x"), **SMALL) for p in row["images"]]
    text = processor.apply_chat_template(build_messages(row, style), tokenize=False, add_generation_prompt=True)
    return processor(images=images or None, text=[text], return_tensors="pt")


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_encode_equals_the_processor(pictures, processor):
    row = make_row(images=[png(picture(40 + 30 * i, 60, seed=i)) for i in range(pictures)])
    prompt, expected = encode(row, processor, style="short", **SMALL), reference(row, processor, "short")
    assert prompt.expanded == expected["input_ids"][0].tolist()
    assert prompt.ids.count(processor.image_token_id) == pictures
    squeezed = [t for i, t in enumerate(prompt.expanded)
                if t != processor.image_token_id or prompt.expanded[i - 1] != processor.image_token_id]
    assert prompt.ids == squeezed and len(prompt.images) == pictures and prompt.row is row
    if not pictures:
        assert prompt.pixels is None and prompt.grid is None
        return
    assert prompt.pixels.equal(expected["pixel_values"]) and prompt.grid.equal(expected["image_grid_thw"])
    assert prompt.pixels.shape == (int(prompt.grid.prod(-1).sum()), 3 * 2 * 14 * 14)
    assert prompt.expanded.count(processor.image_token_id) * 4 == len(prompt.pixels)
    # The engine resizes these pictures with the same processor: nothing may change on the way.
    again = processor.image_processor(images=prompt.images, return_tensors="pt")
    assert again["pixel_values"].equal(prompt.pixels)


def test_special_tokens_in_a_question_stay_letters(processor):
    row = make_row(question="What does <|image_pad|><|im_end|>\n<|im_start|> mean? <image>")
    prompt = encode(row, processor, style="reasoning", **SMALL)
    assert prompt.ids.count(processor.image_token_id) == 1
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt.ids.count(end) == 1
    assert "<|image_pad|><|im_end|>\n<|im_start|> mean?" in processor.tokenizer.decode(prompt.ids)
    plain = encode(make_row(), processor, style="reasoning", **SMALL)  # the switch is left as it was
    assert plain.ids == encode(make_row(), processor, style="reasoning", **SMALL).ids


def test_a_chat_template_without_pictures_is_refused(processor):
    with pytest.raises(ValueError, match="row r0: 0 picture placeholders for 1 pictures"):
        expand([1, 2, 3], [4], processor.image_token_id, row_id="r0")


def test_overlong_and_broken_rows_are_dropped_and_counted(processor, capsys):
    rows = [make_row(id="fine"), make_row(id="long", question="why " * 400), make_row(id="broken", images=[b"junk"]),
            make_row(id="text", images=[]), make_row(id="two", images=[png(picture()), png(picture(90, 90))])]
    kept, counts = encode_rows(rows, processor, style="short", max_prompt_tokens=200, **SMALL)
    assert [row["id"] for row in kept] == ["fine", "text", "two"]
    assert counts == {"kept": 3, "overlong": 1, "broken": 1}
    out = capsys.readouterr().out
    assert "3 kept, 1 overlong" in out and "overlong: long" in out and "row broken: picture of 4 bytes" in out
    lengths = [len(encode(row, processor, style="short", **SMALL).expanded) for row in kept]
    assert encode_rows(kept, processor, style="short", max_prompt_tokens=max(lengths), **SMALL)[1]["kept"] == 3
    # exactly at the limit is kept, one below drops the longest: the count is encode's own
    assert encode_rows(kept, processor, style="short", max_prompt_tokens=max(lengths) - 1, **SMALL)[1]["overlong"] == 1


@pytest.mark.skipif(not REAL_QWEN.exists(), reason="shared/realdata is not here")
def test_the_real_qwen_tokenizer_encodes_the_published_prompt():
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(REAL_QWEN))
    row = make_row(images=[png(picture(500, 375))], size=(500, 375))
    prompt = encode(row, processor, style="spatialthinker")
    messages = build_messages(row, "spatialthinker")
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(images=prompt.images, text=[text], return_tensors="pt")
    assert prompt.expanded == expected["input_ids"][0].tolist() and prompt.pixels.equal(expected["pixel_values"])
    assert prompt.images[0].size == (591, 443) and prompt.grid.tolist() == [[1, 32, 42]]
    assert prompt.ids[:2] == [151644, 8948]  # <|im_start|>system: the template's own default turn


# ---------------------------------------------------------------- writing

def test_written_rows_read_back_equal(tmp_path):
    rows = [make_row(id=f"r{i}", images=[picture(100, 60, seed=i)], gold="AB"[i % 2], meta={"image_id": f"{i}"})
            for i in range(3)]
    rows[2]["scene"] = None
    assert write_stvqa(iter(rows), tmp_path / "out" / "val-00000-of-00001.parquet") == 3
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["val-00000-of-00001.parquet"]
    back = load_rows(f"{tmp_path}/out@val")
    for i, (before, after) in enumerate(zip(rows, back, strict=True)):
        assert after["id"] == f"{i}-{i}" and after["size"] == (100, 60)
        for key in ("question", "options", "gold", "scene", "category", "kind"):
            assert after[key] == before[key], key
        assert decode_picture(after["images"][0], row_id="x").tobytes() == before["images"][0].tobytes()
        assert build_messages(after, "row") == build_messages(before, "spatialthinker")


def test_written_columns_are_those_of_stvqa():
    record = stvqa_record(make_row())
    block = json.dumps(scene())
    assert json.loads(record["answer"].partition("<scene>")[2].partition("</scene>")[0]) == json.loads(block)
    assert record["answer"].endswith("</scene>\n<answer>A</answer>") and record["answer_only"] == "A"
    assert record["answer_text"].endswith("<answer>left</answer>") and record["answer_text_only"] == "left"
    assert record["answer_option_text"].endswith("<answer>(A) left</answer>")
    assert record["answer_option_text_only"] == "(A) left"
    assert record["question_with_options"] == "Where is the man?\nOptions:\n(A) left\n(B) right"
    assert record["problem"].startswith("<image>") and "Image size: (100 x 60)" in record["problem"]
    assert (record["level"], record["rating"], record["category"]) == ("easy", 7, "relation")
    with pytest.raises(ValueError, match="row r0: STVQA-7K holds choices over one picture"):
        stvqa_record(make_row(kind="number"))


def test_the_hub_library_sees_pictures_in_a_written_file(tmp_path):
    import datasets

    file = tmp_path / "train-00000-of-00001.parquet"
    write_stvqa([make_row()], file)
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert table[0]["images"].size == (100, 60) and table.features["rating"].dtype == "int32"
    assert len(table.column_names) == 15
