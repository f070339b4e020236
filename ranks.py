"""Which rank this process is, and the few things ranks say to each other besides gradients.

The same script runs as plain `python` (one rank, no process group) and under torchrun."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from model import compute_dtype


def setup(device: str = "auto", dtype: str = "auto") -> tuple[int, int, torch.device, torch.dtype]:
    """rank, world size, device, dtype; joins the process group under torchrun (NCCL on GPUs, gloo on CPUs).

    auto is a GPU with bfloat16 where there is one, otherwise the CPU with float32. Raises ValueError, one line."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: auto, float32 or bfloat16")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {kind}: no NVIDIA GPU here (torch.cuda.is_available() is False); leave --device out")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return rank, world, place, compute_dtype(dtype, place.type)


def several() -> bool:
    """More than one rank. (A vLLM engine initialises torch.distributed even for one.)"""
    return dist.is_initialized() and dist.get_world_size() > 1


def gather(value) -> list:
    """One Python object a rank, on every rank."""
    if not several():
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def barrier() -> None:
    if several():
        dist.barrier()


def leave() -> None:
    """Ends the process group (ours, or the one a vLLM engine made) at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()
