"""The run folder: configuration, metrics, transcripts, checkpoints, resume, the curve of the reward.

    runs/<name>/config.json      configuration, versions, GPUs, command line, git state (git.diff beside it if dirty)
                metrics.jsonl    one line a step                    samples.jsonl   whole transcripts, every few steps
                pictures/        the pictures that the transcripts name, when they were not files already
                step_N/          the state after N steps: metrics of steps 0 to N-1 belong to it, the loop goes on at N
                reward.png       the reward and its parts over the steps

Nothing here knows about models or rewards: the caller hands in dicts and a function that writes its files. What is
written survives whatever comes after it: lines are appended whole (files.py), a checkpoint is renamed into place when
whole, and older ones go only after that. torch and matplotlib are imported by the functions that need them.
"""

import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from command import versions
from files import FullDisk, append_lines, not_written, read_lines, replace_file, sync

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


def _output(*command: str) -> str | None:
    """What a command prints when run beside this file; None where there is no such command, or it fails."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


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
            raise not_written(error, path, "everything written before is untouched") from error
    return str(path.relative_to(run))


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
            sync(*tmp.rglob("*"), tmp)  # or a power cut after the rename leaves a whole-looking folder of empty files
            os.rename(tmp, final)
            sync(run)
    except BaseException as error:  # also Ctrl-C: whatever it was, half a checkpoint helps nobody
        newest = latest_checkpoint(run)
        kept = f"{newest[1].name} and everything before is untouched" if newest else "nothing was saved before it"
        explained = not_written(error, final, kept)  # asked while the half still fills the disk
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
# the curve of the reward


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
