"""kernels/linear_policy_loss.py: the single pass is policy_loss of token_logprob, in value, gradient and statistics."""

import pytest
import torch
from kernel_cases import DEVICE, close, double, spiky, triton_only

from kernels import linear_policy_loss as module
from kernels import logprob
from kernels.linear_policy_loss import linear_policy_loss
from kernels.logprob import token_logprob
from kernels.policy_loss import KL_ESTIMATORS, policy_loss

CLIPPED = dict(importance_cap=2.0, kl="k3", kl_coef=0.2, entropy_coef=0.05)


def batch(rows=37, vocabulary=101):
    """Inputs on DEVICE: positional arguments, and log-probs near the current ones; some rows masked, one ignored."""
    hidden, weight, targets, banned = spiky(rows=rows, vocabulary=vocabulary, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        start = token_logprob(hidden, weight, targets, banned=banned, temperature=0.7, reference=True)[0].cpu()
    names = ("old_logp", "ref_logp", "rollout_logp")
    near = {name: (start + 0.3 * torch.randn(rows, generator=generator)).to(DEVICE) for name in names}
    advantages, scale = torch.randn(rows, generator=generator), torch.rand(rows, generator=generator)
    scale[::6] = 0
    if rows > 4:
        targets[3] = -100
    options = dict(temperature=0.7, banned=banned)
    return [hidden, weight, targets, advantages.to(DEVICE), scale.to(DEVICE)], near, options


def exact_of(arguments, near, **options):
    """The reference in fp64 -> its four results and its leaves."""
    leaves = double(*arguments[:2])
    rest = [arguments[2], *(x.double() for x in arguments[3:])]
    return linear_policy_loss(*leaves, *rest, **{k: x.double() for k, x in near.items()}, **options, reference=True), leaves


def agree(ours, exact, arguments, leaves, factor=1.0):
    close(ours[0].double(), exact[0], 1e-4)
    assert set(ours[1]) == set(exact[1])
    for name, value in exact[1].items():
        assert float(ours[1][name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
    for a, b in zip(ours[2:], exact[2:]):
        assert not a.requires_grad
        close(a.double(), b, 1e-4)
    got = torch.autograd.grad(ours[0] * factor, arguments[:2], retain_graph=True)
    want = torch.autograd.grad(exact[0] * factor, leaves, retain_graph=True)
    for x, y in zip(got, want):
        assert (x - y).norm() / y.norm() < 1e-4


def test_the_reference_is_the_two_calls():
    arguments, near, options = batch()
    hidden, weight, targets, advantages, scale = arguments
    ours = linear_policy_loss(*arguments, **near, **options, **CLIPPED, reference=True)
    logp, entropy = token_logprob(hidden, weight, targets, **options, reference=True)
    scale = scale.masked_fill(targets == -100, 0)
    loss, stats = policy_loss(logp, advantages, scale, entropy=entropy, **near, **CLIPPED, reference=True)
    assert torch.equal(ours[0], loss) and torch.equal(ours[2], logp) and torch.equal(ours[3], entropy)
    assert all(torch.equal(ours[1][name], stats[name]) for name in stats) and "entropy_sum" in stats
    for x, y in zip(*(torch.autograd.grad(z, (hidden, weight)) for z in (ours[0], loss))):
        assert torch.equal(x, y)


def test_gspo_is_refused_and_shapes_are_named():
    arguments, near, options = batch()
    with pytest.raises(ValueError, match="gspo weighs whole sequences.*use token_logprob and policy_loss"):
        linear_policy_loss(*arguments, loss="gspo", **options)
    with pytest.raises(ValueError, match="unknown loss 'ppo'"):
        linear_policy_loss(*arguments, loss="ppo", **options)
    with pytest.raises(AssertionError, match="old_logp is"):
        linear_policy_loss(*arguments, old_logp=near["old_logp"][:5], **options)
    with pytest.raises(AssertionError, match="scale is"):
        linear_policy_loss(*arguments[:4], arguments[4][:5], **options)


@pytest.mark.parametrize("reference", [True, False])
def test_no_rows_give_a_zero_that_stays_attached(reference):
    hidden, weight, targets, advantages, scale = batch()[0]
    loss, stats, logp, entropy = linear_policy_loss(
        hidden[:0], weight, targets[:0], advantages[:0], scale[:0], reference=reference
    )
    loss.backward()
    assert loss == 0 and logp.shape == entropy.shape == (0,) and stats["token_sum"] == 0
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


@triton_only
@pytest.mark.parametrize("chunk_rows", [None, 1, 8, 36])
@pytest.mark.parametrize("loss", ["grpo", "cispo"])
def test_the_single_pass_against_fp64(loss, chunk_rows):
    arguments, near, options = batch()
    options |= dict(loss=loss) | CLIPPED
    exact, leaves = exact_of(arguments, near, **options)
    agree(linear_policy_loss(*arguments, **near, **options, chunk_rows=chunk_rows), exact, arguments, leaves)


@triton_only
@pytest.mark.parametrize("kl", KL_ESTIMATORS)
def test_every_kl_in_the_single_pass(kl):
    arguments, near, options = batch(rows=9)
    options |= dict(kl=kl, kl_coef=0.3)
    exact, leaves = exact_of(arguments, near, **options)
    agree(linear_policy_loss(*arguments, **near, **options, chunk_rows=4), exact, arguments, leaves)


@triton_only
@pytest.mark.parametrize("rows, vocabulary", [(1, 127), (2, 1000), (5, 1001)])
def test_the_single_pass_at_odd_sizes_and_on_policy(rows, vocabulary):
    arguments, _, options = batch(rows, vocabulary)
    arguments[4].fill_(0.5)
    exact, leaves = exact_of(arguments, {}, **options)
    agree(linear_policy_loss(*arguments, **options), exact, arguments, leaves)


@triton_only
def test_the_gradient_of_the_loss_is_a_factor():
    """Any value, more than once: the stored gradients are not spent by the first backward."""
    arguments, near, options = batch()
    exact, leaves = exact_of(arguments, near, **options, **CLIPPED)
    ours = linear_policy_loss(*arguments, **near, **options, **CLIPPED, chunk_rows=8)
    for factor in (1.0, -0.3, 1000.0, 1.0):
        agree(ours, exact, arguments, leaves, factor)


@triton_only
def test_three_products_a_chunk_two_with_a_frozen_head_one_without_gradients(monkeypatch):
    arguments, near, options = batch()
    hidden, weight = arguments[:2]
    products, inner = [], module.matmul_into
    for place in (module, logprob):  # gradients, logits
        monkeypatch.setattr(place, "matmul_into", lambda *a, **k: products.append(tuple(a[0].shape)) or inner(*a, **k))

    def count(**given):
        products.clear()
        loss, *_ = linear_policy_loss(*arguments, **near, **options, chunk_rows=10, **given)
        return len(products), loss

    made, loss = count()
    assert made == 3 * 4
    both = torch.autograd.grad(loss, (hidden, weight))
    weight.requires_grad_(False)
    made, loss = count()
    assert made == 2 * 4 and torch.equal(torch.autograd.grad(loss, hidden)[0], both[0])
    hidden.requires_grad_(False)
    assert count()[0] == 4
    weight.requires_grad_()
    made, loss = count()
    assert made == 2 * 4 and torch.equal(torch.autograd.grad(loss, weight)[0], both[1])
    with torch.no_grad():
        made, loss = count()
    assert made == 4 and not loss.requires_grad


@triton_only
def test_rows_that_do_not_count_change_nothing():
    """Ignored targets and zero scale: no loss, no gradient, no count, whatever their hidden states hold."""
    arguments, near, options = batch()
    hidden, weight, targets, advantages, scale = arguments
    dead = (targets == -100) | (scale == 0)
    ours = linear_policy_loss(*arguments, **near, **options, **CLIPPED)
    gradient, dweight = torch.autograd.grad(ours[0], (hidden, weight))
    assert ours[1]["token_sum"] == (~dead).sum() and (gradient[dead] == 0).all() and (gradient[~dead].abs().sum(1) > 0).all()
    with torch.no_grad():
        moved = hidden.clone()
        moved[dead] += 1
    again = linear_policy_loss(moved.requires_grad_(), *arguments[1:], **near, **options, **CLIPPED)
    assert torch.equal(ours[0], again[0])
    close(dweight, torch.autograd.grad(again[0], weight)[0])


@triton_only
def test_a_tied_head_adds_to_the_gradient_of_the_embedding():
    arguments, near, options = batch()
    _, weight, targets, *rest = arguments
    ids = targets.roll(1).clamp(min=0)
    (wide,) = double(weight)
    ours = linear_policy_loss(weight[ids], weight, targets, *rest, **options, chunk_rows=8)
    exact = linear_policy_loss(wide[ids], wide, targets, *(x.double() for x in rest), **options, reference=True)
    close(torch.autograd.grad(ours[0], weight)[0].double(), torch.autograd.grad(exact[0], wide)[0], 1e-4)


@triton_only
def test_the_single_pass_holds_one_chunk_of_logits(monkeypatch):
    arguments, near, options = batch(rows=64, vocabulary=500)
    shapes = []
    for name in ("row_stats", "row_dz"):

        def spy(logits, *args, inner=getattr(module, name), **kwargs):
            shapes.append((logits.data_ptr(), tuple(logits.shape)))
            return inner(logits, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_policy_loss(*arguments, **near, **options, chunk_rows=8)
    assert len(shapes) == 16 and len(set(shapes)) == 1 and shapes[0][1] == (8, 500)
    assert max(saved) <= arguments[1].numel()
