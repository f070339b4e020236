"""The log-prob and policy-loss kernels on a GPU: bf16, the full vocabulary, against fp64.

    python -m pytest -m gpu tests/test_kernels_gpu.py          about a minute on one H200; needs 40 GiB
"""

import pytest
import torch

from kernels import logprob as logprob_module
from kernels.linear_policy_loss import linear_policy_loss
from kernels.logprob import token_logprob, token_logprob_reference
from kernels.policy_loss import LOSSES, policy_loss, policy_loss_reference
from kernels.row_logprob import logits_logprob, logits_logprob_reference, row_dz, row_stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SHAPES = [(2048, 151_936), (3584, 152_064), (512, 100_001)]  # H, V: Qwen2.5-VL 3B, 7B, and an odd vocabulary
# Largest errors allowed: log-prob; entropy, a sum of 1e5 of those; dX and dW, relative; ratio on-policy.
LOGP, ENTROPY, GRADIENT, RATIO = 2e-5, 2e-4, 3e-3, 1e-4
GIB = 2**30


@pytest.fixture(autouse=True)
def empty_cache():
    yield
    torch.cuda.empty_cache()


def inputs(rows, width, vocabulary, seed=0):
    """As in a trained model: target logits of 12 to 30 above noise of deviation 3; the last 271 ids are banned."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(*size):
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    weight = noise(vocabulary, width) * width**-0.5
    targets = torch.randint(vocabulary - 271, (rows,), generator=generator, device="cuda")
    margin = 12 + 18 * torch.rand(rows, 1, generator=generator, device="cuda").bfloat16()
    hidden = 3 * noise(rows, width) + margin * weight[targets]
    banned = torch.arange(vocabulary, device="cuda") >= vocabulary - 271
    return hidden.requires_grad_(), weight.requires_grad_(), targets, banned


def double(*tensors):
    """fp64 leaves: gradients that went back through a cast would be rounded to bf16."""
    return [x.detach().double().requires_grad_() for x in tensors]


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("rows", [1, 257])
@pytest.mark.parametrize("width, vocabulary", SHAPES)
def test_log_probs_and_gradients_against_fp64(width, vocabulary, rows):
    hidden, weight, targets, banned = inputs(rows, width, vocabulary)
    if rows > 1:
        targets[rows // 2 :: 50] = -100
    upstream = torch.randn(2, rows, device="cuda")
    leaves = double(hidden, weight)
    exact = token_logprob_reference(*leaves, targets, temperature=0.9, banned=banned)
    want = torch.autograd.grad(exact, leaves, list(upstream.double()))
    # A row by itself may have one number that outweighs all others, and rounding it to bf16 costs up to 4e-3.
    allowed = GRADIENT if rows > 1 else 6e-3
    for chunk_rows in (None, 100):  # 100: several chunks forward, one super-block of four column blocks backward
        ours = token_logprob(hidden, weight, targets, temperature=0.9, banned=banned, chunk_rows=chunk_rows)
        for x, want_x, bound in zip(ours, exact, (LOGP, ENTROPY)):
            assert (x.double() - want_x).abs().max() <= bound
        got = torch.autograd.grad(ours, (hidden, weight), list(upstream))
        for g, w in zip(got, want):
            assert g.dtype == torch.bfloat16 and relative(g, w) <= allowed


@pytest.mark.parametrize("width, vocabulary", SHAPES)
def test_the_single_pass_against_fp64(width, vocabulary):
    rows = 257
    hidden, weight, targets, banned = inputs(rows, width, vocabulary)
    advantages, scale = torch.randn(rows, device="cuda"), torch.rand(rows, device="cuda") / rows
    scale[::5] = 0
    leaves = double(hidden, weight)
    exact_logp, exact_entropy = token_logprob_reference(*leaves, targets, banned=banned)
    names = ("old_logp", "ref_logp", "rollout_logp")
    near = {name: (exact_logp + 0.2 * torch.randn_like(exact_logp)).detach() for name in names}
    kwargs = dict(importance_cap=2.0, kl="k3", kl_coef=0.05, entropy_coef=0.01)
    exact, stats = policy_loss_reference(
        exact_logp, advantages.double(), scale.double(), entropy=exact_entropy, **near, **kwargs
    )
    want = torch.autograd.grad(exact, leaves)
    near = {name: x.float() for name, x in near.items()}
    for chunk_rows in (None, 100):
        ours, seen, logp, entropy = linear_policy_loss(
            hidden, weight, targets, advantages, scale, banned=banned, chunk_rows=chunk_rows, **near, **kwargs
        )
        assert (logp.double() - exact_logp).abs().max() <= LOGP
        assert (entropy.double() - exact_entropy).abs().max() <= ENTROPY
        assert float(ours.detach()) == pytest.approx(float(exact.detach()), abs=1e-5)
        for name, value in stats.items():
            assert float(seen[name]) == pytest.approx(float(value), rel=1e-4, abs=rows * LOGP), name
        got = torch.autograd.grad(ours, (hidden, weight), retain_graph=True)
        for g, w in zip(got, want):
            assert relative(g, w) <= GRADIENT
        for g, first in zip(torch.autograd.grad(0.3 * ours, (hidden, weight)), got):
            assert relative(g, 0.3 * first.double()) <= GRADIENT  # one more rounding to bf16


@pytest.mark.parametrize("loss", LOSSES)
def test_the_policy_loss_against_fp64_and_again(loss):
    generator = torch.Generator("cuda").manual_seed(0)
    logp, old, ref, rollout = (-3 * torch.rand(40_000, generator=generator, device="cuda") for _ in range(4))
    advantages = torch.randn(100, generator=generator, device="cuda").repeat_interleave(400)
    scale = torch.rand(40_000, generator=generator, device="cuda") / 40_000
    given = dict(old_logp=old, ref_logp=ref, rollout_logp=rollout)
    options = dict(loss=loss, importance_cap=2.0, kl="k3", kl_coef=0.1, lengths=torch.full((100,), 400, device="cuda"))
    logp.requires_grad_()

    def once():
        ours, stats = policy_loss(logp, advantages, scale, **given, **options)
        return ours, torch.autograd.grad(ours, logp)[0], stats

    ours, gradient, stats = once()
    (leaf,) = double(logp)
    wide = {name: x.double() for name, x in given.items()}
    exact, wanted = policy_loss_reference(leaf, advantages.double(), scale.double(), **wide, **options)
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    assert relative(gradient, torch.autograd.grad(exact, leaf)[0]) < 1e-5
    for name, value in wanted.items():
        assert float(stats[name]) == pytest.approx(float(value), rel=1e-4, abs=1), name
    for _ in range(3):
        again = once()
        assert torch.equal(again[0], ours) and torch.equal(again[1], gradient)
        assert all(torch.equal(again[2][name], stats[name]) for name in stats)


def test_two_runs_give_the_same_bits():
    hidden, weight, targets, banned = inputs(5000, 2048, 151_936)
    advantages, scale = torch.randn(5000, device="cuda"), torch.rand(5000, device="cuda")

    def single():
        arguments = (hidden, weight, targets, advantages, scale)
        loss, _, logp, entropy = linear_policy_loss(*arguments, banned=banned, entropy_coef=0.01)
        return loss, logp, entropy, *torch.autograd.grad(loss, (hidden, weight))

    def two():
        logp, entropy = token_logprob(hidden, weight, targets, banned=banned)
        return logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))

    for run in (single, two):
        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_chunk_sizes_do_not_move_the_ratio():
    """Old log-probs from chunks of one size, new ones from another: on-policy the ratio stays 1."""
    hidden, weight, targets, banned = inputs(1500, 2048, 151_936)
    with torch.no_grad():
        old = token_logprob(hidden, weight, targets, banned=banned)[0]
        for chunk_rows in (64, 333, 1499):
            new = token_logprob(hidden, weight, targets, banned=banned, chunk_rows=chunk_rows)[0]
            assert ((new - old).exp() - 1).abs().max() <= RATIO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_kernels_on_logits_in_any_dtype(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(33, 100_001, generator=generator, device="cuda")
    logits = (logits * torch.tensor([1.0, 8.0, 3.0] * 11, device="cuda")[:, None]).to(dtype).requires_grad_()
    targets = torch.randint(100_001, (33,), generator=generator, device="cuda")
    targets[5] = -100
    ours = logits_logprob(logits, targets, temperature=0.7)
    (leaf,) = double(logits)
    exact = logits_logprob_reference(leaf, targets, temperature=0.7)
    got, want = (torch.autograd.grad(pair[0].sum() + pair[1].sum(), x)[0] for pair, x in ((ours, logits), (exact, leaf)))
    for a, b in zip(ours, exact):
        assert (a.double() - b).abs().max() <= LOGP
    assert relative(got, want) <= (1e-5 if dtype == torch.float32 else GRADIENT)


def test_more_than_two_to_the_31_logits():
    """14,200 rows of 151,936: 32-bit offsets would wrap. The last row must be as good as the first."""
    rows, columns = 14_200, 151_936
    logits = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    logits.normal_(generator=torch.Generator("cuda").manual_seed(0))
    targets = torch.randint(columns, (rows,), device="cuda")
    stats = row_stats(logits, targets)
    ends = [0, rows // 2, rows - 1]
    (few,) = double(logits[ends])
    exact = logits_logprob_reference(few, targets[ends])
    assert (stats[0][ends].double() - exact[0]).abs().max() <= LOGP
    assert (stats[2][ends].double() - exact[1]).abs().max() <= LOGP
    (want,) = torch.autograd.grad(exact[0].sum(), few)
    row_dz(logits, targets, *stats, torch.ones(rows, device="cuda"), out=logits)  # over the logits themselves
    assert relative(logits[ends], want) <= GRADIENT


def peak(run):
    """GiB beyond what was there and what comes back."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    held = sum(x.numel() * x.itemsize for x in results)
    return (torch.cuda.max_memory_allocated() - before - held) / GIB


def test_memory_does_not_grow_with_rows():
    """131,072 rows, whose logits would be 74 GiB in fp32, need what 8,192 need, apart from X and dX."""
    seen = {}
    for rows in (8192, 131_072):
        hidden, weight, targets, banned = inputs(rows, 2048, 151_936)
        advantages, scale = torch.randn(rows, device="cuda"), torch.full((rows,), 1 / rows, device="cuda")

        def single():
            loss, *_ = linear_policy_loss(hidden, weight, targets, advantages, scale, banned=banned)
            return torch.autograd.grad(loss, (hidden, weight))

        def two():
            logp, _ = token_logprob(hidden, weight, targets, banned=banned)
            return torch.autograd.grad(logp.sum(), (hidden, weight))

        def forward():
            with torch.no_grad():
                return token_logprob(hidden, weight, targets, banned=banned)

        seen[rows] = [peak(run) for run in (single, two, forward)]
        gradients = single()
        assert all(x.isfinite().all() for x in gradients)
        with torch.no_grad():  # the last rows are as right as the first
            logp, _ = token_logprob(hidden, weight, targets, banned=banned)
            few = slice(rows - 64, rows)
            exact, _ = token_logprob_reference(hidden[few].double(), weight.double(), targets[few], banned=banned)
        assert (logp[few].double() - exact).abs().max() <= LOGP
        dx = hidden.numel() * hidden.itemsize / GIB
        del hidden, weight, gradients
    chunk, fp32_weight = logprob_module.CHUNK_BYTES / GIB, 4 * 2048 * 151_936 / GIB
    for small, large in zip(*seen.values()):
        assert large <= 1.1 * small + dx + fp32_weight  # dX once more; dW in fp32 where super-blocks are summed
    assert max(seen[8192]) <= chunk + fp32_weight + 0.3 and seen[131_072][2] <= chunk


def test_a_frozen_head_holds_no_gradient_of_it():
    hidden, weight, targets, banned = inputs(4096, 2048, 151_936)
    weight.requires_grad_(False)
    advantages, scale = torch.randn(4096, device="cuda"), torch.rand(4096, device="cuda")

    def single():
        loss, *_ = linear_policy_loss(hidden, weight, targets, advantages, scale, banned=banned)
        return torch.autograd.grad(loss, (hidden,))

    assert peak(single) <= logprob_module.CHUNK_BYTES / GIB + 0.2
