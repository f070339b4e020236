"""GRPO from the demo model on one GPU, one reward against another, several seeds, scored on held-out scenes.

    python -m bench.demo_rewards --out DIR

Every run is `train_grpo.py demo --rollout vllm` in a process of its own; then every checkpoint, and the start, answers
the same questions greedily with its picture, with another's (swapped), without any (blind), and in samples. DIR gets
results.json, results.md, curves.json (reward, accuracy and format of every step) and the weights.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import evaluate
from answers import controlled, swapped_pictures
from data.dataset import encode, load_rows
from files import read_lines
from rewards import extract_scene, format_score, grade, is_valid_object, match_objects, scene_metrics
from rollout import hf_rollout

START = "assets/demo-model"


@dataclass(frozen=True)
class Config:
    out: Path
    rewards: tuple[str, ...] = ("spatialthinker", "vanilla-scene")
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 90
    limit: int = 1024  # held-out questions
    samples: int = 4  # a question, at temperature 1
    more: str = "--rollout vllm --engine-memory 0.2 --token-budget 65536"  # further arguments of train_grpo.py
    start: bool = True  # score the start too
    only_score: str | None = None  # internal: score this checkpoint in this process, write into out


def main(cfg: Config) -> None:
    cfg.out.mkdir(parents=True, exist_ok=True)
    checkpoints, curves = ({"start": START} if cfg.start else {}), {}
    for reward in cfg.rewards:
        for seed in cfg.seeds:
            name = f"{reward}-{seed}"
            command = [sys.executable, "train_grpo.py", "demo", "--name", name, "--reward", reward, "--seed", str(seed),
                       "--steps", str(cfg.steps), "--val-every", "0", "--save-every", "1000", *cfg.more.split()]  # fmt: skip
            print("$", *command, flush=True)
            subprocess.run(command, check=True)
            checkpoints[name] = f"runs/{name}/step_{cfg.steps}"
            lines = read_lines(Path("runs", name, "metrics.jsonl"))
            curves[name] = [{k: line.get(k) for k in KEPT} for line in lines]
            (cfg.out / "curves.json").write_text(json.dumps(curves))
            shutil.copy(Path(checkpoints[name], "model.safetensors"), cfg.out / f"{name}.safetensors")
    scored = score_all(cfg, checkpoints)
    (cfg.out / "results.json").write_text(json.dumps(scored, indent=1))
    (cfg.out / "results.md").write_text(table(scored))
    print(table(scored))


KEPT = ("step", "reward/total", "reward/accuracy", "reward/format", "reward/length", "rollout/logprob_gap", "time/step")


def score_all(cfg: Config, checkpoints: dict[str, str]) -> dict[str, dict]:
    """All checkpoints side by side, each in a process of its own: decoding a small model keeps no GPU busy."""
    me = [sys.executable, "-m", "bench.demo_rewards", "--out", str(cfg.out), "--limit", str(cfg.limit), "--samples", str(cfg.samples)]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // len(checkpoints)))}
    children = [subprocess.Popen([*me, "--only-score", path], env=os.environ | threads) for path in checkpoints.values()]
    if any([child.wait() for child in children]):
        raise RuntimeError("a checkpoint was not scored: see above")
    return {name: json.loads(score_file(cfg, path).read_text()) for name, path in checkpoints.items()}


def score_file(cfg: Config, checkpoint: str) -> Path:
    return cfg.out / f"score-{checkpoint.replace('/', '_')}.json"


def score(cfg: Config, checkpoint: str) -> dict[str, list[float]]:
    """{measure: [mean, standard error]} of one checkpoint."""
    asked = evaluate.with_trained_settings(evaluate.Config(model=START))
    rollout, processor = hf_rollout(checkpoint, max_sequences=1024)
    rows = load_rows("scenes:demo@val", limit=cfg.limit)
    donors = swapped_pictures(rows, asked.seed)
    how = {"max_tokens": asked.max_tokens, "seed": asked.seed}
    measures: dict[str, list[float]] = {}

    def ask(control: str, **kwargs) -> list[list]:
        shown = [controlled(row, control, donors[row["id"]]) for row in rows]
        prompts = [encode(row, processor, style=asked.style, min_pixels=asked.min_pixels, max_pixels=asked.max_pixels) for row in shown]
        return rollout.generate(prompts, **how, **kwargs)

    for control in ("none", "swapped", "blind"):
        groups = ask(control, n=1, temperature=0.0)
        measures[f"greedy {control}"] = [float(grade(row, c.text)["correct"]) for row, (c,) in zip(rows, groups)]
        if control == "none":
            seen = [scene_metrics(c.text, row["scene"], row["size"]) for row, (c,) in zip(rows, groups)]
            measures |= {name: [one[name] for one in seen] for name in seen[0]}
            measures["ciou"] = [mean_ciou(c.text, row) for row, (c,) in zip(rows, groups)]
            measures["format"] = [format_score(c.text, extract_scene(c.text)) for (c,) in groups]
            measures["tokens"] = [float(len(c.token_ids)) for (c,) in groups]
    groups = ask("none", n=cfg.samples, temperature=1.0)
    measures["sampled"] = [sum(float(grade(row, c.text)["correct"]) for c in g) / len(g) for row, g in zip(rows, groups)]
    measures[f"pass@{cfg.samples}"] = [max(float(grade(row, c.text)["correct"]) for c in g) for row, g in zip(rows, groups)]
    return {name: list(mean_and_error(values)) for name, values in measures.items()}


def mean_ciou(text: str, row: dict) -> float:
    """Mean mapped CIoU over the gold objects, each against its best prediction of the same label; 0 where there is none."""
    found = [o for o in extract_scene(text).get("objects") or [] if is_valid_object(o)]
    gold, (w, h) = row["scene"]["objects"], row["size"]
    sides = [([o["id"].split(".")[0] for o in side], [tuple(v / s for v, s in zip(o["bbox"], (w, h, w, h))) for o in side])
             for side in (found[:64], gold)]  # fmt: skip
    (labels, boxes), (gold_labels, gold_boxes) = sides
    if not boxes:
        return 0.0
    pairs = match_objects(labels, boxes, gold_labels, gold_boxes, similarity=lambda a, b: float(a == b))
    return sum(p[1] for p, label in zip(pairs, gold_labels) if p and labels[p[0]] == label) / len(gold)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values)) / len(values)


def table(scored: dict[str, dict]) -> str:
    names = list(next(iter(scored.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {run} | " + " | ".join(f"{m[n][0]:.3f} ± {m[n][1]:.3f}" for n in names) + " |" for run, m in scored.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    config = tyro.cli(Config)
    if config.only_score:
        score_file(config, config.only_score).write_text(json.dumps(score(config, config.only_score)))
    else:
        main(config)
