"""train_grpo.py --dry-run: what a run would see and hold, without running it."""

import torch

import memory
from model import Policy
from rollout import choose_rollout


def show(cfg, policy: Policy, processor, prompts: list, rows: int, world: int) -> None:
    """Prints a rendered prompt, prompt lengths, passes over the data, memory by phase; cfg is train_grpo.Config."""
    lengths = sorted(len(p.expanded) for p in prompts)
    print(f"\nfirst prompt ({len(prompts[0].expanded)} tokens, one placeholder a picture shown):")
    print(processor.tokenizer.decode(prompts[0].ids))
    print(f"\nprompt tokens of {len(lengths)} rows: least {lengths[0]}, median {lengths[len(lengths) // 2]}, most {lengths[-1]}")
    print(f"steps: {cfg.steps} x {cfg.prompts_per_step} prompts = {cfg.steps * cfg.prompts_per_step / rows:.1f} passes "
          f"over {rows} rows, {cfg.steps * cfg.mini_batches} optimiser steps on {world} ranks")  # fmt: skip
    engine = 0.0
    if choose_rollout(cfg.rollout, policy.device) == "vllm" and policy.device.type == "cuda":
        engine = cfg.engine_memory * torch.cuda.get_device_properties(policy.device).total_memory / memory.GIB
    print(f"\nmemory of one of {world} ranks, --shard {cfg.shard}, reference {cfg.reference}, estimated, GiB:")
    for phase, parts in memory.estimate(cfg, policy, engine, world, cfg.shard, cfg.reference).items():
        print(f"  {phase:9s} {sum(parts.values()):7.2f}   " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v > 0.005))
