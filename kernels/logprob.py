"""Log-probability of chosen tokens, and the entropy of their distribution, from hidden states and the head.

    logits[m, v] = hidden[m] . weight[v] / temperature          banned v: -inf
    logps[m, v]  = logits[m, v] - log sum_u exp(logits[m, u])
    logp[m]      = logps[m, target[m]]
    entropy[m]   = - sum_v exp(logps[m, v]) logps[m, v]

Hidden states come already gathered to the rows that predict a completion token, so the prompt never meets the
head. Banned tokens (vision specials, vocabulary rows beyond the tokenizer) leave the softmax on both sides: the
engine cannot sample them and the trainer does not spread probability over them.

On a GPU the library multiplies and Triton reads each product once (row_logprob.py: copy both into one package). One block
of logits is alive at a time, forward or backward, whatever the number of rows:

    forward    chunks of rows:  logits (C, V) fp32  ->  logp, lse, entropy
    backward   super-blocks of 4 C rows, in each blocks of V / 4 columns: the same logits again, fp32  ->  dz bf16
               dX += dz W_block,  dW_block = dz^T X

Blocks of columns in the backward, because dW is then written once with a long inner dimension and needs no fp32 copy
as long as one super-block holds all rows; chunks of rows would read and write 1.2 GB of fp32 dW for every chunk. What
is summed over several blocks is summed in fp32: bf16 sums of dX over 16 blocks triple its error. Logits are fp32 both
times: bf16 logits cost log-probs 5e-3 on average, and mixing the two precisions 7 % of the gradient. Tensor cores cut the
running sum of a product off at every step, so a long inner dimension is multiplied in parts (INNER).

Where several log-probs feed one loss that is known row by row, kernels/linear_policy_loss.py does this in three
products instead of four.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .row_logprob import IGNORE, has_kernel, logits_logprob_reference, row_dz, row_stats

CHUNK_BYTES = int(3.5 * 2**30)  # a block of logits in fp32 and its gradient in bf16: 4096 rows of Qwen's vocabulary
INNER = 2048  # of a product with fp32 result; at 3584 in one piece log-probs are off by 3.1e-5 on an H200, in two by 1.5e-5
REFERENCE_LOGITS = 2048 * 151_936  # the reference holds several fp32 copies of a chunk


# ---------------------------------------------------------------- reference


def token_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None,
    upcast: bool = True, chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain torch with plain autograd; arguments and results as `token_logprob`.

    `upcast=True` multiplies in fp32 (fp64 for fp64 inputs), the truth to judge by; `upcast=False` multiplies in the
    inputs' dtype with fp32 statistics, the error that any low-precision kernel is allowed a small multiple of.
    Above `chunk_rows` rows it works in chunks under activation checkpointing, so that memory stays bounded too.
    """
    if upcast:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(wide), weight.to(wide)

    def one_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits_logprob_reference(hidden @ weight.T, targets, temperature=temperature, banned=banned)

    chunk_rows = chunk_rows or max(1, REFERENCE_LOGITS // len(weight))
    if len(hidden) <= chunk_rows:
        return one_chunk(hidden, weight, targets)
    parts = [
        checkpoint(one_chunk, hidden[i : i + chunk_rows], weight, targets[i : i + chunk_rows], use_reentrant=False)
        for i in range(0, len(hidden), chunk_rows)
    ]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


# ---------------------------------------------------------------- products and blocks


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out (m, n) = a (m, k) @ b (k, n), or += with `add`. An fp32 `out` of bf16 inputs is rounded nowhere on the way."""
    assert not add or out.dtype == torch.float32, f"sums over blocks are kept in fp32, not {out.dtype}"
    dtype = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, out=out, **dtype) if add else torch.mm(a, b, out=out, **dtype)


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """out (C, V) fp32 = hidden (C, H) weight (V, H)^T."""
    for k in blocks(hidden.shape[1], INNER):
        matmul_into(out, hidden[:, k], weight[:, k].T, add=k.start > 0)
    return out


def blocks(count: int, most: int) -> list[slice]:
    """Equal parts of at most `most` (a part of one row would cost as much as one of 500), of whole tiles where it can."""
    parts = max(1, math.ceil(count / most))
    size = min(most, math.ceil(count / parts / 128) * 128) or 1
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def rows_per_chunk(columns: int, itemsize: int) -> int:
    """How many rows of fp32 logits and of their gradient fit CHUNK_BYTES, in whole tiles where there are some."""
    rows = max(1, CHUNK_BYTES // ((4 + itemsize) * columns))
    return rows - rows % 128 if rows >= 128 else rows


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned, chunk_rows):
        ctx.set_materialize_grads(False)
        chunks = blocks(len(hidden), chunk_rows)
        size = max((c.stop - c.start for c in chunks), default=0)
        logits = hidden.new_empty(size, len(weight), dtype=torch.float32)  # (C, V), the only one
        stats = hidden.new_empty(3, len(hidden), dtype=torch.float32)  # logp, lse, entropy
        for c in chunks:
            part = logits_into(logits[: c.stop - c.start], hidden[c], weight)
            for whole, x in zip(stats, row_stats(part, targets[c], temperature=temperature, banned=banned)):
                whole[c] = x
        logp, lse, entropy = stats
        ctx.save_for_backward(hidden, weight, targets, banned, logp, lse, entropy)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        hidden, weight, targets, banned, *stats = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dlogp = torch.zeros_like(stats[0]) if dlogp is None else dlogp.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        M, V = len(hidden), len(weight)
        row_blocks = blocks(M, 4 * ctx.chunk_rows)
        rows = max((r.stop - r.start for r in row_blocks), default=1)
        column_blocks = blocks(V, max(1, ctx.chunk_rows * V // rows))
        columns = column_blocks[0].stop
        logits = hidden.new_empty(rows * columns, dtype=torch.float32)
        dz = hidden.new_empty(rows * columns)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        total = hidden.new_empty(rows, hidden.shape[1], dtype=torch.float32)  # dX of one super-block
        dweight = None
        if need_weight:  # summed over super-blocks in fp32; one needs no sum
            dweight = torch.empty_like(weight, dtype=weight.dtype if len(row_blocks) == 1 else torch.float32)
            if not M:
                dweight.zero_()
        for r in row_blocks:
            of_rows = [targets[r], *(x[r] for x in stats), dlogp[r], None if dentropy is None else dentropy[r]]
            for c in column_blocks:
                shape = r.stop - r.start, c.stop - c.start
                part = logits_into(logits[: math.prod(shape)].view(shape), hidden[r], weight[c])
                grad = row_dz(part, *of_rows, out=dz[: math.prod(shape)].view(shape), first=c.start,
                              temperature=ctx.temperature, banned=banned)  # fmt: skip
                if need_hidden:
                    matmul_into(total[: shape[0]], grad, weight[c], add=c.start > 0)
                if need_weight:
                    matmul_into(dweight[c], grad.T, hidden[r], add=r.start > 0)
            if need_hidden:
                dhidden[r] = total[: shape[0]]
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


# ---------------------------------------------------------------- wrapper


def check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor | None) -> None:
    """Shapes and dtypes by assertion; on the CPU, where it costs nothing, also the target ids (ValueError)."""
    rows, width = hidden.shape
    assert weight.ndim == 2 and weight.shape[1] == width, f"head {tuple(weight.shape)} does not fit hidden width {width}"
    assert hidden.dtype == weight.dtype, f"hidden states are {hidden.dtype}, the head is {weight.dtype}"
    assert targets.shape == (rows,) and targets.dtype == torch.int64, f"targets {tuple(targets.shape)} {targets.dtype}"
    assert banned is None or banned.shape == weight.shape[:1], f"banned mask {tuple(banned.shape)}, V {weight.shape[0]}"
    assert temperature > 0, f"temperature {temperature}: log-probs of greedy decoding are those at temperature 1"
    chosen = targets[targets != IGNORE] if targets.device.type == "cpu" else targets[:0]
    if len(chosen):
        low, high = chosen.aminmax()
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"target ids {low} to {high} outside the vocabulary of {weight.shape[0]}")
        if banned is not None and banned[chosen].any():
            raise ValueError(f"a banned token was sampled: id {int(chosen[banned[chosen]][0])}")


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    chunk_rows: int | None = None,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """hidden (M, H), weight (V, H), targets (M,) int64, banned (V,) bool or None -> logp (M,), entropy (M,), fp32.

    Differentiable in `hidden` and `weight` through logp and entropy; a weight that needs no gradient costs none. A
    target of IGNORE (-100) gives 0, 0 and no gradient. `chunk_rows` rows of logits are alive at a time, by default
    what fits CHUNK_BYTES. `reference=True`, or no GPU: plain torch, chunked as well.
    Raises ValueError for a target that is banned or outside the vocabulary on the CPU; on a GPU that check would cost
    a synchronisation, and the log-prob is -inf.
    """
    check_inputs(hidden, weight, targets, temperature, banned)
    if reference or not has_kernel(hidden):
        return token_logprob_reference(
            hidden, weight, targets, temperature=temperature, banned=banned, chunk_rows=chunk_rows
        )
    chunk_rows = chunk_rows or rows_per_chunk(len(weight), hidden.itemsize)
    return _TokenLogprob.apply(hidden, weight, targets, temperature, banned, chunk_rows)


# ---------------------------------------------------------------- check


def check(device: str) -> None:
    """Chunks against the whole, values and gradients, with spiky inputs: plain noise would pass any softmax."""
    torch.manual_seed(0)
    hidden = torch.randn(37, 48, device=device)
    hidden[::5] *= 20
    hidden = hidden.requires_grad_()
    weight = torch.randn(301, 48, device=device).requires_grad_()
    targets = torch.randint(0, 290, (37,), device=device)
    targets[7] = IGNORE
    banned = torch.arange(301, device=device) >= 290
    exact = token_logprob_reference(hidden.double(), weight.double(), targets, temperature=0.7, banned=banned)
    chunks = token_logprob(hidden, weight, targets, chunk_rows=8, temperature=0.7, banned=banned)
    for a, b in zip(chunks, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
        grads_a = torch.autograd.grad(a.sum(), (hidden, weight), retain_graph=True)
        grads_b = torch.autograd.grad(b.sum(), (hidden, weight), retain_graph=True)
        for x, y in zip(grads_a, grads_b):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    print("token_logprob: chunks equal the whole, values and gradients")
