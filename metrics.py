"""What is logged about a step: loss statistics, reward means, seconds by phase, all reduced over ranks.

Names are in README.md with what each means and what a bad value looks like."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

import ranks


class LossStats:
    """Sums and extremes of one step, kept on the device until `result` reduces them over ranks, once."""

    def __init__(self, device):
        self.device, self.sums, self.extremes, self.norms = device, {}, {}, []

    def add(self, seen: dict[str, Tensor]) -> None:
        """Names that end in _sum add up, those in _max, _p99 keep the largest, those in _min the smallest."""
        for name, value in seen.items():
            if name.endswith("_sum"):
                self.sums[name] = self.sums.get(name, 0.0) + value
            else:  # a minimum is the maximum of the negative
                value = -value if name.endswith("_min") else value
                self.extremes[name] = torch.maximum(self.extremes.get(name, value), value)

    def add_gap(self, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> None:
        """How far the engine's log-probs (M,) are from the trainer's before any update: rounding, or a bug."""
        live = mask > 0
        off = torch.where(live, (logp - rollout_logp).abs(), 0.0)  # picking the live ones would wait for the GPU
        if len(off):
            # quantile() refuses more than 2^24 numbers; the k-th largest is the same thing
            p99 = off.topk(max(1, len(off) // 100)).values[-1]
            self.add({"gap_sum": off.sum(), "gap_p99": p99, "gap_max": off.max(), "gap_tokens_sum": live.sum()})

    def result(self) -> dict[str, float]:
        # Ranks may have seen different names (one with no tokens); their union, sorted, keeps the reductions in step.
        names = ranks.gather((sorted(self.sums), sorted(self.extremes)))
        sum_names = sorted({n for sums, _ in names for n in sums})
        max_names = sorted({n for _, extremes in names for n in extremes})
        zero, lowest = torch.zeros((), device=self.device), torch.full((), -math.inf, device=self.device)
        sums = torch.stack([torch.as_tensor(self.sums.get(n, zero), device=self.device).double() for n in sum_names])
        extremes = torch.stack([self.extremes.get(n, lowest).double() for n in max_names])
        if ranks.several():
            dist.all_reduce(sums)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return self._named(dict(zip(sum_names, sums.tolist())), dict(zip(max_names, extremes.tolist())))

    def _named(self, s: dict[str, float], x: dict[str, float]) -> dict[str, float]:
        tokens = max(1.0, s["token_sum"])
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        metrics = {
            "loss/policy": s["policy_loss_sum"] / max(1, len(self.norms)),
            "loss/entropy": s["entropy_sum"] / tokens,
            "loss/old_kl": s["old_kl_sum"] / tokens,
            "loss/ratio_max": x["ratio_max"],
            "loss/ratio_min": -x["ratio_min"],
            **{f"loss/clip_{side}": s[f"clip_{side}_sum"] / tokens for side in ("low", "high", "dual")},
            "optim/grad_norm": sum(finite) / max(1, len(finite)),
            "optim/skipped": float(len(self.norms) - len(finite)),
        }
        if "kl_sum" in s:
            metrics["loss/kl"] = s["kl_sum"] / tokens
        if "importance_sum" in s:
            metrics |= {"rollout/importance": s["importance_sum"] / tokens, "rollout/importance_max": x["importance_max"],
                        "rollout/importance_capped": s["importance_capped_sum"] / tokens}  # fmt: skip
        if s.get("gap_tokens_sum"):
            metrics |= {"rollout/logprob_gap": s["gap_sum"] / s["gap_tokens_sum"],
                        "rollout/logprob_gap_p99": x["gap_p99"], "rollout/logprob_gap_max": x["gap_max"]}  # fmt: skip
        return metrics


def reward_metrics(prefix: str, parts: list[dict], groups: list[list]) -> dict[str, float]:
    """Means over all ranks of every reward part, of the completions' length in tokens, of how many were cut, and of how many
    the reward failed on."""
    own = [
        {**{k: v for k, v in part.items() if isinstance(v, (int, float))},
         "length": len(c.token_ids), "truncated": float(not c.finished), "failed": float("error" in part)}
        for part, c in zip(parts, (c for group in groups for c in group), strict=True)
    ]  # fmt: skip
    everyone = [record for records in ranks.gather(own) for record in records]
    names = sorted({name for record in everyone for name in record})
    return {f"{prefix}/{n}": sum(r.get(n, 0.0) for r in everyone) / max(1, len(everyone)) for n in names}


class Clock:
    """Seconds by phase of one step: clock.lap("generate") after the phase."""

    def __init__(self):
        self.began = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def metrics(self) -> dict[str, float]:
        named = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        return {**named, "time/step": time.perf_counter() - self.began}
