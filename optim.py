"""AdamW (or Muon) on fp32 master weights, whole or cut over ranks; learning-rate schedules.

bf16 has 8 bits of mantissa: a step of 1e-6 on a weight of 0.02 is far below its spacing (1.2e-4) and is lost in
rounding. So the optimiser owns fp32 copies of low-precision parameters, adds every micro-batch's gradient up in fp32,
steps the copies, and writes them back. Parameters that are fp32 already are their own master; `kahan` keeps what bf16
rounds off instead of a master.

Parameters lie one behind the other in flat buckets, of which every rank may own a slice: it sums the slice of the gradient
over ranks, steps it, and gathers the weights. They stay whole on every rank, so the engine gets them without a collective.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adamw8bit", "kahan", "muon")
# Bytes of GPU memory for each number that a rank steps, beside weights and gradients: fp32 master, then moments.
STATE_BYTES = {"adamw": (4, 8), "adamw8bit": (4, 2), "kahan": (0, 6), "muon": (4, 8)}

BUCKET = 1 << 28  # numbers in a bucket: 1 GiB of fp32
ALIGN = 64  # every parameter starts at a multiple: kernels load 16 bytes at a time
SLICE = 2048  # every slice is a multiple: a block of 8-bit moments never lies on two ranks


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
    """Steps the trainable ones of `named`, pairs of (name, parameter), and moves them into buckets.

        optimizer.zero_grad(); loss.backward() ...; norm = optimizer.step(lr=1e-6)

    kind  adamw      fp32 masters and moments: 12 bytes a number
          adamw8bit  fp32 masters, moments in 8 bits (bitsandbytes, GPU only): 6 bytes
          kahan      bf16 weights, bf16 moments and what bf16 rounded off: 6 bytes, as SpatialThinker trained (spec 4.1)
          muon       orthogonalised momentum for the 2-D weights inside blocks, AdamW for the rest; it learns a small model
                     from nothing about twice as fast (docs/demo-model.md). Whole on every rank.
    shard none: every rank steps everything; optimizer: every rank steps its slice. Parameters that model.shard_policy has
          cut are found by their type; then every rank steps its shards.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], *, kind: str = "adamw", weight_decay: float = 0.01,
                 betas: tuple[float, float] = (0.9, 0.999), max_grad_norm: float = 1.0, offload_moments: bool = False,
                 shard: str = "none"):  # fmt: skip
        named = [(name, p) for name, p in named if p.requires_grad]
        if not named:
            raise ValueError("nothing to train: every parameter is frozen")
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.kind, self.max_grad_norm = kind, max_grad_norm
        self.layout = "fsdp" if isinstance(self.params[0], DTensor) else "flat"
        self.cut = self.layout == "fsdp" or (shard == "optimizer" and world() > 1)  # what a rank steps is not everything
        check_kind(kind, self.params[0], cut=self.cut, offload_moments=offload_moments)
        if self.layout == "fsdp":
            self.buckets = [Shard(name, p) for name, p in named]
        else:
            parts, index = (world(), dist.get_rank()) if self.cut else (1, 0)
            self.buckets = [Bucket(part, parts, index, with_master=kind != "kahan") for part in alike(named)]
        for bucket in self.buckets:  # Muon needs matrices; everything else steps a slice as one long vector
            bucket.stepped = bucket.views(bucket.master) if kind == "muon" else [bucket.master]
        self.offloaded: list[HostMoments] = []
        self.inner = self._inner(offload_moments, betas=betas, eps=1e-8, weight_decay=weight_decay)

    def _inner(self, offload_moments: bool, **settings) -> list[torch.optim.Optimizer]:
        """torch's optimisers over the masters. One for all, unless their moments live in host memory."""
        masters = [tensor for bucket in self.buckets for tensor in bucket.stepped if tensor.numel()]
        fused = masters[0].is_cuda
        if self.kind == "kahan":
            return [KahanAdamW(masters, **settings)]
        if self.kind == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return [AdamW8bit(masters, **settings)]
        if self.kind == "muon":
            chosen = [is_block_matrix(name, master) for name, master in zip(self.names, masters)]
            matrices, rest = ([m for m, c in zip(masters, chosen) if c is wanted] for wanted in (True, False))
            muon = partial(torch.optim.Muon, weight_decay=settings["weight_decay"], adjust_lr_fn="match_rms_adamw")
            adamw = partial(torch.optim.AdamW, **settings, fused=fused)
            return [make(some) for make, some in ((muon, matrices), (adamw, rest)) if some]  # LoRA trains matrices alone
        if offload_moments and fused:
            inner = [torch.optim.AdamW(part, **settings, fused=True) for part in grouped(masters, Tensor.numel)]
            self.offloaded = [HostMoments(one) for one in inner]
            return inner
        return [torch.optim.AdamW(masters, **settings, fused=fused)]

    @property
    def gradients(self) -> list[Tensor]:
        """fp32 gradients of this rank's micro-batches, zeros where a parameter got none (FSDP: its shards, of all ranks)."""
        return [view for bucket in self.buckets for view in bucket.views(bucket.gradient)]

    def zero_grad(self) -> None:
        for parameter in self.params:
            parameter.grad = None
        for bucket in self.buckets:
            bucket.clear()
        for inner in self.inner:
            inner.zero_grad()

    def reduce(self) -> list[Tensor]:
        """What this rank steps of each bucket's gradient: fp32, summed over ranks. A sum, not a mean: the loss is already
        divided by global counts. Call it once a step, on every rank."""
        return [bucket.reduce() for bucket in self.buckets]

    @torch.no_grad()
    def step(self, *, lr: float) -> float:
        """Sum over ranks, clip, step, write back; returns the norm before clipping, the same on every rank. A norm that is
        not finite skips the step on all of them (rule 11)."""
        gradients = self.reduce()
        squares = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).double().square().sum()
        if self.cut and world() > 1:
            dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if math.isfinite(norm):
            for bucket, gradient in zip(self.buckets, gradients):
                gradient.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
                parts = [gradient] if bucket.stepped[0] is bucket.master else bucket.views(gradient)
                for tensor, part in zip(bucket.stepped, parts):
                    tensor.grad = part
            for group in (group for inner in self.inner for group in inner.param_groups):
                group["lr"] = lr
            if self.offloaded:
                step_from_host(self.offloaded)
            else:
                for inner in self.inner:
                    inner.step()
            for bucket in self.buckets:
                bucket.publish()
        self.zero_grad()
        return norm

    def bytes_to_come(self) -> int:
        """What the first step still allocates beside the masters: gradients, and moments that live on the GPU."""
        owned = sum(bucket.master.numel() for bucket in self.buckets)
        have = any(inner.state for inner in self.inner)
        gradients = sum(bucket.gradient_bytes() for bucket in self.buckets)
        return gradients + (0 if have or self.offloaded else STATE_BYTES[self.kind][1] * owned)

    def state_dict(self) -> dict:
        """This rank's part: masters and moments of its slices. Ranks that hold everything hold the same."""
        state = {"names": self.names, "kind": self.kind, "layout": self.layout, "parts": world() if self.cut else 1}
        if self.kind == "muon":
            moments = [{}] * len(self.buckets)
            state["inner"] = [inner.state_dict() for inner in self.inner]
        else:
            moments = [self._moments(bucket) for bucket in self.buckets]
        slices = [{"master": b.saved_master(), **own} for b, own in zip(self.buckets, moments)]
        places = [(i, at) for i, bucket in enumerate(self.buckets) for at in bucket.offsets]  # of each name: bucket, first number
        return state | {"shapes": [tuple(p.shape) for p in self.params], "places": places, "slices": slices}

    def _moments(self, bucket) -> dict:
        """torch's state of this bucket; empty before the first step."""
        return next((inner.state[bucket.master] for inner in self.inner if bucket.master in inner.state), {})

    @torch.no_grad()
    def load_state_dict(self, states: list[dict]) -> None:
        """What all ranks saved, in their order (one dict if each held everything), on any number of ranks now.

        Raises ValueError, one line, for other parameters, another kind, or a layout that cannot be cut anew."""
        first, parts = states[0], world() if self.cut else 1
        if first["names"] != self.names:
            changed = sorted(set(first["names"]) ^ set(self.names))[:3]
            raise ValueError(f"the checkpoint trained other parameters than this run ({', '.join(changed)}, ...)")
        for flag, saved, now in (("optimizer", first["kind"], self.kind), ("shard", first["layout"], self.layout)):
            if saved != now:
                raise ValueError(f"the checkpoint was written with {saved}, this run has {now}: give the old --{flag}")
        if len(states) != first["parts"]:
            raise ValueError(f"the checkpoint has the optimiser of {len(states)} ranks, {first['parts']} wrote it")
        if len(states) != parts and self.layout == "fsdp" and self.kind == "adamw8bit":
            raise ValueError(f"8-bit moments of fsdp shards go on with {len(states)} ranks only, as they were saved")
        for i, bucket in enumerate(self.buckets):
            saved = [state["slices"][i] for state in states]
            own = saved[dist.get_rank() if parts > 1 else 0] if len(saved) == parts else bucket.recut(saved)
            bucket.master.copy_(own["master"])
            bucket.publish()
            if len(own) > 1:
                self._put_moments(bucket, {name: value for name, value in own.items() if name != "master"})
        if self.kind == "muon":
            for inner, saved in zip(self.inner, first["inner"], strict=True):
                inner.load_state_dict(saved)

    def _put_moments(self, bucket, saved: dict) -> None:
        if self.offloaded:  # the tensors that are streamed stay the same
            for name, value in saved.items():
                self._moments(bucket)[name].copy_(value)
        elif bucket.master.numel():
            device = bucket.master.device
            self.inner[0].state[bucket.master] = {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in saved.items()
            }


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def check_kind(kind: str, parameter: nn.Parameter, *, cut: bool, offload_moments: bool) -> None:
    """ValueError, one line, for a kind of optimiser that does not go with these parameters."""
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {kind!r}: one of {', '.join(OPTIMIZERS)}")
    if kind == "muon" and cut:
        raise ValueError("--optimizer muon needs whole matrices on every rank: --shard none")
    if kind == "kahan" and parameter.dtype != torch.bfloat16:
        raise ValueError("--optimizer kahan keeps bf16 weights; these are fp32 (--dtype float32, or --shard fsdp): take adamw")
    if kind != "adamw" and offload_moments and parameter.is_cuda:
        raise ValueError(f"--offload-moments goes with --optimizer adamw, not {kind}: --no-offload-moments")
    if kind == "adamw8bit":
        if not parameter.is_cuda:
            raise ValueError("--optimizer adamw8bit needs an NVIDIA GPU: take adamw")
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ValueError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or take adamw") from error


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """True for the weights that Muon should step: matrices inside transformer blocks, not tables of embeddings."""
    return tensor.ndim == 2 and ("layers." in name or "blocks." in name)


# ---------------------------------------------------------------- where weights and gradients lie


class Bucket:
    """Whole parameters one behind the other, in a flat buffer of their dtype, cut into `parts` equal slices: slice number
    `index` is this rank's. The end is padded with zeros, which stay zero.

    Parameters become views of `weights` (elements,); their gradients add up in a flat fp32 buffer, which is there from a
    step's first gradient to its end. `master` (elements / parts,) is fp32, or without one the weights themselves."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], parts: int, index: int, *, with_master: bool = True):
        self.params, self.parts = [p for _, p in named], parts
        ends = list(accumulate(-(-p.numel() // ALIGN) * ALIGN for p in self.params))
        self.offsets = [0, *ends[:-1]]
        size = -(-ends[-1] // (SLICE * parts)) * SLICE
        self.own = slice(index * size, (index + 1) * size)
        self.weights = torch.zeros(parts * size, dtype=self.params[0].dtype, device=self.params[0].device)
        for parameter, view in zip(self.params, self.views(self.weights)):
            parameter.data = view.copy_(parameter.detach())
        self.master = self.weights[self.own]
        if self.weights.dtype != torch.float32:
            self.master = self.master.float() if with_master else self.master
            self.master.grad_dtype = torch.float32
        self.accumulated: Tensor | None = None
        for i, parameter in enumerate(self.params):
            if hasattr(parameter, "adder"):  # of an older optimiser
                parameter.adder.remove()
            parameter.adder = parameter.register_post_accumulate_grad_hook(self._adder(i))

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of a whole buffer, in their shapes."""
        return [flat[at : at + p.numel()].view(p.shape) for at, p in zip(self.offsets, self.params)]

    def _adder(self, i: int) -> Callable[[Tensor], None]:
        """A hook that adds a finished gradient to its fp32 sum and frees it."""

        def add(parameter: Tensor) -> None:
            at = self.offsets[i]
            self.gradient[at : at + parameter.numel()].view(parameter.shape).add_(parameter.grad)
            parameter.grad = None

        return add

    @property
    def gradient(self) -> Tensor:
        if self.accumulated is None:
            self.accumulated = torch.zeros_like(self.weights, dtype=torch.float32)
        return self.accumulated

    def gradient_bytes(self) -> int:
        """What a step's gradients still allocate."""
        return 4 * self.weights.numel() if self.accumulated is None else 0

    def reduce(self) -> Tensor:
        gradient = self.gradient
        if self.parts > 1:
            dist.reduce_scatter_tensor(gradient[self.own], gradient)  # in place: the slice is part of the input
        elif world() > 1:
            dist.all_reduce(gradient)
        return gradient[self.own]

    def publish(self) -> None:
        """Masters -> weights, on every rank."""
        assert self.params[0].data_ptr() == self.weights.data_ptr(), "the model was moved or converted after its optimiser was made"
        mine = self.weights[self.own]
        if mine.data_ptr() != self.master.data_ptr():
            mine.copy_(self.master)
        if self.parts > 1:
            dist.all_gather_into_tensor(self.weights, mine)

    def clear(self) -> None:
        self.accumulated = None

    def saved_master(self) -> Tensor:
        """Alone in its storage: of a part of the weights torch.save would write all of them."""
        whole = self.master.data_ptr() == self.weights[self.own].data_ptr() and self.parts > 1
        return self.master.to("cpu", copy=True) if whole else self.master

    def recut(self, saved: list[dict]) -> dict:
        """This rank's slice of what other slices hold. A tensor has one entry for every `per` numbers (8-bit moments: one
        scale a block); step counts and tables are the same everywhere."""
        own, per_slice = dict(saved[0]), saved[0]["master"].numel()
        for name, value in saved[0].items():
            if not isinstance(value, Tensor) or value.ndim == 0 or name.startswith("qmap"):
                continue
            per = per_slice // value.numel()
            whole = torch.cat([part[name] for part in saved])
            whole = nn.functional.pad(whole, (0, self.weights.numel() // per - len(whole)))  # less padding: cut off
            own[name] = whole[self.own.start // per : self.own.stop // per]
        return own


class Shard:
    """The same verbs for this rank's rows of one parameter that fully_shard has cut: FSDP sums its gradient over ranks and
    gathers its weights by itself. `master` (numbers,) may be empty: ranks beyond the parameter's rows own nothing."""

    offsets = [0]

    def __init__(self, name: str, parameter: nn.Parameter):
        self.parameter, self.master = parameter, parameter.detach().to_local().view(-1)
        assert self.master.dtype == torch.float32, f"{name}: shards are masters, and this one is {self.master.dtype}"

    @property
    def gradient(self) -> Tensor:
        gradient = self.parameter.grad
        return torch.zeros_like(self.master) if gradient is None else gradient.to_local().view(-1)

    def views(self, flat: Tensor) -> list[Tensor]:
        return [flat]

    def gradient_bytes(self) -> int:
        return 4 * self.master.numel() if self.parameter.grad is None else 0

    def reduce(self) -> Tensor:
        return self.gradient

    def publish(self) -> None:
        assert self.master.data_ptr() == self.parameter.detach().to_local().data_ptr(), "FSDP has moved its shards"

    def clear(self) -> None:
        """The parameter's own gradient is all there is."""

    def saved_master(self) -> Tensor:
        return self.master

    def recut(self, saved: list[dict]) -> dict:
        """Rows are dealt out in order, ceil(rows / ranks) to each, so all shards behind each other are the parameter."""
        rows, *rest = self.parameter.shape
        width = math.prod(rest)
        start = min(rows, dist.get_rank() * -(-rows // world())) * width
        full = next(part for part in saved if len(part) > 1 or part is saved[-1])  # an empty shard has no moments
        own = dict(full)
        for name, value in full.items():
            if isinstance(value, Tensor) and value.ndim:
                own[name] = torch.cat([part[name] for part in saved if name in part])[start : start + self.master.numel()]
        return own


def alike(named: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Consecutive parameters of one dtype, a bucket's worth at a time. The world size has no say: slices can be cut anew."""
    for _, part in groupby(named, key=lambda pair: pair[1].dtype):
        yield from grouped(part, lambda pair: pair[1].numel())


def grouped(items: Iterable, size: Callable[[object], int]) -> Iterator[list]:
    """Consecutive items in lists of at most BUCKET together; a larger one is alone."""
    part, total = [], 0
    for item in items:
        if part and total + size(item) > BUCKET:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part


# ---------------------------------------------------------------- bf16 without masters


class KahanAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights with bf16 moments and, instead of masters, what rounding took from the weights so far:
    AnyPrecisionAdamW as SpatialThinker used it (spec 4.1). Computed in fp32, so the decay of 1e-8 a step is not lost.

    A second moment in bf16 cannot shrink at beta2 = 0.999: 0.999 v rounds back to v. Steps get shorter after a burst of large
    gradients and stay so; adamw8bit takes the same memory and does not have this."""

    CHUNK = 1 << 24  # numbers computed at a time: 64 MiB of fp32 each for four temporaries

    def __init__(self, params: Iterable[Tensor], *, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, dict(lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weights in group["params"]:
                state = self.state[weights]
                if not state:
                    state["step"] = 0
                    state |= {name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq", "compensation")}
                state["step"] += 1
                tensors = (weights, weights.grad, state["exp_avg"], state["exp_avg_sq"], state["compensation"])
                for parts in zip(*(tensor.split(self.CHUNK) for tensor in tensors)):
                    self._update(*parts, state["step"], **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})

    def _update(self, weights, gradient, mean, square, lost, step, *, lr, betas, eps, weight_decay) -> None:
        mean.copy_(mean.float().lerp_(gradient, 1 - betas[0]))
        square.copy_(square.float().mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1]))
        change = mean.float().div_(square.float().sqrt_().div_((1 - betas[1] ** step) ** 0.5).add_(eps))
        change.mul_(-lr / (1 - betas[0] ** step)).add_(weights, alpha=-lr * weight_decay).add_(lost)
        before = weights.float()
        weights.copy_(change + before)
        lost.copy_(change.sub_(weights.float().sub_(before)))


# ---------------------------------------------------------------- moments in host memory


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


def step_from_host(parts: list[HostMoments]) -> None:
    """One step of every part. While one computes, the next one's moments come in and the last one's go out.

    Three buffers go round: without them the allocator, which cannot know when a copy has ended, would take new memory for
    every part, 8 bytes a parameter in the end."""
    device = parts[0].masters[0].device
    compute, coming, going = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)
    torch.cuda.empty_cache()  # activations leave pieces that no buffer fits into: 7 GiB more at the peak
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
