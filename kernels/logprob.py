"""Log-probability of chosen tokens, and the entropy of their distribution, from hidden states and the head.

    logits[m, v] = hidden[m] . weight[v] / temperature          banned v: -inf
    logps[m, v]  = logits[m, v] - log sum_u exp(logits[m, u])
    logp[m]      = logps[m, target[m]]
    entropy[m]   = - sum_v exp(logps[m, v]) logps[m, v]

Hidden states come already gathered to the rows that predict a completion token, so the prompt never meets the
head. Banned tokens (vision specials, vocabulary rows beyond the tokenizer) leave the softmax on both sides: the
engine cannot sample them and the trainer does not spread probability over them.

The reference works in chunks of rows under activation checkpointing: one chunk of logits is alive at a time,
forward or backward, whatever the number of rows. A Triton kernel will come behind `token_logprob`; the reference
stays as the CPU path and as its judge.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2048 * 151_936  # 1.2 GiB of fp32 logits alive at a time


class _Logits(torch.autograd.Function):
    """hidden @ weight.T with fp32 output from low-precision inputs: bf16 logits would cost log-probs 5e-3 on average."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return (grad @ weight if ctx.needs_input_grad[0] else None), (grad.T @ hidden if ctx.needs_input_grad[1] else None)


def token_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, banned: Tensor | None, upcast: bool = True
) -> tuple[Tensor, Tensor]:
    """All rows at once. hidden (M, H), weight (V, H), targets (M,), banned (V,) bool -> logp (M,), entropy (M,).

    `upcast=True` multiplies in fp32, the truth to judge by; `upcast=False` multiplies in the inputs' dtype with fp32
    statistics, the error that any low-precision kernel is allowed a small multiple of.
    """
    if upcast:
        hidden, weight = hidden.float(), weight.float()
    return _from_logits((hidden @ weight.T).float(), targets, temperature, banned)


def _from_logits(logits: Tensor, targets: Tensor, temperature: float, banned: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = logits / temperature  # (M, V)
    if banned is not None:
        logits = logits.masked_fill(banned, float("-inf"))
    # log_softmax subtracts the maximum first: `logit - logsumexp` of logits in the thousands loses four digits, and
    # so does an entropy formed as lse - sum(p * logit).
    logps = torch.log_softmax(logits, dim=-1)  # (M, V)
    probabilities = logps.exp()
    # 0 * -inf is nan for banned tokens; they carry no probability, so any finite value will do.
    entropy = -(probabilities * logps.masked_fill(probabilities == 0, 0.0)).sum(-1)  # (M,)
    return logps.gather(-1, targets[:, None]).squeeze(-1), entropy


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden (M, H), weight (V, H), targets (M,) int64, banned (V,) bool or None -> logp (M,), entropy (M,), fp32.

    Differentiable in `hidden` and `weight` through logp and entropy. Raises ValueError for a target that is banned or
    outside the vocabulary on the CPU; on a GPU that check would cost a synchronisation and is left to the caller.
    """
    rows, width = hidden.shape
    assert weight.ndim == 2 and weight.shape[1] == width, f"head {tuple(weight.shape)} does not fit hidden width {width}"
    assert targets.shape == (rows,) and targets.dtype == torch.int64, f"targets {tuple(targets.shape)} {targets.dtype}"
    assert banned is None or banned.shape == weight.shape[:1], f"banned mask {tuple(banned.shape)}, V {weight.shape[0]}"
    assert temperature > 0, f"temperature {temperature}: log-probs of greedy decoding are those at temperature 1"
    if targets.device.type == "cpu" and rows:
        low, high = targets.aminmax()
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"target ids {low} to {high} outside the vocabulary of {weight.shape[0]}")
        if banned is not None and banned[targets].any():
            raise ValueError(f"a banned token was sampled: id {int(targets[banned[targets]][0])}")

    def one_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return _from_logits(_Logits.apply(hidden, weight), targets, temperature, banned)
        return token_logprob_reference(hidden, weight, targets, temperature=temperature, banned=banned)

    chunk_rows = chunk_rows or max(1, CHUNK_LOGITS // weight.shape[0])
    if rows <= chunk_rows:
        return one_chunk(hidden, weight, targets)
    parts = [
        checkpoint(one_chunk, hidden[i : i + chunk_rows], weight, targets[i : i + chunk_rows], use_reentrant=False)
        for i in range(0, rows, chunk_rows)
    ]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


def check(device: str = "cpu") -> None:
    """Chunks against the whole, values and gradients, with spiky inputs: plain noise would pass any softmax."""
    torch.manual_seed(0)
    hidden = torch.randn(37, 48, device=device)
    hidden[::5] *= 20
    hidden = hidden.requires_grad_()
    weight = torch.randn(301, 48, device=device).requires_grad_()
    targets = torch.randint(0, 290, (37,), device=device)
    banned = torch.arange(301, device=device) >= 290
    kwargs = dict(temperature=0.7, banned=banned)
    whole = token_logprob_reference(hidden, weight, targets, **kwargs)
    chunks = token_logprob(hidden, weight, targets, chunk_rows=8, **kwargs)
    for a, b in zip(whole, chunks):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        grads_a = torch.autograd.grad(a.sum(), (hidden, weight), retain_graph=True)
        grads_b = torch.autograd.grad(b.sum(), (hidden, weight), retain_graph=True)
        for x, y in zip(grads_a, grads_b):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    check("cuda" if torch.cuda.is_available() else "cpu")
    print("token_logprob: chunks equal the whole, values and gradients")
