"""The run folder: nothing written is lost or stands there twice, a stop saves, one rank's death is everybody's.

    python -m pytest tests/test_runs.py
"""

import errno
import importlib.metadata
import io
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import runs

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
    assert [line["step"] for line in runs.read_lines(tmp_path / "metrics.jsonl")] == [3]


def test_truncate_cuts_steps_done_after_the_checkpoint_and_a_torn_line(tmp_path):
    for step in range(6):
        runs.log_metrics(tmp_path, step, {"x": step / 3})
        runs.log_samples(tmp_path, step, [{"text": "a"}, {"text": "b"}])
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "x"')  # the process was killed while it wrote
    assert runs.truncate_after(tmp_path, 4) == 2 + 4
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:4])
    assert [line["step"] for line in runs.read_lines(tmp_path / "samples.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert runs.truncate_after(tmp_path / "nothing", 0) == 0


def test_samples_keep_any_text_and_the_picture(tmp_path):
    text = "line\nbreak \u2028 \U0001f600 lone \udc80 surrogate \x00 é"
    picture = Image.new("RGB", (5, 4), (1, 2, 3))
    png = io.BytesIO()
    picture.save(png, "PNG")
    runs.log_samples(tmp_path, 0, [{"text": text, "images": [picture, png.getvalue(), "photo.jpg"]}, {"text": "x"}])
    runs.log_samples(tmp_path, 5, [{"text": text, "images": [picture]}])
    first, second, third = runs.read_lines(tmp_path / "samples.jsonl")
    assert first["text"] == third["text"] == text and second == {"step": 0, "text": "x"}
    assert first["images"][2] == "photo.jpg" and first["images"][0] == third["images"][0]
    for name in first["images"][:2]:
        assert Image.open(tmp_path / name).getpixel((0, 0)) == (1, 2, 3)
    runs.truncate_after(tmp_path, 5)
    assert runs.read_lines(tmp_path / "samples.jsonl")[0]["text"] == text


def test_broken_line_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="x.jsonl, line 2: not JSON"):
        runs.read_lines(tmp_path / "x.jsonl")


def test_what_a_crash_broke_off_is_cut_and_whole_lines_stay(tmp_path):
    path = tmp_path / "x.jsonl"
    runs.append_lines(path, [{"text": "a\nb \ud800"}, {"text": "é"}])
    whole = path.read_bytes()
    assert not runs.cut_torn_line(path) and path.read_bytes() == whole == runs.json_lines(runs.read_lines(path))
    path.write_bytes(whole + b'{"text": "c')
    assert len(runs.read_lines(path)) == 2
    assert runs.cut_torn_line(path) and path.read_bytes() == whole
    path.write_bytes(b'{"te')
    assert runs.cut_torn_line(path) and path.read_bytes() == b""
    with pytest.raises(ValueError):
        runs.append_lines(path, [{"fine": 1}, {"x": float("nan")}])
    assert path.read_bytes() == b""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    runs.replace_file(path, b"old")
    monkeypatch.setattr(runs, "open", lambda path, mode: io.BufferedWriter(FullAfter(path, mode)), raising=False)
    with pytest.raises(runs.FullDisk, match="x.json was not written, the disk is full; the old one, if any, is .*"):
        runs.replace_file(path, b"new" * 10)
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
    runs.log_metrics(tmp_path, 0, {"x": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def open_on_a_full_disk(path, mode, **options):
        return FullAfter(path, mode) if mode == "ab" else open(path, mode, **options)

    monkeypatch.setattr(runs, "open", open_on_a_full_disk, raising=False)
    with pytest.raises(runs.FullDisk, match="disk is full; the lines before are untouched: free some space") as caught:
        runs.log_metrics(tmp_path, 1, {"x": 1.0, "a longer name": 2.0})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


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

    with pytest.raises(runs.FullDisk, match="step_2 was not written, the disk is full; step_1 .* untouched") as caught:
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
from types import SimpleNamespace
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


# signals and errors -------------------------------------------------------------------------------------------------


def test_signals_only_set_a_flag_and_a_second_ctrl_c_interrupts(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = runs.stop_on_signals(stop_file=tmp_path / "stop")
    try:
        assert not stop.requested
        (tmp_path / "stop").touch()
        assert stop.requested
        (tmp_path / "stop").unlink()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # a bytecode on which the handler may run
    finally:
        stop.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


STEPS = """
import os, runs, signal
from pathlib import Path
from types import SimpleNamespace
run = runs.open_run(Path(sys.argv[1]), {}, resume="--resume" in sys.argv)
newest = runs.latest_checkpoint(run)
start = newest[0] if newest else 0
runs.truncate_after(run, start)
stop = runs.stop_on_signals(stop_file=run / "stop")
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
    assert len(runs.read_lines(run / "metrics.jsonl")) == steps
    assert runs.latest_checkpoint(run)[0] == (4 if code == 0 else 2)
    assert subprocess.run([sys.executable, path, run, name, "--resume"]).returncode == 0
    assert [line["step"] for line in runs.read_lines(run / "metrics.jsonl")] == list(range(6))


HANG = """
import os, runs, torch
import torch.distributed as dist
rank = int(os.environ["RANK"])
with runs.die_together(rank, world_size=2):
    dist.init_process_group("gloo")
    runs.stop_on_signals(rank=rank)
    dist.barrier()
    if rank == 1:
        raise LookupError("rank one is broken")
    while True:
        WAIT
"""


@pytest.mark.parametrize("wait", [
    "dist.all_reduce(torch.ones(1))",
    pytest.param("time.sleep(1)", marks=pytest.mark.slow),  # a peer that notices nothing, as in an NCCL collective
])
def test_one_rank_that_raises_ends_all_with_its_traceback(tmp_path, wait):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = script(tmp_path, "import time\n" + HANG.replace("WAIT", wait))
    began = time.monotonic()
    done = subprocess.run([*torchrun, path], capture_output=True, text=True, timeout=100,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert time.monotonic() - began < 60 + 20, "a minute, and 20 s for starting two interpreters with torch"
    assert "[rank 1] LookupError: rank one is broken" in done.stderr
    assert '[rank 1]   File "' in done.stderr, "the traceback says where"


def test_with_one_rank_errors_just_pass(capsys):
    with pytest.raises(LookupError), runs.die_together(0, world_size=1):
        raise LookupError("x")
    with pytest.raises(SystemExit) as caught, runs.die_together(1, world_size=2):
        sys.exit(0)
    assert caught.value.code == 0
    with pytest.raises(SystemExit, match="error: metrics.jsonl was not written"), runs.die_together(0, world_size=1):
        raise runs.FullDisk("metrics.jsonl was not written")


def test_errors_of_the_user_are_one_line():
    for error in (ValueError("two\nlines"), FileNotFoundError("two\nlines"), ImportError("two lines")):
        with pytest.raises(SystemExit) as caught, runs.one_line_errors():
            raise error
        assert caught.value.code == "error: two lines"
    with pytest.raises(KeyError), runs.one_line_errors():  # a bug of ours keeps its traceback
        raise KeyError("x")


def test_a_shadowed_kernels_package_is_found_without_importing_it(tmp_path, monkeypatch):
    runs.check_shadowed_kernels()
    info = tmp_path / "kernels-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="'kernels' 0.9.0 .* pip uninstall kernels"):
        runs.check_shadowed_kernels()


# what one sees ------------------------------------------------------------------------------------------------------


def test_progress_prints_plain_lines_without_a_terminal():
    out = io.StringIO()
    progress = runs.Progress(12, start=2, every=0.0, file=out)
    for step in range(2, 12):
        progress.show(step, {"reward": step / 10, "accuracy": 0.5})
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("step 3/12  reward 0.200  accuracy 0.500") and lines[-1].endswith("00:00 left")
    assert " s/step " in lines[0]
    other = io.StringIO()
    runs.Progress(3, unit="row", file=other).show(0, {})
    assert other.getvalue().startswith("row 1/3 ") and " s/row " in other.getvalue()
    seldom, quiet = io.StringIO(), io.StringIO()
    for file, rank in ((seldom, 0), (quiet, 1)):
        progress = runs.Progress(5, rank=rank, every=1e9, file=file)
        for step in range(5):
            progress.show(step, {"reward": 0.0})
    assert [line.split()[1] for line in seldom.getvalue().splitlines()] == ["1/5", "5/5"], "the first and the last"
    assert quiet.getvalue() == ""


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    progress = runs.Progress(4, start=1, file=out)
    progress.show(1, {"reward": 0.25})
    progress.show(3, {"reward": 0.75})
    progress.close()
    last = out.getvalue().split("\r")[-1]
    assert "4/4" in last and "reward 0.750" in last


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


# ---------------------------------------------------------------- tracker


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
