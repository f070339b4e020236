"""The data engine from end to end: stages, resume, servers that fail, what is packed.

python -m pytest tests/test_generate_stvqa.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tyro
from misbehaving import Handler, Misbehaving, half, hang_up, proper, says, servers, status
from PIL import Image

from data.dataset import load_rows
from data.generate_stvqa import Config, jpeg_bytes, main
from data.rows import STVQA_REQUIRED
from data.scene_graphs import read_graphs
from data.stvqa_folder import records_of
from data.stvqa_items import CATEGORIES, Balance
from data.stvqa_templates import write_items
from rewards import spatialthinker_reward, solution_text

ROOT = Path(__file__).resolve().parent.parent
REAL = next((p / "shared" / "realdata" for p in ROOT.parents if (p / "shared" / "realdata").is_dir()), ROOT / "none")


def run(command: str, out: Path, **settings) -> None:
    main(Config(command, out=str(out), **settings))


def lines(path: Path) -> list[dict]:
    return [record for _, record in records_of(path)]


def contents(out: Path) -> dict[str, bytes]:
    names = ("written.jsonl", "checked.jsonl", "selected.jsonl", "train-00000-of-00001.parquet", "stats.json")
    return {name: (out / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished folder of 300 drawn scenes."""
    out = tmp_path_factory.mktemp("whole")
    run("all", out, graphs="scenes:hard", limit=300)
    return out


# ---------------------------------------------------------------- the whole chain


def test_the_packed_rows_load_with_their_scenes_and_the_gold_text_earns_everything(whole):
    train, val = (load_rows(f"{whole}@{split}") for split in ("train", "val"))
    assert len(train) > 200 and 15 < len(val) < 45
    assert {row["category"] for row in train} == set(CATEGORIES)
    for row in (*train[:60], *val):
        reply = f"<observe>x</observe>\n<think>y</think>\n{solution_text(row)}"
        reward = spatialthinker_reward(reply, solution_text(row), row["size"])
        assert reward["total"] == pytest.approx(1.0, abs=1e-4), row["id"]
        assert f"({row['size'][0]} x {row['size'][1]})" in row["problem"] and row["question"] in row["problem"]


def test_the_columns_are_the_fifteen_of_stvqa_and_the_pictures_jpeg(whole):
    table = pq.read_table(whole / "train-00000-of-00001.parquet")
    assert len(table.column_names) == 15 and set(STVQA_REQUIRED) < set(table.column_names)
    types = {field.name: str(field.type) for field in table.schema}
    assert types["rating"] == "int32" and types["options"].startswith("list<") and types["images"].startswith("struct<")
    assert {types[name] for name in types if name not in ("rating", "options", "images")} == {"string"}
    for row in table.slice(0, 5).to_pylist():
        assert row["images"]["bytes"].startswith(b"\xff\xd8") and row["level"] in ("easy", "medium", "hard")
        assert row["answer"].endswith(f"<answer>{row['answer_only']}</answer>")
        assert row["answer_option_text_only"] == f"({row['answer_only']}) {row['answer_text_only']}"


def test_no_picture_is_in_both_splits_and_the_statistics_are_of_the_rows(whole):
    tables = {split: pq.read_table(whole / f"{split}-00000-of-00001.parquet") for split in ("train", "val")}
    ids = {split: set(table["image_id"].to_pylist()) for split, table in tables.items()}
    assert not ids["train"] & ids["val"]
    stats = json.loads((whole / "stats.json").read_text())
    count = Counter(tables["train"]["category"].to_pylist())
    assert stats["train"]["rows"] == count.total()
    assert stats["train"]["category"]["relation"] == round(100 * count["relation"] / count.total(), 1)
    assert 45 <= stats["train"]["category"]["relation"] <= 51
    assert abs(stats["train"]["blind"] - stats["train"]["chance"]) < 20


def test_the_page_shows_samples_with_boxes_and_needs_nothing_else(whole):
    page = (whole / "view.html").read_text()
    assert page.count("<article>") == 40 and page.count("data:image/jpeg;base64,") == 40
    assert page.count("<rect ") >= 40 and page.count('class="right"') == 40 and "http" not in page.replace("xmlns", "")
    assert all(f"<small>{category} " in page for category in CATEGORIES)


def test_two_runs_are_equal_to_the_byte_and_another_seed_is_not(whole, tmp_path):
    run("all", tmp_path / "again", graphs="scenes:hard", limit=300)
    assert contents(tmp_path / "again") == contents(whole)
    other = tmp_path / "other"
    run("write", other, graphs="scenes:hard", limit=20, seed=2)
    assert lines(other / "written.jsonl")[0] != lines(whole / "written.jsonl")[0]
    for command in ("check", "select", "pack"):
        run(command, other)  # the scenes of seed 2 again, though nobody says so
    assert len(lines(other / "checked.jsonl")) == 20
    first = (other / "selected.jsonl").read_bytes()
    run("select", other, seed=7)
    assert (other / "selected.jsonl").read_bytes() != first


def test_the_order_of_sets_which_is_salted_decides_nothing(tmp_path):
    graphs = photo_graphs(tmp_path / "photos", relations=("holding", "touching", "riding", "next to", "looking at"))
    made = []
    for salt in ("1", "2", "3"):
        command = [sys.executable, "-m", "data.generate_stvqa", "write", "--graphs", str(graphs), "--questions", "9",
                   "--out", str(tmp_path / salt)]  # fmt: skip
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": salt}, check=True, capture_output=True)
        made.append((tmp_path / salt / "written.jsonl").read_bytes())
    assert made[0] == made[1] == made[2] and b"Which of these is the man" in made[0]


@pytest.mark.parametrize("cut", [0, 40_001, -1])
def test_a_cut_off_file_is_gone_on_with_to_the_same_end(whole, tmp_path, cut):
    run("write", tmp_path, graphs="scenes:hard", limit=300)
    written = tmp_path / "written.jsonl"
    os.truncate(written, cut if cut >= 0 else written.stat().st_size - 1)
    (tmp_path / "checked.jsonl.tmp").write_text("half")  # of a killed check
    run("check", tmp_path, graphs="scenes:hard")  # of what is whole; the torn line is no line
    assert len(lines(tmp_path / "checked.jsonl")) == written.read_bytes().count(b"\n")
    run("all", tmp_path, graphs="scenes:hard", limit=300)
    assert contents(tmp_path) == contents(whole)


def test_raising_the_limit_goes_on_and_several_questions_a_picture_are_all_packed(tmp_path, whole):
    run("write", tmp_path, graphs="scenes:hard", limit=100)
    run("all", tmp_path, limit=300)  # knows its graphs
    assert contents(tmp_path) == contents(whole)
    run("all", tmp_path / "more", graphs="scenes:hard", limit=40, questions=4)
    rows = load_rows(f"{tmp_path / 'more'}@train")
    assert max(Counter(row["id"].rsplit("-", 1)[0] for row in rows).values()) > 1
    assert len({row["id"] for row in rows}) == len(rows) > 60


def test_a_photo_keeps_its_bytes_and_other_pictures_become_jpeg(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "a.jpg", quality=60)
    assert jpeg_bytes(str(tmp_path / "a.jpg")) == (tmp_path / "a.jpg").read_bytes()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "b.png")
    for name in ("turned.jpg", "b.png"):
        (tmp_path / "out.jpg").write_bytes(jpeg_bytes(str(tmp_path / name)))
        with Image.open(tmp_path / "out.jpg") as made:
            assert made.format == "JPEG" and made.size == (60, 40) and made.getexif().get(0x0112, 1) == 1


def photo_graphs(folder: Path, n: int = 12, relations=("near",)) -> Path:
    """n graphs of the VG150 layout with photos of noise; the last three photos are missing, cut off, of another size."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, records = np.random.default_rng(0), []
    for i in range(n):
        image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        image.save(folder / f"{i}.jpg")
        objects = [{"id": "man.1", "bbox": [2 + i, 5, 20 + i, 50]}, {"id": "traffic light.1", "bbox": [50, 10, 70, 40]}]
        objects += [{"id": "dog.1", "bbox": [50, 45, 78, 58]}, {"id": "cup.1", "bbox": [70, 2, 78, 8]}]
        links = [{"subject": "man.1", "predicate": p, "object": "traffic light.1"} for p in relations]
        records.append({"image_id": str(i), "objects": objects, "relationships": links, "width": 80, "height": 60})
    (folder / f"{n - 3}.jpg").unlink()
    data = (folder / f"{n - 2}.jpg").read_bytes()
    (folder / f"{n - 2}.jpg").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (160, 120)).save(folder / f"{n - 1}.jpg")
    (folder / "graphs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "graphs.jsonl"


def test_a_picture_that_is_missing_cut_off_or_of_another_size_costs_its_questions_only(tmp_path, capsys):
    run("all", tmp_path / "out", graphs=str(photo_graphs(tmp_path / "photos")))
    assert "1 graphs left out: no picture" in capsys.readouterr().out
    why = Counter(line["why"] for line in lines(tmp_path / "out" / "rejected.jsonl"))
    assert why == {"the picture cannot be read (OSError)": 1, "the picture has another size than the graph says": 1}
    assert len(lines(tmp_path / "out" / "checked.jsonl")) == 9


# ---------------------------------------------------------------- servers


class Answering(Misbehaving):
    """Answers by what it finds in the question: {mark: text}. plan: {mark: steps that come before}. `paid` counts the
    whole proper replies sent for a mark."""

    def __init__(self, answers, plan=None, delay=0.0):
        super().__init__(Asked, plan)
        self.answers, self.delay, self.paid = answers, delay, Counter()


class Asked(Handler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content, server = body["messages"][-1]["content"], self.server
        question = content if isinstance(content, str) else content[-1]["text"]
        [mark] = [mark for mark in server.answers if mark in question]
        with server.lock:
            server.seen.append((mark, body, dict(self.headers), time.monotonic()))
            steps = server.plan.get(mark, [])
            step = steps.pop(0) if steps else proper
        time.sleep(server.delay)
        self.text = server.answers[mark]
        if step is proper:
            with server.lock:
                server.paid[mark] += 1
        step(self)

    def reply(self, text=None, finish=None):
        return super().reply(text or self.text, finish)


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with servers(Answering) as start:
        yield start


def scene_answers(n: int) -> tuple[list[str], dict[str, str]]:
    """(graph ids, {what only that graph's prompt says: a good reply}) of the first n scenes."""
    ids, answers = [], {}
    for graph in read_graphs("scenes:hard", limit=n, seed=1):
        items = write_items(graph, Balance(), n=2, relation_percent=50, seed=1)
        things = "objects: " + "; ".join(f"{thing['id']} {json.dumps(thing['bbox'])}" for thing in graph.objects)
        ids.append(graph.id)
        answers[things] = "Here you are:\n```json\n" + json.dumps({"questions": items}) + "\n```"
    return ids, answers


def model(server, provider="openai", **more) -> dict:
    url = server.url + ("/v1" if provider == "openai" else "")
    return {"graphs": "scenes:hard", "writer": provider, "model": "m", "base_url": url, "questions": 2, "attempts": 3} | more


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_server_that_fails_on_purpose_loses_nothing_and_is_paid_once(serving, tmp_path, capsys, provider):
    ids, answers = scene_answers(24)
    marks = list(answers)
    wait = [("Retry-After", "0.1")]
    faults = [status(429, headers=wait), status(500), hang_up, half, says(b'{"choices": [{"mess'), status(503)]
    plan = {mark: [fault] for mark, fault in zip(marks, faults, strict=False)}
    plan[marks[7]] = [status(400)]  # refused for good: an error of this item
    plan[marks[8]] = [status(500)] * 3  # every attempt fails
    answers[marks[9]] = '{"questions": [{"question": "cut off'  # paid for, and malformed
    answers[marks[10]] = "I would rather not."
    answers[marks[11]] = '[{"question": "Why?", "rating": NaN, "options": ["\\ud800", 1e999]}]'
    server = serving(answers, plan)
    settings = model(server, provider, limit=24)
    run("write", tmp_path, **settings)
    told = capsys.readouterr().out
    assert "24 calls, 2 failed, 8 retries" in told and "is asked again by the same command" in told
    assert server.paid == {mark: 1 for i, mark in enumerate(marks) if i not in (7, 8)}
    run("write", tmp_path, **settings)
    assert "2 calls, 0 failed" in capsys.readouterr().out
    assert server.paid == dict.fromkeys(marks, 1)  # nothing lost, nothing twice
    seen = len(server.seen)
    run("all", tmp_path, **settings)
    assert len(server.seen) == seen
    good = lines(tmp_path / "checked.jsonl")
    whole = {graph.id: len(write_items(graph, Balance(), n=2, relation_percent=50, seed=1))
             for graph in read_graphs("scenes:hard", limit=24, seed=1)}  # fmt: skip
    assert Counter(row["graph"] for row in good) == {name: whole[name] for i, name in enumerate(ids) if i not in (9, 10, 11)}
    why = [line["why"] for line in lines(tmp_path / "rejected.jsonl")]
    assert why[:2] == ["no question in the reply"] * 2 and len(why) == 3


def test_a_refusal_in_the_middle_keeps_what_was_under_way(serving, tmp_path):
    _, answers = scene_answers(20)
    marks = list(answers)
    server = serving(answers, {marks[9]: [status(402, "credit balance is too low")]}, delay=0.1)
    with pytest.raises(ValueError, match="credit balance"):
        run("write", tmp_path, **model(server, limit=20))
    kept = lines(tmp_path / "written.jsonl")
    assert len(kept) == sum(server.paid.values()) >= 8
    run("write", tmp_path, **model(server, limit=20))
    assert server.paid == dict.fromkeys(marks, 1) and len(lines(tmp_path / "written.jsonl")) == 20


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_writer_goes_on_and_only_calls_under_way_are_asked_twice(serving, tmp_path, signal_):
    ids, answers = scene_answers(60)
    server = serving(answers, delay=0.1)
    command = [sys.executable, "-m", "data.generate_stvqa", "write", "--graphs", "scenes:hard", "--limit", "60", "--writer",
               "openai", "--model", "m", "--base-url", server.url + "/v1", "--questions", "2", "--parallel", "4",
               "--out", str(tmp_path)]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while sum(server.paid.values()) < 20 and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal_)
    first.communicate(timeout=30)
    assert first.returncode != 0 and 0 < len(lines(tmp_path / "written.jsonl")) < 60
    second = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert second.returncode == 0, second.stderr
    assert sorted(line["id"] for line in lines(tmp_path / "written.jsonl")) == sorted(ids)
    twice = [mark for mark, n in server.paid.items() if n > 1]
    assert set(server.paid) == set(answers) and max(server.paid.values()) <= 2
    assert len(twice) <= (4 if signal_ == signal.SIGKILL else 0)


# ---------------------------------------------------------------- the second model


def verifier_answers(out: Path) -> dict[str, dict]:
    return {line["question"]: line for line in lines(out / "selected.jsonl")}


def test_questions_are_kept_if_one_of_four_tries_agrees_and_no_try_is_asked_twice(serving, tmp_path, capsys):
    run("write", tmp_path, graphs="scenes:hard", limit=30)
    run("check", tmp_path)
    run("select", tmp_path)
    rows = verifier_answers(tmp_path)
    server = serving({question: f"The answer is ({row['gold']})." for question, row in rows.items()})
    marks = list(rows)

    def wrong(mark):
        letter = "B" if rows[mark]["gold"] == "A" else "A"
        return lambda handler: handler.say(200, handler.reply(f"({letter})"))

    server.plan = {
        marks[0]: [wrong(marks[0])] * 2, marks[1]: [wrong(marks[1])] * 4, marks[2]: [status(500), proper],
        marks[3]: [status(400), proper], marks[4]: [lambda handler: handler.say(200, handler.reply("I cannot see it"))] * 4,
    }  # fmt: skip
    settings = {"verifier": "openai", "verifier_model": "m", "verifier_url": server.url + "/v1", "attempts": 3}
    run("verify", tmp_path, **settings)
    assert f"of {len(marks)} questions {len(marks) - 3} kept, 2 refused, 1 open" in capsys.readouterr().out
    asked = Counter(mark for mark, *_ in server.seen)
    assert [asked[mark] for mark in marks[:6]] == [3, 4, 2, 1, 4, 1]
    sent = server.seen[0][1]["messages"][-1]["content"]
    assert sent[0]["image_url"]["url"].startswith("data:image/jpeg") and "Options:" in sent[1]["text"]
    run("verify", tmp_path, **settings)  # the one that the server disliked, and no other
    assert Counter(mark for mark, *_ in server.seen) - asked == {marks[3]: 1}
    run("select", tmp_path, verified=True)
    kept = {line["question"] for line in lines(tmp_path / "selected.jsonl")}
    assert not kept & {marks[1], marks[4]} and len(kept) >= len(marks) - 12
    with pytest.raises(ValueError, match="retry_temperature was 1.0, now 0.5"):
        run("verify", tmp_path, **settings, retry_temperature=0.5)


def test_a_model_that_takes_no_temperature_is_sent_none(serving, tmp_path):
    asked = tyro.cli(Config, args=["write", "--temperature", "None", "--retry-temperature", "None"])
    assert asked.temperature is None and asked.retry_temperature is None
    _, answers = scene_answers(4)
    server = serving(answers)
    run("write", tmp_path, **model(server, limit=4), temperature=None)
    run("check", tmp_path)
    run("select", tmp_path)
    verifier = serving({question: "no idea" for question in verifier_answers(tmp_path)})
    how = {"verifier": "openai", "verifier_model": "m", "verifier_url": verifier.url + "/v1", "tries": 2}
    run("verify", tmp_path, **how, retry_temperature=None)
    assert len(server.seen) == 4 and len(verifier.seen) == 2 * len(verifier.answers)
    assert not any("temperature" in body for _, body, *_ in (*server.seen, *verifier.seen))
    (tmp_path / "verified.jsonl").unlink()
    run("verify", tmp_path, **how, retry_temperature=0.7)
    assert {body["temperature"] for _, body, *_ in verifier.seen[2 * len(verifier.answers) :]} == {0.0, 0.7}


def test_the_whole_chain_with_a_verifier(serving, tmp_path):
    run("all", tmp_path, graphs="scenes:hard", limit=20)
    rows = verifier_answers(tmp_path)
    server = serving({q: row["gold"] if row["category"] == "relation" else "no idea" for q, row in rows.items()})
    run("all", tmp_path, verifier="openai", verifier_model="m", verifier_url=server.url + "/v1", tries=2)
    assert {row["category"] for row in load_rows(f"{tmp_path}@train")} == {"relation"}
    assert {pq.read_table(p)["category"].to_pylist()[0] for p in tmp_path.glob("*.parquet")} == {"relation"}


def test_a_model_in_this_process_writes_and_verifies(tmp_path):
    settings = {"graphs": "scenes:demo", "limit": 3, "max_tokens": 6, "batch": 2}
    run("write", tmp_path / "w", writer="hf", model="random:tiny", **settings)
    written = lines(tmp_path / "w" / "written.jsonl")
    assert len(written) == 3 and all(line["tokens"][1] <= 6 < line["tokens"][0] for line in written)
    os.truncate(tmp_path / "w" / "written.jsonl", (tmp_path / "w" / "written.jsonl").stat().st_size - 5)
    run("write", tmp_path / "w", writer="hf", model="random:tiny", **settings)
    assert lines(tmp_path / "w" / "written.jsonl") == written
    run("write", tmp_path / "v", graphs="scenes:demo", limit=3)
    run("check", tmp_path / "v")
    run("select", tmp_path / "v")
    run("verify", tmp_path / "v", verifier="hf", verifier_model="random:tiny", max_tokens=6, batch=2, tries=2)
    assert all({"letter", "agrees", "text"} <= set(line) for line in lines(tmp_path / "v" / "verified.jsonl"))


# ---------------------------------------------------------------- before money is spent


def test_a_dry_run_counts_calls_and_money_and_asks_nothing(tmp_path, capsys):
    known = {"writer": "openai", "model": "gpt-4o-2024-05-13", "base_url": "http://127.0.0.1:9"}
    run("write", tmp_path, graphs="scenes:hard", limit=50, dry_run=True, **known)
    told = capsys.readouterr().out
    tokens_in, tokens_out = int(told.split("about ")[1].split()[0]), int(told.split(" in and ")[1].split()[0])
    assert told.startswith("write: 50 calls") and 50_000 < tokens_in < 200_000
    assert f"{(5 * tokens_in + 15 * tokens_out) / 1e6:.2f} dollars" in told
    assert not (tmp_path / "written.jsonl").exists()
    run("all", tmp_path, graphs="scenes:hard", limit=50)
    capsys.readouterr()
    run("verify", tmp_path, verifier="anthropic", verifier_model="new", dry_run=True)
    told = capsys.readouterr().out
    assert f"verify: {len(lines(tmp_path / 'selected.jsonl'))} calls" in told
    assert "price unknown" in told and "at the most 4 times" in told
    run("verify", tmp_path, verifier="anthropic", verifier_model="new", dry_run=True, price=(1000.0, 0.0))
    assert "dollars" in capsys.readouterr().out


@pytest.mark.parametrize(("settings", "named"), [
    ({"writer": "hf", "model": "m", "temperature": None}, "--temperature None: give 0"),
    ({"verifier": "vllm", "verifier_model": "m", "retry_temperature": None}, "--retry-temperature None: give 0"),
    ({"temperature": -1.0}, "--temperature -1.0"),
    ({"command": "paint"}, "command paint: unknown"), ({"writer": "gpt"}, "--writer gpt: unknown"),
    ({"writer": "openai"}, "needs --model"), ({}, "--graphs is missing"), ({"graphs": "none.json"}, "no such file"),
    ({"graphs": "scenes:huge"}, "unknown level"), ({"questions": 0}, "--questions 0"), ({"val_split": 1.0}, "--val-split"),
    ({"command": "check", "graphs": "scenes:hard"}, "run write --out"), ({"command": "verify"}, "--verifier is missing"),
    ({"command": "pack", "graphs": "scenes:hard"}, "run select --out"),
    ({"command": "stats", "graphs": "scenes:hard"}, "run pack --out"),
])  # fmt: skip
def test_settings_that_cannot_work_are_one_line(tmp_path, settings, named):
    with pytest.raises((ValueError, OSError), match=named):
        run(**{"command": "write", "out": tmp_path} | settings)


def test_other_settings_graphs_or_a_second_process_are_refused(tmp_path):
    run("write", tmp_path, graphs="scenes:hard", limit=5)
    with pytest.raises(ValueError, match="questions was 1, now 2"):
        run("write", tmp_path, graphs="scenes:hard", limit=5, questions=2)
    with pytest.raises(ValueError, match="holds questions about scenes:hard"):
        run("check", tmp_path, graphs="scenes:demo")
    file = photo_graphs(tmp_path / "photos")
    run("write", tmp_path / "b", graphs=str(file))
    file.write_text(file.read_text().replace('"near"', '"behind"'))
    with pytest.raises(ValueError, match="content of graphs was"):
        run("write", tmp_path / "b", graphs=str(file))
    hold = ("import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX); "
            "print(1, flush=True); time.sleep(60)")  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "written.jsonl"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is writing it"):
            run("write", tmp_path, graphs="scenes:hard", limit=5)
    finally:
        other.kill()
        other.communicate()


def test_a_spoilt_line_is_named_and_the_command_line_says_it_in_one(tmp_path):
    run("write", tmp_path, graphs="scenes:hard", limit=3)
    with open(tmp_path / "written.jsonl", "a") as file:
        file.write("[1]\n")
    done = subprocess.run([sys.executable, "-m", "data.generate_stvqa", "check", "--out", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 1 and "line 4: no record of this stage" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------- real photos


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/realdata is not here")
def test_real_photos_become_rows(tmp_path):
    tiny = REAL / "tinycoco"
    run("all", tmp_path, graphs=str(tiny / "annotations/instances_val2017.json"), images=str(tiny / "images/val2017"),
        questions=8)  # fmt: skip
    rows = load_rows(f"{tmp_path}@train") + load_rows(f"{tmp_path}@val")
    assert len(rows) >= 20 and not lines(tmp_path / "rejected.jsonl")
    table = pq.read_table(tmp_path / "train-00000-of-00001.parquet", columns=["image_id", "images"])
    for row in table.to_pylist():
        assert row["images"]["bytes"] == (tiny / f"images/val2017/{int(row['image_id']):012d}.jpg").read_bytes()
