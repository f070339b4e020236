"""Supervised fine-tuning on the rows that GRPO takes: the papers' baseline (bare answers), or a warm start (scene graphs).

    python train_sft.py demo-sees                           a small model from nothing on procedural scenes, before GRPO
    python train_sft.py sft-3b --data my_rows.jsonl         the papers' baseline: LoRA, bare answers

The prompt is masked: only the response's tokens count, each the same. Rows are packed as groups of one completion, so
model, packing, optimiser, checkpoints and validation are those of train_grpo.py. Batches are made in worker processes
from their step number alone, which is what makes a resumed run see the same ones. Procedural rows are drawn on the fly
and never repeat, unless --repeat says so.
"""

import math
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from command import Progress, StopSignal, check_shadowed_kernels, one_line_errors

if __name__ == "__main__":
    check_shadowed_kernels()  # before anything imports transformers

import torch
import tyro
from torch.utils.data import DataLoader, Dataset

import flags
import memory
import ranks
import rewards
import runs
import scoring
from data.dataset import encode, load_rows
from data.responses import careless_text
from data.scenes import scene_rows
from metrics import Clock
from model import Packed, Policy, add_lora, load_policy, pack
from optim import OPTIMIZERS, SCHEDULES, MasterOptimizer, learning_rate
from rollout import Completion
from sampling import encoding, fingerprint, fitting, take, validate
from train_grpo import (
    KERNELS, SPACER_DATA, check_data, global_counts, own_rollout, prepare, restore, save, token_scale,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # checkpoint folder, hub id, or random:tiny|demo|3b|7b
    processor: str | None = None  # tokenizer and picture processor, if not the model's own
    data: str = "OX-PIXL/STVQA-7K@train"  # as train_grpo.py takes it; scenes:LEVEL@train draws new rows for ever
    val_data: str | None = None  # the same for validation
    limit: int | None = None  # first rows of data only; scenes: None never repeats a row
    val_limit: int | None = 256  # first rows of val_data only
    repeat: int | None = None  # so many different procedural rows, then the same ones again, instead of new ones for ever
    name: str = "sft"  # run folder: runs/NAME
    resume: bool = False  # go on from the newest whole checkpoint of runs/NAME
    seed: int = 1  # of everything drawn: rows, random weights

    # what is taught
    # full: the four-tag text with its scene graph; answer: the bare answer (the papers' baseline); gold: of a choice the
    # letter alone (SpaceR's baseline)
    response: str = "full"
    careless: float = 0.0  # share of procedural rows whose response answers wrongly, with the right boxes
    style: str = "row"  # prompt style, as in train_grpo.py
    box_frame: str = "original"  # boxes in pixels of the original or the resized picture
    min_pixels: int = 512 * 512  # pictures are resized into this range before the processor sees them
    max_pixels: int = 2048 * 2048  # the upper end of that range
    max_prompt_tokens: int = 6144  # longer prompts are dropped at load, and counted

    # optimisation
    steps: int = 645  # optimiser steps
    rows_per_step: int = 32  # over all ranks
    token_budget: int = 16384  # packed tokens of a micro-batch
    workers: int = 2  # processes that draw, encode and pack; 0: this one
    lr: float = 1e-5  # learning rate, its peak
    schedule: str = "cosine"  # constant, cosine, linear
    warmup_steps: int = 64  # up to the peak
    optimizer: str = "adamw"  # adamw, adamw8bit, kahan, muon
    weight_decay: float = 0.01  # AdamW's
    betas: tuple[float, float] = (0.9, 0.999)  # likewise
    max_grad_norm: float = 1.0  # a longer gradient is cut to this
    lora_rank: int = 0  # above 0: only low-rank corrections of the language model's layers are trained (needs peft)
    freeze_vision: bool = False  # leave the vision tower as it is
    offload_moments: bool = False  # this and the next two: see train_grpo.py
    shard: str = "auto"  # none, optimizer, fsdp
    checkpoint_layers: int | None = None  # language layers whose activations are recomputed
    kernels: str = "auto"  # auto (Triton and Liger on a GPU) or reference (plain torch)
    dtype: str = "auto"  # of weights and compute: auto (bfloat16 on a GPU, float32 otherwise), float32, bfloat16
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda

    # validation and records
    max_completion_tokens: int = 512  # of validation
    val_temperature: float = 0.0  # 0 is greedy
    rollout_sequences: int = 256  # completions decoded side by side
    reward: str = "spatialthinker"  # of validation
    reward_mode: str = "corrected"  # or upstream
    similarity: str = "exact"  # of object labels: lexical, exact, spacy, or file.py:function
    val_every: int = 100  # steps; also after the last; 0: never
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # checkpoints


DEMO = Config(
    model="random:demo", data="scenes:demo@train", val_data="scenes:demo@val", val_limit=512, name="demo-sees",
    style="short", min_pixels=784, max_pixels=448 * 448, max_prompt_tokens=512, max_completion_tokens=192,
    rollout_sequences=512, steps=2400, rows_per_step=512, token_budget=131072, workers=14, lr=1.5e-3, optimizer="muon",
    warmup_steps=100, weight_decay=0.0, betas=(0.9, 0.95), val_every=400, save_every=400,
)  # fmt: skip

# Spec 4.4: LoRA on the language model's layers, lr 1e-4 cosine, warm-up over a tenth, context 2,048, no reasoning; what it
# teaches has no tags but <answer>, so validation takes the reward that asks for no others.
SFT = Config(response="answer", style="no_reasoning", reward="vanilla", lora_rank=8, lr=1e-4, max_prompt_tokens=2048, name="sft-3b")

# Sections 3.3 and 3.6 of SpaceR's notes: all weights, batches of 1 x 2 x 8 GPUs, one pass, bare answers to the plain template.
# There the prompt's text was learned too; here it is masked.
SPACER = Config(
    model="Qwen/Qwen2.5-VL-7B-Instruct", data=SPACER_DATA, name="spacer-sft-7b", response="gold", style="spacer",
    min_pixels=4 * 28 * 28, max_pixels=256 * 28 * 28, max_prompt_tokens=16384, steps=9_457, rows_per_step=16, lr=1e-6,
    schedule="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=5.0, reward="spacer", save_every=1000, val_every=0,
)  # fmt: skip

PRESETS = {
    "sft-3b": ("The papers' SFT baseline on Qwen2.5-VL-3B: LoRA of rank 8, three passes over STVQA-7K, bare answers (one GPU).", SFT),
    "sft-7b": ("The same on Qwen2.5-VL-7B.", replace(SFT, model="Qwen/Qwen2.5-VL-7B-Instruct", name="sft-7b")),
    "spacer-sft-7b": ("SpaceR's SFT baseline on Qwen2.5-VL-7B: one pass over SpaceR-151k, all weights, bare answers (8 GPUs).", SPACER),
    "demo-sees": ("A small model learns to see procedural scenes, from nothing: minutes on one GPU.", DEMO),
    "demo-careless": (
        "The model that sees, taught careless answers to right boxes: what reinforcement learning then mends.",
        replace(DEMO, model="runs/demo-sees/step_2400", name="demo-careless", careless=0.5, steps=200, lr=3e-4,
                optimizer="adamw", warmup_steps=20, val_every=100, save_every=100),
    ),
}  # fmt: skip


RESPONSES = ("full", "answer", "gold")
MAX_SKIPPED = 10  # optimiser steps in a row with a non-finite gradient before the run stops


class Batches(Dataset):
    """Step number -> this rank's packed micro-batches; nothing else decides what is in them."""

    def __init__(self, cfg: Config, rows: list[dict] | None, processor, config, rank: int, world: int):
        self.cfg, self.rows, self.processor, self.config = cfg, rows, processor, config
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.cfg.steps

    def __getitem__(self, step: int) -> list[Packed]:
        cfg, share = self.cfg, self.cfg.rows_per_step // self.world
        if self.rows is None:
            level = cfg.data.partition("@")[0].partition(":")[2] or "demo"
            first = step * cfg.rows_per_step % cfg.repeat if cfg.repeat else step * cfg.rows_per_step
            rows = scene_rows(share, seed=cfg.seed, level=level, start=first + self.rank * share)
        else:
            rows = take(self.rows, step * cfg.rows_per_step, cfg.rows_per_step, cfg.seed)[self.rank :: self.world]
        prompts = [encode(row, self.processor, **encoding(cfg)) for row in rows]
        groups = [[target(row, self.processor, cfg)] for row in rows]
        return pack(prompts, groups, self.config, token_budget=cfg.token_budget)


def target(row: dict, processor, cfg: Config) -> Completion:
    """The response that a row teaches, tokenised, ended by the end-of-turn token."""
    text = response_of(row, cfg)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
    return Completion(ids, [0.0] * len(ids), text, True)


def response_of(row: dict, cfg: Config) -> str:
    """By cfg.response; full: rows without gold observation and reasoning teach scene and answer only."""
    if cfg.response == "gold":
        return f"<answer>{row['gold']}</answer>"
    if cfg.response == "answer":
        return rewards.solution_text({**row, "scene": None})
    if row["source"] != "scenes":
        return rewards.solution_text(row)
    return careless_text(row, cfg.careless)


def sft_step(policy: Policy, optimizer: MasterOptimizer, packs: list[Packed], *, lr: float,
             checkpoint_layers: int | None = None) -> dict[str, float]:  # fmt: skip
    """One optimiser step on this rank's micro-batches; the loss is the mean over all ranks' response tokens."""
    tokens, sequences, most = global_counts(packs, policy.device)
    total = torch.zeros((), device=policy.device)
    policy.checkpoint_layers(memory.layers_to_checkpoint(policy, optimizer, packs, checkpoint_layers))
    # Through shards every pass is a collective: every rank runs the same number, the extra ones with weight 0.
    for packed in packs + [replace(packs[0], loss_mask=torch.zeros_like(packs[0].loss_mask))] * (most - len(packs)):
        packed = packed.to(policy.device)
        logp, _ = policy(packed)
        loss = -(logp * token_scale(packed, "token", tokens, sequences)).sum()
        loss.backward()
        total += loss.detach()
    norm = optimizer.step(lr=lr)
    return {"loss/sft": sum(ranks.gather(float(total))), "optim/grad_norm": norm, "data/tokens": tokens}


def draws_rows(cfg: Config) -> bool:
    """Whether procedural rows are drawn while training, in the workers."""
    return cfg.limit is None and cfg.data.startswith("scenes")


def load_sft_rows(cfg: Config, source: str, limit: int | None, processor) -> list[dict]:
    rows = load_rows(source, limit=limit, box_frame=cfg.box_frame, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
    return fitting(cfg, rows, source, processor)


def check_config(cfg: Config) -> None:
    """Settings that cannot work, in one line each, before anything is loaded."""
    if (cfg.repeat or 0) % max(1, cfg.rows_per_step):
        raise ValueError(f"--repeat {cfg.repeat} is no multiple of --rows-per-step {cfg.rows_per_step}")
    if cfg.repeat and not draws_rows(cfg):
        raise ValueError(f"--repeat {cfg.repeat}: only for scenes without --limit; the rows of {cfg.data} come again as they are")
    flags.check_sizes(cfg, "limit", "repeat", "val_limit", "steps", "rows_per_step", "token_budget", "save_every", "keep", "max_completion_tokens")
    flags.check_numbers(cfg, limits="max_grad_norm", above="lr",
                        from_zero="val_every warmup_steps weight_decay lora_rank val_temperature")  # fmt: skip
    flags.check_choices(cfg, response=RESPONSES, schedule=SCHEDULES, optimizer=OPTIMIZERS, kernels=KERNELS, shard=memory.SHARDS)
    check_data(cfg.data, cfg.val_data)


def main(cfg: Config) -> None:
    with one_line_errors():
        check_config(cfg)
        runs.check_run(Path("runs") / cfg.name, resume=cfg.resume)
        pool = scoring.RewardPool(cfg.reward, mode=cfg.reward_mode, similarity=cfg.similarity)
        rank, world, device, dtype = ranks.setup(cfg.device, cfg.dtype)
        if cfg.rows_per_step % world:
            raise ValueError(f"--rows-per-step {cfg.rows_per_step} does not divide into {world} ranks")
    with ranks.die_together(rank, world_size=world), pool:
        with one_line_errors():
            policy, processor = load_policy(
                cfg.model, processor=cfg.processor, dtype=dtype, seed=cfg.seed, device=str(device),
                freeze_vision=cfg.freeze_vision, kernels=cfg.kernels == "auto",
            )  # fmt: skip
            if cfg.lora_rank:
                torch.manual_seed(cfg.seed)  # a checkpoint's loading leaves the generators as they were
                add_lora(policy, cfg.lora_rank)
            rows = None if draws_rows(cfg) else load_sft_rows(cfg, cfg.data, cfg.limit, processor)
            val_rows = load_sft_rows(cfg, cfg.val_data, cfg.val_limit, processor) if cfg.val_data else []
            if val_rows:
                scoring.check_rows(cfg.reward, val_rows)
            run = Path("runs") / cfg.name
            if rank == 0:
                runs.open_run(run, asdict(cfg), resume=cfg.resume, may_differ=MAY_DIFFER)
            ranks.barrier()
            cfg = replace(cfg, shard=memory.choose_shard(cfg, policy, world)[0])
            if cfg.lora_rank and cfg.shard == "fsdp":
                raise ValueError("--lora-rank trains few numbers: --shard none or optimizer, not fsdp")
            rollout = own_rollout(cfg, policy, processor)
            _, optimizer = prepare(cfg, policy)
            start = 0
            if cfg.resume and (newest := runs.latest_checkpoint(run)):
                start = newest[0]
                restore(newest[1], optimizer, rank, rows=rows)
        train(cfg, policy, optimizer, processor, rollout, pool, rows, val_rows, run, rank, world, start)
        ranks.leave()


MAY_DIFFER = ("resume", "val_every", "save_every", "keep", "workers", "token_budget", "checkpoint_layers", "rollout_sequences",
              "shard", "offload_moments")  # not steps: the schedule hangs on them  # fmt: skip


def leave_signals_alone(worker: int) -> None:
    """A signal to the whole group, as torchrun and Ctrl-C send it, is for the process that saves: without the workers it could
    not finish its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(cfg: Config, policy: Policy, optimizer: MasterOptimizer, processor, rollout, pool, rows, val_rows, run, rank: int,
          world: int, start: int) -> None:  # fmt: skip
    if rank == 0:
        runs.truncate_after(run, start)
        print(f"{run}: {'endless' if rows is None else len(rows)} rows, {world} ranks on {policy.device.type}, from step {start}")
    stop = StopSignal(stop_file=run / "stop", rank=rank)
    progress = Progress(cfg.steps, start=start, rank=rank)
    batches = Batches(cfg, rows, processor, policy.config, rank, world)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, cfg.steps), num_workers=cfg.workers,
                        worker_init_fn=leave_signals_alone)  # fmt: skip
    clock, skipped = Clock(), 0
    for step, packs in zip(range(start, cfg.steps), loader):
        metrics, rate = {}, learning_rate(step, peak=cfg.lr, schedule=cfg.schedule, warmup_steps=cfg.warmup_steps,
                                          total_steps=cfg.steps)  # fmt: skip
        clock.lap("data")
        metrics |= sft_step(policy, optimizer, packs, lr=rate, checkpoint_layers=cfg.checkpoint_layers)
        clock.lap("update")
        skipped = 0 if math.isfinite(metrics["optim/grad_norm"]) else skipped + 1
        if skipped > MAX_SKIPPED:
            raise RuntimeError(f"step {step}: {skipped} optimiser steps in a row had a non-finite gradient")
        last, stopping = step + 1 == cfg.steps, any(ranks.gather(stop.requested))
        if val_rows and cfg.val_every and not stopping and (last or (step + 1) % cfg.val_every == 0):
            metrics |= validate(rollout, policy, processor, pool, val_rows, cfg, rank, world)
            clock.lap("validate")
        metrics |= {"optim/lr": rate} | clock.metrics()
        if rank == 0:
            runs.log_metrics(run, step, metrics)
            progress.show(step, {"loss": metrics["loss/sft"]})
        if last or stopping or (step + 1) % cfg.save_every == 0:
            save(run, step + 1, policy, processor, optimizer, cfg, rank, cursor=(step + 1) * cfg.rows_per_step, skipped=0,
                 data=fingerprint(rows))  # fmt: skip
        if stopping:
            break
        clock = Clock()
    progress.close()
    if rank == 0:
        print(f"{run}: {', '.join(p.name for p in sorted(run.glob('step_*')))}")


if __name__ == "__main__":
    flags.check(sys.argv, Config, PRESETS, __doc__.splitlines()[0])
    main(tyro.extras.overridable_config_cli(PRESETS))
