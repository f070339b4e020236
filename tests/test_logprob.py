"""kernels/logprob.py: log-probs and entropy from hidden states and head, against log_softmax in fp64."""

import pytest
import torch
from kernel_cases import DEVICE, close, double, spiky, triton_only

from kernels import logprob as logprob_module
from kernels.logprob import blocks, matmul_into, rows_per_chunk, token_logprob, token_logprob_reference

@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 2048])
def test_log_probs_and_entropy_are_those_of_log_softmax(temperature, chunk_rows):
    hidden, weight, targets, banned = spiky(dtype=torch.float64)
    exact = ((hidden @ weight.T)[:, ~banned] / temperature).log_softmax(-1)
    expected = exact[torch.arange(len(targets)), targets], -(exact.exp() * exact).sum(-1)
    low = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    ours = token_logprob(*low, targets, temperature=temperature, banned=banned, chunk_rows=chunk_rows)
    for a, b in zip(ours, expected):
        assert a.dtype == torch.float32
        close(a.double(), b, 1e-4)
        got = torch.autograd.grad(a.sum(), low, retain_graph=True)
        want = torch.autograd.grad(b.sum(), (hidden, weight), retain_graph=True)
        for x, y in zip(got, want):
            close(x.double(), y, 2e-4)


@pytest.mark.parametrize("chunk_rows", [1, 7, 36])
def test_chunks_change_nothing(chunk_rows):
    hidden, weight, targets, banned = spiky()
    whole = token_logprob_reference(hidden, weight, targets, temperature=0.7, banned=banned)
    chunks = token_logprob(hidden, weight, targets, temperature=0.7, banned=banned, chunk_rows=chunk_rows)
    for a, b in zip(whole, chunks):
        close(a, b)
        want, got = (torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (a, b))
        for x, y in zip(want, got):
            close(x, y, 1e-4)


def test_only_one_chunk_of_logits_is_alive(monkeypatch):
    """Nothing of the size of the logits is kept for the backward pass."""
    hidden, weight, targets, banned = spiky(rows=64, vocabulary=500)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        logp, _ = token_logprob(hidden, weight, targets, banned=banned, chunk_rows=8)
    assert max(sizes) <= weight.numel()  # 12,000, where all logits are 32,000
    widest, inner = [], logprob_module.token_logprob_reference
    monkeypatch.setattr(
        logprob_module, "token_logprob_reference", lambda h, *a, **k: widest.append(len(h)) or inner(h, *a, **k)
    )
    token_logprob(hidden, weight, targets, banned=banned, chunk_rows=8)[0].sum().backward()
    assert set(widest) == {8} and len(widest) == 16  # forward, and again in the backward


def test_rule_08_log_probs_of_bf16_inputs_are_exact_in_fp32():
    hidden, weight, targets, banned = spiky(rows=64, width=256, vocabulary=1000, dtype=torch.bfloat16)
    exact = ((hidden.double() @ weight.double().T)[:, ~banned]).log_softmax(-1)
    logp, entropy = token_logprob(hidden, weight, targets, banned=banned)
    assert logp.dtype == entropy.dtype == torch.float32
    error = (logp.double() - exact[torch.arange(64), targets]).abs()
    assert (error / (1 + exact.abs().amax(-1))).max() < 1e-5
    close(entropy.double(), -(exact.exp() * exact).sum(-1), 1e-4)
    rounded = (hidden @ weight.T)[:, ~banned].log_softmax(-1)[torch.arange(64), targets]  # all in bf16: what not to do
    assert (rounded.double() - exact[torch.arange(64), targets]).abs().max() > 1000 * error.max()


def test_rule_08_entropy_of_a_peaked_distribution_does_not_cancel():
    """Logits in the hundreds: lse - sum(p x logit) loses what sum(p x log p) keeps, and comes out negative."""
    hidden, weight, targets, banned = spiky(rows=64, width=256, vocabulary=1000)
    hidden = (hidden * 3).detach()
    exact = ((hidden.double() @ weight.double().T)[:, ~banned]).log_softmax(-1)
    _, entropy = token_logprob(hidden, weight, targets, banned=banned)
    assert exact.abs().max() > 1000
    close(entropy.double(), -(exact.exp() * exact).sum(-1), 1e-3)
    assert entropy.min() > -1e-6


def test_rule_03_banned_ids_leave_the_softmax():
    hidden, weight, targets, banned = spiky()
    loud = torch.where(banned[:, None], weight * 100, weight)
    plain = token_logprob(hidden, weight, targets, banned=banned)
    for a, b in zip(plain, token_logprob(hidden, loud, targets, banned=banned)):
        assert torch.equal(a, b)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in plain), weight)
    assert gradient[banned].abs().max() == 0 and gradient.isfinite().all()
    with pytest.raises(ValueError, match="banned token was sampled: id 95"):
        token_logprob(hidden, weight, torch.full_like(targets, 95), banned=banned)
    with pytest.raises(ValueError, match="outside the vocabulary of 101"):
        token_logprob(hidden, weight, torch.full_like(targets, 101), banned=banned)


def test_extreme_hidden_states_give_finite_gradients():
    hidden, weight, targets, banned = spiky()
    hidden = (hidden.detach() * 1e4).requires_grad_()
    logp, entropy = token_logprob(hidden, weight, targets, banned=banned)
    assert logp.isfinite().all() and (entropy.abs() < 1e3).all()
    for g in torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight)):
        assert g.isfinite().all()


def test_no_completion_token_at_all():
    hidden, weight, targets, banned = spiky()
    logp, entropy = token_logprob(hidden[:0], weight, targets[:0], banned=banned)
    assert logp.shape == entropy.shape == (0,)
