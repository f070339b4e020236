"""The update alone, without an engine: one training step's passes on completions made up at random, timed and profiled.

    python -m bench.update --out DIR                     on a GPU: the 3B shape, 16 groups of 8 x 512 tokens
    python -m bench.update --out DIR --model random:tiny --tokens 32 --prompts 2
    python -m bench.update --out DIR --largest           the most groups that fit one micro-batch; add --kernels reference

Rows, flags and token counts are those of the preset bench-3b; completions are random ids. DIR gets update.json, and
profile/ (seconds by kernel, a trace for Perfetto) of the last step. For work on the update: the whole step is the preset's.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import memory
import speed
from data.dataset import encode, load_rows
from model import compute_dtype, frozen_copy, load_policy
from optim import MasterOptimizer
from rollout import Completion
from sampling import encoding
from train_grpo import BENCH, train_step


@dataclass(frozen=True)
class Config:
    out: Path
    model: str = "random:3b"
    prompts: int = 16
    tokens: int = 512
    steps: int = 3
    offload_moments: bool = True
    kernels: str = "auto"
    checkpoint_layers: int | None = None
    token_budget: int = BENCH.token_budget
    profile: bool = True
    largest: bool = False  # instead: one step each of 1, 2, ... groups in one micro-batch, nothing recomputed, until one fails


def main(cfg: Config) -> None:
    cfg.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.largest and device.type != "cuda":
        raise SystemExit("--largest asks what fits a GPU, and there is none here")
    if cfg.model in ("random:3b", "random:7b") and device.type != "cuda":
        raise SystemExit(f"error: {cfg.model} needs an NVIDIA GPU, and there is none: --model random:tiny runs on a CPU")
    policy, processor = load_policy(
        cfg.model, dtype=compute_dtype("auto", device.type), device=str(device), never_stop=True, kernels=cfg.kernels == "auto"
    )  # fmt: skip
    reference = frozen_copy(policy)
    optimizer = MasterOptimizer(policy.named_parameters(), weight_decay=0.01, offload_moments=cfg.offload_moments)
    if cfg.largest:
        largest(cfg, policy, processor, reference, optimizer)
    else:
        timed(cfg, policy, processor, reference, optimizer)


def made_up(cfg: Config, policy, processor, train_cfg) -> tuple[list, list, torch.Tensor]:
    """Prompts, groups of random completions, advantages (prompts, G)."""
    rows = load_rows(BENCH.data, limit=train_cfg.prompts_per_step)
    prompts = [encode(row, processor, **encoding(train_cfg)) for row in rows]
    allowed = (~policy.banned).nonzero().squeeze(1).cpu()
    draw = torch.Generator().manual_seed(1)
    ids = allowed[torch.randint(len(allowed), (len(rows), train_cfg.group_size, cfg.tokens), generator=draw)].tolist()
    groups = [[Completion(one, [-7.0] * cfg.tokens, "", False) for one in group] for group in ids]
    return prompts, groups, torch.randn(len(rows), train_cfg.group_size, generator=draw)


def timed(cfg: Config, policy, processor, reference, optimizer) -> None:
    device = policy.device
    train_cfg = replace(BENCH, prompts_per_step=cfg.prompts, token_budget=cfg.token_budget, checkpoint_layers=cfg.checkpoint_layers)
    prompts, groups, advantages = made_up(cfg, policy, processor, train_cfg)
    meter, lines = speed.Meter(policy, passes=1), []
    for step in range(cfg.steps):
        last = cfg.profile and step + 1 == cfg.steps
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with speed.profiled(cfg.out / "profile" if last else None):
            metrics = train_step(policy, reference, optimizer, prompts, groups, advantages, train_cfg, step=step)
        metrics["time/update"] = time.perf_counter() - began
        metrics |= meter.read(metrics)
        if device.type == "cuda":
            metrics["torch_gib"] = torch.cuda.max_memory_allocated() / memory.GIB
        lines.append(metrics)
        names = ("time/update", "speed/mfu", "speed/hfu", "speed/matmul_tflops", "speed/checkpointed_layers", "speed/peak_gib", "torch_gib")
        print(f"step {step}{' (profiled)' if last else ''}: " + ", ".join(f"{n} {metrics[n]:.3f}" for n in names if n in metrics), flush=True)
    (cfg.out / "update.json").write_text(json.dumps(lines, indent=1))


def largest(cfg: Config, policy, processor, reference, optimizer) -> None:
    """largest.json: packed tokens and torch's peak, a line for every number of groups that fitted."""
    lines = []
    for n in range(1, cfg.prompts + 1):
        train_cfg = replace(BENCH, prompts_per_step=n, token_budget=1 << 40, checkpoint_layers=cfg.checkpoint_layers or 0)
        try:
            torch.cuda.reset_peak_memory_stats()
            metrics = train_step(policy, reference, optimizer, *made_up(cfg, policy, processor, train_cfg), train_cfg, step=0)
        except torch.OutOfMemoryError as error:
            print(f"{n} groups: {str(error).splitlines()[0]}")
            break
        lines.append({"groups": n, "tokens": metrics["speed/packed_tokens"], "torch_gib": torch.cuda.max_memory_allocated() / memory.GIB})
        print(json.dumps(lines[-1]), flush=True)
    (cfg.out / "largest.json").write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
