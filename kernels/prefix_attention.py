"""Attention of packed groups: every completion attends to its group's prompt and to itself, never to its siblings.

    packed tokens   [ prompt_0 | c_00 | c_01 | ... | prompt_1 | c_10 | ... ]            (T,)

The prompt is computed once however many completions share it. Two paths behind one call:

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

NAME = "packed_flash"  # "flash" in the name makes transformers hand the vision tower's segment bounds over


@dataclass(frozen=True)
class Layout:
    """Where the groups lie. groups[i] = (prompt length, (completion lengths)), in packed order."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    device: torch.device

    @cached_property
    def tokens(self) -> int:
        return sum(prompt + sum(completions) for prompt, completions in self.groups)

    def _bounds(self, lengths: list[int]) -> tuple[Tensor, int]:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return bounds.to(self.device, non_blocking=True), max(lengths, default=0)

    @cached_property
    def segments(self) -> tuple[Tensor, int]:
        """Bounds of prompts and completions, and the longest of them."""
        return self._bounds([n for prompt, completions in self.groups for n in (prompt, *completions) if n])

    @cached_property
    def prompts(self) -> tuple[Tensor, int]:
        return self._bounds([prompt for prompt, _ in self.groups])

    @cached_property
    def completions(self) -> tuple[Tensor, int]:
        """Bounds of each group's completions taken together."""
        return self._bounds([sum(completions) for _, completions in self.groups])

    @cached_property
    def is_prompt(self) -> Tensor:
        lengths = torch.tensor([n for prompt, completions in self.groups for n in (prompt, sum(completions))])
        flags = torch.tensor([True, False] * len(self.groups)).repeat_interleave(lengths)
        return flags.to(self.device, non_blocking=True)  # (T,)

    @cached_property
    def prompt_rows(self) -> Tensor:
        return self.is_prompt.nonzero().squeeze(-1)

    @cached_property
    def completion_rows(self) -> Tensor:
        return (~self.is_prompt).nonzero().squeeze(-1)

    def mask(self, group: int) -> Tensor:
        """(t, t) bool of one group: True where the row may attend to the column."""
        prompt, completions = self.groups[group]
        segment = torch.cat([torch.zeros(prompt), *(torch.full((n,), i + 1.0) for i, n in enumerate(completions))])
        same_or_prompt = (segment[:, None] == segment[None, :]) | (segment[None, :] == 0)
        return (same_or_prompt & torch.ones(len(segment), len(segment)).tril().bool()).to(self.device)

    @cached_property
    def masks(self) -> list[Tensor]:
        return [self.mask(i) for i in range(len(self.groups))]


def prefix_attention_reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """q (T, heads, d), k and v (T, kv_heads, d) -> (T, heads, d), one dense masked softmax a group."""
    outputs, start = [], 0
    for (prompt, completions), mask in zip(layout.groups, layout.masks):
        stop = start + prompt + sum(completions)
        part = [x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # (1, heads, t, d)
        out = F.scaled_dot_product_attention(*part, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out.squeeze(0).transpose(0, 1))
        start = stop
    return torch.cat(outputs)  # (T, heads, d)


def _flash(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal, scale):
    """-> output (t, heads, d), log-sum-exp (heads, t), and the two tensors that the backward wants back."""
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds_q, bounds_k, longest_q, longest_k, 0.0, causal, False, scale=scale
    )
    return out, lse, seed, offset


class _PrefixFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: Layout, scale: float):
        segments, longest = layout.segments
        prompts, longest_prompt = layout.prompts
        completions, longest_completions = layout.completions
        rows, prefix = layout.completion_rows, layout.prompt_rows
        out, lse, *rng = _flash(q, k, v, segments, segments, longest, longest, True, scale)
        q_c, k_p, v_p = q[rows], k[prefix], v[prefix]
        out_p, lse_p, *_ = _flash(q_c, k_p, v_p, completions, prompts, longest_completions, longest_prompt, False, scale)
        lse_own = lse[:, rows]  # (heads, completion rows)
        lse_all = torch.logaddexp(lse_own, lse_p)
        share_own = (lse_own - lse_all).exp().T.unsqueeze(-1)  # (completion rows, heads, 1)
        share_prompt = (lse_p - lse_all).exp().T.unsqueeze(-1)
        out[rows] = (out[rows] * share_own + out_p * share_prompt).to(out.dtype)
        lse[:, rows] = lse_all
        ctx.save_for_backward(q, k, v, out, lse, *rng)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        segments, longest = layout.segments
        prompts, longest_prompt = layout.prompts
        completions, longest_completions = layout.completions
        rows, prefix = layout.completion_rows, layout.prompt_rows
        backward = torch.ops.aten._flash_attention_backward
        grad = grad.contiguous()
        dq, dk, dv = backward(
            grad, q, k, v, out, lse, segments, segments, longest, longest, 0.0, True, seed, offset, scale=scale
        )
        dq_c, dk_p, dv_p = backward(
            grad[rows], q[rows], k[prefix], v[prefix], out[rows], lse[:, rows].contiguous(), completions, prompts,
            longest_completions, longest_prompt, 0.0, False, seed, offset, scale=scale,
        )  # fmt: skip
        dq[rows] += dq_c
        dk[prefix] += dk_p
        dv[prefix] += dv_p
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


def segment_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, *, scale: float) -> Tensor:
    """Attention in both directions within each segment, for the vision tower. q, k, v (T, heads, d) -> (T, heads, d).

    bounds (segments + 1,) int32, cumulative."""
    if _flash_can(q):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, bounds.int(), bounds.int(), longest, longest, scale=scale)
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
    mask = torch.block_diag(*[m.float() for m in layout.masks]).bool()
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


if __name__ == "__main__":
    check("cuda" if torch.cuda.is_available() else "cpu")
