"""What a step costs: seconds by phase, tokens a second, share of the GPU's matrix-product rate, and the whole recipe's hours.

    MFU = (6 P T + 2 P T for every pass without gradient) / (rate x seconds)      P: parameters of the language model
    HFU = the same with recomputed products counted                               T: packed tokens, a prompt once a group

The vision tower and attention scores are left out of both, so they are a little low. The rate is measured here and now, by a
large bf16 matrix product: data sheets promise more.
"""

import atexit
import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import ranks

SPATIALTHINKER_PROMPTS = 75 * 512  # the published recipe: 75 steps of 512 prompts x 8 completions (spec 4.3)


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a square matrix product in bf16 on a GPU, fp32 on the CPU; median of ten."""
    if device.type != "cuda":
        size = 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    seconds = []
    for _ in range(13):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:])


def utilisation(policy, *, tokens: float, passes: int, recomputed: float, seconds: float, rate: float) -> tuple[float, float]:
    """(MFU, HFU) of an update over `tokens` packed tokens with `passes` passes without gradient, a share `recomputed` of
    the layers run twice forward."""
    parameters = sum(p.numel() for p in policy.language.parameters())
    useful = (6 + 2 * passes) * parameters * tokens
    return useful / (rate * seconds), (useful + 2 * recomputed * parameters * tokens) / (rate * seconds)


def report(lines: list[dict], cfg, world: int) -> str:
    """Medians of all steps but the first, from metrics.jsonl, as a Markdown table; cfg is train_grpo.Config."""
    lines = lines[1:] or lines

    def median(name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return statistics.median(values) if values else None

    phases = [name for name in dict.fromkeys(k for line in lines for k in line) if name.startswith("time/")]
    out = ["| phase | seconds |", "|---|---|"]
    out += [f"| {name.removeprefix('time/')} | {median(name):.2f} |" for name in phases]
    whole, packed, sampled = (median(name) for name in ("time/step", "speed/packed_tokens", "speed/sampled_tokens"))
    out += ["", "| | |", "|---|---|"]
    out.append(f"| sampled tokens a second, a GPU | {sampled / median('time/generate') / world:,.0f} |")
    out.append(f"| packed tokens a second in the update, a GPU | {packed / median('time/update') / world:,.0f} |")
    if median("speed/mfu"):
        out.append(f"| update: MFU, HFU | {median('speed/mfu'):.1%}, {median('speed/hfu'):.1%} |")
        out.append(f"| matrix products here | {median('speed/matmul_tflops'):.0f} TFLOP/s |")
    if median("speed/peak_gib"):
        out.append(f"| most memory in use on the card, GiB | {max(line['speed/peak_gib'] for line in lines):.1f} |")
    hours = SPATIALTHINKER_PROMPTS / cfg.prompts_per_step * whole / 3600
    out.append(f"| SpatialThinker's 75 steps of 512 prompts at this speed | {hours:.1f} hours, {hours * world:.1f} GPU-hours |")
    return "\n".join(out)


class Meter:
    """What a step of training is worth, for metrics.jsonl: `read` after every step."""

    def __init__(self, policy, *, passes: int):
        self.policy, self.passes = policy, passes
        self.rate = matmul_rate(policy.device)
        self.peak = CardPeak(policy.device)

    def read(self, metrics: dict) -> dict[str, float]:
        layers, world = self.policy.config.text_config.num_hidden_layers, len(ranks.gather(0))
        mfu, hfu = utilisation(
            self.policy, tokens=metrics["speed/packed_tokens"] / world, passes=self.passes, rate=self.rate,
            recomputed=metrics["speed/checkpointed_layers"] / layers, seconds=metrics["time/update"],
        )  # fmt: skip
        found = {"speed/mfu": mfu, "speed/hfu": hfu, "speed/matmul_tflops": self.rate / 1e12}
        if self.policy.device.type == "cuda":
            found |= {"speed/peak_gib": self.peak.take()}
        return found


class CardPeak:
    """The most memory in use on the card, by whomever, every 20 ms: what nvidia-smi would have shown.

    torch's own counter misses what the engine maps by itself, and takes a sleeping pool for a full one."""

    def __init__(self, device: torch.device):
        self.device, self.most, self.over = device, 0, threading.Event()
        if device.type == "cuda":
            thread = threading.Thread(target=self._watch, daemon=True)
            thread.start()
            atexit.register(lambda: (self.over.set(), thread.join()))  # ended from outside, a thread in CUDA aborts the process

    def _watch(self) -> None:
        while not self.over.wait(0.02):
            free, total = torch.cuda.mem_get_info(self.device)
            self.most = max(self.most, total - free)

    def take(self) -> float:
        """GiB since the last call."""
        most, self.most = self.most, 0
        return most / 2**30


@contextlib.contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """torch's profiler around a block: `kernels.txt` (seconds by kernel), `trace.json.gz` (for Perfetto); None: nothing."""
    if folder is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=100)
    (folder / "kernels.txt").write_text(table)
    found.export_chrome_trace(str(folder / "trace.json.gz"))
