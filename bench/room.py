"""How much room a checkpoint leaves for reinforcement learning: greedy and sampled accuracy, pass@k, mixed groups.

    python -m bench.room --model assets/demo-model --limit 512

A group is mixed when some of its k samples are right and some wrong: only those give GRPO a gradient. pass@k is the
share of questions that at least one of k samples answers: what the policy could reach by choosing better.
"""

import json
from dataclasses import dataclass

import tyro

from data.dataset import encode, load_rows
from rewards import grade, scene_metrics
from rollout import hf_rollout


@dataclass(frozen=True)
class Config:
    model: str = "assets/demo-model"
    dataset: str = "scenes:demo@val"
    limit: int = 512
    samples: int = 8  # a question
    max_tokens: int = 192
    style: str = "short"
    min_pixels: int = 784
    max_pixels: int = 448 * 448
    seed: int = 1
    device: str = "auto"


def main(cfg: Config) -> dict[str, dict[str, float]]:
    rollout, processor = hf_rollout(cfg.model, device=cfg.device, max_sequences=512)
    rows = load_rows(cfg.dataset, limit=cfg.limit)
    prompts = [encode(r, processor, style=cfg.style, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels) for r in rows]
    greedy = rollout.generate(prompts, n=1, max_tokens=cfg.max_tokens, temperature=0.0, seed=cfg.seed)
    sampled = rollout.generate(prompts, n=cfg.samples, max_tokens=cfg.max_tokens, temperature=1.0, seed=cfg.seed)
    records = []
    for row, (best,), group in zip(rows, greedy, sampled):
        right = [float(grade(row, c.text)["correct"]) for c in group]
        records.append({
            "category": row["category"], "greedy": float(grade(row, best.text)["correct"]), "sampled": sum(right) / len(right),
            f"pass@{cfg.samples}": max(right), "mixed": float(0 < sum(right) < len(right)),
            **scene_metrics(best.text, row["scene"], row["size"]),
        })  # fmt: skip
    result = {}
    for category in ("all", *sorted({r["category"] for r in records})):
        chosen = [r for r in records if category in ("all", r["category"])]
        names = [k for k in chosen[0] if k != "category"]
        result[category] = {k: mean([r[k] for r in chosen]) for k in names} | {"n": len(chosen)}
    names = list(result["all"])
    print("| category | " + " | ".join(names) + " |\n|---" * 1 + "|---" * len(names) + "|")
    for category, values in result.items():
        print(f"| {category} | " + " | ".join(f"{values[n]:.3f}" if n != "n" else str(values[n]) for n in names) + " |")
    return result


def mean(values: list[float | None]) -> float:
    """Of those that there are: an answer without a rightly named box has no ciou."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else float("nan")


if __name__ == "__main__":
    try:
        print(json.dumps(main(tyro.cli(Config))["all"]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
