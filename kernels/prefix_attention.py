"""Attention of packed groups: every completion attends to its group's prompt and to itself, never to its siblings.

    packed tokens   [ prompt_0 | prompt_1 | ... | c_00 | c_01 | ... | c_10 | c_11 | ... ]            (T,)

All prompts come first, then all completions, so that each half is a slice and never a gather. The prompt is computed
once however many completions share it. Two paths behind one call:

- dense: one masked softmax a group, the reference, any dtype, any device;
- flash: bf16/fp16 on CUDA, two variable-length flash calls merged by log-sum-exp. Call one is causal within each
  segment (prompt or completion), call two lets each group's completions see its whole prompt. The backward of each
  call is given the merged output and the merged log-sum-exp, which makes it the exact gradient of the merged softmax.

`hf_attention` is what transformers calls once `register()` has named it; the vision tower comes through it too, where
pictures (or windows of one) are segments that attend within themselves in both directions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: only the dense path runs
    triton = None

NAME = "packed_flash"  # "flash" in the name makes transformers hand the vision tower's segment bounds over


@dataclass(frozen=True)
class Layout:
    """Where the groups lie. groups[i] = (prompt length, (completion lengths)); the packed order is above."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    device: torch.device

    @cached_property
    def prompt_tokens(self) -> int:
        """Of all groups: packed tokens before this one are prompts, the others completions."""
        return sum(prompt for prompt, _ in self.groups)

    @cached_property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(sum(completions) for _, completions in self.groups)

    def _bounds(self, lengths: list[int]) -> tuple[Tensor, int]:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if self.device.type == "cuda":
            bounds = bounds.pin_memory()  # or the copy waits for the GPU
        return bounds.to(self.device, non_blocking=True), max(lengths, default=0)

    @cached_property
    def segments(self) -> tuple[Tensor, int]:
        """Bounds of prompts and completions, and the longest of them."""
        completions = [n for _, completions in self.groups for n in completions]
        return self._bounds([n for n in [*(prompt for prompt, _ in self.groups), *completions] if n])

    @cached_property
    def prompts(self) -> tuple[Tensor, int]:
        return self._bounds([prompt for prompt, _ in self.groups])

    @cached_property
    def completions(self) -> tuple[Tensor, int]:
        """Bounds of each group's completions taken together, counted from the first completion."""
        return self._bounds([sum(completions) for _, completions in self.groups])

    def rows(self, group: int) -> Tensor:
        """Packed rows of one group: its prompt's, then its completions'."""
        before, (prompt, completions) = self.groups[:group], self.groups[group]
        first = sum(p for p, _ in before)
        own = self.prompt_tokens + sum(sum(c) for _, c in before)
        return torch.cat([torch.arange(first, first + prompt), torch.arange(own, own + sum(completions))]).to(self.device)

    def mask(self, group: int) -> Tensor:
        """(t, t) bool of one group's rows: True where the row may attend to the column."""
        prompt, completions = self.groups[group]
        segment = torch.cat([torch.zeros(prompt), *(torch.full((n,), i + 1.0) for i, n in enumerate(completions))])
        same_or_prompt = (segment[:, None] == segment[None, :]) | (segment[None, :] == 0)
        return (same_or_prompt & torch.ones(len(segment), len(segment)).tril().bool()).to(self.device)

    @cached_property
    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """(rows, mask) of every group, for the reference."""
        return [(self.rows(i), self.mask(i)) for i in range(len(self.groups))]


def prefix_attention_reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """q (T, heads, d), k and v (T, kv_heads, d) -> (T, heads, d), one dense masked softmax a group."""
    outputs = []
    for rows, mask in layout.dense:
        part = [x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # (1, heads, t, d)
        out = F.scaled_dot_product_attention(*part, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out.squeeze(0).transpose(0, 1))
    order = torch.cat([rows for rows, _ in layout.dense])
    return torch.cat(outputs)[order.argsort()]  # (T, heads, d)


# ---------------------------------------------------------------- two flash calls, merged

if triton is not None:

    @triton.jit
    def _merge_kernel(
        out, out_prefix, lse, lse_prefix, stride, stride_prefix, heads, d, HEADS: tl.constexpr, D: tl.constexpr
    ):
        """One program a completion row: out, out_prefix (R, heads, d), lse (heads, ., stride), lse_prefix (heads, .); all
        begin at the first completion, and the merged values go over out and lse."""
        row = tl.program_id(0).to(tl.int64)
        head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, D)[None, :]
        is_head = head < heads
        own = tl.load(lse + head * stride + row, mask=is_head, other=0.0)  # (HEADS, 1)
        prefix = tl.load(lse_prefix + head * stride_prefix + row, mask=is_head, other=0.0)
        top = tl.maximum(own, prefix)
        merged = top + tl.log(tl.exp(own - top) + tl.exp(prefix - top))
        at, inside = (row * heads + head) * d + column, is_head & (column < d)
        x = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(out_prefix + at, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.exp(own - merged) + y * tl.exp(prefix - merged)
        tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + head * stride + row, merged, mask=is_head)


def _merge(out: Tensor, out_prefix: Tensor, lse: Tensor, lse_prefix: Tensor) -> None:
    """Two softmaxes over parts of the columns into one, in place: out, out_prefix (R, heads, d), lse, lse_prefix (heads, R)."""
    R, heads, d = out.shape
    if out.is_cuda and R:
        assert out.is_contiguous() and out_prefix.is_contiguous() and lse.stride(1) == lse_prefix.stride(1) == 1
        tile = triton.next_power_of_2(heads), triton.next_power_of_2(d)
        _merge_kernel[(R,)](out, out_prefix, lse, lse_prefix, lse.stride(0), lse_prefix.stride(0), heads, d, *tile)
    elif R:  # the same in torch
        merged = torch.logaddexp(lse, lse_prefix)
        own, prefix = ((x - merged).exp().T.unsqueeze(-1) for x in (lse, lse_prefix))  # (R, heads, 1)
        out.copy_(out * own + out_prefix * prefix)
        lse.copy_(merged)


def _flash(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal, scale):
    """-> output (t, heads, d), log-sum-exp (heads, t), and the two tensors that the backward wants back."""
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds_q, bounds_k, longest_q, longest_k, 0.0, causal, False, scale=scale
    )
    return out, lse, seed, offset


class _PrefixFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: Layout, scale: float):
        (segments, longest), (prompts, longest_prompt), (completions, longest_completions) = (
            layout.segments, layout.prompts, layout.completions
        )  # fmt: skip
        P = layout.prompt_tokens
        out, lse, *rng = _flash(q, k, v, segments, segments, longest, longest, True, scale)
        prefix, lse_prefix, *_ = _flash(
            q[P:], k[:P], v[:P], completions, prompts, longest_completions, longest_prompt, False, scale
        )
        _merge(out[P:], prefix, lse[:, P:], lse_prefix)
        ctx.save_for_backward(q, k, v, out, lse, *rng)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        layout, scale, grad = ctx.layout, ctx.scale, grad.contiguous()
        (segments, longest), (prompts, longest_prompt), (completions, longest_completions) = (
            layout.segments, layout.prompts, layout.completions
        )  # fmt: skip
        P, backward = layout.prompt_tokens, torch.ops.aten._flash_attention_backward
        dq, dk, dv = backward(
            grad, q, k, v, out, lse, segments, segments, longest, longest, 0.0, True, seed, offset, scale=scale
        )
        dq_c, dk_p, dv_p = backward(
            grad[P:], q[P:], k[:P], v[:P], out[P:], lse[:, P:].contiguous(), completions, prompts,
            longest_completions, longest_prompt, 0.0, False, seed, offset, scale=scale,
        )  # fmt: skip
        dq[P:] += dq_c
        dk[:P] += dk_p
        dv[:P] += dv_p
        return dq, dk, dv, None, None


def _flash_can(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """q (T, heads, d), k and v (T, kv_heads, d), heads a multiple of kv_heads -> (T, heads, d)."""
    assert q.shape[0] == layout.tokens, f"{q.shape[0]} packed tokens, the layout says {layout.tokens}"
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape, f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    if not _flash_can(q):
        return prefix_attention_reference(q, k, v, layout, scale=scale)
    return _PrefixFlash.apply(q.contiguous(), k.contiguous(), v.contiguous(), layout, scale)


class _SegmentFlash(torch.autograd.Function):
    """torch.nn.attention.varlen without its operators in Python, which a vision tower's small kernels would wait for."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest: int, scale: float):
        out, *kept = _flash(q, k, v, bounds, bounds, longest, longest, False, scale)
        ctx.save_for_backward(q, k, v, bounds, out, *kept)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bounds, out, lse, seed, offset = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, bounds, bounds, ctx.longest, ctx.longest, 0.0, False, seed, offset, scale=ctx.scale
        )
        return *grads, None, None, None


def segment_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, *, scale: float) -> Tensor:
    """Attention in both directions within each segment, for the vision tower. q, k, v (T, heads, d) -> (T, heads, d).

    bounds (segments + 1,) int32, cumulative."""
    if _flash_can(q):
        return _SegmentFlash.apply(q, k, v, bounds.int(), longest, scale)
    lengths = (bounds[1:] - bounds[:-1]).tolist()
    if len(set(lengths)) == 1:  # pictures of one size: one batched call
        part = [x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in (q, k, v)]  # (n, heads, t, d)
        return F.scaled_dot_product_attention(*part, scale=scale).transpose(1, 2).flatten(0, 1)
    parts = zip(*(x.split(lengths) for x in (q, k, v)))
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in part), scale=scale) for part in parts
    ]
    return torch.cat([out.squeeze(0).transpose(0, 1) for out in outputs])


def hf_attention(module, q, k, v, attention_mask, *, scaling, layout=None, cu_seq_lens_q=None, max_length_q=None, **_):
    """The signature transformers calls: q, k, v (1, heads, T, d) -> (1, T, heads, d), None."""
    if layout is None and cu_seq_lens_q is None:  # decoding with a cache: a dense mask over left-padded prompts
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # (T, heads, d)
    if cu_seq_lens_q is not None:
        out = segment_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling)
    else:
        out = prefix_attention(q, k, v, layout, scale=scaling)
    return out.unsqueeze(0), None


def register() -> str:
    """Make the attention known to transformers under NAME and return that name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, hf_attention)
    return NAME


def check(device: str = "cpu") -> None:
    """Against one dense mask over the whole pack in fp32: outputs and gradients."""
    torch.manual_seed(0)
    layout = Layout(((17, (5, 9, 1)), (33, (64,)), (8, (3, 3))), torch.device(device))
    heads, kv_heads, d = 6, 2, 64
    shapes = [(layout.tokens, heads, d), (layout.tokens, kv_heads, d), (layout.tokens, kv_heads, d)]
    exact = [torch.randn(s, device=device).mul_(2).requires_grad_() for s in shapes]
    low = [x.detach().to(torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_() for x in exact]
    exact = [x.detach().float().requires_grad_() for x in low]
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool, device=device)
    for rows, own in layout.dense:
        mask[rows[:, None], rows[None, :]] = own
    dense = F.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in exact), attn_mask=mask, scale=0.1, enable_gqa=True
    )
    dense = dense.squeeze(0).transpose(0, 1)
    ours = prefix_attention(*low, layout, scale=0.1)
    grad = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, exact, grad)
    got = torch.autograd.grad(ours, low, grad.to(ours.dtype))
    tolerance = 2e-2 if device == "cuda" else 1e-5
    for name, a, b in zip(("out", "dq", "dk", "dv"), (dense, *expected), (ours, *got)):
        error = (a - b.float()).abs().max() / a.abs().max()
        assert error < tolerance, f"{name}: relative error {error:.2e}"
        print(f"{name:4s} relative error {error:.1e}")


def bench(prompt: int = 900, completions: int = 8, tokens: int = 512) -> None:
    """Forward and forward + backward of one group, beside FlexAttention with the same mask and beside G causal copies
    of prompt and completion, in turns: medians of 30, milliseconds of the GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = torch.device("cuda")
    layout = Layout(((prompt, (tokens,) * completions),), device)
    segment = torch.cat([torch.zeros(prompt), torch.arange(1, completions + 1).repeat_interleave(tokens)]).to(device)
    T = layout.tokens
    block_mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & ((segment[i] == segment[j]) | (segment[j] == 0)), None, None, T, T, device=device
    )
    flex = torch.compile(flex_attention)
    print(f"prompt {prompt}, {completions} completions of {tokens}, bf16: forward, forward + backward in ms")
    for heads, kv_heads in ((16, 2), (28, 4)):
        q, k, v = (torch.randn(T, h, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for h in (heads, kv_heads, kv_heads))
        copies = [torch.randn(completions, h, prompt + tokens, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
                  for h in (heads, kv_heads, kv_heads)]  # fmt: skip
        ways = {
            "two flash calls, merged": (lambda: prefix_attention(q, k, v, layout, scale=128**-0.5), (q, k, v)),
            "FlexAttention": (lambda: flex(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), block_mask=block_mask,
                                           enable_gqa=True), (q, k, v)),
            "causal copies": (lambda: F.scaled_dot_product_attention(*copies, is_causal=True, enable_gqa=True), copies),
        }  # fmt: skip
        upstream = {name: torch.ones_like(call()) for name, (call, _) in ways.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(40):
            for name, (call, inputs) in ways.items():
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                # As in training, where Python runs ahead of the GPU: all launches are queued before the clock starts.
                torch.cuda._sleep(10_000_000)  # clock cycles, about 5 ms
                marks[0].record()
                out = call()
                marks[1].record()
                grads = torch.autograd.grad(out, inputs, upstream[name])
                marks[2].record()
                torch.cuda.synchronize()
                del grads, out
                times[name].append((marks[0].elapsed_time(marks[1]), marks[0].elapsed_time(marks[2])))
        for name, pairs in times.items():
            forward, both = (sorted(column)[15] for column in zip(*pairs[10:]))
            print(f"  {heads} query, {kv_heads} key heads  {name:24s} {forward:6.2f} {both:6.2f}")


if __name__ == "__main__":
    check("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        bench()
