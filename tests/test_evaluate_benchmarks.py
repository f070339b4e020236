"""evaluate.py on benchmarks and with served models: one command line for all, resumed without loss.

python -m pytest tests/test_evaluate_benchmarks.py
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_fixtures import write
from misbehaving import KEY, Handler, Misbehaving, servers, status
from PIL import Image
from video_fixtures import film

import evaluate
from answers import controlled
from data.benchmarks import BENCHMARKS
from data.dataset import encode
from data.prompts import build_prompt
from data.video import load_clip
from evaluate import Config
from rewards import PUBLISHED
from rollout import Completion
from transcripts import read_transcripts

ROOT = Path(__file__).resolve().parent.parent
TINY = Config(model="random:tiny", style="short", box_frame="original", min_pixels=784, max_pixels=56 * 56, max_tokens=4,
              temperature=1.0)  # fmt: skip


class Answering(Handler):
    """Says B to everything, after a moment."""

    pause = 0.005

    def reply(self, text="It is (B).", finish=None):
        time.sleep(self.pause)
        return super().reply(text, finish)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with servers(Misbehaving) as start:
        yield start(Answering)


@pytest.fixture
def clones(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def clone(*names):
        for name in names:
            write(name, BENCHMARKS[name].split, tmp_path / "data" / name)
        return str(tmp_path / "data")

    return clone


@pytest.fixture
def rows(tmp_path):
    """24 questions over six pictures; gold is B for every other one."""
    lines = []
    for n in range(24):
        path = tmp_path / f"p{n % 6}.png"
        Image.new("RGB", (40, 30), (40 * (n % 6), 9, 9)).save(path)
        lines.append({"id": f"r{n}", "images": [path.name], "question": f"Question {n}?", "options": ["left", "right"],
                      "gold": "AB"[n % 2], "category": "ab"[n % 2]})  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "rows.jsonl"


def served(server, provider="openai", **more):
    url = server.url + ("/v1" if provider == "openai" else "")
    return replace(Config(model="gpt-4o-2024-05-13", provider=provider, base_url=url, style="short"), **more)


def question(n):
    return build_prompt({"question": f"Question {n}?", "options": ["left", "right"], "style": None, "id": "x"}, "short")


def lines_of(out):
    return read_transcripts(Path(out) / "transcripts.jsonl")


# ---------------------------------------------------------------- served models


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_served_model_is_asked_once_a_row_and_scored(server, rows, tmp_path, capsys, provider):
    out = tmp_path / "out"
    evaluate.main(served(server, provider, dataset=str(rows), out=str(out), parallel=4))
    records = lines_of(out)
    assert sorted(r["id"] for r in records) == sorted(f"r{n}" for n in range(24)) and len(server.seen) == 24
    result = json.loads((out / "scores.json").read_text())
    assert (result["n"], result["accuracy"]) == (24, 0.5) and result["by_category"]["b"]["accuracy"] == 1.0
    assert result["usage"]["tokens_in"] == 2400 and result["usage"]["cost"] == pytest.approx((2400 * 5 + 168 * 15) / 1e6)
    assert "0.01 dollars" in capsys.readouterr().out
    sent = json.dumps([body for _, body, *_ in server.seen])
    assert sent.count("data:image/png;base64," if provider == "openai" else '"media_type": "image/png"') == 24
    evaluate.main(served(server, provider, dataset=str(rows), out=str(out)))
    assert len(server.seen) == 24, "a finished evaluation asks nothing"
    texts = "".join(path.read_text() for path in out.iterdir())
    assert KEY not in texts


def test_what_fails_is_listed_and_asked_again_alone(server, rows, tmp_path, capsys):
    server.plan = {question(3): [status(400, "too dark")], question(7): [status(400, "too light")]}
    cfg = served(server, dataset=str(rows), out=str(tmp_path / "out"))
    evaluate.main(cfg)
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert set(failed) == {"r3", "r7"} and "too dark" in failed["r3"] and len(lines_of(cfg.out)) == 22
    printed = capsys.readouterr().out
    assert "2 of 24 rows failed" in printed and "unfinished: 22 of 24 rows" in printed
    evaluate.main(cfg)
    assert [q for q, *_ in server.seen[24:]] in ([question(3), question(7)], [question(7), question(3)])
    assert len(lines_of(cfg.out)) == 24 and json.loads((tmp_path / "out" / "failed.json").read_text()) == {}


@pytest.mark.parametrize("torn", ["foreign", "cut after its header"])
def test_a_broken_picture_is_skipped_for_good(server, rows, tmp_path, torn):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "p0.png").write_bytes(b"torn" if torn == "foreign" else data[: len(data) // 2])
    cfg = served(server, dataset=str(rows), out=str(tmp_path / "out"))
    evaluate.main(cfg)
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["n"] == 20 and [entry["id"] for entry in result["skipped"]] == ["r0", "r6", "r12", "r18"]
    evaluate.main(cfg)
    assert len(server.seen) == 20


def test_several_samples_are_told_apart_and_a_cut_file_gets_the_missing_ones(server, rows, tmp_path):
    cfg = served(server, dataset=str(rows), out=str(tmp_path / "out"), k=3, temperature=0.7, limit=8)
    evaluate.main(cfg)
    records = lines_of(cfg.out)
    assert len(records) == len(server.seen) == 24 and {r["sample"] for r in records} == {0, 1, 2}
    assert len({body["seed"] for _, body, *_ in server.seen}) == 24
    file = tmp_path / "out" / "transcripts.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:13]) + whole[13][:20])
    evaluate.main(cfg)
    assert len(server.seen) == 24 + 11
    assert sorted((r["id"], r["sample"]) for r in lines_of(cfg.out)) == sorted((r["id"], r["sample"]) for r in records)
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["n"] == 8 and result["samples"]["k"] == 3 and result["accuracy"] == 0.5


def test_local_samples_too(rows, tmp_path):
    cfg = replace(TINY, dataset=str(rows), limit=4, k=3, batch=2, out=str(tmp_path / "out"))
    evaluate.main(cfg)
    file, records = tmp_path / "out" / "transcripts.jsonl", lines_of(cfg.out)
    whole = file.read_bytes()
    assert [(r["id"], r["sample"]) for r in records] == [(f"r{n}", sample) for n in range(4) for sample in range(3)]
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:8]))
    evaluate.main(cfg)
    assert file.read_bytes() == whole


def test_a_served_model_answers_one_picture(server, rows, tmp_path, capsys):
    about = {"image": str(tmp_path / "p0.png"), "question": "Where?", "options": ("left", "right")}
    evaluate.main(served(server, **about, out=str(tmp_path / "one")))
    assert "answer: (B) right" in capsys.readouterr().out and (tmp_path / "one" / "answer.png").is_file()
    server.plan = {build_prompt({"question": "Why?", "options": [], "style": None, "id": "x"}, "short"): [status(400, "no")]}
    with pytest.raises(ValueError, match="400"):
        evaluate.main(served(server, image=about["image"], question="Why?", out=str(tmp_path / "two")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_by_signal_keeps_every_answer_that_was_asked_for(server, rows, tmp_path, number):
    class Stopping(Answering):
        pause = 0.2

        def reply(self, *args, **options):
            with self.server.lock:
                if len(self.server.seen) >= 6 and not stops:
                    stops.append(os.kill(os.getpid(), number))
            return super().reply(*args, **options)

    stops, server.RequestHandlerClass, before = [], Stopping, signal.getsignal(number)
    cfg = served(server, dataset=str(rows), out=str(tmp_path / "out"), parallel=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(cfg)
    assert signal.getsignal(number) is before
    assert 6 <= len(lines_of(cfg.out)) == len(server.seen) < 14
    evaluate.main(cfg)
    assert len(lines_of(cfg.out)) == len(server.seen) == 24


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost_or_asked_twice(server, rows, tmp_path, monkeypatch):
    """The command line, killed outright again and again; what stands in the file was asked once."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "evaluate.py"), "--model", "m", "--provider", "openai", "--base-url",
               server.url + "/v1", "--dataset", str(rows), "--style", "short", "--out", str(out), "--parallel", "2"]  # fmt: skip
    monkeypatch.setattr(Answering, "pause", 0.3)
    finished = []
    for attempt in range(10):
        run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        asked, until = len(server.seen), time.monotonic() + 120
        while run.poll() is None and len(server.seen) < asked + 7 and time.monotonic() < until:
            time.sleep(0.02)
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        finished.append({record["id"] for record in lines_of(out)})
    assert run.returncode == 0 and len(finished) >= 3
    assert sorted(r["id"] for r in lines_of(out)) == sorted(f"r{n}" for n in range(24))
    assert json.loads((out / "scores.json").read_text())["accuracy"] == 0.5
    assert all(before <= after for before, after in zip(finished, finished[1:]))
    assert len(server.seen) <= 24 + 2 * (len(finished) + 1), "at most the two under way are asked again"


# ---------------------------------------------------------------- benchmarks


def test_several_benchmarks_with_one_model(clones, tmp_path, capsys, monkeypatch):
    opened, real = [], evaluate.open_provider
    monkeypatch.setattr(evaluate, "open_provider", lambda cfg, pictures: opened.append(pictures) or real(cfg, pictures))
    names, out = ("mmvp", "blink-jigsaw", "vsi-bench", "stvqa"), tmp_path / "out"
    evaluate.main(replace(TINY, dataset=",".join(names), data_root=clones(*names), out=str(out), frames=4))
    assert opened == [4], "one engine for all, for the most pictures that any row may have"
    lines = {name: lines_of(out / name) for name in names}
    assert [len(lines[name]) for name in names] == [4, 2, 5, 2]
    mmvp, _, vsi, stvqa = (json.loads((out / name / "scores.json").read_text()) for name in names)
    assert mmvp["together"]["pair"]["n"] == 2 and vsi["macro"]["over"] == ["task", "category"] and stvqa["scene"]["n"] == 2
    assert len(lines["vsi-bench"][0]["images"]) == 4 and lines["vsi-bench"][2]["kind"] == "mra"
    printed = capsys.readouterr().out
    assert "all right in each pair" in printed and "mean of task, of category" in printed
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == [*names]
    evaluate.main(Config(rescore=str(out), out=str(tmp_path / "upstream"), mode="upstream"))
    again = json.loads((tmp_path / "upstream" / "vsi-bench" / "scores.json").read_text())
    assert again["published"]["overall"] is not None and again["graded_with"]["mode"] == "upstream"
    evaluate.main(Config(compare=(str(out / "mmvp"), str(out / "mmvp"))))
    assert "difference +0.000" in capsys.readouterr().out


def test_controls_on_a_benchmark(clones, tmp_path):
    root = clones("cv-bench")
    for control in ("blind", "swapped"):
        evaluate.main(replace(TINY, dataset="cv-bench", data_root=root, control=control, out=str(tmp_path / control)))
        records = lines_of(tmp_path / control)
        assert len(records) == 5 and all(("picture_of" in r) == (control == "swapped") for r in records)


def test_videos_are_shown_as_frames_and_bad_ones_are_one_line(clones, tmp_path):
    root = Path(clones("vsi-bench"))
    folders = list((root / "vsi-bench" / "scannet").iterdir())
    for folder in folders:
        for frame in folder.iterdir():
            frame.unlink()
        folder.rmdir()
    cfg = replace(TINY, dataset="vsi-bench", data_root=str(root), frames=4)
    with pytest.raises(ValueError, match="vsi-bench: row .*mp4: no such file; with --data-root give") as error:
        evaluate.main(replace(cfg, out=str(tmp_path / "none")))
    assert "\n" not in str(error.value) and not (tmp_path / "none").exists()
    for folder in folders:
        folder.with_suffix(".mp4").write_bytes(b"video")
    film(root / "vsi-bench" / "scannet" / "scene0000_00.mp4")
    evaluate.main(replace(cfg, out=str(tmp_path / "out")))  # the rows that can be asked are, the others are named and counted
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["n"] == 3 and len(result["skipped"]) == 2 and ".mp4" in result["skipped"][0]["why"]
    row = evaluate.rows_of(replace(cfg, min_pixels=784, max_pixels=200704))[0]
    shown = controlled(row, "none", None, frames=4)
    assert 2 <= len(shown["images"]) <= 4 and shown["question"].startswith("The pictures are frames of a video, in order.")
    assert controlled(row, "blind", None)["images"] == []
    evaluate.main(replace(cfg, out=str(tmp_path / "clips"), clips="eval"))
    asked, before = lines_of(tmp_path / "clips"), lines_of(tmp_path / "out")
    assert [(line["id"], "skipped" in line) for line in asked] == [(line["id"], "skipped" in line) for line in before]
    for rule in ("train", "whole"):
        with pytest.raises(ValueError, match=f"--clips {rule}: eval or eval-published"):
            evaluate.main(replace(cfg, clips=rule))


def test_the_engine_is_told_how_many_pictures_a_video_becomes(monkeypatch):
    told, rows = [], [{"images": [], "video": "a.mp4"}, {"images": ["a.png", "b.png"]}]
    monkeypatch.setattr(evaluate, "open_provider", lambda cfg, pictures: told.append(pictures))
    for clips in (None, "eval"):
        with pytest.raises(TypeError):  # nothing was opened that could answer
            evaluate.once({}, replace(TINY, frames=7, clips=clips), TINY, rows, [])
    assert told == [7, 2]


def test_a_control_decodes_no_clip_a_second_time(tmp_path, monkeypatch):
    film(tmp_path / "a.mp4")
    monkeypatch.setenv("SPATIAL_GRPO_CLIPS", str(tmp_path / "kept"))
    row = {"id": "a", "images": [], "video": str(tmp_path / "a.mp4"), "meta": {}}
    load_clip(row, rule="eval", max_frames=4)  # what control none shows
    controlled(row, "blind", None, 4, "eval")
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize("control, seen", [("none", "a"), ("swapped", "b"), ("blind", None)])
def test_a_video_as_one_clip(tiny, tmp_path, control, seen):
    for name in "ab":
        film(tmp_path / f"{name}.mp4")
    rows = [{"id": name, "images": [], "video": str(tmp_path / f"{name}.mp4"), "question": "Where?", "options": [], "gold": "x", "kind": "text",
             "size": None, "map": None, "problem": None, "style": None, "meta": {}} for name in "ab"]  # fmt: skip
    asked = controlled(rows[0], control, rows[1], 2, "eval-published")
    assert asked["id"] == "a" and (seen is None and not asked["video"] or Path(asked["video"]).stem == seen)
    prompt = encode(asked, tiny.processor, style="short", frame_rule="eval-published", max_frames=2)
    assert (prompt.seconds is not None) == (seen is not None) and len(prompt.images) <= 2 and "Where?" in str(build_prompt(asked, "short"))
    (tmp_path / "a.mp4").write_bytes(b"torn")
    if control != "none":  # under "none" encode() says it
        assert "a.mp4" in controlled(rows[0], control, rows[1], 2, "eval")


# ---------------------------------------------------------------- the command line


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def test_the_published_scripts_command_line(server, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--dataset", str(rows), "--model_path", "gpt-4o-2024-05-13", "--provider", "openai", "--base_url",
        server.url + "/v1", "--template", "spatial_thinker", "--batch_size", "4", "--num_samples", "5", "--resume",
        "--custom_filename", "mine")  # fmt: skip
    assert len(lines_of("evaluations/mine")) == 5 and "<scene>" in server.seen[0][0]
    for arguments, named in (
        (["--cuda", "1", "--model_path", "m", "--provider", "huggingface"], "--device cuda:1"),
        (["--template", "yes_no", "--model", "m"], "--template yes_no: left out"),
        (["--dataset", "mathvista", "--model", "m"], "--dataset mathvista: left out: not a spatial benchmark"),
        (["--dataset", "3dsrbench_full", "--model", "m"], "3dsrbench_full: left out: 3dsrbench-circular"),
        (["--model", "m", "--k", "3"], "--k 3 greedy answers are one: give a --temperature"),
        (["--model", "m", "--provider", "openai", "--box-frame", "resized"], "--box-frame resized with --provider openai"),
        (["--compare", "here", "there"], "--compare here: no such transcripts"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments)
        assert named in str(stop.value.code) and "\n" not in str(stop.value.code), (arguments, stop.value.code)


def test_the_list(monkeypatch, capsys):
    run(monkeypatch, "--list")
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in BENCHMARKS) and "nyu-visionx/VSI-Bench" in printed


def test_a_missing_key_or_a_key_in_the_url_is_one_line(rows, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    cfg = Config(model="m", provider="openai", dataset=str(rows), style="short", out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set: export it"):
        evaluate.main(cfg)
    with pytest.raises(ValueError, match="holds a user, a password or a query"):
        evaluate.main(replace(cfg, base_url="http://u:secret@host/v1"))
    assert not any("secret" in path.read_text() for path in tmp_path.rglob("*.json"))


def test_every_benchmark_has_a_published_rule():
    assert {bench.rule for bench in BENCHMARKS.values()} == set(PUBLISHED)


def test_a_benchmark_is_one_call_of_the_vllm_engine(rows, tmp_path, monkeypatch):
    """And without pixels, which it computes itself: those of thousands of rows would not fit in memory."""
    import rollout
    from model import load_model

    calls = []

    class Engine:
        def generate(self, prompts, **settings):
            calls.append(prompts)
            return [[Completion([1], [0.0], "(B)", True)] for _ in prompts]

    processor = load_model("random:tiny")[1]
    monkeypatch.setattr(rollout, "vllm_rollout", lambda model, **settings: (Engine(), processor))
    evaluate.main(replace(TINY, provider="vllm", dataset=str(rows), out=str(tmp_path / "out")))
    assert [len(prompts) for prompts in calls] == [24]
    assert all(prompt.pixels is None and prompt.images for prompt in calls[0])
