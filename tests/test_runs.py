"""The run folder: nothing written is lost or stands there twice, a stop saves and resumes.

    python -m pytest tests/test_runs.py
"""

import importlib.metadata
import io
import json
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import runs
from files import FullDisk, read_lines

ROOT = Path(__file__).resolve().parent.parent


def write_something(folder: Path) -> None:
    (folder / "trainer").mkdir()
    (folder / "weights.bin").write_bytes(b"w" * 1000)
    (folder / "trainer" / "state.bin").write_bytes(b"s" * 10)


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + text)
    return path


# configuration ------------------------------------------------------------------------------------------------------


def test_config_json_says_where_the_numbers_come_from(tmp_path):
    run = runs.open_run(tmp_path / "a" / "run", {"lr": 1e-6, "betas": (0.9, 0.99), "data": Path("x")}, resume=False)
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"] == {"lr": 1e-6, "betas": [0.9, 0.99], "data": "x"}
    assert saved["versions"]["torch"] == importlib.metadata.version("torch")
    assert saved["versions"]["python"] == platform.python_version()
    assert saved["argv"] == sys.argv
    assert len(saved["gpus"]) >= torch.cuda.device_count()
    assert set(saved["git"]) == {"commit", "dirty"}


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_git_state_and_diff_of_a_dirty_tree(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    repo.mkdir()
    git = ["git", "-C", str(repo), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (repo / "f.py").write_text("a = 1\n")
    for command in (["init", "-q"], ["add", "f.py"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(runs, "__file__", str(repo / "runs.py"))
    clean = json.loads((runs.open_run(tmp_path / "clean", {}, resume=False) / "config.json").read_text())
    assert len(clean["git"]["commit"]) == 40 and clean["git"]["dirty"] is False
    (repo / "f.py").write_text("a = 2\n")
    run = runs.open_run(tmp_path / "dirty", {}, resume=False)
    assert json.loads((run / "config.json").read_text())["git"]["dirty"] is True
    assert "+a = 2" in (run / "git.diff").read_text()


def test_used_folder_is_refused_with_the_cure(tmp_path):
    run = runs.open_run(tmp_path / "run", {}, resume=False)
    runs.open_run(run, {}, resume=False)  # nothing done in it yet: no harm
    runs.log_metrics(run, 0, {"x": 1.0})
    runs.log_metrics(run, 1, {"x": 1.0})
    with pytest.raises(ValueError, match=r"metrics up to step 1\): go on with --resume, or choose another --name"):
        runs.open_run(run, {}, resume=False)
    (run / "metrics.jsonl").unlink()
    runs.save_checkpoint(run, 7, write_something, keep=1)
    with pytest.raises(ValueError, match="step_7"):
        runs.open_run(run, {}, resume=False)


def test_resume_wants_the_same_config_except_where_it_may_differ(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        runs.open_run(tmp_path / "none", {}, resume=True)
    run = runs.open_run(tmp_path / "run", {"lr": 1e-6, "steps": 10, "betas": (0.9, 0.99)}, resume=False)
    with pytest.raises(ValueError, match="lr was 1e-06, now 2e-06") as caught:
        runs.open_run(run, {"lr": 2e-6, "steps": 20, "betas": (0.9, 0.99)}, resume=True, may_differ=("steps",))
    assert "\n" not in str(caught.value) and "steps" not in str(caught.value)
    with pytest.raises(ValueError, match="new was None, now 1"):
        runs.open_run(run, {"lr": 1e-6, "steps": 10, "betas": (0.9, 0.99), "new": 1}, resume=True)
    runs.save_checkpoint(run, 4, write_something, keep=1)
    (run / "stop").touch()
    runs.open_run(run, {"lr": 1e-6, "steps": 20, "betas": (0.9, 0.99)}, resume=True, may_differ=("steps",))
    assert "steps was 10, now 20" in capsys.readouterr().out
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["steps"] == 20
    assert saved["resumed"][0]["from_step"] == 4 and saved["resumed"][0]["changed"] == {"steps": [10, 20]}
    assert not (run / "stop").exists(), "a stop file that stays would end the resumed run after one step"


def test_resume_names_changed_versions(tmp_path, capsys):
    run = runs.open_run(tmp_path / "run", {}, resume=False)
    saved = json.loads((run / "config.json").read_text())
    saved["versions"]["torch"] = "1.0"
    (run / "config.json").write_text(json.dumps(saved))
    runs.open_run(run, {}, resume=True)
    assert "resume: torch was 1.0, now" in capsys.readouterr().out


# metrics and transcripts --------------------------------------------------------------------------------------------


def test_metrics_are_json_lines_of_finite_numbers(tmp_path):
    metrics = {"a": torch.tensor(0.5), "b": np.float32(2.0), "c": 3, "nan": float("nan"), "inf": 1e400}
    runs.log_metrics(tmp_path, 0, metrics)
    runs.log_metrics(tmp_path, 1, {"a": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 0, "a": 0.5, "b": 2.0, "c": 3, "nan": None, "inf": None}
    assert json.loads(lines[1]) == {"step": 1, "a": 1.0}


def test_a_step_is_never_logged_twice(tmp_path):
    runs.log_metrics(tmp_path, 3, {})
    with pytest.raises(ValueError, match="already holds step 3"):
        runs.log_metrics(tmp_path, 3, {})
    runs.truncate_after(tmp_path, 3)
    runs.log_metrics(tmp_path, 3, {})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [3]


def test_truncate_cuts_steps_done_after_the_checkpoint_and_a_torn_line(tmp_path):
    for step in range(6):
        runs.log_metrics(tmp_path, step, {"x": step / 3})
        runs.log_samples(tmp_path, step, [{"text": "a"}, {"text": "b"}])
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "x"')  # the process was killed while it wrote
    assert runs.truncate_after(tmp_path, 4) == 2 + 4
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:4])
    assert [line["step"] for line in read_lines(tmp_path / "samples.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert runs.truncate_after(tmp_path / "nothing", 0) == 0


def test_samples_keep_any_text_and_the_picture(tmp_path):
    text = "line\nbreak \u2028 \U0001f600 lone \udc80 surrogate \x00 é"
    picture = Image.new("RGB", (5, 4), (1, 2, 3))
    png = io.BytesIO()
    picture.save(png, "PNG")
    runs.log_samples(tmp_path, 0, [{"text": text, "images": [picture, png.getvalue(), "photo.jpg"]}, {"text": "x"}])
    runs.log_samples(tmp_path, 5, [{"text": text, "images": [picture]}])
    first, second, third = read_lines(tmp_path / "samples.jsonl")
    assert first["text"] == third["text"] == text and second == {"step": 0, "text": "x"}
    assert first["images"][2] == "photo.jpg" and first["images"][0] == third["images"][0]
    for name in first["images"][:2]:
        assert Image.open(tmp_path / name).getpixel((0, 0)) == (1, 2, 3)
    runs.truncate_after(tmp_path, 5)
    assert read_lines(tmp_path / "samples.jsonl")[0]["text"] == text


# checkpoints --------------------------------------------------------------------------------------------------------


def test_checkpoints_are_whole_or_not_there(tmp_path):
    assert runs.latest_checkpoint(tmp_path / "none") is None
    for step in (2, 9, 10):
        runs.save_checkpoint(tmp_path, step, write_something, keep=2)
    (tmp_path / "step_11.tmp").mkdir()
    (tmp_path / "step_12").touch()  # no folder
    assert runs.latest_checkpoint(tmp_path) == (10, tmp_path / "step_10")
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_10", "step_11.tmp", "step_12", "step_9"]
    assert (tmp_path / "step_10" / "trainer" / "state.bin").read_bytes() == b"s" * 10
    runs.open_run(tmp_path / "other", {}, resume=False)
    (tmp_path / "other" / "step_3.tmp" / "x").mkdir(parents=True)
    runs.open_run(tmp_path / "other", {}, resume=True)
    assert not list((tmp_path / "other").glob("*.tmp"))


def test_a_checkpoint_under_way_is_not_resumed_and_older_ones_stay_until_it_is_whole(tmp_path):
    runs.save_checkpoint(tmp_path, 1, write_something, keep=1)
    seen = []

    def write(folder):
        write_something(folder)
        seen.append((runs.latest_checkpoint(tmp_path), folder.name))

    runs.save_checkpoint(tmp_path, 2, write, keep=1)
    assert seen == [((1, tmp_path / "step_1"), "step_2.tmp")]
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
    runs.save_checkpoint(tmp_path, 2, lambda folder: 1 / 0, keep=1)  # already saved: not written again


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_keeps_the_earlier_checkpoints(tmp_path, wrapped):
    runs.save_checkpoint(tmp_path, 1, write_something, keep=1)

    def write(folder):
        write_something(folder)
        try:
            (folder / "big.bin").symlink_to("/dev/full")  # Linux: every write to it fails with "no space left"
            (folder / "big.bin").write_bytes(b"x")
        except OSError as error:
            if wrapped:  # as safetensors does
                raise RuntimeError(f"Error while serializing: I/O error: {error.strerror} (os error 28)") from error
            raise

    with pytest.raises(FullDisk, match="step_2 was not written, the disk is full; step_1 .* untouched") as caught:
        runs.save_checkpoint(tmp_path, 2, write, keep=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert (tmp_path / "step_1" / "weights.bin").read_bytes() == b"w" * 1000


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug")])
def test_other_errors_while_saving_come_through_and_leave_no_half(tmp_path, error):
    runs.save_checkpoint(tmp_path, 1, write_something, keep=1)

    def write(folder):
        write_something(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        runs.save_checkpoint(tmp_path, 2, write, keep=1)
    assert caught.value is error
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_every_rank_writes_before_the_rename(tmp_path):
    """Two ranks, played one after the other at the barriers: rank 1 writes at rank 0's first barrier."""
    order = []

    def barrier():
        if not order:
            order.append("rank 1 writes")
            runs.save_checkpoint(tmp_path, 1, lambda folder: (folder / "rank_1").touch(), keep=1, rank=1)
            assert not (tmp_path / "step_1").exists(), "only rank 0 renames"

    runs.save_checkpoint(tmp_path, 1, lambda folder: (folder / "rank_0").touch(), keep=1, rank=0, barrier=barrier)
    assert sorted(path.name for path in (tmp_path / "step_1").iterdir()) == ["rank_0", "rank_1"]


def test_kill_in_the_middle_of_a_save_leaves_the_older_one(tmp_path):
    path = script(tmp_path, """
import os, runs
from pathlib import Path
run = Path(sys.argv[1])
def write(folder, die=False):
    (folder / "a").write_text("a")
    if die: os.kill(os.getpid(), 9)
runs.save_checkpoint(run, 1, write, keep=1)
runs.save_checkpoint(run, 2, lambda folder: write(folder, die=True), keep=1)
""")
    assert subprocess.run([sys.executable, path, tmp_path / "run"]).returncode == -9
    assert runs.latest_checkpoint(tmp_path / "run") == (1, tmp_path / "run" / "step_1")


def draws() -> list:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_rng_state_survives_a_file_and_gives_the_same_draws(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep a second number back: part of the state
    torch.save(runs.rng_state(), tmp_path / "rng.pt")
    want = draws() + draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    runs.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draws() + draws() == want


# signals ------------------------------------------------------------------------------------------------------------


STEPS = """
import command, os, runs, signal
from pathlib import Path
run = runs.open_run(Path(sys.argv[1]), {}, resume="--resume" in sys.argv)
newest = runs.latest_checkpoint(run)
start = newest[0] if newest else 0
runs.truncate_after(run, start)
stop = command.StopSignal(stop_file=run / "stop")
for step in range(start, 6):
    if step == 3 and not newest:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        (run / "in_the_middle").touch()
    runs.log_metrics(run, step, {"x": float(step)})
    if stop.requested or step == 1 or step == 5:
        runs.save_checkpoint(run, step + 1, lambda folder: (folder / "x").write_text(str(step)), keep=1)
    if stop.requested:
        break
"""


@pytest.mark.parametrize("name,code,steps", [("SIGTERM", 0, 4), ("SIGINT", 0, 4), ("SIGKILL", -9, 3)])
def test_a_signal_ends_the_step_saves_and_resume_repeats_nothing(tmp_path, name, code, steps):
    path, run = script(tmp_path, STEPS), tmp_path / "run"
    assert subprocess.run([sys.executable, path, run, name]).returncode == code
    assert (run / "in_the_middle").exists() == (code == 0), "the step went on after the signal"
    assert len(read_lines(run / "metrics.jsonl")) == steps
    assert runs.latest_checkpoint(run)[0] == (4 if code == 0 else 2)
    assert subprocess.run([sys.executable, path, run, name, "--resume"]).returncode == 0
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(6))


# the curve of the reward --------------------------------------------------------------------------------------------


def test_plot_shows_reward_parts_and_validation(tmp_path):
    assert runs.plot_reward(tmp_path) is None and not list(tmp_path.iterdir())
    for step in range(30):
        val = {"val/total": step / 30, "val/accuracy": 0.4} if step % 10 == 0 else {}
        runs.log_metrics(tmp_path, step, {"reward/total": step / 40, "reward/format": None if step == 3 else 1.0,
                                          "reward/length": 400.0, "loss/policy": -5.0, **val})
    path = runs.plot_reward(tmp_path)
    image = Image.open(path).convert("RGB")
    assert image.width > 800
    drawn = {colour for _, colour in image.getcolors(maxcolors=2**24)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in runs.COLOURS[:3]} <= drawn, "the total and two parts"
    assert tuple(bytes.fromhex(runs.COLOURS[3][1:])) not in drawn, "the length is no reward"
    assert not list(tmp_path.glob("*.tmp*"))


# tracker ----------------------------------------------------------------------------------------------------------


def test_wandb_gets_what_metrics_jsonl_gets(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(init=lambda **kwargs: calls.append(kwargs), log=lambda metrics, step: calls.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = runs.open_tracker("wandb", tmp_path / "mine", {"lr": 1e-6})
    log(3, {"reward/total": torch.tensor(0.5), "loss": float("nan")})
    assert calls[0]["id"] == "mine" and calls[0]["config"] == {"lr": 1e-6} and calls[0]["resume"] == "allow"
    assert calls[1] == (3, {"reward/total": 0.5, "loss": None})


def test_no_tracker_logs_nothing_and_an_unknown_one_is_one_line(tmp_path, monkeypatch):
    assert runs.open_tracker("none", tmp_path, {})(0, {"a": 1.0}) is None
    with pytest.raises(ValueError, match="--tracker mlflow: one of none, wandb"):
        runs.open_tracker("mlflow", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        runs.open_tracker("wandb", tmp_path, {})
