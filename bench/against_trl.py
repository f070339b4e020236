"""One GRPO step of ours against TRL's GRPOTrainer: one GPU, same shape, same prompts and pictures, same engine share.

    python -m bench.against_trl --out DIR

Random weights of Qwen2.5-VL-3B's shape, 16 prompts of about 900 tokens with one picture each, 8 completions of 512
tokens, KL 0.01 to a frozen start. Ours runs `train_grpo.py bench-3b` with that preset's flags; TRL runs colocated vLLM
with sleep, fused AdamW on bf16 weights, no checkpointing and Liger layers, the fastest of the settings we tried. Each is a
process of its own; DIR gets results.json and both logs. TRL samples among the first 1,000 ids of the tokenizer (its way of
allowing ids takes no more), ours among all but the special ones: the work is the same.
"""

import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from files import read_lines


@dataclass(frozen=True)
class Config:
    out: Path
    model: str = "random:3b"
    sides: tuple[str, ...] = ("ours", "trl")
    prompts: int = 16
    group_size: int = 8
    tokens: int = 512  # of a completion
    steps: int = 4  # of ours; the first warms up and does not count
    trl_steps: int = 3  # likewise
    micro_batch: int = 8  # TRL's
    checkpointing: bool = False  # TRL's
    liger: bool = True  # TRL's
    engine_memory: float = 0.35
    more: str = ""  # further arguments of train_grpo.py
    only_trl: bool = False  # internal: TRL in this process


def main(cfg: Config) -> None:
    if not shutil.which("nvidia-smi"):
        raise SystemExit("error: the comparison needs an NVIDIA GPU, and there is none")
    cfg.out.mkdir(parents=True, exist_ok=True)
    checkpoint = write_checkpoint(cfg)
    write_rows(cfg)
    results = {}
    shutil.rmtree("runs/against-trl", ignore_errors=True)  # of an earlier bench: ours would refuse to go on in it
    for side in cfg.sides:
        log = cfg.out / f"{side}.log"
        began = time.time()
        with open(log, "w") as file:
            code = subprocess.run(command(cfg, side, checkpoint), stdout=file, stderr=subprocess.STDOUT).returncode
        print(f"{side}: exit code {code} after {time.time() - began:.0f} s, {log}", flush=True)
        steps = [json.loads(found) for found in re.findall(r"STEP (\{.*?\})", log.read_text())]
        if side == "ours" and (metrics := Path("runs/against-trl/metrics.jsonl")).exists():
            lines = read_lines(metrics)
            steps = [{"seconds": line["time/step"], "card_gib": line.get("speed/peak_gib"), "metrics": line} for line in lines]
        results[side] = {"exit code": code, "steps": steps}
        (cfg.out / "results.json").write_text(json.dumps(results, indent=1))
        if code:
            print("\n".join(log.read_text().splitlines()[-15:]))
    show(results)


def show(results: dict) -> None:
    medians = {}
    for side, found in results.items():
        if later := found["steps"][1:]:
            medians[side] = statistics.median(step["seconds"] for step in later)
            peak = max(step["card_gib"] or 0 for step in later)
            print(f"{side:5s} {medians[side]:6.2f} s a step (median of {len(later)}), most on the card {peak:.1f} GiB")
    if len(medians) == 2:
        print(f"ratio {medians['trl'] / medians['ours']:.2f}")


def command(cfg: Config, side: str, checkpoint: Path) -> list[str]:
    if side == "ours":
        return [sys.executable, "train_grpo.py", "bench-3b", "--model", str(checkpoint), "--name", "against-trl",
                "--data", str(cfg.out / "rows.jsonl"), "--prompts-per-step", str(cfg.prompts), "--limit", "None",
                "--group-size", str(cfg.group_size), "--max-completion-tokens", str(cfg.tokens), "--steps", str(cfg.steps),
                "--engine-memory", str(cfg.engine_memory), *cfg.more.split()]  # fmt: skip
    flags = ("prompts", "group_size", "tokens", "trl_steps", "micro_batch", "engine_memory")
    return [sys.executable, "-m", "bench.against_trl", "--only-trl", "--out", str(cfg.out), "--model", str(checkpoint),
            *(x for f in flags for x in (f"--{f.replace('_', '-')}", str(getattr(cfg, f)))),
            "--checkpointing" if cfg.checkpointing else "--no-checkpointing", "--liger" if cfg.liger else "--no-liger"]  # fmt: skip


def write_checkpoint(cfg: Config) -> Path:
    """The weights as a folder, which is all that TRL takes; both sides read it."""
    import torch

    from model import load_policy, save_hf

    folder = cfg.out / "checkpoint"
    if not (folder / "config.json").exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy, processor = load_policy(cfg.model, dtype=torch.bfloat16, device=device)
        save_hf(policy, processor, folder)
        del policy
        if device == "cuda":  # this process lives as long as the sides do, and their memory is counted
            gc.collect()  # bound methods tie layers to themselves
            torch.cuda.empty_cache()
    return folder


def write_rows(cfg: Config) -> None:
    """rows.jsonl and its pictures: what both sides read."""
    from data.noise import noise_rows

    rows = noise_rows(cfg.prompts * (max(cfg.steps, cfg.trl_steps) + 1), width=588, height=448, words=270)
    with open(cfg.out / "rows.jsonl", "w") as file:
        for row in rows:
            picture = cfg.out / f"{row['id']}.png"
            row["images"][0].save(picture)
            file.write(json.dumps({**row, "images": [picture.name]}) + "\n")


def trl(cfg: Config) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "RANK": "0", "WORLD_SIZE": "1",
                   "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}  # fmt: skip
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from bench.random_reward import reward
    from speed import CardPeak

    lines = read_lines(cfg.out / "rows.jsonl")
    data = Dataset.from_list([
        {"prompt": [{"role": "user", "content": line["problem"]}], "image": Image.open(cfg.out / line["images"][0])} for line in lines
    ])  # fmt: skip
    peak = CardPeak(torch.device("cuda", 0))

    class Timer(TrainerCallback):
        last = None

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            now = time.perf_counter()
            if self.last is not None:  # the first step compiles, and its beginning is not seen
                torch_gib = torch.cuda.max_memory_allocated() / 2**30
                print("STEP " + json.dumps({"seconds": now - self.last, "card_gib": peak.take(), "torch_gib": torch_gib}), flush=True)
            else:
                print("STEP " + json.dumps({"seconds": None, "card_gib": peak.take()}), flush=True)
            self.last = time.perf_counter()

    settings = GRPOConfig(
        output_dir=str(cfg.out / "trl"), per_device_train_batch_size=cfg.micro_batch, num_generations=cfg.group_size,
        gradient_accumulation_steps=cfg.prompts * cfg.group_size // cfg.micro_batch, max_completion_length=cfg.tokens,
        use_vllm=True, vllm_mode="colocate", vllm_enable_sleep_mode=True, vllm_gpu_memory_utilization=cfg.engine_memory,
        vllm_max_model_length=2048, gradient_checkpointing=cfg.checkpointing, use_liger_kernel=cfg.liger, bf16=True,
        beta=0.01, loss_type="grpo", temperature=1.0, max_steps=cfg.trl_steps, report_to="none", save_strategy="no", disable_tqdm=True,
        generation_kwargs={"allowed_token_ids": list(range(1000)), "ignore_eos": True}, optim="adamw_torch_fused",
        learning_rate=1e-6, model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=cfg.model, args=settings, train_dataset=data, callbacks=[Timer()],
        reward_funcs=lambda completions, **_: [reward(str(c), {})["total"] for c in completions],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    config = tyro.cli(Config)
    trl(config) if config.only_trl else main(config)
