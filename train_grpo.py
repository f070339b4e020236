"""GRPO on a vision-language model: sample groups, score them, push up what scored above its group's mean.

    python train_grpo.py demo                                             a small model on procedural scenes, no GPU
    torchrun --nproc_per_node=4 train_grpo.py spatialthinker-7b           the published recipe on your box
    python train_grpo.py spatialthinker-3b --dry-run                      rows, one prompt, lengths, memory; no training

One step of `train`: rows -> sample G completions each -> rewards (B, G), all in sampling.py -> advantages (B, G) -> packed
micro-batches -> clipped policy loss + KL to the frozen start -> optimiser step. Differences from the published
SpatialThinker code, each on purpose: the loss is a sum over global counts (not a mean of micro-batch means); a group of
equal rewards gets exactly 0; the first learning rate is not 0; old log-probs need a pass of their own only when a
rollout is used for several optimiser steps; overlong prompts are dropped at load, never cut.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from command import Progress, StopSignal, check_shadowed_kernels, one_line_errors

if __name__ == "__main__":
    check_shadowed_kernels()  # before anything imports transformers

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

import dry_run
import flags
import memory
import ranks
import runs
import scoring
import speed
from data.dataset import encode
from files import read_lines
from kernels.policy_loss import KL_ESTIMATORS, LOSSES
from metrics import Clock, LossStats
from model import (
    Packed, Policy, check_clips, frozen_copy, load_policy, pack, pack_groups, save_hf, shard_policy, weights,
)  # fmt: skip
from optim import OPTIMIZERS, SCHEDULES, MasterOptimizer, learning_rate
from rollout import HFRollout, VLLMRollout, choose_rollout
from sampling import check_reward, collect, encoding, fingerprint, load_data, part_weights, validate


@dataclass(frozen=True)
class Config:
    model: str = "random:tiny"  # checkpoint folder, hub id, or random:tiny|demo|3b|7b
    processor: str | None = None  # tokenizer and picture processor, if not the model's own
    data: str = "scenes:demo@train"  # hub id, folder, .parquet, .jsonl, name@split, or scenes:LEVEL@train
    val_data: str | None = None  # the same for validation
    skip_bad_rows: bool = False  # leave rows that do not check out instead of stopping at the first
    limit: int | None = None  # first rows of data only (how many to draw, for scenes)
    val_limit: int | None = 256  # first rows of val_data only
    name: str = "run"  # run folder: runs/NAME
    resume: bool = False  # go on from the newest whole checkpoint of runs/NAME
    dry_run: bool = False  # show rows, a prompt, lengths and memory, then stop
    seed: int = 1  # of everything drawn: order of the rows, samples, random weights

    # prompts
    # spatialthinker, reasoning, no_reasoning, reasoning_end, short, spacer and spacer_map (short_map for small models; both
    # ask for a map), row (the row's own), or a file
    style: str = "row"
    box_frame: str = "original"  # boxes in pixels of the original (published) or the resized picture
    min_pixels: int = 512 * 512  # pictures are resized into this range before the processor sees them
    max_pixels: int = 2048 * 2048  # the upper end of that range
    max_prompt_tokens: int = 6144  # longer prompts are dropped at load, and counted
    max_completion_tokens: int = 2048  # longer ones are cut, and say so
    fixed_length: bool = False  # stop tokens are banned: every completion runs to the limit (measurements)

    # sampling
    prompts_per_step: int = 512  # over all ranks
    group_size: int = 8  # completions a prompt
    temperature: float = 1.0  # of the samples, and of the log-probs trained on
    top_p: float = 1.0  # below 1 the tail of each token's distribution is not sampled; then importance_cap must be 0
    val_temperature: float = 0.0  # 0 is greedy
    rollout: str = "auto"  # auto (vllm where it and a GPU are there), hf, vllm
    rollout_sequences: int = 256  # completions decoded side by side
    engine_memory: float = 0.5  # vLLM: share of the GPU that the awake engine may fill
    engine_eager: bool = False  # vLLM: no CUDA graphs, starts faster and samples slower
    sleep_level: int = 2  # vLLM: 2 drops the weights while asleep, 1 keeps them in host memory
    importance_cap: float = 2.0  # vLLM: cap of the weight exp(trainer - engine log-prob) of a token; 0: no weight
    max_gap: float = 0.2  # the run stops when engine and trainer log-probs differ by more, on average

    dynamic_sampling: bool = False  # sample on until no group of the step has equal rewards
    max_rounds: int = 4  # of it; what is missing then is filled with groups of equal rewards

    # reward
    reward: str = "spatialthinker"  # spatialthinker, vanilla, vanilla-scene, spacer, or path/to/file.py:function
    reward_mode: str = "upstream"  # upstream (as published) or corrected
    similarity: str = "lexical"  # of object labels: lexical, exact, spacy (published), or file.py:function
    reward_workers: int | None = None  # processes; None: 0 (this one) for the built-in rewards, up to 4 for a file's
    reward_seconds: float = 10.0  # time limit of one sample
    # accuracy=0.5,format=0.1,repetition=0.05: the total is this sum of the reward's parts, of `repetition` (rewards.py) and
    # of `overlong`, DAPO's penalty over the last --overlong-buffer tokens; None: the reward's own total
    part_weights: str | None = None
    overlong_buffer: int = 512  # tokens before the limit over which `overlong` falls to -1
    # SpaceR's: half as many completions of each clip with its frames in random order, which are only scored; what is right
    # earns 0.3 more where they are no better
    temporal: bool = False
    length_control: bool = False  # SpaceR's: what is right earns 0.2 more for 320 to 512 tokens

    # advantages and loss; docs/recipes.md has Dr.GRPO, DAPO, GSPO, CISPO and RLOO as lists of flags
    baseline: str = "mean"  # of a completion's reward: mean of its group, or of the others in it (rloo)
    scale_by_std: bool = True  # advantages divided by the group's standard deviation
    std_eps: float = 1e-6  # added to that deviation
    loss: str = "grpo"  # grpo, gspo, cispo (kernels/policy_loss.py)
    normalize: str = "token"  # token: mean over tokens; sequence: of completions' means; length: over the longest allowed
    mask_truncated: bool = False  # tokens of completions that ran into the limit do not count
    clip_low: float = 0.2  # the ratio to the old policy counts down to 1 - this
    clip_high: float = 0.3  # and up to 1 + this
    dual_clip: float = 3.0  # a bad token pushes at most this times its advantage; 0: off
    entropy_coef: float = 0.0  # bonus for the entropy of every token
    kl: str = "k3"  # none, k1, k2, k3, abs, chi2; against the frozen start
    kl_coef: float = 0.01  # 0 loads no reference

    # optimisation
    steps: int = 75  # rollouts
    mini_batches: int = 4  # optimiser steps a rollout
    token_budget: int = 16384  # packed tokens of a micro-batch
    lr: float = 1e-6  # learning rate, its peak
    schedule: str = "constant"  # constant, cosine, linear
    warmup_steps: int = 0  # of optimiser steps
    optimizer: str = "adamw"  # adamw, adamw8bit, muon (fp32 master weights), kahan (bf16, what rounding takes is kept)
    weight_decay: float = 0.01  # AdamW's
    betas: tuple[float, float] = (0.9, 0.999)  # likewise
    max_grad_norm: float = 1.0  # a longer gradient is cut to this
    max_skipped: int = 10  # optimiser steps in a row with a non-finite gradient before the run stops
    freeze_vision: bool = False  # leave the vision tower as it is (published: trained)
    offload_moments: bool = False  # AdamW's moments in host memory but for its step: 8 bytes a parameter of GPU memory
    shard: str = "auto"  # none, optimizer (every rank steps a slice), fsdp (weights in slices too); auto: what memory allows
    reference: str = "auto"  # gpu (whole on each), sharded (over the ranks), host (in host memory); auto: as the policy
    checkpoint_layers: int | None = None  # language layers whose activations are recomputed; None: as few as memory needs
    kernels: str = "auto"  # auto (Triton and Liger on a GPU) or reference (plain torch)
    dtype: str = "auto"  # of weights and compute: auto (bfloat16 on a GPU, float32 otherwise), float32, bfloat16
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda

    # records
    val_every: int = 5  # steps; also before the first and after the last; 0: never
    save_every: int = 5  # steps between checkpoints; also after the last and on a signal; 0: never (measurements)
    keep: int = 2  # checkpoints
    samples_every: int = 5  # steps between whole transcripts in samples.jsonl
    tracker: str = "none"  # none, or wandb: the metrics go there too
    report_speed: bool = False  # log tokens, MFU, HFU and memory; print a table of phases at the end
    profile_step: int | None = None  # write a torch profile of this step's update to the run folder


SPATIALTHINKER = Config(
    model="Qwen/Qwen2.5-VL-7B-Instruct", data="OX-PIXL/STVQA-7K@train", val_data="OX-PIXL/STVQA-7K@val", val_limit=None,
    name="spatialthinker-7b", skip_bad_rows=True, val_temperature=0.5, token_budget=12288, offload_moments=True,
)  # fmt: skip

VANILLA = dict(reward="vanilla", style="reasoning", max_prompt_tokens=2048)  # spec 4.1

# The recipe's flags on random weights and noise; reward at random, because random text has none. One optimiser step a
# rollout, as the peer of docs/performance.md does it.
BENCH = replace(
    SPATIALTHINKER, model="random:3b", data="noise:588x448:270@train", val_data=None, limit=64, name="bench-3b", style="row",
    min_pixels=784, max_prompt_tokens=1536, max_completion_tokens=512, fixed_length=True, prompts_per_step=16,
    reward="bench/random_reward.py:reward", engine_memory=0.35, mini_batches=1, steps=4, val_every=0, save_every=0,
    samples_every=1000, report_speed=True,
)  # fmt: skip

# Sections 2.5 and 3 of SpaceR's notes. Nothing is clipped: with one optimiser step a rollout the ratio to the old policy is 1.
# Pictures come to the model with at most 256 * 28 * 28 pixels there too: its larger max_pixels is applied after that.
SPACER_DATA = "SpaceR-151k/SpaceR-151k.jsonl"
SPACER = Config(
    model="Qwen/Qwen2.5-VL-7B-Instruct", data=SPACER_DATA, name="spacer-7b", style="spacer_map", min_pixels=4 * 28 * 28,
    max_pixels=256 * 28 * 28, max_prompt_tokens=16384, max_completion_tokens=1024, prompts_per_step=8, top_p=0.95,
    importance_cap=0.0, reward="spacer", temporal=True, length_control=True, std_eps=1e-4, normalize="sequence", dual_clip=0.0,
    kl_coef=0.04, steps=18_914, mini_batches=1, schedule="cosine", max_grad_norm=5.0, val_every=0, save_every=1000,
    samples_every=50,
)  # fmt: skip

PRESETS = {
    "demo": (
        "The shipped model, careless about its answers, learns to trust its boxes: seven minutes on two CPU cores.",
        Config(
            model="assets/demo-model", data="scenes:demo@train", val_data="scenes:demo@val", limit=4096, val_limit=256,
            name="demo", style="short", min_pixels=784, max_pixels=448 * 448, max_prompt_tokens=512,
            max_completion_tokens=192, prompts_per_step=16, mini_batches=1, reward_mode="corrected",
            similarity="exact", kl="none", kl_coef=0.0, steps=90, lr=3e-5, val_every=1000, save_every=30,
            token_budget=8192, engine_memory=0.3,
        ),
    ),
    "spatialthinker-3b": (
        "SpatialThinker on Qwen2.5-VL-3B as published: 512 prompts x 8, 75 steps (4 GPUs, 52 H100-hours published).",
        replace(SPATIALTHINKER, model="Qwen/Qwen2.5-VL-3B-Instruct", name="spatialthinker-3b"),
    ),
    "spatialthinker-7b": (
        "SpatialThinker on Qwen2.5-VL-7B as published: 512 prompts x 8, 75 steps (4 GPUs, 60 H100-hours published).",
        SPATIALTHINKER,
    ),
    "vanilla-3b": (
        "The papers' baseline: GRPO on format and accuracy alone, Qwen2.5-VL-3B (4 GPUs).",
        replace(SPATIALTHINKER, model="Qwen/Qwen2.5-VL-3B-Instruct", name="vanilla-3b", **VANILLA),
    ),
    "vanilla-7b": (
        "The same on Qwen2.5-VL-7B (4 GPUs).", replace(SPATIALTHINKER, name="vanilla-7b", **VANILLA),
    ),
    "spacer-7b": (
        "SpaceR's SG-RLVR on Qwen2.5-VL-7B as published: 8 prompts x 8 and 4 on shuffled frames, one pass over SpaceR-151k "
        "(8 GPUs; docs/video.md says how to get the data).", SPACER,
    ),
    "spacer-3b": (
        "The same on Qwen2.5-VL-3B.", replace(SPACER, model="Qwen/Qwen2.5-VL-3B-Instruct", name="spacer-3b"),
    ),
    "bench-3b": ("Speed of the 3B recipe on this box, random weights, no files needed: 16 prompts x 8 x 512 tokens.", BENCH),
    "bench-7b": ("The same in the shape of the 7B.", replace(BENCH, model="random:7b", name="bench-7b")),
}  # fmt: skip


NORMALIZERS = ("token", "sequence", "length")
BASELINES = ("mean", "rloo")
KERNELS = ("auto", "reference")

# ---------------------------------------------------------------- the algorithm


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, baseline: str = "mean", eps: float = 1e-6) -> Tensor:
    """rewards (B, G) -> advantages (B, G): above or below the group's mean, in standard deviations + eps (spec 4.2).

    baseline rloo: above or below the mean of the other completions, which is G / (G - 1) times as far. A group
    of equal rewards gets exactly 0 (in float32 the mean of eight 0.1s is not 0.1). G must be at least 2."""
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 completions: --group-size 2 or more")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "rloo":
        centred = centred * rewards.shape[1] / (rewards.shape[1] - 1)
    if scale_by_std:
        centred = centred / (rewards.std(dim=1, keepdim=True) + eps)
    flat = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return centred.masked_fill(flat, 0.0)


def token_scale(packed: Packed, normalize: str, tokens: float, sequences: float, longest: int = 0) -> Tensor:
    """(M,) weight of each token in the loss, from counts that are global over ranks and micro-batches; `longest` allowed
    completion, for `length`."""
    if normalize == "token":
        return packed.loss_mask / tokens
    if normalize == "sequence":
        own = torch.zeros_like(packed.lengths, dtype=torch.float32).index_add(0, packed.sequence, packed.loss_mask)
        return packed.loss_mask / (own.clamp(min=1.0)[packed.sequence] * sequences)
    if normalize == "length":
        return packed.loss_mask / (longest * sequences)
    raise ValueError(f"--normalize {normalize}: one of {', '.join(NORMALIZERS)}")


def global_counts(packs: list[Packed], device) -> tuple[float, float, int]:
    """Tokens and completions that count, over all ranks, and the largest number of micro-batches of any rank."""
    tokens = sum(float(p.loss_mask.sum()) for p in packs)
    sequences = sum(len(torch.unique(p.sequence[p.loss_mask > 0])) for p in packs)
    sums = torch.tensor([tokens, sequences], dtype=torch.float64, device=device)
    most = torch.tensor(len(packs), device=device)
    if ranks.several():
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return max(1.0, float(sums[0])), max(1.0, float(sums[1])), int(most)


def train_step(policy: Policy, reference: Policy | None, optimizer: MasterOptimizer, prompts: list, groups: list,
               advantages: Tensor, cfg: Config, *, step: int) -> dict[str, float]:  # fmt: skip
    """The optimiser steps of rollout number `step` on this rank's groups; advantages (B, G).

    Returns metrics summed or averaged over ranks, the same on each."""
    size = -(-len(prompts) // cfg.mini_batches)
    parts = [slice(i, i + size) for i in range(0, size * cfg.mini_batches, size)]
    batches = [
        pack(prompts[part], groups[part], policy.config, token_budget=cfg.token_budget, advantages=advantages[part],
             mask_truncated=cfg.mask_truncated)
        for part in parts
    ]
    everything = [packed for packs in batches for packed in packs]
    policy.checkpoint_layers(memory.layers_to_checkpoint(policy, optimizer, everything, cfg.checkpoint_layers))
    if reference is not None or cfg.mini_batches > 1:
        passes_before(policy, reference, everything, cfg)
    stats = LossStats(policy.device)
    settings = dict(loss=cfg.loss, entropy_coef=cfg.entropy_coef, importance_cap=cfg.importance_cap, clip_low=cfg.clip_low,
                    clip_high=cfg.clip_high, dual_clip=cfg.dual_clip, kl="none" if reference is None else cfg.kl,
                    kl_coef=cfg.kl_coef)  # fmt: skip

    for i, packs in enumerate(batches):
        tokens, sequences, most = global_counts(packs, policy.device)
        # Every rank runs the same number of micro-batches; the extra ones repeat the first with weight 0.
        packs = packs + [replace(packs[0], loss_mask=torch.zeros_like(packs[0].loss_mask))] * (most - len(packs))
        for packed in packs:
            packed = packed.to(policy.device)
            scale = token_scale(packed, cfg.normalize, tokens, sequences, cfg.max_completion_tokens)
            loss, seen, logp, _ = policy(packed, temperature=cfg.temperature, scale=scale, **settings)
            loss.backward()
            stats.add(seen)
            if packed.old_logp is not None or len(batches) == 1:  # nothing was updated since these were sampled
                stats.add_gap(logp if packed.old_logp is None else packed.old_logp, packed.rollout_logp, scale)
        rate = learning_rate(step * cfg.mini_batches + i, peak=cfg.lr, schedule=cfg.schedule,
                             warmup_steps=cfg.warmup_steps, total_steps=cfg.steps * cfg.mini_batches)  # fmt: skip
        stats.norms.append(optimizer.step(lr=rate))
    packed_tokens = float(sum(ranks.gather(sum(len(packed.ids) for packed in everything))))
    return stats.result() | {"optim/lr": rate, "optim/skipped_in_a_row": trailing_skips(stats.norms),
                             "speed/packed_tokens": packed_tokens, "speed/checkpointed_layers": float(policy.checkpointed)}  # fmt: skip


@torch.no_grad()
def passes_before(policy: Policy, reference: Policy | None, packs: list[Packed], cfg: Config) -> None:
    """Writes into the packs what stays fixed over the optimiser steps of a rollout: reference and old log-probs, and the
    features of a vision tower that is not trained, the reference's own then."""
    # A forward pass through shards is a collective: every rank runs the same number, the extra ones for nothing.
    sharded = any(one is not None and one.sharded for one in (policy, reference))
    extra = max(ranks.gather(len(packs))) - len(packs) if sharded else 0
    for packed in packs + [replace(packs[0]) for _ in range(extra)]:
        on_device = packed.to(policy.device)
        if packed.pixels is not None and not policy.trains_vision:
            packed.features = on_device.features = policy.picture_features(on_device.pixels, packed.grid)
            packed.pixels = on_device.pixels = None
        if reference is not None:
            packed.ref_logp = reference(on_device, temperature=cfg.temperature)[0]
        if cfg.mini_batches > 1:  # with one optimiser step the forward of that step is the old policy
            packed.old_logp = policy(on_device, temperature=cfg.temperature)[0]


def trailing_skips(norms: list[float]) -> float:
    """How many optimiser steps at the end of a rollout were skipped, without a good one after them."""
    good = [i for i, norm in enumerate(norms) if math.isfinite(norm)]
    return float(len(norms) - 1 - good[-1] if good else len(norms))


# ---------------------------------------------------------------- around the algorithm


def check_config(cfg: Config, world: int) -> None:
    """Settings that cannot work, in one line each, before anything is loaded."""
    flags.check_sizes(cfg, "limit", "val_limit", "steps", "prompts_per_step", "mini_batches", "token_budget",
                      "max_completion_tokens", "rollout_sequences", "samples_every", "keep")  # fmt: skip
    flags.check_numbers(cfg, limits="max_grad_norm max_gap",
                        above="lr temperature reward_seconds",  # training samples: never at temperature 0
                        from_zero="save_every val_every warmup_steps weight_decay kl_coef clip_low clip_high dual_clip std_eps "
                                  "importance_cap val_temperature max_skipped overlong_buffer")  # fmt: skip
    if cfg.clip_low >= 1:
        raise ValueError(f"--clip-low {cfg.clip_low}: below 1, as a ratio is never below 0; 0.999 bounds next to nothing")
    if not math.isfinite(cfg.entropy_coef):
        raise ValueError(f"--entropy-coef {cfg.entropy_coef}: give a number")
    if cfg.prompts_per_step % (world * cfg.mini_batches):
        raise ValueError(f"--prompts-per-step {cfg.prompts_per_step} does not divide into {world} ranks x "
                         f"{cfg.mini_batches} mini-batches")  # fmt: skip
    if cfg.group_size < 2:
        raise ValueError("--group-size: a group needs at least 2 completions")
    if cfg.dynamic_sampling and cfg.max_rounds < 1:
        raise ValueError(f"--max-rounds {cfg.max_rounds}: dynamic sampling needs at least one round")
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"--top-p {cfg.top_p}: above 0, and 1 to cut nothing")
    if cfg.top_p < 1 and cfg.importance_cap > 0:
        raise ValueError(f"--top-p {cfg.top_p}: the rollout's log-probs are of a cut distribution then, and the importance weight "
                         "would mean nothing: add --importance-cap 0")  # fmt: skip
    part_weights(cfg)
    check_data(cfg.data, cfg.val_data)
    runs.check_tracker(cfg.tracker)
    flags.check_choices(cfg, normalize=NORMALIZERS, kl=KL_ESTIMATORS, schedule=SCHEDULES, optimizer=OPTIMIZERS, kernels=KERNELS,
                  loss=LOSSES, baseline=BASELINES, shard=memory.SHARDS, reference=memory.REFERENCES)  # fmt: skip


def check_data(*sources: str | None) -> None:
    """A file that is not there, in one line, before a model is fetched and loaded for nothing."""
    for source in filter(None, sources):
        name = source.partition("@")[0]
        if Path(name).suffix in (".jsonl", ".parquet") and not (Path(name).expanduser().exists() or Path(source).exists()):
            cure = "docs/video.md says how to get it, or give --data" if source == SPACER_DATA else "check the path"
            raise FileNotFoundError(f"{source}: no such file: {cure}")


def transcripts(rows, groups, parts, advantages, limit: int = 4) -> list[dict]:
    """Whole samples of the first groups, for samples.jsonl."""
    G = advantages.shape[1]
    clips = [{"video": row["video"]} if isinstance(row.get("video"), str) else {} for row in rows]
    return [
        {"id": rows[b]["id"], "images": rows[b]["images"], **clips[b], "question": rows[b]["question"], "gold": rows[b]["gold"],
         "text": c.text, "finished": c.finished, "advantage": round(float(advantages[b, g]), 4), "reward": parts[b * G + g]}
        for b in range(min(limit, len(groups))) for g, c in enumerate(groups[b])
    ]  # fmt: skip


# How a checkpoint was asked, beside its weights, so that evaluate.py asks it the same way.
PROMPTING, ASKED_WITH = "prompting.json", ("style", "box_frame", "min_pixels", "max_pixels", "max_completion_tokens")


def restore(folder, optimizer: MasterOptimizer, rank: int, *, rows: list[dict] | None) -> dict:
    """Weights, optimiser and generators of a checkpoint, in full precision; returns its cursor and counters. It may have
    been written by another number of ranks. Raises ValueError, one line, if it does not fit this run or its rows."""
    state = torch.load(folder / "trainer" / "state.pt", map_location="cpu", weights_only=True)
    now = fingerprint(rows)
    if (then := state.get("data", now)) != now:
        raise ValueError(f"{folder}: trained on {then}, --data now gives {now}: bring back the rows as they were, or start "
                         "another run from its weights (--model, --name)")  # fmt: skip
    files = sorted((folder / "trainer").glob("rank_*.pt"), key=lambda file: int(file.stem.partition("_")[2]))
    optimizer.load_state_dict([torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files])
    if rank < len(state["rng"]):
        runs.set_rng_state(state["rng"][rank])
    return state


def save(run, step: int, policy, processor, optimizer, cfg: Config, rank: int, **state) -> None:
    """runs/NAME/step_N: a folder that loads anywhere, and trainer/ to go on from bit for bit: state.pt, and rank_K.pt of
    every rank that steps a part of its own."""
    rng = ranks.gather(runs.rng_state())

    def write(folder) -> None:
        save_hf(policy, processor, folder, write=rank == 0)
        (folder / "trainer").mkdir(exist_ok=True)
        if rank == 0:
            (folder / PROMPTING).write_text(json.dumps({key: getattr(cfg, key) for key in ASKED_WITH}, indent=1))
            torch.save({"rng": rng, **state}, folder / "trainer" / "state.pt")
        if rank == 0 or optimizer.cut:
            torch.save(optimizer.state_dict(), folder / "trainer" / f"rank_{rank}.pt")

    runs.save_checkpoint(run, step, write, keep=cfg.keep, rank=rank, barrier=ranks.barrier)


def main(cfg: Config) -> None:
    with one_line_errors():
        check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        if not cfg.dry_run:
            runs.check_run(Path("runs") / cfg.name, resume=cfg.resume)
        pool = scoring.RewardPool(  # its processes start before this one touches a GPU
            cfg.reward, mode=cfg.reward_mode, similarity=cfg.similarity, workers=cfg.reward_workers,
            time_limit=cfg.reward_seconds,
        )  # fmt: skip
        rank, world, device, dtype = ranks.setup(cfg.device, cfg.dtype)
        if device.type == "cpu" and cfg.model in ("random:3b", "random:7b"):
            raise ValueError(f"{cfg.model} needs an NVIDIA GPU, and there is none: --model random:tiny shows the same on a CPU")
    with ranks.die_together(rank, world_size=world), pool:
        with one_line_errors():
            policy, processor = load_policy(
                cfg.model, processor=cfg.processor, dtype=dtype, seed=cfg.seed, device=str(device),
                freeze_vision=cfg.freeze_vision, never_stop=cfg.fixed_length, kernels=cfg.kernels == "auto",
            )  # fmt: skip
            wanted = cfg.reference if cfg.kl != "none" and cfg.kl_coef > 0 else "none"
            engine = cfg.engine_memory if choose_rollout(cfg.rollout, device) == "vllm" else 0.0
            shard, reference = memory.choose_shard(cfg, policy, world, reference=wanted, engine=engine)
            cfg = replace(cfg, shard=shard, reference=reference)
            rows = load_data(cfg, cfg.data, cfg.limit, processor)
            val_rows = load_data(cfg, cfg.val_data, cfg.val_limit, processor) if cfg.val_data else []
            if cfg.reward in scoring.BUILT_IN or cfg.part_weights or cfg.temporal or cfg.length_control:
                check_reward(pool, rows, cfg)
            if any(row.get("video") for row in rows + val_rows):
                check_clips(policy.config)
            if cfg.dry_run:
                prompts = [encode(row, processor, **encoding(cfg)) for row in rows[:64]]
                return dry_run.show(cfg, policy, processor, prompts, len(rows), world) if rank == 0 else None
            rollout = start_rollout(cfg, policy, processor, rows + val_rows, rank)
            if isinstance(rollout, VLLMRollout):
                row = next((row for row in rows if row.get("video")), rows[0])
                check_engine(rollout, policy, encode(row, processor, **encoding(cfg)), cfg)
            run = Path("runs") / cfg.name
            if rank == 0:
                allowed = [key for key in MAY_DIFFER if key != "steps" or cfg.schedule == "constant"]  # a schedule hangs on them
                runs.open_run(run, asdict(cfg), resume=cfg.resume, may_differ=allowed)
            tracker = runs.open_tracker(cfg.tracker if rank == 0 else "none", run, asdict(cfg))
            ranks.barrier()
            pool.file = run / "failures.jsonl"
            reference, optimizer = prepare(cfg, policy, reference=cfg.reference)
            state = dict(step=0, cursor=0, skipped=0)
            if cfg.resume and (newest := runs.latest_checkpoint(run)):
                state = restore(newest[1], optimizer, rank, rows=rows) | {"step": newest[0]}
        train(cfg, policy, reference, optimizer, processor, rollout, pool, rows, val_rows, run, tracker, rank, world, state)
        ranks.leave()


# Settings that a resumed run may change without becoming another run.
MAY_DIFFER = ("resume", "steps", "save_every", "val_every", "samples_every", "keep", "reward_workers", "reward_seconds",
              "dry_run", "token_budget", "checkpoint_layers", "rollout_sequences", "max_gap", "max_skipped", "engine_memory",
              "engine_eager", "sleep_level", "report_speed", "profile_step", "tracker", "shard", "reference",
              "offload_moments")  # fmt: skip


def own_rollout(cfg, policy: Policy, processor) -> HFRollout:
    """Sampling with the policy's own modules, or with a whole copy of them: decoding goes round the shards of fsdp."""
    copied = cfg.shard == "fsdp"
    return HFRollout(frozen_copy(policy) if copied else policy, processor, max_sequences=cfg.rollout_sequences, copied=copied)


def start_rollout(cfg: Config, policy: Policy, processor, rows: list[dict], rank: int):
    """The engine, asleep. vLLM sizes its cache by the memory that is free now, so it starts before the optimiser."""
    kind = choose_rollout(cfg.rollout, policy.device)
    if kind == "hf":
        return own_rollout(cfg, policy, processor)
    rollout = VLLMRollout(
        policy.config, processor, banned=policy.banned, max_prompt_tokens=cfg.max_prompt_tokens,
        max_tokens=cfg.max_completion_tokens, memory=cfg.engine_memory, max_sequences=cfg.rollout_sequences,
        sleep_level=cfg.sleep_level, seed=cfg.seed * 1_009 + rank, eager=cfg.engine_eager,
        max_images=max(1, *(len(row["images"]) for row in rows)), max_clips=int(any(row.get("video") for row in rows)),
        dtype=str(policy.dtype).removeprefix("torch."),
    )  # fmt: skip
    rollout.sleep()
    return rollout


@torch.no_grad()
def check_engine(rollout, policy: Policy, prompt, cfg: Config) -> None:
    """After a sleep and a sync the engine must compute what the trainer computes, on a fixed prompt.

    Level 2 sleep has brought models back wrong. What it lost then is unknown, so the program starts again at level 1."""
    rollout.wake(weights(policy, dtype=None))
    groups = rollout.generate([prompt], n=2, max_tokens=min(32, cfg.max_completion_tokens), temperature=1.0, seed=0)
    rollout.sleep()
    packed = pack_groups([prompt], groups, policy.config).to(policy.device)
    gaps = ranks.gather(float((policy(packed, temperature=1.0)[0] - packed.rollout_logp).abs().mean()))
    said = f"engine and trainer log-probs differ by {max(gaps):.4f} on average after level {rollout.level} sleep"
    if all(gap <= cfg.max_gap for gap in gaps):  # max() may step over a nan
        if int(os.environ.get("RANK", 0)) == 0:
            print(said)
        return
    if rollout.level == 2 and rollout.kind == "cuda" and not ranks.several():
        print(f"{said}, more than --max-gap {cfg.max_gap}: starting again with --sleep-level 1", flush=True)
        os.execv(sys.executable, [*sys.orig_argv, "--sleep-level", "1"])
    raise ValueError(f"{said}, more than --max-gap {cfg.max_gap}: try --sleep-level 1, then --rollout hf")


def prepare(cfg, policy: Policy, *, reference: str = "none") -> tuple[Policy | None, MasterOptimizer]:
    """The frozen start, unless `reference` is none, and the optimiser; both policies cut over ranks as the settings say."""
    if cfg.shard == "fsdp" or reference in ("sharded", "host"):
        ranks.join_alone(policy.device)
    start = frozen_copy(policy) if reference != "none" else None
    if reference in ("sharded", "host"):
        shard_policy(start, masters=False, tower=policy.trains_vision, host=reference == "host")
    if cfg.shard == "fsdp":
        shard_policy(policy, tower=policy.trains_vision)
    return start, MasterOptimizer(
        policy.named_parameters(), kind=cfg.optimizer, weight_decay=cfg.weight_decay, betas=cfg.betas,
        max_grad_norm=cfg.max_grad_norm, offload_moments=cfg.offload_moments, shard=cfg.shard,
    )  # fmt: skip


def train(cfg: Config, policy: Policy, reference: Policy | None, optimizer: MasterOptimizer, processor, rollout, pool, rows,
          val_rows, run, tracker, rank: int, world: int, state: dict) -> None:  # fmt: skip
    """The loop: one rollout and its optimiser steps after the other, until cfg.steps or a signal."""
    meter = speed.Meter(policy, passes=(reference is not None) + (cfg.mini_batches > 1)) if cfg.report_speed else None
    start, cursor, skipped = state["step"], state["cursor"], state["skipped"]
    if rank == 0:
        runs.truncate_after(run, start)
        print(f"{run}: {len(rows)} rows, {world} ranks on {policy.device.type}, {type(rollout).__name__}, from step {start}")
    stop = StopSignal(stop_file=run / "stop", rank=rank)
    progress = Progress(cfg.steps, start=start, rank=rank)

    for step in range(start, cfg.steps):
        metrics, clock, last = {}, Clock(), step + 1 == cfg.steps
        if val_rows and cfg.val_every and step % cfg.val_every == 0:
            metrics |= validate(rollout, policy, processor, pool, val_rows, cfg, rank, world)
            clock.lap("validate")

        own, cursor, sampled = collect(cfg, policy, rollout, processor, pool, rows, cursor, step, clock, rank, world)
        advantages = group_advantages(own.rewards, scale_by_std=cfg.scale_by_std, baseline=cfg.baseline, eps=cfg.std_eps)
        metrics |= sampled
        with speed.profiled(run / "profile" if step == cfg.profile_step and rank == 0 else None):
            metrics |= train_step(policy, reference, optimizer, own.prompts, own.groups, advantages, cfg, step=step)
        clock.lap("update")

        in_a_row = metrics["optim/skipped_in_a_row"]
        skipped = skipped + in_a_row if in_a_row == cfg.mini_batches else in_a_row
        check_health(cfg, step, metrics, skipped, run)
        stopping = any(ranks.gather(stop.requested))  # signals reach ranks at different moments
        if last and val_rows and cfg.val_every and not stopping:
            after = validate(rollout, policy, processor, pool, val_rows, cfg, rank, world)
            metrics |= {f"final_{name}": value for name, value in after.items()}
            clock.lap("validate")
        metrics |= clock.metrics()
        if meter:
            metrics |= meter.read(metrics)
        if rank == 0:
            runs.log_metrics(run, step, metrics)
            tracker(step, metrics)
            if step % cfg.samples_every == 0 or last:
                runs.log_samples(run, step, transcripts(own.rows, own.groups, own.parts, advantages))
            progress.show(step, {"reward": metrics["reward/total"], "accuracy": metrics.get("reward/accuracy", 0.0)})
        if last or stopping or (cfg.save_every and (step + 1) % cfg.save_every == 0):
            if cfg.save_every:
                save(run, step + 1, policy, processor, optimizer, cfg, rank, cursor=cursor, skipped=skipped,
                     data=fingerprint(rows))  # fmt: skip
            if rank == 0:
                runs.plot_reward(run)
        if stopping:
            break
    progress.close()
    if meter and rank == 0:
        print(speed.report(read_lines(run / "metrics.jsonl"), cfg, world))
    if rank == 0:
        print(f"{run}: {', '.join(['metrics.jsonl', 'samples.jsonl', 'reward.png', *sorted(p.name for p in run.glob('step_*'))])}")


def check_health(cfg: Config, step: int, metrics: dict[str, float], skipped: float, run) -> None:
    """Ends a run that learns nothing any more, or learns from another policy than it samples."""
    newest = runs.latest_checkpoint(run)
    where = f"the last good checkpoint is {newest[1]}" if newest else "no checkpoint was saved yet"
    if skipped > cfg.max_skipped:
        raise RuntimeError(f"step {step}: {int(skipped)} optimiser steps in a row had a non-finite gradient; {where}")
    allowed = cfg.max_gap - math.log(cfg.top_p)  # a tail cut off raises every log-prob of the engine, by so much at most
    if not metrics.get("rollout/logprob_gap", 0.0) <= allowed:  # a nan is no agreement
        raise RuntimeError(f"step {step}: engine and trainer log-probs differ by {metrics['rollout/logprob_gap']:.3f} on "
                           f"average, more than --max-gap {cfg.max_gap}: the engine has other weights; {where}")  # fmt: skip


if __name__ == "__main__":
    flags.check(sys.argv, Config, PRESETS, __doc__.splitlines()[0])
    main(tyro.extras.overridable_config_cli(PRESETS))
