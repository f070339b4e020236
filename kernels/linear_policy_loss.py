"""Hidden states and head -> policy loss and its gradients, in three matrix products instead of four.

A function that returns log-probs has to multiply the logits again in its backward pass, because nobody kept them. Where
the loss is a sum over tokens, the derivative by a log-prob is known as soon as that log-prob is: everything can be done
while one chunk of logits is there.

    for each chunk of rows:   logits = X W^T          fp32, one buffer for all chunks
                              logp, lse, entropy      one read of the logits
                              loss, d loss / d logp   one number a row
                              dz                      the second read; bf16, a buffer of its own
                              dX = dz W     dW += dz^T X, in fp32 if there are several chunks
    backward:                 dX and dW times the gradient of the loss

An fp32 dW stays so until backward, where the factor and the rounding are one pass: no factor costs anything or stops
the GPU. Memory is the chunk, dX and the fp32 dW, whatever the number of rows. Only losses whose tokens do not meet (grpo,
cispo): gspo needs a whole sequence's log-probs first.

Built of row_logprob.py, policy_loss.py and, for the products and the reference, logprob.py: copy the four into one package.
"""

import torch
from torch import Tensor

from .logprob import blocks, check_inputs, logits_into, matmul_into, rows_per_chunk, token_logprob
from .policy_loss import check_arguments, policy_loss, policy_terms, reduce_partials
from .row_logprob import IGNORE, has_kernel, row_dz, row_stats


def _slice(arguments: dict, rows: slice) -> dict:
    """The same arguments for some of the rows."""
    return {name: x[rows] if isinstance(x, Tensor) else x for name, x in arguments.items()}


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, advantages, scale, temperature, banned, arguments, chunk_rows, need):
        need_hidden, need_weight = need
        scale = scale.masked_fill(targets == IGNORE, 0.0)
        chunks = blocks(len(hidden), chunk_rows)
        size = chunks[0].stop
        logits = hidden.new_empty(size, len(weight), dtype=torch.float32)  # (C, V), the only one
        dz = hidden.new_empty(logits.shape) if need_hidden or need_weight else None
        dhidden = torch.empty_like(hidden) if need_hidden else None
        # Few rows make the library split the vocabulary, and it may sum such parts in bf16: dX is multiplied into fp32.
        wide = hidden.new_empty(size, hidden.shape[1], dtype=torch.float32) if need_hidden else None
        once = weight.dtype if len(chunks) == 1 else torch.float32  # one chunk has nothing to add to
        dweight = torch.empty_like(weight, dtype=once) if need_weight else None
        logp, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        partials = []
        for c in chunks:
            rows = c.stop - c.start
            part = logits_into(logits[:rows], hidden[c], weight)
            stats = row_stats(part, targets[c], temperature=temperature, banned=banned)
            logp[c], entropy[c] = stats[0], stats[2]
            dlogp, sums = policy_terms(logp[c], advantages[c], scale[c], entropy=entropy[c], **_slice(arguments, c))
            partials.append(sums)
            if dz is None:
                continue
            dentropy = -arguments["entropy_coef"] * scale[c] if arguments["entropy_coef"] else None
            grad = row_dz(part, targets[c], *stats, dlogp, dentropy, out=dz[:rows], temperature=temperature, banned=banned)
            if need_hidden:
                dhidden[c] = matmul_into(wide[:rows], grad, weight)
            if need_weight:
                matmul_into(dweight, grad.T, hidden[c], add=c.start > 0)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        partials = torch.cat(partials, dim=1)
        ctx.mark_non_differentiable(partials, logp, entropy)
        return partials[0].sum(), partials, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        # The factor as a (1, 1) tensor: the product is formed in fp32. A () one would first be rounded to bf16 itself.
        dhidden, dweight = ctx.saved_tensors
        factor = grad.float().reshape(1, 1)
        if dhidden is not None:
            dhidden = torch.mul(dhidden, factor, out=torch.empty_like(dhidden))
        if dweight is not None:
            dweight = torch.mul(dweight, factor, out=torch.empty_like(dweight, dtype=ctx.dtype))
        return dhidden, dweight, None, None, None, None, None, None, None, None


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    scale: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    loss: str = "grpo",
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    importance_cap: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float = 3.0,
    kl: str = "none",
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    chunk_rows: int | None = None,
    reference: bool = False,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """`policy_loss` of `token_logprob`: -> loss (), statistics {name: ()}, logp (M,) and entropy (M,), both detached.

    hidden (M, H), weight (V, H), targets (M,) int64, banned (V,) bool or None; everything else (M,) fp32, as in
    kernels/policy_loss.py, with `entropy_coef` times the entropy of every token taken off the loss. Differentiable in
    `hidden` and `weight` through the loss; a weight that needs no gradient costs none. A target of IGNORE (-100)
    removes its row. The statistics hold `entropy_sum` too. The scale is all there is to normalise by: pass it in, do
    not divide the loss afterwards (that is right as well, and rounds the gradients twice).
    Raises ValueError for loss "gspo", whose ratio is a sequence's, and for bad targets on the CPU (token_logprob).
    `reference=True`, or no GPU: plain torch, four products, chunked as well.
    """
    check_inputs(hidden, weight, targets, temperature, banned)
    if loss == "gspo":
        raise ValueError("gspo weighs whole sequences, the single pass sees tokens: use token_logprob and policy_loss")
    arguments = dict(loss=loss, old_logp=old_logp, ref_logp=ref_logp, rollout_logp=rollout_logp, lengths=None,
                     importance_cap=importance_cap, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl,
                     kl_coef=kl_coef, entropy_coef=entropy_coef)  # fmt: skip
    check_arguments(targets, advantages=advantages, scale=scale, entropy=targets, **arguments)
    if reference or not has_kernel(hidden) or not len(hidden):
        logp, entropy = token_logprob(
            hidden, weight, targets, temperature=temperature, banned=banned, chunk_rows=chunk_rows, reference=reference
        )
        scale = scale.masked_fill(targets == IGNORE, 0.0)
        total, stats = policy_loss(logp, advantages, scale, entropy=entropy, reference=reference, **arguments)
        return total, stats, logp.detach(), entropy.detach()
    grads = torch.is_grad_enabled()
    need = grads and hidden.requires_grad, grads and weight.requires_grad
    chunk_rows = chunk_rows or rows_per_chunk(len(weight), hidden.itemsize)
    total, partials, logp, entropy = _LinearPolicyLoss.apply(
        hidden, weight, targets, advantages, scale, temperature, banned, arguments, chunk_rows, need
    )
    _, stats = reduce_partials(partials, kl=kl != "none", rollout=rollout_logp is not None, entropy=True)
    return total, stats, logp, entropy


# ---------------------------------------------------------------- check


def check(device: str) -> None:
    """The single pass against plain autograd in fp64: loss, statistics, and gradients times a factor that is not 1."""
    torch.manual_seed(0)
    hidden = torch.randn(37, 48, device=device)
    hidden[::5] *= 8
    hidden, weight = hidden.requires_grad_(), torch.randn(301, 48, device=device).requires_grad_()
    targets = torch.randint(290, (37,), device=device)
    targets[7] = IGNORE
    advantages, scale = torch.randn(37, device=device), torch.rand(37, device=device)
    scale[::6] = 0
    banned = torch.arange(301, device=device) >= 290
    with torch.no_grad():
        start, _ = token_logprob(hidden.double(), weight.double(), targets, temperature=0.7, banned=banned, reference=True)
    names = ("old_logp", "ref_logp", "rollout_logp")
    near = {name: (start + 0.3 * torch.randn(37, device=device)).float() for name in names}
    kwargs = dict(importance_cap=2.0, kl="k3", kl_coef=0.1, entropy_coef=0.05, temperature=0.7, banned=banned)
    ours = linear_policy_loss(hidden, weight, targets, advantages, scale, chunk_rows=8, **near, **kwargs)
    double = {name: x.double() for name, x in near.items()}
    exact = linear_policy_loss(
        hidden.double(), weight.double(), targets, advantages.double(), scale.double(), **double, **kwargs, reference=True
    )
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-4, atol=1e-4)
    for a, b in zip(ours[2:], exact[2:]):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    for got, want in zip(*(torch.autograd.grad(-0.3 * x[0], (hidden, weight)) for x in (ours, exact))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    print("linear_policy_loss: one pass equals plain autograd in fp64, loss, statistics and gradients")
