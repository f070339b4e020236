"""make demo: the shipped model before and after GRPO on two CPU cores, on questions it has not seen, with both controls.

    python -m examples.demo --seed 1

The shipped model sees nearly every object and has learned from a careless teacher to contradict its own boxes half of
the time (docs/demo-model.md). GRPO has only the reward to tell it so. The controls ask the same questions without the
picture (blind) or with another one (swapped): what they gain is guessing, not seeing.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

START = "assets/demo-model"


@dataclass(frozen=True)
class Config:
    seed: int = 1
    steps: int = 90  # of GRPO
    limit: int = 256  # held-out questions
    device: str = "auto"


def call(*command: str) -> None:
    print("\n$ python", *command, flush=True)
    finished = subprocess.run([sys.executable, *command])
    if finished.returncode:
        raise SystemExit(finished.returncode)


def ask(cfg: Config, model: str, when: str, control: str) -> dict:
    """evaluate.py in a process of its own; its scores."""
    out = f"evaluations/demo-{cfg.seed}-{when}-{control}"
    call("evaluate.py", "--model", model, "--dataset", "scenes:demo@val", "--limit", str(cfg.limit), "--control", control,
         "--batch", "128", "--device", cfg.device, "--out", out)  # fmt: skip
    return json.loads(Path(out, "scores.json").read_text())


def main(cfg: Config) -> None:
    began, run = time.time(), f"demo-{cfg.seed}"
    if Path("runs", run).exists() or list(Path("evaluations").glob(f"demo-{cfg.seed}-*")):
        raise ValueError(f"runs/{run} or its evaluations are there from an earlier demo: delete them, or take another --seed")
    controls = ("none", "swapped", "blind")
    before = {control: ask(cfg, START, "before", control) for control in controls}
    call("train_grpo.py", "demo", "--name", run, "--seed", str(cfg.seed), "--steps", str(cfg.steps), "--device", cfg.device,
         "--val-every", "0")  # fmt: skip
    after = {control: ask(cfg, f"runs/{run}/step_{cfg.steps}", "after", control) for control in controls}

    print(f"\n{cfg.limit} held-out questions, greedy answers; chance {before['none']['chance']:.3f}")
    print(f"{'':22s}{'before':>16s}{'after':>16s}{'difference':>14s}")
    for control, label in zip(controls, ("picture shown", "swapped picture", "no picture")):
        (p, e), (q, f) = ((x[control]["accuracy"], x[control]["se"]) for x in (before, after))
        errors = (q - p) / max(1e-9, math.hypot(e, f))
        print(f"{label:22s}{p:9.3f} ± {e:.3f}{q:9.3f} ± {f:.3f}{q - p:+9.3f} = {errors:+.1f} standard errors")
    boxes = before["none"]["scene"]["iou"], after["none"]["scene"]["iou"]
    print(f"{'IoU of its boxes':22s}{boxes[0]:9.3f}{'':7s}{boxes[1]:9.3f}")
    print(f"\n{(time.time() - began) / 60:.1f} minutes. Reward curve: runs/{run}/reward.png   what it wrote in training: "
          f"runs/{run}/samples.jsonl   its held-out answers: evaluations/demo-{cfg.seed}-after-none/transcripts.jsonl")  # fmt: skip


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
