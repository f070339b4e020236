"""SpaceR's reward on procedural clips, with a small model and one GPU: does the map get better, and is it seen or guessed?

    python -m bench.clips --out DIR                some minutes on one GPU
    python -m bench.clips --out DIR --rehearse     a few steps of everything, on a CPU; learns nothing

The demo model gets a token for each category and for the fixed pieces of a map: a small model looks up what is one token,
and spelled words it does not (data/tokenizer.py). Then three runs in processes of their own, then answers to held-out clips:

  sees      train_sft.py from there, on rooms of level clip_small (data/clips.py); the response is the map, the
            numbers that the answer follows from, the answer. Drawing a room costs more than training on it, so every room
            comes several times and is kept on the disk (about 180 kB each)
  careless  a little more of it from a teacher who is wrong in half of the rows, each by itself: the answer, left and right
            of the map, the end of the thinking. Without this the reward would find little to raise in minutes
  grpo      train_grpo.py --reward spacer --reward-mode corrected, on other clips

Each of the three answers the same questions greedily and in samples: with the clip, with another room's clip, with grey
frames, and with the clip's frames in random order. What is above the second and third was seen. The same command goes on
where a broken one ended. DIR gets results.md, results.json, answers.json (question by question), curves.json and the weights
before and after GRPO.
"""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from command import Progress
from data.clips import CLIPS
from data.dataset import encode
from data.scenes import scene_rows
from files import read_lines
from model import Policy, banned_ids, load_model, save_hf
from rewards import grade
from rollout import hf_rollout
from scoring import RewardPool


@dataclass(frozen=True)
class Config:
    out: Path
    start: str = "assets/demo-model"  # or random:demo
    seed: int = 1
    level: str = "clip_small"  # of data/clips.py
    sees_steps: int = 1200
    careless_steps: int = 150
    grpo_steps: int = 100
    rows: int = 256  # clips a step of the first two
    distinct: int = 57_600  # different clips of the first two: a multiple of rows
    prompts: int = 16  # clips a step of GRPO, 8 samples each
    sees_lr: float = 1.5e-3  # Muon's
    careless_lr: float = 3e-4  # AdamW's, of this and the next
    grpo_lr: float = 3e-5
    careless: float = 0.5  # share of wrong rows; 0: no careless run, GRPO goes on from `sees`
    limit: int = 512  # held-out questions
    samples: int = 4  # a question, at temperature 1
    workers: int = 14  # processes that draw clips
    kept: Path = Path("runs/kept-clips")  # where clips are kept once drawn
    rollout: str = "hf"  # of GRPO: hf or vllm
    more: str = ""  # further arguments of train_grpo.py
    rehearse: bool = False
    only_score: str | None = None  # internal: answer with this checkpoint, in this process


STYLE, TOKENS = "short_map", 80  # responses have about 50
PIECES = ["<map>", "</map>", '{"', '": [[', "], [", ']], "', "]]}"]
CONTROLS = ("none", "other room", "grey", "shuffled")
MEASURES = ("map", "format", "answer", "correct")  # parts of the reward, and the grader's verdict on the answer
KEPT = ("step", "loss/sft", "val/map", "val/answer", "reward/total", "reward/map", "reward/answer", "reward/format",
        "reward/length", "rollout/logprob_gap", "time/data", "time/step")  # fmt: skip


def main(cfg: Config) -> None:
    if cfg.seed == 0:
        raise SystemExit("--seed 0 draws the supervised rooms where GRPO draws its own: give 1 or more")
    cfg.out.mkdir(parents=True, exist_ok=True)
    if cfg.rehearse:
        cfg = replace(cfg, sees_steps=3, careless_steps=2, grpo_steps=2, rows=4, distinct=8, prompts=2, limit=12, samples=2,
                      workers=1)  # fmt: skip
    os.environ["SPATIAL_GRPO_SCENES"] = str(cfg.kept)
    draw_ahead(cfg)
    if not start_folder(cfg).is_dir():
        more_tokens(cfg)
    checkpoints = {}
    for name, command in stages(cfg).items():
        checkpoints[name] = run_stage(cfg, name, command)
        curves = {stage: [{k: line[k] for k in KEPT if k in line} for line in read_lines(Path(path).parent / "metrics.jsonl")]
                  for stage, path in checkpoints.items()}  # fmt: skip
        (cfg.out / "curves.json").write_text(json.dumps(curves))
    for name in list(checkpoints)[-2:]:
        shutil.copy(Path(checkpoints[name], "model.safetensors"), cfg.out / f"{name}.safetensors")
    answers = answer_all(cfg, checkpoints)
    (cfg.out / "answers.json").write_text(json.dumps(answers))
    (cfg.out / "results.json").write_text(json.dumps(summary(answers), indent=1))
    text = report(answers)
    (cfg.out / "results.md").write_text(text)
    print(text)


def start_folder(cfg: Config) -> Path:
    return Path(f"runs/{run_name(cfg, 'start')}")


def more_tokens(cfg: Config) -> None:
    """Writes cfg.start with more tokens; those that it has keep their numbers."""
    torch.manual_seed(cfg.seed)
    model, processor = load_model(cfg.start)
    old = len(processor.tokenizer)
    processor.tokenizer.add_tokens([*CLIPS[cfg.level]["kinds"], *PIECES])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    table = model.get_input_embeddings().weight.data  # (V, H)
    table[old:] = table[:old].std() * torch.randn_like(table[old:])
    save_hf(Policy(model, banned_ids(processor, model)), processor, start_folder(cfg))


def draw_ahead(cfg: Config) -> None:
    """Draws the clips that are read by one process alone: GRPO's (seed 0 of load_rows) and those of the questions."""
    blocks = [(split, at, min(16, count - at)) for split, count in (("train", cfg.prompts * cfg.grpo_steps), ("val", cfg.limit))
              for at in range(0, count, 16)]  # fmt: skip
    progress = Progress(len(blocks), unit="block")
    with ProcessPoolExecutor(cfg.workers, mp_context=multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(draw, n, cfg.level, split, at) for split, at, n in blocks]
        for i, job in enumerate(as_completed(jobs)):
            job.result()  # raises what went wrong
            progress.show(i, {})
    progress.close()


def draw(count: int, level: str, split: str, start: int) -> None:
    scene_rows(count, level=level, split=split, start=start)  # the rows stay in the folder, not in a pipe


def stages(cfg: Config) -> dict[str, list[str]]:
    """Name -> arguments of python, of the runs in their order."""
    data = ["--data", f"scenes:{cfg.level}@train", "--style", STYLE, "--seed", str(cfg.seed)]
    data += ["--max-completion-tokens", str(TOKENS), "--reward", "spacer", "--reward-mode", "corrected", "--save-every", "1000"]
    drawn = [*data, "--rows-per-step", str(cfg.rows), "--repeat", str(cfg.distinct), "--workers", str(cfg.workers)]
    checked = ["--val-data", f"scenes:{cfg.level}@val", "--val-limit", str(min(128, cfg.limit))]
    found = {"sees": [
        "train_sft.py", "demo-sees", "--model", str(start_folder(cfg)), "--steps", str(cfg.sees_steps), "--lr", str(cfg.sees_lr),
        "--warmup-steps", str(max(1, cfg.sees_steps // 20)), "--val-every", str(max(1, cfg.sees_steps // 4)), *checked, *drawn,
    ]}  # fmt: skip
    if cfg.careless:
        found["careless"] = [
            "train_sft.py", "demo-careless", "--model", checkpoint(cfg, "sees", cfg.sees_steps), "--steps", str(cfg.careless_steps),
            "--lr", str(cfg.careless_lr), "--warmup-steps", str(max(1, cfg.careless_steps // 10)), "--val-every", "0",
            "--val-data", "None", "--careless", str(cfg.careless), *drawn,
        ]  # fmt: skip
    before = ("careless", cfg.careless_steps) if cfg.careless else ("sees", cfg.sees_steps)
    found["grpo"] = [
        "train_grpo.py", "demo", "--model", checkpoint(cfg, *before), "--steps", str(cfg.grpo_steps), "--lr", str(cfg.grpo_lr),
        "--prompts-per-step", str(cfg.prompts), "--limit", str(cfg.prompts * cfg.grpo_steps), "--val-data", "None",
        "--val-every", "0", "--token-budget", "65536", "--rollout", cfg.rollout, *data, *cfg.more.split(),
    ]  # fmt: skip
    return found


def run_name(cfg: Config, stage: str) -> str:
    return f"clips-{cfg.out.resolve().name}-{stage}"


def checkpoint(cfg: Config, stage: str, steps: int) -> str:
    return f"runs/{run_name(cfg, stage)}/step_{steps}"


def run_stage(cfg: Config, stage: str, command: list[str]) -> str:
    """The checkpoint that a run ends with, from the run if it is not there yet."""
    folder = checkpoint(cfg, stage, getattr(cfg, f"{stage}_steps"))
    if Path(folder).is_dir():
        print(f"{folder} is there")
        return folder
    command = [sys.executable, *command, "--name", run_name(cfg, stage)]
    command += ["--resume"] if Path(folder).parent.is_dir() else []
    print("$", *command, flush=True)
    subprocess.run(command, check=True)
    return folder


# ---------------------------------------------------------------- answers


def answer_all(cfg: Config, checkpoints: dict[str, str]) -> dict[str, dict]:
    """All checkpoints side by side, each in a process of its own: decoding a small model keeps no GPU busy.

    {checkpoint: {control: {"greedy map": [a number a question], ...}}}, and {"category": [...]} of the questions."""
    me = [sys.executable, "-m", "bench.clips", "--out", str(cfg.out), "--limit", str(cfg.limit), "--samples", str(cfg.samples),
          "--level", cfg.level, "--seed", str(cfg.seed)]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // len(checkpoints)))}
    children = [subprocess.Popen([*me, "--only-score", path], env=os.environ | threads) for path in checkpoints.values()]
    if any([child.wait() for child in children]):
        raise RuntimeError("a checkpoint was not scored: see above")
    return {name: json.loads(answers_file(path).read_text()) for name, path in checkpoints.items()}


def answers_file(path: str) -> Path:
    return Path(path).parent / "answers.json"


def answer(cfg: Config, path: str) -> dict:
    """What one checkpoint answers with each control; see answer_all()."""
    rows = scene_rows(cfg.limit, level=cfg.level, split="val")
    rollout, processor = hf_rollout(path, max_sequences=1024)
    found: dict = {"category": [row["category"] for row in rows]}
    with RewardPool("spacer", mode="corrected") as pool:
        for control in CONTROLS:
            prompts = [encode({**row, "video": frames(rows, i, control)}, processor, style=STYLE) for i, row in enumerate(rows)]
            measures = found[control] = {}
            for way, n, temperature in (("greedy", 1, 0.0), ("sampled", cfg.samples, 1.0)):
                groups = rollout.generate(prompts, n=n, max_tokens=TOKENS, temperature=temperature, seed=cfg.seed)
                for row, group in zip(rows, groups, strict=True):
                    parts = pool.score([c.text for c in group], [row] * n)
                    for part, c in zip(parts, group, strict=True):
                        part["correct"] = float(grade(row, c.text)["correct"])
                    for name in MEASURES:
                        measures.setdefault(f"{way} {name}", []).append(math.fsum(part[name] for part in parts) / n)
            print(f"{path}, frames {control}: map {np.mean(measures['sampled map']):.3f}", flush=True)
    return found


def frames(rows: list[dict], i: int, control: str) -> list[Image.Image]:
    """The frames that question i is asked with: its own, those of the next question's room, grey ones, or its own in random
    order. The text, and with it the categories of the map, stays as it is."""
    own = rows[i]["video"]
    if control == "other room":
        return rows[(i + 1) % len(rows)]["video"]
    if control == "grey":
        return [Image.new("RGB", frame.size, (128, 128, 128)) for frame in own]
    if control == "shuffled":
        return [own[k] for k in np.random.default_rng(i).permutation(len(own))]
    return own


# ---------------------------------------------------------------- numbers


def mean_and_error(values: list[float]) -> tuple[float, float]:
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(spread / math.sqrt(len(values)))


def summary(answers: dict[str, dict]) -> dict:
    """{checkpoint: {control: {measure: [mean, standard error]}}}, "correct" also by category."""
    found: dict = {}
    for name, one in answers.items():
        for control in CONTROLS:
            cut = {measure: mean_and_error(values) for measure, values in one[control].items()}
            for category in sorted(set(one["category"])):
                for way in ("greedy", "sampled"):
                    values = [v for v, of in zip(one[control][f"{way} correct"], one["category"], strict=True) if of == category]
                    cut[f"{way} correct {category}"] = mean_and_error(values)
            found.setdefault(name, {})[control] = cut
    return found


def report(answers: dict[str, dict]) -> str:
    """Tables of all means, then the differences that the claim is about, question by question."""
    found, lines = summary(answers), []
    for way in ("sampled", "greedy"):
        names = [name for name in next(iter(found.values()))["none"] if name.startswith(way)]
        lines += [f"{way}, {len(next(iter(answers.values()))['category'])} held-out questions", ""]
        lines += ["| run | frames | " + " | ".join(name.removeprefix(way + " ") for name in names) + " |"]
        lines += ["|---" * (len(names) + 2) + "|"]
        for run, controls in found.items():
            lines += [f"| {run} | {'own' if control == 'none' else control} | "
                      + " | ".join(f"{cut[n][0]:.3f} ± {cut[n][1]:.3f}" for n in names) + " |"
                      for control, cut in controls.items()]  # fmt: skip
        lines.append("")
    before, after = list(answers)[-2:]
    lines += ["| difference, sampled | mean | standard errors |", "|---|---|---|"]
    pairs = [(f"{m}: {after} - {before}", answers[after]["none"], answers[before]["none"], m) for m in MEASURES]
    pairs += [(f"{m}: {after}, own - {control}", answers[after]["none"], answers[after][control], m)
              for control in CONTROLS[1:] for m in ("map", "correct")]  # fmt: skip
    for label, a, b, m in pairs:
        mean, error = mean_and_error([x - y for x, y in zip(a[f"sampled {m}"], b[f"sampled {m}"], strict=True)])
        lines.append(f"| {label} | {mean:+.3f} ± {error:.3f} | {mean / error if error else 0:+.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    config = tyro.cli(Config)
    if config.only_score:
        answers_file(config.only_score).write_text(json.dumps(answer(config, config.only_score)))
    else:
        main(config)
