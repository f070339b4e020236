"""kernels/row_logprob.py: log-probs and entropy of existing logits, values and gradients against fp64."""

import pytest
import torch
from kernel_cases import DEVICE, close, double, triton_only

from kernels.row_logprob import BLOCK, IGNORE, logits_logprob, logits_logprob_reference, row_dz, row_stats


def rows_of_all_kinds(rows, columns, seed=0):
    """Flat, spiky and far below zero, one ignored; the last tenth of the columns banned. On DEVICE, fp32."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator)
    logits[1::3] *= 30
    logits[2::3] -= 400  # all negative: a running maximum that starts at 0 would underflow
    live = max(1, columns - columns // 10)
    targets = torch.randint(live, (rows,), generator=generator)
    targets[4::6] = IGNORE
    banned = torch.arange(columns) >= live
    return logits.to(DEVICE).requires_grad_(), targets.to(DEVICE), banned.to(DEVICE)


def by_hand(logits, targets, temperature, banned):
    """Row by row over the allowed columns only."""
    logp, entropy = [], []
    for row, target in zip(logits / temperature, targets.tolist()):
        logps = row.log_softmax(0) if banned is None else torch.full_like(row, -torch.inf).masked_scatter(
            ~banned, row[~banned].log_softmax(0))  # fmt: skip
        allowed = logps[logps > -torch.inf]
        logp.append(row.sum() * 0 if target == IGNORE else logps[target])
        entropy.append(row.sum() * 0 if target == IGNORE else -(allowed.exp() * allowed).sum())
    return torch.stack(logp), torch.stack(entropy)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bans", [True, False])
def test_the_reference_is_log_softmax_by_hand(with_bans, temperature):
    logits, targets, banned = rows_of_all_kinds(7, 53)
    (logits,) = double(logits)
    banned = banned if with_bans else None
    ours = logits_logprob_reference(logits, targets, temperature=temperature, banned=banned)
    for a, b in zip(ours, by_hand(logits, targets, temperature, banned)):
        close(a, b, 1e-10)
        close(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (a, b)), 1e-10)


def test_upcast_is_the_truth_and_without_it_the_error_of_bf16():
    logits, targets, _ = rows_of_all_kinds(8, 500)
    low = logits.bfloat16()
    exact = logits_logprob_reference(low.double(), targets)[0]
    up, plain = ((logits_logprob_reference(low, targets, upcast=x)[0] - exact).abs().max() for x in (True, False))
    assert up < 1e-4 and plain > 100 * up


@triton_only
@pytest.mark.parametrize("temperature, with_bans", [(1.0, False), (0.7, True)])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("columns", [1, 2, 127, 1000, 1001, BLOCK, BLOCK + 1, 2 * BLOCK + 777])
def test_kernels_against_fp64(columns, rows, temperature, with_bans):
    logits, targets, banned = rows_of_all_kinds(rows, columns)
    (wide,) = double(logits)
    options = dict(temperature=temperature, banned=banned if with_bans else None)
    ours = logits_logprob(logits, targets, **options)
    exact = logits_logprob_reference(wide, targets, **options)
    upstream = torch.randn(2, rows, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for a, b in zip(ours, exact):
        assert a.dtype == torch.float32
        own = logits.detach().abs().amax(1) / 100  # logits of 400 carry an error of 3e-5 themselves
        assert ((a - b).abs() <= 2e-5 * (1 + own)).all()
    got, want = torch.autograd.grad(ours, logits, list(upstream)), torch.autograd.grad(exact, wide, list(upstream.double()))
    close(got[0].double(), want[0], 1e-4)
    assert got[0][targets == IGNORE].abs().sum() == 0
    assert not with_bans or got[0][:, banned].abs().sum() == 0


@triton_only
@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_either_output_may_stay_unused(which):
    logits, targets, banned = rows_of_all_kinds(5, 300)
    (wide,) = double(logits)
    index = ["logp", "entropy"].index(which)
    got = logits_logprob(logits, targets, banned=banned)[index].sum()
    want = logits_logprob_reference(wide, targets, banned=banned)[index].sum()
    close(torch.autograd.grad(got, logits)[0].double(), torch.autograd.grad(want, wide)[0], 1e-4)


@triton_only
def test_confident_tokens_keep_their_log_prob_and_gradient():
    """From a margin of 16 on, z - lse is exactly 0 in fp32; the kernels stay right to 5 digits."""
    margins = torch.tensor([8.0, 12.0, 16.0, 20.0, 25.0, 30.0], device=DEVICE)
    logits = torch.zeros(6, 600, device=DEVICE)
    logits[:, 7] = margins + 6.4  # about the log of the 599 others
    logits.requires_grad_()
    targets = torch.full((6,), 7, device=DEVICE)
    logp, entropy = logits_logprob(logits, targets)
    others = 599 * (-logits.detach()[:, 7].double()).exp()
    exact = -torch.log1p(others)  # log_softmax would cancel in fp64 too
    assert (logits - logits.logsumexp(1, keepdim=True))[-1, 7] == 0
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=0)
    exact_entropy = others / (1 + others) * (logits.detach()[:, 7].double() - exact) - exact / (1 + others)
    assert (entropy >= 0).all() and (entropy - exact_entropy).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    torch.testing.assert_close(gradient[:, 7].double(), -torch.expm1(exact), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:, 0].double(), torch.expm1(exact) / 599, rtol=1e-4, atol=0)


@triton_only
def test_no_rows():
    logits = torch.zeros(0, 9, device=DEVICE, requires_grad=True)
    logp, entropy = logits_logprob(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert logp.shape == entropy.shape == (0,)
    assert torch.autograd.grad(logp.sum(), logits)[0].shape == (0, 9)


@triton_only
def test_a_target_that_cannot_be_sampled_has_probability_zero():
    """Banned or outside the vocabulary: -inf, its row alone, and nothing is read outside."""
    logits, _, banned = rows_of_all_kinds(4, 100)
    targets = torch.tensor([3, 95, 100, 2**31 - 1], device=DEVICE)
    logp, lse, entropy = row_stats(logits.detach(), targets, banned=banned)
    assert logp[0].isfinite() and (logp[1:] == -torch.inf).all()
    assert lse.isfinite().all() and entropy.isfinite().all()
    ones, out = torch.ones_like(logp), torch.empty_like(logits)
    dz = row_dz(logits.detach(), targets, logp, lse, entropy, ones, out=out, banned=banned)
    assert dz.isfinite().all() and dz[:, banned].abs().sum() == 0


@triton_only
def test_gradient_in_place_and_in_blocks_of_columns():
    """Over the logits themselves, or column block by column block, it is the gradient of the whole."""
    logits, targets, banned = rows_of_all_kinds(6, 1000)
    logits = logits.detach()
    stats = row_stats(logits, targets, temperature=0.7, banned=banned)
    given = (targets, *stats, torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE))
    whole = row_dz(logits, *given, out=torch.empty_like(logits), temperature=0.7, banned=banned)
    for start, end in ((0, 300), (300, 999), (999, 1000)):
        part = logits[:, start:end]
        block = row_dz(part, *given, out=torch.empty(part.shape, device=DEVICE), temperature=0.7, banned=banned, first=start)
        assert torch.equal(block, whole[:, start:end])
    assert torch.equal(row_dz(logits, *given, out=logits, temperature=0.7, banned=banned), whole)


@triton_only
def test_a_row_of_no_weight_is_not_read():
    logits, targets, _ = rows_of_all_kinds(3, 200)
    stats = row_stats(logits.detach(), targets)
    spoiled = logits.detach().clone()
    spoiled[1] = torch.nan
    weights = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    dz = row_dz(spoiled, targets, *stats, weights, weights, out=torch.empty_like(spoiled))
    assert (dz[1] == 0).all() and dz[0].abs().sum() > 0
    broken = torch.tensor([1.0, torch.nan, 1.0], device=DEVICE)
    dz = row_dz(logits.detach(), targets, *stats, broken, out=torch.empty_like(spoiled))
    assert dz[1].isnan().any(), "a nan from the loss must not vanish"


@triton_only
def test_offsets_beyond_32_bits():
    """Three rows 2^30 elements apart: the last begins at 2^31, where 32-bit offsets turn negative. Nothing else of the
    4 GiB is ever touched. One kernel reads there, the other writes there too."""
    stride, columns = 2**30, 257
    room = torch.empty(2 * stride + columns, dtype=torch.float16, device=DEVICE)
    far = room.as_strided((3, columns), (stride, 1))
    near, targets, _ = rows_of_all_kinds(3, columns)
    near = near.detach().half()
    far.copy_(near)
    stats, expected = row_stats(far, targets), row_stats(near, targets)
    for a, b in zip(stats, expected):
        assert torch.equal(a, b)
    ones = torch.ones(3, device=DEVICE)
    expected = row_dz(near, targets, *stats, ones, out=torch.empty_like(near))
    assert torch.equal(row_dz(far, targets, *stats, ones, out=far), expected)


def test_wrong_shapes_and_dtypes_are_named():
    logits, targets, banned = rows_of_all_kinds(4, 50)
    logits = logits.detach()
    row = torch.zeros(4, device=DEVICE)
    for change, message in (
        (dict(logits=logits.double()), "logits torch.float64"),
        (dict(logits=logits.T.contiguous().T), "whole rows"),
        (dict(targets=targets.int()), "targets .* torch.int32"),
        (dict(temperature=0.0), "temperature 0"),
        (dict(banned=banned.float()), "bool mask"),
        (dict(banned=banned[:-1]), "banned mask"),
        (dict(out=torch.empty(4, 49, device=DEVICE)), "out"),
        (dict(out=logits.view(torch.bfloat16)[:, :50]), "a race"),
        (dict(dlogp=row.double()), "dlogp must be"),
    ):
        given = dict(logits=logits, targets=targets, logp=row, lse=row, entropy=row, dlogp=row, out=logits) | change
        with pytest.raises(AssertionError, match=message):
            row_dz(**given)
    with pytest.raises(AssertionError, match="V 50"):
        row_stats(logits, targets, banned=banned[:-1])
