"""The rows, completions and rewards of one step, over all ranks: what train_grpo.py learns from.

    share, cursor, metrics = collect(cfg, policy, rollout, processor, pool, rows, cursor, step, clock, rank, world)

Rows come from one endless global order, so the whole state of the data is the cursor, one integer. Every rank samples its own
rows; afterwards whole groups move, so that each optimiser step costs every rank the same. cfg is train_grpo.Config throughout;
fitting(), take(), encoding() and validate() serve train_sft.py too.
"""

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import ranks
import rewards
import scoring
from command import Progress
from data.dataset import encode, encode_rows, load_rows, measure_rows, shuffled_clip
from metrics import Clock, reward_metrics
from model import Policy, group_tokens, weights
from rollout import Completion, prompt_seed

BROKEN = 16  # samples that a reward fails on without a good one, until the run ends


@dataclass
class Share:
    """This rank's part of a step's groups: B whole ones."""

    rows: list[dict]
    prompts: list
    groups: list[list]  # B lists of G completions
    parts: list[dict]  # of the reward, B * G

    @property
    def rewards(self) -> Tensor:  # (B, G)
        return torch.tensor([part["total"] for part in self.parts]).view(len(self.groups), -1)


def collect(cfg, policy: Policy, rollout, processor, pool, rows: list[dict], cursor: int, step: int, clock: Clock,
            rank: int, world: int) -> tuple[Share, int, dict]:  # fmt: skip
    """Rows, completions and rewards of a step: this rank's share, the next cursor, metrics of all that was sampled.

    Dynamic sampling draws on in the one global order, in rounds that all ranks end together, until prompts_per_step groups
    have unequal rewards; of surplus ones the last go, and the cursor moves past everything drawn."""
    drawn, prompts, sampled, shuffled, live, metrics = [], {}, {}, {}, [], {}  # rows in global order; by number; numbers
    for round in range(cfg.max_rounds if cfg.dynamic_sampling else 1):
        first, count = len(drawn), draw_next(len(live), len(drawn), cfg.prompts_per_step, world)
        drawn += take(rows, cursor + first, count, cfg.seed)
        own = range(first + rank, len(drawn), world)
        encoded = [encode(drawn[i], processor, **encoding(cfg)) for i in own]
        clock.lap("encode")
        if round == 0:
            rollout.wake(weights(policy, dtype=None, trained=rollout.keeps_frozen))
            clock.lap("sync")
        groups, others = sample_groups(cfg, rollout, processor, encoded, sampling_seed(cfg, step, rank, round))
        clock.lap("generate")
        if not cfg.dynamic_sampling:
            metrics |= fall_asleep(rollout, clock)
        by_group, of_others = score_groups(cfg, pool, [drawn[i] for i in own], groups, others)
        clock.lap("reward")
        prompts |= zip(own, encoded, strict=True)
        sampled |= zip(own, zip(groups, by_group, strict=True), strict=True)
        shuffled |= zip(own, zip(others, of_others, strict=True), strict=True)
        totals = torch.tensor([[part["total"] for part in parts] for parts in by_group])  # (B, G)
        unequal = (totals.amax(dim=1) > totals.amin(dim=1)).tolist()
        live = sorted(live + [i for found in ranks.gather([i for i, u in zip(own, unequal) if u]) for i in found])
        if len(live) >= cfg.prompts_per_step:
            break
    if cfg.dynamic_sampling:
        metrics |= fall_asleep(rollout, clock) | {"sampling/rounds": round + 1, "sampling/drawn": len(drawn)}
    tokens = 0
    for prefix, found in (("reward", sampled), ("shuffled", shuffled)):
        groups = [group for group, _ in found.values()]
        metrics |= reward_metrics(prefix, [part for _, parts in found.values() for part in parts], groups)
        tokens += sum(len(c.token_ids) for group in groups for c in group)
    metrics |= {"reward/flat_groups": 1 - len(live) / len(drawn), "speed/sampled_tokens": float(sum(ranks.gather(tokens)))}
    share = deal(cfg, drawn, prompts, sampled, live, processor, world)
    clock.lap("balance")
    return share, cursor + len(drawn), metrics


def draw_next(live: int, drawn: int, wanted: int, world: int) -> int:
    """How many rows the next round draws: all at first, then as many as the share of live groups so far lets expect."""
    if drawn == 0:
        return wanted
    return min(wanted, -(-(wanted - live) * drawn // (max(1, live) * world)) * world)


def sample_groups(cfg, rollout, processor, prompts: list, seed: int) -> tuple[list[list], list[list]]:
    """G completions of every prompt; and of every clip, with --temporal, G/2 with its frames in random order, [] for other
    prompts (SpaceR 2.5). In one call: two would decode one after the other."""
    clips = [i for i, prompt in enumerate(prompts) if cfg.temporal and prompt.seconds is not None]
    others = [shuffled_clip(prompts[i], processor, seed=prompt_seed(seed, i)) for i in clips]
    counts = [cfg.group_size] * len(prompts) + [cfg.group_size // 2] * len(others)
    found = rollout.generate(prompts + others, n=counts if others else cfg.group_size, seed=seed, top_p=cfg.top_p,
                             max_tokens=cfg.max_completion_tokens, temperature=cfg.temperature)  # fmt: skip
    of_clip = dict(zip(clips, found[len(prompts) :], strict=True))
    return found[: len(prompts)], [of_clip.get(i, []) for i in range(len(prompts))]


def fall_asleep(rollout, clock: Clock) -> dict[str, float]:
    found = {f"memory/after_generate_{who}": gib for who, gib in rollout.memory().items()}
    rollout.sleep()
    clock.lap("sleep")
    return found | {f"memory/after_sleep_{who}": gib for who, gib in rollout.memory().items()}


def deal(cfg, drawn: list[dict], prompts: dict, sampled: dict, live: list[int], processor, world: int) -> Share:
    """The groups of the step, in global order, with each mini-batch spread over the ranks by cost (packed tokens).

    prompts and sampled (completions, reward parts) are this rank's own, by their number in `drawn`; number i is held by rank
    i % world. A group that moves is encoded again where it goes: its pixels are larger than its row."""
    chosen = list(range(len(drawn)))
    if cfg.dynamic_sampling:  # flat ones fill what is missing
        chosen = sorted([*live, *sorted(set(chosen) - set(live))][: cfg.prompts_per_step])
    own = {i: group_tokens(prompts[i], group) for i, (group, _) in sampled.items()}
    costs = {i: tokens for found in ranks.gather(own) for i, tokens in found.items()}
    owners, size = {}, cfg.prompts_per_step // cfg.mini_batches
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        owners |= zip(part, ranks.balance([i % world for i in part], [costs[i] for i in part], world))
    share = sorted(ranks.exchange(sampled, owners).items())
    return Share(
        rows=[drawn[i] for i, _ in share],
        prompts=[prompts[i] if i in prompts else encode(drawn[i], processor, **encoding(cfg)) for i, _ in share],
        groups=[group for _, (group, _) in share], parts=[part for _, (_, parts) in share for part in parts],
    )  # fmt: skip


# ---------------------------------------------------------------- rows and prompts


def load_data(cfg, source: str, limit: int | None, processor) -> list[dict]:
    """Rows of a source that fit: overlong prompts and broken pictures dropped, counted and printed."""
    rows = load_rows(source, limit=limit, box_frame=cfg.box_frame, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels,
                     skip_bad=cfg.skip_bad_rows)  # fmt: skip
    kept = fitting(cfg, rows, source, processor)
    scoring.check_rows(cfg.reward, kept)
    return kept


def fitting(cfg, rows: list[dict], source: str, processor) -> list[dict]:
    """The rows whose pictures and clips decode and whose prompts fit. Ranks share the decoding: of clips it takes hours, once."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    progress, began, seen = Progress(-(-len(rows) // world), unit="row", rank=rank), time.monotonic(), 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if time.monotonic() - began > 5:  # pictures take seconds
            progress.show(seen - 1, {})

    measured = ranks.spread(partial(measure_rows, done=count), rows)
    progress.close()
    kept, counts = encode_rows(rows, processor, max_prompt_tokens=cfg.max_prompt_tokens, measured=measured, verbose=rank == 0,
                               **encoding(cfg))  # fmt: skip
    if not kept:
        raise ValueError(f"{source}: no row left of {len(rows)} ({counts}); raise --max-prompt-tokens or check the file")
    return kept


def take(rows: list[dict], cursor: int, count: int, seed: int) -> list[dict]:
    """`count` rows from position `cursor` of one endless global order: each pass a new permutation of all rows.

    The whole state of the data is the cursor, one integer."""
    out = []
    while len(out) < count:
        epoch, offset = divmod(cursor + len(out), len(rows))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        out += [rows[i] for i in order[offset : offset + count - len(out)]]
    return out


def fingerprint(rows: list[dict] | None) -> str:
    """Of what take() draws from: the cursor of a checkpoint means nothing on other rows. None: drawn without end."""
    ids = hashlib.sha256(json.dumps([row["id"] for row in rows or ()]).encode()).hexdigest()
    return "endless" if rows is None else f"{len(rows)} rows, {ids[:12]}"


def sampling_seed(cfg, step: int, rank: int, round: int = 0) -> int:
    """Different for every step, rank and round of dynamic sampling, the same when a run is resumed."""
    return (cfg.seed * 1_000_003 + step) * 1_009 + rank + (round << 48)


def encoding(cfg) -> dict:
    return dict(style=cfg.style, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)


# ---------------------------------------------------------------- rewards


def score(pool, rows: list[dict], groups: list[list], cfg) -> list[dict]:
    """The reward of every completion, in the same order: `total` and its other parts by name."""
    completions = [c for group in groups for c in group]
    parts = pool.score([c.text for c in completions], [row for row, group in zip(rows, groups) for _ in group])
    # One failure costs its sample. All of many, in one call or since the start, are a broken reward.
    if all("error" in part for part in parts) and (len(parts) >= BROKEN or sum(pool.failures.values()) == pool.scored >= BROKEN):
        raise RuntimeError(f"the reward failed on all of the last {len(parts)} samples: {parts[0]['error']}; texts in {pool.file}")
    if weights := part_weights(cfg):
        for c, own in zip(completions, parts):
            own["repetition"] = rewards.repetition_penalty(c.text)
            own["overlong"] = rewards.overlong_penalty(len(c.token_ids), cfg.max_completion_tokens, cfg.overlong_buffer)
            if (missing := weights.keys() - own.keys()) and "error" not in own:  # a sample that failed has no parts
                raise ValueError(f"--part-weights: the reward {cfg.reward} has no part {missing.pop()!r}, only {', '.join(own)}")
            own["total"] = sum(weight * own.get(name, 0.0) for name, weight in weights.items())
    return parts


def score_groups(cfg, pool, rows: list[dict], groups: list[list], others: list[list]) -> tuple[list, list]:
    """The reward's parts of every group, and of the completions on shuffled frames, whose only use is SpaceR's term: both
    terms of a group (2.5) are added to `total`, and kept as parts `temporal_term` and `length_term`."""
    parts = score(pool, rows, groups, cfg)
    by_group = [parts[i : i + cfg.group_size] for i in range(0, len(parts), cfg.group_size)]
    scored = iter(score(pool, rows, others, cfg) if any(others) else [])
    of_others = [[next(scored) for _ in other] for other in others]
    if not (cfg.temporal or cfg.length_control):
        return by_group, of_others
    for group, own, other in zip(groups, by_group, of_others, strict=True):
        accuracies, shuffled = ([part.get("accuracy", 0.0) for part in some] for some in (own, other))
        lengths = [len(c.token_ids) for c in group]
        temporal = rewards.spacer_group_terms(accuracies, lengths, shuffled_accuracies=shuffled or None, length_control=False)
        length = rewards.spacer_group_terms(accuracies, lengths, length_control=cfg.length_control)
        for part, *terms in zip(own, temporal, length, strict=True):
            part |= {"temporal_term": terms[0], "length_term": terms[1], "total": part["total"] + sum(terms)}
    return by_group, of_others


def part_weights(cfg) -> dict[str, float]:
    """"accuracy=0.5,format=0.1" -> {"accuracy": 0.5, "format": 0.1}; empty for None. Raises ValueError, one line."""
    weights = {}
    for part in filter(None, (getattr(cfg, "part_weights", None) or "").split(",")):  # train_sft.py validates without
        name, _, value = part.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"--part-weights {part}: write name=number, say accuracy=0.5")
        weights[name.strip()] = weight
    return weights


def check_reward(pool, rows: list[dict], cfg) -> None:
    """What the reward lacks, in one line now, not after the first rollout: a package that one kind of row needs, a part that
    a setting needs. A reward from outside may fail on a text as short as this one."""
    some = list({row["kind"]: row for row in rows}.values())  # a row of every kind
    found = score(pool, some, [[Completion([], [], "<answer>a word</answer>", False)] for _ in some], cfg)
    for row, parts in zip(some, found, strict=True):
        if "error" in parts and cfg.reward in scoring.BUILT_IN:
            raise ValueError(f"--reward {cfg.reward} cannot score row {row['id']} ({row['kind']}): {parts['error']}")
        if (cfg.temporal or cfg.length_control) and not parts.keys() & {"accuracy", "error"}:
            raise ValueError("--temporal and --length-control need a reward with a part accuracy; "
                             f"{cfg.reward} has {', '.join(parts)}")  # fmt: skip


def validate(rollout, policy, processor, pool, rows: list[dict], cfg, rank: int, world: int) -> dict:
    """The training reward on held-out rows, one answer each at val_temperature; every rank takes its share."""
    own = rows[rank::world]
    prompts = [encode(row, processor, **encoding(cfg)) for row in own]
    rollout.wake(weights(policy, dtype=None, trained=rollout.keeps_frozen))
    groups = rollout.generate(prompts, n=1, max_tokens=cfg.max_completion_tokens, temperature=cfg.val_temperature,
                              seed=cfg.seed) if own else []  # fmt: skip
    rollout.sleep()
    return reward_metrics("val", score(pool, own, groups, cfg), groups)
