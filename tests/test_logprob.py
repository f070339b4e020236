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


def test_the_reference_has_one_chunk_of_logits_alive(monkeypatch):
    """Nothing of the size of the logits is kept for the backward pass."""
    hidden, weight, targets, banned = spiky(rows=64, vocabulary=500)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        logp, _ = token_logprob(hidden, weight, targets, banned=banned, chunk_rows=8, reference=True)
    assert max(sizes) <= weight.numel()  # 12,000, where all logits are 32,000
    widest, inner = [], logprob_module.logits_logprob_reference
    monkeypatch.setattr(
        logprob_module, "logits_logprob_reference", lambda z, *a, **k: widest.append(len(z)) or inner(z, *a, **k)
    )
    token_logprob(hidden, weight, targets, banned=banned, chunk_rows=8, reference=True)[0].sum().backward()
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


def test_an_ignored_row_gives_nothing():
    hidden, weight, targets, banned = spiky()
    plain = token_logprob(hidden, weight, targets, banned=banned)
    targets[[0, 9]] = -100
    ours = token_logprob(hidden, weight, targets, banned=banned)
    kept = targets != -100
    for a, b in zip(ours, plain):
        assert torch.equal(a[kept], b[kept]) and (a[~kept] == 0).all()
    gradient = torch.autograd.grad(sum(x.sum() for x in ours), hidden)[0]
    assert (gradient[~kept] == 0).all() and (gradient[kept].abs().sum(1) > 0).all()


def test_wrong_shapes_and_dtypes_are_named():
    hidden, weight, targets, banned = spiky()
    with pytest.raises(AssertionError, match="does not fit hidden width 24"):
        token_logprob(hidden, weight[:, :5], targets)
    with pytest.raises(AssertionError, match="hidden states are torch.float32, the head is torch.bfloat16"):
        token_logprob(hidden, weight.bfloat16(), targets)
    with pytest.raises(AssertionError, match="temperature 0"):
        token_logprob(hidden, weight, targets, temperature=0)


# ---------------------------------------------------------------- the kernel path


def compare(chunk_rows, *, rows=37, vocabulary=101, **options):
    """Values, and gradients of a random mixture of both outputs, against fp64."""
    hidden, weight, targets, banned = spiky(rows=rows, vocabulary=vocabulary, device=DEVICE)
    if rows > 4:
        targets[3] = -100
    wide = double(hidden, weight)
    ours = token_logprob(hidden, weight, targets, banned=banned, chunk_rows=chunk_rows, **options)
    exact = token_logprob_reference(*wide, targets, banned=banned, **options)
    upstream = torch.randn(2, rows, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for a, b in zip(ours, exact):
        assert a.dtype == torch.float32
        close(a.double(), b, 1e-4)
    got = torch.autograd.grad(ours, (hidden, weight), list(upstream))
    want = torch.autograd.grad(exact, wide, list(upstream.double()))
    for x, y in zip(got, want):  # logits of 200, multiplied in another order in the backward: 1e-5 each
        assert (x - y).norm() / y.norm() < 1e-4


@triton_only
@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 8, 9, 36, 37])
def test_the_kernel_path_against_fp64(chunk_rows):
    """2: five super-blocks of eight rows, each in four blocks of columns; 9: one and a row; 37: everything at once."""
    compare(chunk_rows, temperature=0.7)


@triton_only
@pytest.mark.parametrize("rows, vocabulary", [(1, 127), (2, 1000), (5, 1001)])
def test_the_kernel_path_at_odd_sizes(rows, vocabulary):
    compare(None, rows=rows, vocabulary=vocabulary)
    compare(1, rows=rows, vocabulary=vocabulary)


@triton_only
def test_a_frozen_side_gets_no_gradient_and_costs_no_product(monkeypatch):
    hidden, weight, targets, banned = spiky(device=DEVICE)
    both = torch.autograd.grad(token_logprob(hidden, weight, targets, banned=banned)[0].sum(), (hidden, weight))
    products, inner = [], logprob_module.matmul_into
    monkeypatch.setattr(logprob_module, "matmul_into", lambda *a, **k: products.append(a[0].shape) or inner(*a, **k))
    for frozen, left in ((weight, hidden), (hidden, weight)):
        frozen.requires_grad_(False)
        products.clear()
        logp, _ = token_logprob(hidden, weight, targets, banned=banned)
        logp.sum().backward()
        assert len(products) == 3 and frozen.grad is None  # logits, logits again, one gradient
        assert torch.equal(left.grad, both[0] if left is hidden else both[1])
        frozen.requires_grad_()
        left.grad = None


@triton_only
def test_a_tied_head_adds_to_the_gradient_of_the_embedding():
    """Weight used as embedding and as head: one gradient, the sum of both."""
    _, weight, targets, banned = spiky(vocabulary=60, device=DEVICE)
    (wide,) = double(weight)
    ids = targets.roll(1)
    ours = token_logprob(weight[ids] * 0.5, weight, targets, banned=banned, chunk_rows=8)[0].sum()
    exact = token_logprob_reference(wide[ids] * 0.5, wide, targets, banned=banned)[0].sum()
    close(torch.autograd.grad(ours, weight)[0].double(), torch.autograd.grad(exact, wide)[0], 1e-4)


@triton_only
def test_never_more_than_one_block_of_logits(monkeypatch):
    """Rows x columns of every block, forward and backward, stay within chunk_rows x V; forward keeps none of them."""
    hidden, weight, targets, banned = spiky(rows=64, vocabulary=500, device=DEVICE)
    shapes = []
    for name in ("row_stats", "row_dz"):

        def spy(logits, *args, inner=getattr(logprob_module, name), **kwargs):
            shapes.append(tuple(logits.shape))
            return inner(logits, *args, **kwargs)

        monkeypatch.setattr(logprob_module, name, spy)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        logp, _ = token_logprob(hidden, weight, targets, banned=banned, chunk_rows=8)
    logp.sum().backward()
    assert max(rows * columns for rows, columns in shapes) <= 8 * 500
    assert shapes[:8] == [(8, 500)] * 8 and shapes[8:] == [(32, 125)] * 8
    assert max(saved) <= weight.numel()
    shapes.clear()
    with torch.no_grad():
        logp, entropy = token_logprob(hidden, weight, targets, banned=banned)
    assert not logp.requires_grad and not entropy.requires_grad and shapes == [(64, 500)]


@triton_only
def test_no_rows_on_the_kernel_path():
    hidden, weight, targets, banned = spiky(device=DEVICE)
    logp, entropy = token_logprob(hidden[:0], weight, targets[:0], banned=banned)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


@triton_only
def test_reference_switches_the_kernels_off(monkeypatch):
    hidden, weight, targets, banned = spiky(device=DEVICE)
    monkeypatch.setattr(logprob_module, "row_stats", None)
    token_logprob(hidden, weight, targets, banned=banned, reference=True)
    with pytest.raises(TypeError):
        token_logprob(hidden, weight, targets, banned=banned)


def test_blocks_cover_everything_once_and_evenly():
    for count in (1, 5, 127, 4096, 4097, 8191, 8192, 131_072):
        for most in (1, 3, 128, 4096, 10_000):
            parts = blocks(count, most)
            assert [p.stop for p in parts[:-1]] == [p.start for p in parts[1:]]
            assert parts[0].start == 0 and parts[-1].stop == count and max(p.stop - p.start for p in parts) <= most
    assert [p.stop - p.start for p in blocks(4097, 4096)] == [2176, 1921]  # not 4096 and 1
    assert blocks(0, 8) == []


def test_the_chunk_fits_its_budget():
    for columns in (151_936, 152_064):
        assert rows_per_chunk(columns, 2) == 4096
    assert rows_per_chunk(10**9, 2) == 1


def test_sums_over_blocks_are_refused_in_low_precision():
    a = torch.ones(2, 2, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="kept in fp32"):
        matmul_into(a.clone(), a, a, add=True)


def test_a_long_inner_dimension_is_multiplied_in_parts(monkeypatch):
    hidden, weight = torch.randn(5, 300), torch.randn(7, 300)
    monkeypatch.setattr(logprob_module, "INNER", 128)
    shapes = []
    monkeypatch.setattr(logprob_module, "matmul_into", lambda out, a, b, add=False: shapes.append(a.shape[1]) or matmul_into(out, a, b, add=add))
    out = logprob_module.logits_into(torch.empty(5, 7), hidden, weight)
    close(out, hidden @ weight.T)
    assert shapes == [128, 128, 44]
