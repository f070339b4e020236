"""Which rank this process is, the few things ranks say to each other besides gradients, and that they end together.

The same script runs as plain `python` (one rank, no process group) and under torchrun."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from files import FullDisk
from model import compute_dtype


def setup(device: str = "auto", dtype: str = "auto") -> tuple[int, int, torch.device, torch.dtype]:
    """rank, world size, device, dtype; joins the process group under torchrun (NCCL on GPUs, gloo on CPUs).

    auto is a GPU with bfloat16 where there is one, otherwise the CPU with float32. Raises ValueError, one line."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: auto, float32 or bfloat16")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", kind):
        raise ValueError(f"--device {kind}: auto, cpu or cuda")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {kind}: no NVIDIA GPU here (torch.cuda.is_available() is False); leave --device out")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        if place.index >= (here := torch.cuda.device_count()):
            raise ValueError(f"rank {rank} wants GPU {place.index}, here are {here}: lower --nproc_per_node, or --device")
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return rank, world, place, compute_dtype(dtype, place.type)


def join_alone(device: torch.device) -> None:
    """A process group of one, which sharding (a reference in host memory, say) needs where there are no ranks to join."""
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)


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


def spread(function: Callable[[list], list], items: list, *, part: int = 4096) -> list:
    """function(items), where every rank does its share of them; the result is the same on all, and must pickle. `part` items
    at a time: a rank that waits for another waits minutes, not until the process group gives up."""
    if not several():
        return function(items)
    rank, world, out = dist.get_rank(), dist.get_world_size(), []
    for start in range(0, len(items), part):
        some = items[start : start + part]
        share = -(-len(some) // world)  # neighbours stay together: rows that share a clip
        out += [one for found in gather(function(some[rank * share : (rank + 1) * share])) for one in found]
    return out


def barrier() -> None:
    if several():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def leave() -> None:
    """Ends the process group (ours, or the one a vLLM engine made) at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def die_together(rank: int, *, world_size: int) -> Iterator[None]:
    """Rule 17: an exception inside ends every rank within a minute, with its traceback on stderr. Wrap main in it.

    With one rank the exception passes. With several this rank prints it, "[rank r]" before each line, and leaves by
    os._exit(1): no destructor, no barrier, nothing that could wait for a peer. Peers in a gloo collective then get an
    error at once; peers in NCCL hang until the launcher ends them. torchrun sends SIGTERM and, since StopSignal only
    notes that, SIGKILL 30 s later; torch.multiprocessing.spawn does the like. Without a launcher nobody would.
    A full disk and an error of one_line_errors() are one line instead of a traceback.
    """
    try:
        yield
    except BaseException as error:
        clean = isinstance(error, SystemExit) and error.code in (None, 0)
        if isinstance(error, FullDisk):
            error = SystemExit(f"error: {error}")
        if world_size == 1 or clean:
            raise error
        text = str(error.code) if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
        sys.stdout.flush()
        sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in text.splitlines()))
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


# ---------------------------------------------------------------- groups over ranks


def balance(owners: list[int], costs: list[float], world: int, *, tolerance: float = 0.01) -> list[int]:
    """The rank of each group, given the rank that holds it now: as many for each, and costs as even as swapping pairs makes
    them, to `tolerance` of a rank's share. Few groups move, because one that moves is encoded again where it goes.

    Same input, same answer, so every rank computes it for itself. len(owners) must divide by `world`."""
    assert len(owners) % world == 0, f"{len(owners)} groups on {world} ranks"
    owners, share = list(owners), len(owners) // world
    counts = [owners.count(rank) for rank in range(world)]
    loads = [sum(c for c, owner in zip(costs, owners) if owner == rank) for rank in range(world)]

    def move(i: int, to: int) -> None:
        for rank, sign in ((owners[i], -1), (to, 1)):
            counts[rank], loads[rank] = counts[rank] + sign, loads[rank] + sign * costs[i]
        owners[i] = to

    while max(counts) > share:
        full, short = counts.index(max(counts)), counts.index(min(counts))
        wanted = sum(costs) / len(costs) if loads[full] > loads[short] else min(costs)
        move(min((i for i, owner in enumerate(owners) if owner == full), key=lambda i: abs(costs[i] - wanted)), short)
    while (gap := max(loads) - min(loads)) > tolerance * sum(costs) / world:
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        pairs = [(abs(gap - 2 * (costs[i] - costs[j])), i, j) for i, a in enumerate(owners) if a == heavy
                 for j, b in enumerate(owners) if b == light and 0 < costs[i] - costs[j] < gap]  # fmt: skip
        if not pairs:
            break
        _, i, j = min(pairs)
        move(i, light)
        move(j, heavy)
    return owners


def exchange(held: dict[int, object], owners: dict[int, int]) -> dict[int, object]:
    """What each rank holds, by number, after every item went to the rank that `owners` names; items without one are dropped."""
    rank = dist.get_rank() if several() else 0
    sent = gather({i: item for i, item in held.items() if owners.get(i, rank) != rank})
    arrived = {i: item for items in sent for i, item in items.items() if owners[i] == rank}
    return arrived | {i: item for i, item in held.items() if owners.get(i) == rank}
