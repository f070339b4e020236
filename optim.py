"""AdamW (or Muon) on fp32 master weights, learning-rate schedules.

bf16 has 8 bits of mantissa: a step of 1e-6 on a weight of 0.02 is far below its spacing (1.2e-4) and is lost in
rounding. So the optimiser owns fp32 copies of low-precision parameters, adds every micro-batch's gradient up in fp32,
steps the copies, and writes them back. Parameters that are fp32 already are their own master.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "muon")


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The rate in force during optimiser step `step`, counted from 0.

    Warm-up starts at peak/warmup, never at 0: upstream's schedule is 0 at step 0 even without warm-up, so its first
    step of a run trains nothing (spec 4.2)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    raise ValueError(f"unknown schedule {schedule!r}: one of {', '.join(SCHEDULES)}")


class MasterOptimizer:
    """Steps fp32 masters of the trainable parameters. `named` is (name, parameter); masters keep that order.

        optimizer.zero_grad(); loss.backward() ...; norm = optimizer.step(lr=1e-6)

    kind `adamw`, or `muon` (orthogonalised momentum for the 2-D weights inside blocks, AdamW for embeddings, head,
    norms and biases), which learns a small model from nothing about twice as fast (docs/demo-model.md).
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], *, kind: str = "adamw", weight_decay: float = 0.01,
                 betas: tuple[float, float] = (0.9, 0.999), max_grad_norm: float = 1.0,
                 offload_moments: bool = False):  # fmt: skip
        named = [(name, p) for name, p in named if p.requires_grad]
        if not named:
            raise ValueError("nothing to train: every parameter is frozen")
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.params]
        self.max_grad_norm = max_grad_norm
        for parameter, master in zip(self.params, self.masters):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(_adder(master))
        fused = self.masters[0].is_cuda
        self.offloaded: list[HostMoments] = []
        if kind == "adamw":
            adamw = dict(betas=betas, eps=1e-8, weight_decay=weight_decay, fused=fused)
            if offload_moments and fused:
                self.inner = [torch.optim.AdamW(bucket, **adamw) for bucket in buckets(self.masters)]
                self.offloaded = [HostMoments(inner) for inner in self.inner]
            else:
                self.inner = [torch.optim.AdamW(self.masters, **adamw)]
        elif kind == "muon":
            matrices = [m for name, m in zip(self.names, self.masters) if is_block_matrix(name, m)]
            chosen = {id(m) for m in matrices}
            rest = [m for m in self.masters if id(m) not in chosen]
            self.inner = [
                torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(rest, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=fused),
            ]
        else:
            raise ValueError(f"unknown optimizer {kind!r}: one of {', '.join(OPTIMIZERS)}")

    @property
    def gradients(self) -> list[Tensor]:
        """fp32 gradients, zeros where a parameter got none: every rank must reduce the same list."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters]

    def zero_grad(self) -> None:
        for tensor in (*self.params, *self.masters):
            tensor.grad = None

    @torch.no_grad()
    def step(self, *, lr: float) -> float:
        """Clip, step, write back; returns the norm before clipping. A norm that is not finite skips the step."""
        norm = torch.nn.utils.get_total_norm(self.gradients)
        value = float(norm)
        if math.isfinite(value):
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, norm)
            for group in (group for inner in self.inner for group in inner.param_groups):
                group["lr"] = lr
            if self.offloaded:
                step_from_host(self.offloaded)
            else:
                for inner in self.inner:
                    inner.step()
            for parameter, master in zip(self.params, self.masters):
                if master is not parameter:
                    parameter.copy_(master)
        self.zero_grad()
        return value

    def bytes_to_come(self) -> int:
        """What the first step still allocates beside the masters: gradients, and moments that live on the GPU."""
        trained = sum(m.numel() for m in self.masters)
        have = any(inner.state for inner in self.inner)
        gradients = 0 if self.masters[0].grad is not None else 4 * trained
        return gradients + (0 if have or self.offloaded else 8 * trained)

    def state_dict(self) -> dict:
        return {"names": self.names, "masters": [m.detach() for m in self.masters],
                "inner": [inner.state_dict() for inner in self.inner]}  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        if state["names"] != self.names:
            changed = sorted(set(state["names"]) ^ set(self.names))[:3]
            raise ValueError(f"the checkpoint trained other parameters than this run ({', '.join(changed)}, ...)")
        for parameter, master, saved in zip(self.params, self.masters, state["masters"]):
            master.copy_(saved)
            if master is not parameter:
                parameter.copy_(master)
        if len(state["inner"]) != len(self.inner):
            raise ValueError("the checkpoint was written with another --offload-moments or --optimizer: give the old one")
        for inner, saved in zip(self.inner, state["inner"], strict=True):
            if self.offloaded:
                self.offloaded[self.inner.index(inner)].load(saved)
            else:
                inner.load_state_dict(saved)


def _adder(master: Tensor):
    """A hook that adds a finished low-precision gradient to its fp32 master and frees it."""

    def add(parameter: Tensor) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return add


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """True for the weights that Muon should step: matrices inside transformer blocks, not tables of embeddings."""
    return tensor.ndim == 2 and ("layers." in name or "blocks." in name)


# ---------------------------------------------------------------- moments in host memory


def buckets(masters: list[Tensor], elements: int = 1 << 28) -> list[list[Tensor]]:
    """Consecutive parameters in parts of about `elements` numbers (1 GiB of fp32 each)."""
    parts: list[list[Tensor]] = [[]]
    for master in masters:
        if parts[-1] and sum(m.numel() for m in parts[-1]) + master.numel() > elements:
            parts.append([])
        parts[-1].append(master)
    return parts


class HostMoments:
    """Both moments of one AdamW in pinned host memory. They visit the GPU for its step only, 8 bytes a parameter that
    neither the engine nor the activations have to leave room for."""

    def __init__(self, inner: torch.optim.AdamW):
        self.inner = inner
        self.masters = [p for group in inner.param_groups for p in group["params"]]
        self.host = torch.zeros(2, sum(p.numel() for p in self.masters), pin_memory=True)
        self.steps = [torch.zeros((), device=p.device) for p in self.masters]
        self.point_at(self.host)

    def point_at(self, moments: Tensor) -> None:
        """Both moments of every parameter become views of `moments` (2, elements)."""
        sizes = [p.numel() for p in self.masters]
        for p, step, m, v in zip(self.masters, self.steps, moments[0].split(sizes), moments[1].split(sizes)):
            self.inner.state[p] = {"step": step, "exp_avg": m.view_as(p), "exp_avg_sq": v.view_as(p)}

    def load(self, saved: dict) -> None:
        sizes = [p.numel() for p in self.masters]
        state = [saved["state"][i] for i in range(len(sizes))]
        for i, key in enumerate(("exp_avg", "exp_avg_sq")):
            for part, one in zip(self.host[i].split(sizes), state):
                part.copy_(one[key].flatten())
        for step, one in zip(self.steps, state):
            step.copy_(one["step"])


def step_from_host(parts: list[HostMoments]) -> None:
    """One step of every part. While one computes, the next one's moments come in and the last one's go out.

    Three buffers go round: without them the allocator, which cannot know when a copy has ended, would take new memory for
    every part, 8 bytes a parameter in the end."""
    device = parts[0].masters[0].device
    compute, coming, going = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)
    room = [torch.empty(max(part.host.numel() for part in parts), device=device) for _ in range(min(3, len(parts)))]
    coming.wait_stream(compute)  # the buffers may lie where a gradient was just read
    came, gone = [torch.cuda.Event() for _ in parts], [torch.cuda.Event() for _ in parts]

    def fetch(i: int) -> None:
        with torch.cuda.stream(coming):
            if i >= len(room):
                coming.wait_event(gone[i - len(room)])
            moments(i).copy_(parts[i].host, non_blocking=True)
            came[i].record(coming)

    def moments(i: int) -> Tensor:
        return room[i % len(room)][: parts[i].host.numel()].view(2, -1)

    fetch(0)
    for i, part in enumerate(parts):
        if i + 1 < len(parts):
            fetch(i + 1)
        compute.wait_event(came[i])
        part.point_at(moments(i))
        part.inner.step()
        going.wait_stream(compute)
        with torch.cuda.stream(going):
            part.host.copy_(moments(i), non_blocking=True)
            gone[i].record(going)
        part.point_at(part.host)
    going.synchronize()  # the host copy is read next by a checkpoint or the next step; the buffers are free from here on
