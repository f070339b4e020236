"""kernels/policy_loss.py: every loss by hand, the published code's numbers, and the kernel against both."""

import math

import pytest
import torch
from kernel_cases import DEVICE, double, triton_only

from kernels.policy_loss import KL_ESTIMATORS, LOSSES, kl_penalty, policy_loss, policy_loss_reference, policy_terms

def loss_of(logp, old, advantages, scale=None, **kwargs):
    """Loss, gradient per token and statistics of a few tokens given as lists."""
    logp = torch.tensor(logp, requires_grad=True)
    optional = {k: torch.tensor(kwargs.pop(k)) for k in ("ref_logp", "rollout_logp") if k in kwargs}
    scale = torch.ones(len(logp)) if scale is None else torch.tensor(scale)
    old = None if old is None else torch.tensor(old)
    loss, stats = policy_loss(logp, torch.tensor(advantages), scale, old_logp=old, **optional, **kwargs)
    (gradient,) = torch.autograd.grad(loss, logp)
    return float(loss.detach()), gradient.tolist(), {k: float(v) for k, v in stats.items()}


LOG = math.log
# ratio, advantage -> loss and its derivative by logp, with clips 0.2, 0.3 and 3
BY_HAND = [
    (1.1, 1.0, -1.1, -1.1),  # inside: -A ratio, and d ratio / d logp = ratio
    (1.5, 1.0, -1.3, 0.0),  # above 1.3 and good: clipped, no push
    (0.5, 1.0, -0.5, -0.5),  # below and good: not clipped, it must come back
    (0.7, -1.0, 0.8, 0.0),  # below 0.8 and bad: clipped
    (1.5, -1.0, 1.5, 1.5),  # above and bad: not clipped
    (5.0, -1.0, 3.0, 0.0),  # far above and bad: dual clip
    (5.0, -2.0, 6.0, 0.0),
    (5.0, 2.0, -2.6, 0.0),  # dual clip is for bad ones only
    (1.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("ratio, advantage, loss, slope", BY_HAND)
def test_clipped_loss_by_hand(ratio, advantage, loss, slope):
    found, gradient, _ = loss_of([-1.0 + LOG(ratio)], [-1.0], [advantage])
    assert found == pytest.approx(loss, abs=1e-6) and gradient == pytest.approx([slope], abs=1e-6)


def test_statistics_by_hand():
    ratios, advantages, *_ = zip(*BY_HAND)
    _, _, stats = loss_of([-1.0 + LOG(r) for r in ratios], [-1.0] * len(ratios), list(advantages))
    assert stats["token_sum"] == 9
    assert (stats["clip_high_sum"], stats["clip_low_sum"], stats["clip_dual_sum"]) == (2, 1, 2)
    assert (stats["ratio_max"], stats["ratio_min"]) == pytest.approx((5.0, 0.5), abs=1e-5)
    assert stats["old_kl_sum"] == pytest.approx(-sum(LOG(r) for r in ratios), abs=1e-5)
    assert stats["policy_loss_sum"] == pytest.approx(sum(loss for _, _, loss, _ in BY_HAND), abs=1e-5)


def test_dual_clip_zero_is_off():
    found, gradient, stats = loss_of([-1.0 + LOG(5.0)], [-1.0], [-1.0], dual_clip=0.0)
    assert (found, gradient[0]) == pytest.approx((5.0, 5.0), rel=1e-5) and stats["clip_dual_sum"] == 0


def test_scale_weighs_tokens_and_zero_removes_them():
    """A masked token adds nothing: no loss, no gradient, no count, however wild it is."""
    found, gradient, stats = loss_of([-1.0, -1.0, 5.0], [-1.0, -1.0, -40.0], [1.0, -2.0, 7.0], scale=[0.25, 0.5, 0.0],
                                     ref_logp=[-1.0, -1.0, 30.0], kl="k3", kl_coef=1.0)  # fmt: skip
    assert found == pytest.approx(-0.25 + 1.0) and gradient == pytest.approx([-0.25, 1.0, 0.0])
    assert stats["token_sum"] == 2 and stats["ratio_max"] == 1.0 and stats["kl_sum"] == 0


def test_without_old_log_probs_the_gradient_is_that_of_reinforce():
    found, gradient, stats = loss_of([-0.3, -2.0], None, [0.5, -1.5])
    assert found == pytest.approx(1.0) and gradient == pytest.approx([-0.5, 1.5])
    assert stats["ratio_max"] == stats["ratio_min"] == 1.0 and stats["old_kl_sum"] == 0


def test_importance_weights_are_capped_detached_and_counted():
    """w = min(exp(old - rollout), cap) multiplies loss and gradient; nothing flows through it; KL has no weight."""
    old, rollout = [-1.0, -1.0, -1.0], [-1.0 - LOG(1.5), -1.0 - LOG(4.0), -1.0 + LOG(2.0)]
    kwargs = dict(rollout_logp=rollout, importance_cap=2.0)
    found, gradient, stats = loss_of(old, old, [1.0, 1.0, -1.0], **kwargs)
    assert found == pytest.approx(-1.5 - 2.0 + 0.5, rel=1e-5) and gradient == pytest.approx([-1.5, -2.0, 0.5], rel=1e-5)
    assert stats["importance_capped_sum"] == 1 and stats["importance_max"] == pytest.approx(4.0, rel=1e-5)
    assert stats["importance_sum"] == pytest.approx(1.5 + 4 + 0.5, rel=1e-5)
    _, without_old, _ = loss_of(old, None, [1.0, 1.0, -1.0], **kwargs)
    assert without_old == pytest.approx(gradient)
    _, uncorrected, stats = loss_of(old, old, [1.0, 1.0, -1.0], rollout_logp=rollout)
    assert uncorrected == pytest.approx([-1.0, -1.0, 1.0]) and stats["importance_max"] == pytest.approx(4.0, rel=1e-5)
    plain = loss_of([-2.0], None, [0.0], ref_logp=[-1.0], kl="k2", kl_coef=1.0)
    assert (
        loss_of([-2.0], None, [0.0], ref_logp=[-1.0], kl="k2", kl_coef=1.0, rollout_logp=[-9.0], importance_cap=2.0)[:2]
        == plain[:2]
    )


# estimator -> value and derivative by logp at q = ref - logp
KL_BY_HAND = {
    "k1": (lambda q: -q, lambda q: 1.0),
    "k2": (lambda q: q * q / 2, lambda q: -q),
    "k3": (lambda q: math.exp(q) - q - 1, lambda q: 1 - math.exp(q)),
    "abs": (lambda q: abs(q), lambda q: -1.0 if q > 0 else 1.0),
    "chi2": (lambda q: (math.exp(q) - 1) ** 2, lambda q: -2 * (math.exp(q) - 1) * math.exp(q)),
}


@pytest.mark.parametrize("q", [-1.5, 0.4, 1.2])
@pytest.mark.parametrize("name", KL_BY_HAND)
def test_kl_estimators_by_hand(name, q):
    value, slope = KL_BY_HAND[name]
    found, gradient, stats = loss_of([-2.0], None, [0.0], ref_logp=[-2.0 + q], kl=name, kl_coef=0.5, scale=[0.1])
    assert found == pytest.approx(0.05 * value(q), rel=1e-4)
    assert gradient == pytest.approx([0.05 * slope(q)], rel=1e-4)
    assert stats["kl_sum"] == pytest.approx(value(q), rel=1e-4)


def test_every_kl_estimator_has_a_hand_written_value():
    assert set(KL_BY_HAND) | {"none"} == set(KL_ESTIMATORS)
    with pytest.raises(ValueError, match="k9.*one of.*k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k9")


def test_k3_is_an_unbiased_estimate_of_the_kl():
    """Its mean over samples of the policy is the divergence itself."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, generator=generator).log_softmax(0) for _ in range(2))
    for name in ("k1", "k3"):
        mean = (policy.exp() * kl_penalty(policy, reference, name)).sum()
        assert float(mean) == pytest.approx(float((policy.exp() * (policy - reference)).sum()), rel=1e-4)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_extreme_log_probs_give_finite_losses_and_gradients(name):
    values = [-1e4, -300.0, -80.0, -1e-3, 0.0]
    for advantage in (-3.0, 2.0):
        for old in values:
            for ref in values:
                found, gradient, stats = loss_of(values, [old] * 5, [advantage] * 5, ref_logp=[ref] * 5, kl=name,
                                                 kl_coef=0.01, rollout_logp=[ref] * 5, importance_cap=2.0)  # fmt: skip
                assert math.isfinite(found) and all(map(math.isfinite, gradient)), (old, ref)
                assert all(map(math.isfinite, stats.values()))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(AssertionError, match="advantages is"):
        policy_loss(torch.zeros(3), torch.zeros(2), torch.zeros(3))
    with pytest.raises(AssertionError, match="needs reference"):
        policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), kl="k3")


# ---------------------------------------------------------------- what the published code computes


def test_oracle_kl(vectors):
    cases = [v for v in vectors if v["function"] == "algo.compute_kl"]
    assert len(cases) == 3
    for case in cases:
        logp, ref = (torch.tensor(case["input"][key]) for key in ("log_probs", "ref_log_probs"))
        name = {"low_var_kl": "k3"}.get(case["input"]["kl_penalty"], case["input"]["kl_penalty"])
        if isinstance(case["expected"], dict):
            with pytest.raises(ValueError):  # upstream: NotImplementedError
                kl_penalty(logp, ref, name)
        else:
            torch.testing.assert_close(kl_penalty(logp, ref, name), torch.tensor(case["expected"]), rtol=0, atol=1e-6)


def test_oracle_policy_loss(vectors):
    """[loss, clip fraction high, low, mean KL]; upstream's `high` is either clip, its `low` the dual one."""
    cases = [v for v in vectors if v["function"] == "algo.policy_loss"]
    assert len(cases) == 6
    for case in cases:
        given = case["input"]
        names = ("log_probs", "old_log_probs", "advantages", "response_mask")
        logp, old, advantages, mask = (torch.tensor(given[name]).flatten() for name in names)
        loss, stats = policy_loss(
            logp, advantages, mask / mask.sum(), old_logp=old, clip_low=given["clip_ratio_low"],
            clip_high=given["clip_ratio_high"], dual_clip=given["clip_ratio_dual"],
        )  # fmt: skip
        tokens = stats["token_sum"]
        found = [loss, (stats["clip_high_sum"] + stats["clip_low_sum"]) / tokens, stats["clip_dual_sum"] / tokens,
                 stats["old_kl_sum"] / tokens]  # fmt: skip
        assert [float(x) for x in found] == pytest.approx(case["expected"], abs=1e-6), case["id"]


# ---------------------------------------------------------------- the other losses


def test_gspo_by_hand():
    """Two sequences of two tokens and of one: one ratio a sequence, the geometric mean; its gradient spreads evenly."""
    ratios, advantages = [1.1, 1.3, 2.0], [1.0, 1.0, 1.0]
    mean = math.sqrt(1.1 * 1.3)
    found, gradient, stats = loss_of([-1.0 + LOG(r) for r in ratios], [-1.0] * 3, advantages, scale=[0.5, 0.5, 1.0],
                                     loss="gspo", lengths=torch.tensor([2, 1]))  # fmt: skip
    assert found == pytest.approx(-mean - 1.3, rel=1e-5)
    assert gradient == pytest.approx([-mean / 2, -mean / 2, 0.0], rel=1e-5)
    assert stats["clip_high_sum"] == 1
    assert (stats["ratio_max"], stats["ratio_min"]) == pytest.approx((2.0, mean))


def test_gspo_with_importance_weights_spreads_what_the_sequence_got():
    """Tokens of unlike weight: the ratio is the sequence's, so each token gets the mean of what all of them would."""
    old, rollout = [-1.0, -1.0], [-1.0, -1.0 - LOG(1.5)]
    _, gradient, _ = loss_of(old, old, [2.0, 2.0], scale=[0.5, 0.5], loss="gspo", lengths=torch.tensor([2]),
                             rollout_logp=rollout, importance_cap=2.0)  # fmt: skip
    assert gradient == pytest.approx([-2 * (0.5 * 1 + 0.5 * 1.5) / 2] * 2, rel=1e-5)


# ratio, advantage -> loss at logp -2 and its derivative, with clip_high 0.3
CISPO_BY_HAND = [(1.1, 1.0, 2.2, -1.1), (1.5, 1.0, 2.6, -1.3), (0.2, 1.0, 0.4, -0.2), (1.5, -2.0, -5.2, 2.6)]


@pytest.mark.parametrize("ratio, advantage, loss, slope", CISPO_BY_HAND)
def test_cispo_by_hand(ratio, advantage, loss, slope):
    """A clipped token keeps a gradient, of capped weight, whichever the sign of its advantage."""
    found, gradient, stats = loss_of([-2.0], [-2.0 - LOG(ratio)], [advantage], loss="cispo")
    assert found == pytest.approx(loss, rel=1e-5) and gradient == pytest.approx([slope], rel=1e-5)
    assert stats["clip_high_sum"] == (ratio > 1.3) and stats["clip_low_sum"] == stats["clip_dual_sum"] == 0


def test_the_entropy_bonus_is_taken_off_and_counted():
    entropy = torch.tensor([1.0, 2.0, 40.0], requires_grad=True)
    logp, scale = torch.full((3,), -1.0, requires_grad=True), torch.tensor([0.5, 0.25, 0.0])
    plain, _ = policy_loss(logp, torch.ones(3), scale)
    loss, stats = policy_loss(logp, torch.ones(3), scale, entropy=entropy, entropy_coef=0.1)
    assert float((plain - loss).detach()) == pytest.approx(0.1 * (0.5 * 1 + 0.25 * 2)) and stats["entropy_sum"] == 3
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.05, -0.025, 0.0])
    assert stats["policy_loss_sum"] == plain.detach()


def test_no_token_at_all_gives_a_zero_that_stays_attached():
    none, logp, lengths = torch.zeros(0), torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for loss in LOSSES:
        total, stats = policy_loss(logp, none, none, loss=loss, lengths=lengths, ref_logp=none, kl="k3")
        total.backward()
        assert total == 0 and logp.grad.shape == (0,)
        assert stats["ratio_max"] == stats["ratio_min"] == 1 and stats["token_sum"] == stats["kl_sum"] == 0


def test_unknown_names_and_missing_inputs_are_one_line():
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match="unknown loss 'ppo': one of grpo, gspo, cispo"):
        policy_loss(zero, zero, zero, loss="ppo")
    with pytest.raises(ValueError, match="unknown KL estimator 'k9'"):
        policy_loss(zero, zero, zero, kl="k9")
    with pytest.raises(AssertionError, match="gspo needs the lengths"):
        policy_loss(zero, zero, zero, loss="gspo")
    with pytest.raises(AssertionError, match="needs the entropy"):
        policy_loss(zero, zero, zero, entropy_coef=0.1)
    with pytest.raises(AssertionError, match="clip_low 1.0"):
        policy_loss(zero, zero, zero, clip_low=1.0)


# ---------------------------------------------------------------- the kernel


def tokens_of_all_kinds(count=1300, seed=0):
    """Sequences of 100 with one advantage each; ratios far off, masked rows that hold garbage. On DEVICE."""
    generator = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(count, generator=generator)
    old, ref, rollout = (logp + torch.randn(count, generator=generator) for _ in range(3))
    old[::50] -= 30  # beyond the clamp of the log ratio
    old[1::50] += 30
    ref[::40] += 4  # beyond the clamps of k3 and chi2
    ref[1::40] -= 60
    advantages = torch.randn(-(-count // 100), generator=generator).repeat_interleave(100)[:count]
    advantages[300:400] = 0
    scale = torch.rand(count, generator=generator) / count
    scale[::7] = 0
    for x in (old, ref, rollout, advantages):
        x[::14] = torch.nan  # a part of the masked rows
    lengths = torch.tensor([100] * (count // 100) + [count % 100] * (count % 100 > 0))
    given = dict(old_logp=old, ref_logp=ref, rollout_logp=rollout, entropy=torch.rand(count, generator=generator))
    move = lambda x: x.to(DEVICE)  # noqa: E731
    return move(logp).requires_grad_(), move(advantages), move(scale), {k: move(v) for k, v in given.items()}, move(lengths)


def clean(x, scale):
    return torch.where(scale > 0, x, 0.0).double()


@triton_only
@pytest.mark.parametrize("kl", KL_ESTIMATORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_kernel_against_fp64(loss, kl):
    """Value, gradient and every statistic; the reference gets zeros where the masked rows hold nan."""
    logp, advantages, scale, given, lengths = tokens_of_all_kinds()
    if loss == "gspo":  # its mean reads the masked tokens of a sequence too
        given = {name: clean(x, scale).float() for name, x in given.items()}
    options = dict(loss=loss, kl=kl, kl_coef=0.3, importance_cap=2.0, dual_clip=3.0, entropy_coef=0.2, lengths=lengths)
    ours, stats = policy_loss(logp, advantages, scale, **given, **options)
    (wide,) = double(logp)
    wide_given = {name: clean(x, scale) for name, x in given.items()}
    exact, wanted = policy_loss_reference(wide, clean(advantages, scale), scale.double(), **wide_given, **options)
    assert float(ours) == pytest.approx(float(exact), rel=1e-5)
    got, want = torch.autograd.grad(ours * 0.7, logp)[0], torch.autograd.grad(exact * 0.7, wide)[0]
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6 * float(want.abs().max()))
    assert set(stats) == set(wanted)
    for name, value in wanted.items():
        assert float(stats[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


@triton_only
@pytest.mark.parametrize("absent", ["old_logp", "rollout_logp", "entropy"])
def test_the_kernel_without_an_optional_input(absent):
    for count in (1, 511, 512, 513):  # around one block
        logp, advantages, scale, given, lengths = tokens_of_all_kinds(count)
        given = {name: clean(x, scale).float() for name, x in given.items() if name != absent}
        for options in (dict(), dict(dual_clip=0.0), dict(loss="gspo", lengths=lengths), dict(loss="cispo")):
            options = dict(kl="k3", kl_coef=0.1, importance_cap=0.0) | options
            ours, stats = policy_loss(logp, clean(advantages, scale).float(), scale, **given, **options)
            (wide,) = double(logp)
            wide_given = {name: x.double() for name, x in given.items()}
            exact, wanted = policy_loss_reference(wide, clean(advantages, scale), scale.double(), **wide_given, **options)
            assert float(ours) == pytest.approx(float(exact), rel=1e-5, abs=1e-7)
            got, want = torch.autograd.grad(ours, logp)[0], torch.autograd.grad(exact, wide)[0]
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-8)
            assert set(stats) == set(wanted)
            for name, value in wanted.items():
                assert float(stats[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-4), name


@triton_only
def test_the_kernel_by_hand_at_every_clip():
    for ratio, advantage, loss, slope in BY_HAND:
        logp = torch.tensor([-1.0 + LOG(ratio)], device=DEVICE, requires_grad=True)
        old, one = torch.tensor([-1.0], device=DEVICE), torch.ones(1, device=DEVICE)
        total, _ = policy_loss(logp, one * advantage, one, old_logp=old)
        assert float(total) == pytest.approx(loss, abs=1e-6)
        assert float(torch.autograd.grad(total, logp)[0]) == pytest.approx(slope, abs=1e-6)


@triton_only
@pytest.mark.parametrize("broken", ["logp", "old_logp", "rollout_logp", "ref_logp"])
def test_the_kernel_does_not_hide_a_nan(broken):
    """A live token that is nan must show in the loss, as in torch: the step is then skipped and counted."""
    logp, advantages, scale, given, _ = tokens_of_all_kinds(60)
    given = {name: clean(x, scale).float() for name, x in given.items()} | {"logp": logp.detach().clone()}
    given[broken][5] = torch.nan
    logp = given.pop("logp").requires_grad_()
    total, _ = policy_loss(logp, clean(advantages, scale).float(), scale, importance_cap=2.0, kl="k3", kl_coef=0.1, **given)
    assert total.isnan() and torch.autograd.grad(total, logp)[0][5].isnan()


@triton_only
def test_the_kernel_takes_any_strides_and_refuses_other_dtypes():
    logp, advantages, scale, given, _ = tokens_of_all_kinds(40)
    given = {name: clean(x, scale).float() for name, x in given.items()}
    wide = torch.stack([given["old_logp"], advantages], dim=1)
    plain, _ = policy_loss(logp, advantages, scale, old_logp=given["old_logp"])
    strided, _ = policy_loss(logp, advantages, scale, old_logp=wide[:, 0])
    assert torch.equal(plain, strided)
    with pytest.raises(AssertionError, match="fp32"):
        policy_loss(logp, advantages, scale, old_logp=given["old_logp"].double())


@triton_only
def test_the_partials_are_per_block():
    """No atomics: 1,300 tokens are three blocks, and each writes its own column."""
    logp, advantages, scale, given, lengths = tokens_of_all_kinds()
    _, partials = policy_terms(
        logp.detach(), advantages, scale, loss="grpo", importance_cap=2.0, clip_low=0.2, clip_high=0.3, dual_clip=3.0,
        kl="k3", kl_coef=0.1, lengths=None, entropy_coef=0.0, **given,
    )  # fmt: skip
    assert partials.shape == (14, 3)
    assert partials[1].tolist() == [(scale[i : i + 512] > 0).sum() for i in range(0, 1300, 512)]
