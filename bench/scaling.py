"""What several GPUs of one machine give: step time at the same work a GPU, weight sync, and the end of a run whose rank dies.

    python -m bench.scaling --out DIR                                    on a machine with GPUs: counts 1, 2, 4
    python -m bench.scaling --out DIR --parts sync kill
    python -m bench.scaling --out DIR --rehearse                         random:tiny on the CPU: does it run at all

Every measurement is a torchrun of its own, on the first N GPUs. DIR gets results.json, results.md and the logs.

scale: bench preset, `prompts` a GPU. Efficiency: step time of the smallest count / step time of this one.
sync:  seconds until every weight went through `weights(policy)` to one consumer that copies it, as the engine does, both
       ways: whole weights beside sliced masters, and fsdp shards that are gathered. Median of five after one to warm up.
kill:  SIGKILL to the last rank in the middle of its second update; seconds until no other rank lives (rule 17: under 60).
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

REHEARSAL = (
    "--model random:tiny --data scenes:easy@train --style short --max-pixels 12544 --limit 64 --max-prompt-tokens 512 "
    "--max-completion-tokens 16 --device cpu --rollout hf --reward vanilla --no-offload-moments"
).split()


@dataclass(frozen=True)
class Config:
    out: Path
    parts: tuple[str, ...] = ("scale", "sync", "kill")
    counts: tuple[int, ...] = (1, 2, 4)  # GPUs; those that are not there are left out
    preset: str = "bench-3b"
    prompts: int = 16  # a GPU and step
    steps: int = 4  # the first warms up and does not count
    models: tuple[str, ...] = ("random:3b", "random:7b")  # of the sync
    more: str = ""  # further arguments of train_grpo.py
    rehearse: bool = False
    worker: str = ""  # internal: sync:MODEL:SHARD or kill, in a rank of torchrun


def main(cfg: Config) -> None:
    cfg.out.mkdir(parents=True, exist_ok=True)
    counts = [n for n in cfg.counts if n <= gpus(cfg)]
    if not counts:
        raise SystemExit(f"--counts {cfg.counts}: here are {gpus(cfg)} GPUs; --rehearse runs the same on the CPU")
    results = {"gpus": gpus(cfg), "preset": cfg.preset, "prompts a GPU": cfg.prompts}
    for part in cfg.parts:
        results[part] = {"scale": scale, "sync": sync, "kill": kill}[part](cfg, counts)
        (cfg.out / "results.json").write_text(json.dumps(results, indent=1))
        (cfg.out / "results.md").write_text(markdown(results))
    print(markdown(results))


def gpus(cfg: Config) -> int:
    return 2 if cfg.rehearse else len(cards())


def cards() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i in range(len(found.stdout.splitlines()))] if found.returncode == 0 else []


def start(cfg: Config, count: int, log: Path, *command: str) -> subprocess.Popen:
    visible = {} if cfg.rehearse else {"CUDA_VISIBLE_DEVICES": ",".join(cards()[:count])}
    threads = {"OMP_NUM_THREADS": "1"} if cfg.rehearse else {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    search = os.pathsep.join(filter(None, (".", os.environ.get("PYTHONPATH"))))
    environment = os.environ | visible | threads | {"PYTHONPATH": search}
    with open(log, "w") as file:
        return subprocess.Popen([*torchrun, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)


def training(cfg: Config, count: int, name: str) -> list[str]:
    """Arguments of train_grpo.py: the same work on every GPU."""
    prompts = 2 if cfg.rehearse else cfg.prompts
    limit = [] if cfg.rehearse else ["--limit", str(max(64, prompts * count * cfg.steps))]
    return [cfg.preset, *(REHEARSAL if cfg.rehearse else []), *limit, "--name", name, "--prompts-per-step", str(prompts * count),
            "--steps", str(cfg.steps), "--save-every", "0", *cfg.more.split()]  # fmt: skip


def fresh(name: str) -> Path:
    """runs/NAME with nothing of an earlier bench in it."""
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    return Path("runs") / name


def scale(cfg: Config, counts: list[int]) -> list[dict]:
    found = []
    for count in counts:
        run, log = fresh(f"bench-scaling-{count}"), cfg.out / f"scale-{count}.log"
        code = start(cfg, count, log, "train_grpo.py", *training(cfg, count, run.name)).wait()
        if code:
            raise SystemExit(f"{count} ranks ended with {code}; the last lines of {log}:\n" + tail(log))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
        phases = {k: statistics.median(line[k] for line in lines if k in line) for k in lines[-1] if k.startswith("time/")}
        peak = max(line.get("speed/peak_gib", 0.0) for line in lines)
        shard = json.loads((run / "config.json").read_text())["config"]["shard"]
        found.append({"gpus": count, "step": phases["time/step"], "phases": phases, "peak_gib": peak, "mfu": lines[-1].get("speed/mfu"),
                      "efficiency": (found[0]["step"] if found else phases["time/step"]) / phases["time/step"],
                      "shard": shard})  # fmt: skip
    return found


def sync(cfg: Config, counts: list[int]) -> list[dict]:
    found, count = [], max(counts)
    for model in ("random:tiny",) if cfg.rehearse else cfg.models:
        for shard in ("optimizer", "fsdp"):
            log = cfg.out / f"sync-{model.partition(':')[2]}-{shard}.log"
            flags = ["--rehearse"] if cfg.rehearse else []
            code = start(cfg, count, log, "bench/scaling.py", "--out", str(cfg.out), "--worker", f"sync:{model}:{shard}", *flags).wait()
            if code:
                raise SystemExit(f"{model} {shard} ended with {code}; the last lines of {log}:\n" + tail(log))
            (line,) = [line for line in log.read_text().splitlines() if line.startswith("SYNC ")]
            found.append({"model": model, "shard": shard, "gpus": count, **json.loads(line.removeprefix("SYNC "))})
    return found


def sync_worker(cfg: Config, model: str, shard: str) -> None:
    import torch

    import ranks
    from model import load_policy, shard_policy, weights
    from optim import MasterOptimizer

    rank, _, device, dtype = ranks.setup("cpu" if cfg.rehearse else "auto")
    policy, _ = load_policy(model, dtype=dtype, device=str(device))
    ranks.join_alone(device)
    if shard == "fsdp":
        shard_policy(policy)
    else:
        MasterOptimizer(policy.named_parameters(), shard=shard)
    room = torch.empty(max(p.numel() for p in policy.parameters()), dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        ranks.barrier()
        began = time.perf_counter()
        size = 0
        for _, tensor in weights(policy, dtype=None):
            room[: tensor.numel()].copy_(tensor.flatten())
            size += tensor.nbytes
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(max(ranks.gather(time.perf_counter() - began)))
    if rank == 0:
        print("SYNC " + json.dumps({"seconds": statistics.median(seconds[1:]), "gib": size / 2**30}), flush=True)
    ranks.leave()


def kill(cfg: Config, counts: list[int]) -> dict:
    """Rank files say who lives; the victim says when it begins its second update."""
    count, name, folder = max(counts), "bench-scaling-kill", cfg.out / "kill"
    fresh(name)
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    flags = ["--rehearse"] if cfg.rehearse else []
    process = start(cfg, count, cfg.out / "kill.log", "bench/scaling.py", "--out", str(cfg.out), "--worker", "kill", "--preset",
                    cfg.preset, "--prompts", str(cfg.prompts), f"--more={cfg.more} --steps 50", *flags)  # fmt: skip
    while not (folder / "updating").exists():
        if process.poll() is not None:
            raise SystemExit(f"ended with {process.returncode} before its second update:\n" + tail(cfg.out / "kill.log"))
        time.sleep(0.05)
    pids = {int(file.stem): int(file.read_text()) for file in folder.glob("*.pid")}
    victim = pids.pop(count - 1)
    os.kill(victim, signal.SIGKILL)
    began, ended = time.monotonic(), {}
    while len(ended) < len(pids) and time.monotonic() - began < 180:
        ended |= {rank: round(time.monotonic() - began, 2) for rank, pid in pids.items() if rank not in ended and not lives(pid)}
        time.sleep(0.05)
    code = process.wait(timeout=60)
    return {"gpus": count, "seconds": max(ended.values(), default=None), "all_ended": len(ended) == len(pids), "exit_code": code}


def kill_worker(cfg: Config) -> None:
    import train_grpo

    rank, count, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), cfg.out / "kill"
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    inner, calls = train_grpo.passes_before, []

    def passes_before(*args):
        calls.append(1)
        if len(calls) == 2 and rank == count - 1:
            (folder / "updating").touch()
            time.sleep(600)  # the others wait for it in a collective when the signal comes
        return inner(*args)

    train_grpo.passes_before = passes_before
    train_grpo.main(tyro.extras.overridable_config_cli(train_grpo.PRESETS, args=training(cfg, count, "bench-scaling-kill")))


def lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text().splitlines()[-lines:])


def markdown(results: dict) -> str:
    out = []
    if "scale" in results:
        out += [f"{results['preset']}, {results['prompts a GPU']} prompts a GPU and step:", "",
                "| GPUs | --shard | step, s | efficiency | generate | update | most GiB | MFU |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for r in results["scale"]:
            mfu = f"{r['mfu']:.1%}" if r["mfu"] else ""
            out.append(f"| {r['gpus']} | {r['shard']} | {r['step']:.2f} | {r['efficiency']:.3f} | {r['phases']['time/generate']:.2f} | "
                       f"{r['phases']['time/update']:.2f} | {r['peak_gib']:.1f} | {mfu} |")  # fmt: skip
    if "sync" in results:
        out += ["", "| model | --shard | GPUs | GiB | all weights once, s |", "|---|---|---|---|---|"]
        out += [f"| {r['model']} | {r['shard']} | {r['gpus']} | {r['gib']:.2f} | {r['seconds']:.3f} |" for r in results["sync"]]
    if "kill" in results:
        r = results["kill"]
        out += ["", f"One of {r['gpus']} ranks killed in its second update: all others ended {r['seconds']} s later "
                    f"(all: {r['all_ended']}, exit code {r['exit_code']})."]  # fmt: skip
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    config = tyro.cli(Config)
    if config.worker.startswith("sync:"):
        sync_worker(config, *config.worker.removeprefix("sync:").rsplit(":", 1))
    elif config.worker == "kill":
        kill_worker(config)
    else:
        main(config)
