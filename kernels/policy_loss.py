"""The clipped policy-gradient loss of GRPO and its kin with a KL penalty, one number a token, and what to log about it.

For a token with log-prob `logp` now, `old` when it was sampled, advantage A and scale s (mask x 1/normaliser):

    ratio = exp(clamp(logp - old, -20, 20))
    l     = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))          grpo
    l     = min(l, -A dual_clip)                    where A < 0: a bad token cannot push without bound
    loss  = sum over tokens of  s w l + s kl_coef kl(logp, ref) - s entropy_coef entropy
    w     = min(exp(old - rollout), cap)            detached; corrects for an engine that rounds differently

    gspo    the same with log ratio = mean of (logp - old) over the sequence, one ratio for all its tokens
    cispo   l = -A min(ratio, 1 + clip_high) logp   ratio detached: a clipped token still learns, only less

SpatialThinker's published loss is grpo with clips 0.2 / 0.3 / 3.0 and kl_coef 0.01 on k3 (spec 4.2; the constants are
EasyR1's). GRPO, BNPO, DAPO and Dr.GRPO differ by `scale` alone, formed by the caller with counts that are global over
ranks and micro-batches, so that no way of splitting a batch changes the gradient:

    GRPO 1 / (sequences x length)     DAPO, token mean 1 / tokens     Dr.GRPO 1 / (sequences x longest allowed)

KL estimators of KL(policy || reference), with q = ref - logp:
    k1 = -q      k2 = q^2 / 2      k3 = exp(q) - q - 1 clamped to [-10, 10]      abs = |q|
    chi2 = clamp((exp(q) - 1)^2, 0, 20)

The kernel makes loss, derivative by logp and statistics in one launch; every block writes its own partial sums, so that
no atomic changes the order of a sum. The torch code is the reference, and what runs without a GPU. Copy the file and it
runs.
"""

import math
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system (macOS, Windows): the reference runs
    triton = None

LOSSES = ("grpo", "gspo", "cispo")
KL_ESTIMATORS = ("none", "k1", "k2", "k3", "abs", "chi2")
# Columns of the kernel's partials: sums first, then maxima. `ratio_min` is kept as the maximum of -ratio.
SUMS = ("loss", "token_sum", "policy_loss_sum", "kl_sum", "entropy_sum", "clip_high_sum", "clip_low_sum", "clip_dual_sum",
        "old_kl_sum", "importance_sum", "importance_capped_sum")  # fmt: skip
MAXIMA = ("ratio_max", "ratio_min", "importance_max")
BLOCK = 512
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def has_kernel(x: Tensor) -> bool:
    """Do the Triton kernels run on this tensor?"""
    return triton is not None and (x.is_cuda or INTERPRETED)


# ---------------------------------------------------------------- reference


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference); logp, ref_logp (M,) -> (M,)."""
    q = ref_logp - logp
    if estimator == "k1":
        return -q
    if estimator == "k2":
        return 0.5 * q.square()
    if estimator == "abs":
        return q.abs()
    q = q.clamp(-20.0, 20.0)  # exp must stay finite: an infinite value under the clamps below has a nan gradient
    if estimator == "k3":
        return (q.exp() - q - 1).clamp(-10.0, 10.0)
    if estimator == "chi2":
        return (q.exp() - 1).square().clamp(0.0, 20.0)
    raise ValueError(f"unknown KL estimator {estimator!r}: one of {', '.join(KL_ESTIMATORS)}")


def sequence_mean(x: Tensor, lengths: Tensor) -> Tensor:
    """x (M,), rows of a sequence one after another, lengths (S,) summing to M -> (M,), each row its sequence's mean.

    Its own transpose, so it is its own backward. Summed in a fixed order, unlike index_add on a GPU."""
    means = torch.segment_reduce(x, "mean", lengths=lengths, unsafe=True)  # unsafe: no check that would stop the GPU
    return means.repeat_interleave(lengths, output_size=len(x))


def policy_loss_reference(
    logp: Tensor, advantages: Tensor, scale: Tensor, *, loss: str = "grpo", old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None, rollout_logp: Tensor | None = None, importance_cap: float = 0.0, clip_low: float = 0.2,
    clip_high: float = 0.3, dual_clip: float = 3.0, kl: str = "none", kl_coef: float = 0.0, lengths: Tensor | None = None,
    entropy: Tensor | None = None, entropy_coef: float = 0.0, upcast: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Plain torch with plain autograd; arguments and results as `policy_loss`. `upcast=False` keeps the inputs' dtype."""
    if upcast:
        logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    old = logp.detach() if old_logp is None else old_logp
    log_ratio = logp - old
    if loss == "gspo":
        log_ratio = _SequenceMean.apply(log_ratio, lengths)
    log_ratio = log_ratio.clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    # The clip happens in log space, as upstream does: the same value, and no gradient through a clipped exp.
    clipped = log_ratio.clamp(math.log(1.0 - clip_low), math.log(1.0 + clip_high)).exp()
    plain, held = -advantages * ratio, -advantages * clipped
    is_clipped = plain < held
    no = torch.zeros_like(is_clipped)
    clip_high_seen, clip_low_seen, clip_dual_seen = is_clipped & (advantages > 0), is_clipped & (advantages < 0), no
    if loss == "cispo":
        token_loss = -advantages * ratio.detach().clamp(max=1.0 + clip_high) * logp
        clip_high_seen, clip_low_seen = ratio > 1.0 + clip_high, no
    else:
        token_loss = torch.where(is_clipped, held, plain)
        if dual_clip > 0:
            dual = torch.where(advantages < 0, -advantages * dual_clip, torch.full_like(token_loss, float("inf")))
            clip_dual_seen = dual < token_loss
            token_loss = torch.where(clip_dual_seen, dual, token_loss)

    weight = None
    if rollout_logp is not None:
        weight = (old - rollout_logp).detach().clamp(-20.0, 20.0).exp()  # raw; logged before it is capped
        if importance_cap > 0:
            token_loss = token_loss * weight.clamp(max=importance_cap)

    total = (token_loss * scale).sum()
    live = scale > 0
    stats = {"token_sum": live.sum(), "policy_loss_sum": total}
    if kl != "none":
        penalty = kl_penalty(logp, ref_logp, kl)
        total = total + kl_coef * (penalty * scale).sum()
        stats["kl_sum"] = (penalty * live).sum()
    if entropy is not None:
        total = total - entropy_coef * (entropy * scale).sum()
        stats["entropy_sum"] = (entropy * live).sum()
    stats["clip_high_sum"] = (live & clip_high_seen).sum()
    stats["clip_low_sum"] = (live & clip_low_seen).sum()
    stats["clip_dual_sum"] = (live & clip_dual_seen).sum()
    stats["old_kl_sum"] = (-log_ratio * live).sum()
    stats["ratio_max"] = torch.where(live, ratio, 1.0).amax()
    stats["ratio_min"] = torch.where(live, ratio, 1.0).amin()
    if weight is not None:
        stats["importance_sum"] = (weight * live).sum()
        stats["importance_capped_sum"] = (live & (weight > importance_cap)).sum() if importance_cap > 0 else live.sum() * 0
        stats["importance_max"] = torch.where(live, weight, 1.0).amax()
    return total, {name: value.detach().float() for name, value in stats.items()}


class _SequenceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lengths):
        ctx.save_for_backward(lengths)
        return sequence_mean(x, lengths)

    @staticmethod
    def backward(ctx, grad):
        return sequence_mean(grad.contiguous(), *ctx.saved_tensors), None


# ---------------------------------------------------------------- kernel

if triton is not None:

    @triton.jit
    def _expm1(x):
        # exp(x) - 1 without libdevice: the rounding of u cancels in (u - 1) / log(u)
        u = tl.exp(x)
        near = (u != 1.0) & (x > -1.0)  # further down u - 1 is exact enough, and a denormal u has no digits left for log
        return tl.where(near, (u - 1.0) * (x / tl.log(tl.where(near, u, 0.5))), tl.where(u == 1.0, x, u - 1.0))

    @triton.jit
    def _clamp(x, low, high):
        # nan stays nan, as in torch: tl.minimum and tl.maximum would hide it
        return tl.where(x < low, low, tl.where(x > high, high, x))

    @triton.jit
    def _kl(q, KL: tl.constexpr):
        # value and derivative by logp of one estimator at q = ref - logp
        value, slope = q * 0.0, q * 0.0
        if KL == "k1":
            value, slope = -q, q * 0.0 + 1.0
        elif KL == "k2":
            value, slope = 0.5 * q * q, -q
        elif KL == "abs":
            value, slope = tl.abs(q), tl.where(q > 0, -1.0, tl.where(q < 0, 1.0, 0.0))
        elif KL != "none":
            held = _clamp(q, -20.0, 20.0)
            moves = ~((q < -20.0) | (q > 20.0))
            grown = _expm1(held)
            if KL == "k3":
                value = _clamp(grown - held, -10.0, 10.0)
                slope = tl.where(moves & ~(grown - held > 10.0), -grown, 0.0)
            else:  # chi2
                value = _clamp(grown * grown, 0.0, 20.0)
                slope = tl.where(moves & ~(grown * grown > 20.0), -2.0 * grown * (grown + 1.0), 0.0)
        return value, slope

    @triton.jit
    def _policy_loss(logp, old, log_ratio, ref, rollout, advantages, scale, entropy, dpolicy, dkl, partials, count,
                     cap, log_low, log_high, clip_high, dual, kl_coef, entropy_coef,
                     LOSS: tl.constexpr, KL: tl.constexpr, OLD: tl.constexpr, ROLLOUT: tl.constexpr,
                     ENTROPY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        block = tl.program_id(0)
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside = i < count
        s = tl.load(scale + i, mask=inside, other=0.0)
        live = s > 0
        # Rows that do not count get harmless numbers, whatever lies in them: inf x 0 would be nan.
        a = tl.load(advantages + i, mask=live, other=0.0)
        new = tl.load(logp + i, mask=live, other=0.0)
        before = new
        if OLD:
            before = tl.load(old + i, mask=live, other=0.0)
        raw = new - before
        if LOSS == "gspo":
            raw = tl.load(log_ratio + i, mask=live, other=0.0)
        r_log = _clamp(raw, -20.0, 20.0)
        moves = ~((raw < -20.0) | (raw > 20.0))
        ratio = tl.exp(r_log)
        none = i < 0
        if LOSS == "cispo":
            held_ratio = tl.where(ratio > 1.0 + clip_high, 1.0 + clip_high, ratio)
            token = -a * held_ratio * new
            slope = -a * held_ratio
            high, low, is_dual = ratio > 1.0 + clip_high, none, none
        else:
            plain = -a * ratio
            held = -a * tl.exp(_clamp(r_log, log_low, log_high))
            is_clipped = plain < held
            token = tl.where(is_clipped, held, plain)
            limit = tl.where((a < 0) & (dual > 0), -a * dual, float("inf"))
            is_dual = limit < token
            token = tl.where(is_dual, limit, token)
            slope = tl.where(is_clipped | is_dual, 0.0, tl.where(moves, plain, 0.0))
            high, low = is_clipped & (a > 0), is_clipped & (a < 0)
        weight = r_log * 0.0 + 1.0
        capped = none
        if ROLLOUT:
            gap = before - tl.load(rollout + i, mask=live, other=0.0)
            weight = tl.exp(_clamp(gap, -20.0, 20.0))
            capped = (cap > 0) & (weight > cap)
            applied = tl.where(cap > 0, tl.where(capped, cap, weight), 1.0)
            token *= applied
            slope *= applied
        q = r_log * 0.0
        if KL != "none":
            q = tl.load(ref + i, mask=live, other=0.0) - new
        penalty, penalty_slope = _kl(q, KL)
        h = r_log * 0.0
        if ENTROPY:
            h = tl.load(entropy + i, mask=live, other=0.0)
        slope, penalty_slope = tl.where(live, slope * s, 0.0), tl.where(live, kl_coef * penalty_slope * s, 0.0)
        if LOSS == "gspo":  # the first goes back through the mean of the sequence, the second does not
            tl.store(dpolicy + i, slope, mask=inside)
            tl.store(dkl + i, penalty_slope, mask=inside)
        else:
            tl.store(dpolicy + i, slope + penalty_slope, mask=inside)

        token = tl.where(live, token * s, 0.0)
        total = token + tl.where(live, (kl_coef * penalty - entropy_coef * h) * s, 0.0)
        one = live.to(tl.float32)
        sums = (total, one, token, penalty * one, h * one, high.to(tl.float32) * one, low.to(tl.float32) * one,
                is_dual.to(tl.float32) * one, -r_log * one, weight * one, capped.to(tl.float32) * one)  # fmt: skip
        maxima = (ratio, -ratio, weight)  # of a row that does not count: 1, -1, 1
        out = partials + block
        for k in tl.static_range(len(sums)):
            tl.store(out + k * tl.num_programs(0), tl.sum(sums[k], axis=0))
        for k in tl.static_range(len(maxima)):
            highest = tl.max(tl.where(inside, maxima[k], -float("inf")), axis=0)
            tl.store(out + (len(sums) + k) * tl.num_programs(0), highest)


# ---------------------------------------------------------------- wrappers


def check_arguments(
    logp: Tensor, *, loss: str, kl: str, lengths: Tensor | None, clip_low: float, entropy_coef: float, **others
) -> None:
    """One line for what does not fit: ValueError for a name nobody knows, an assertion for everything else."""
    for name, x in others.items():
        fits = not isinstance(x, Tensor) or x.shape == logp.shape
        assert fits, f"{name} is {tuple(x.shape)}, log-probs are {tuple(logp.shape)}"
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: one of {', '.join(LOSSES)}")
    if kl not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kl!r}: one of {', '.join(KL_ESTIMATORS)}")
    assert kl == "none" or others["ref_logp"] is not None, f"KL estimator {kl} needs reference log-probs"
    assert loss != "gspo" or lengths is not None, "gspo needs the lengths of the sequences"
    assert others["entropy"] is not None or entropy_coef == 0, "an entropy bonus needs the entropy of every token"
    assert 0 <= clip_low < 1, f"clip_low {clip_low}: a ratio is never below 0"


def policy_terms(
    logp: Tensor, advantages: Tensor, scale: Tensor, *, loss: str, old_logp: Tensor | None, ref_logp: Tensor | None,
    rollout_logp: Tensor | None, importance_cap: float, clip_low: float, clip_high: float, dual_clip: float, kl: str,
    kl_coef: float, lengths: Tensor | None, entropy: Tensor | None, entropy_coef: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The launch. Arguments as `policy_loss`, detached -> d loss / d logp (M,), partials (SUMS + MAXIMA, blocks)."""
    rows = len(logp)
    log_ratio = None
    if loss == "gspo":
        log_ratio = torch.zeros_like(logp) if old_logp is None else sequence_mean(logp - old_logp, lengths)
    inputs = [logp, old_logp, log_ratio, ref_logp, rollout_logp, advantages, scale, entropy]
    for x in inputs:
        ok = x is None or (x.shape == (rows,) and x.dtype == torch.float32 and x.device == logp.device)
        assert ok, f"policy_loss takes ({rows},) fp32 on {logp.device}, not {tuple(x.shape)} {x.dtype} on {x.device}"
    inputs = [logp if x is None else x.contiguous() for x in inputs]  # logp stands in where the kernel looks at nothing
    dlogp, dkl = torch.empty_like(inputs[0]), torch.empty_like(inputs[0]) if loss == "gspo" else inputs[0]
    grid = triton.cdiv(rows, BLOCK)
    partials = logp.new_empty(len(SUMS) + len(MAXIMA), grid)
    _policy_loss[(grid,)](
        *inputs, dlogp, dkl, partials, rows, float(importance_cap), math.log(1.0 - clip_low), math.log(1.0 + clip_high),
        float(clip_high), float(dual_clip), float(kl_coef), float(entropy_coef), LOSS=loss, KL=kl, OLD=old_logp is not None,
        ROLLOUT=rollout_logp is not None, ENTROPY=entropy is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    if loss == "gspo":
        dlogp = sequence_mean(dlogp, lengths) + dkl
    return dlogp, partials


def reduce_partials(partials: Tensor, *, kl: bool, rollout: bool, entropy: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """partials (SUMS + MAXIMA, blocks), of one launch or of several side by side -> loss (), statistics {name: ()}."""
    values = dict(zip(SUMS, partials[: len(SUMS)].sum(1).unbind()))
    values |= dict(zip(MAXIMA, partials[len(SUMS) :].amax(1).unbind()))
    values["ratio_min"] = -values["ratio_min"]
    absent = () if kl else ("kl_sum",)
    absent += () if entropy else ("entropy_sum",)
    absent += () if rollout else ("importance_sum", "importance_capped_sum", "importance_max")
    return values.pop("loss"), {name: x for name, x in values.items() if name not in absent}


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, advantages, scale, arguments):
        dlogp, partials = policy_terms(logp, advantages, scale, entropy=entropy, **arguments)
        ctx.save_for_backward(dlogp, scale)
        ctx.entropy_coef = arguments["entropy_coef"]
        ctx.mark_non_differentiable(partials)
        loss = partials[0].sum()
        return loss, partials

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        dlogp, scale = ctx.saved_tensors
        dentropy = -ctx.entropy_coef * scale * grad if ctx.needs_input_grad[1] else None
        return dlogp * grad, dentropy, None, None, None


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    scale: Tensor,
    *,
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
    lengths: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reference: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All inputs (M,) fp32, one number a completion token -> loss (), statistics {name: ()}.

    Differentiable in `logp` and `entropy`. old_logp None means one optimiser step a rollout: the current log-prob,
    detached, so every ratio is 1 and the gradient is REINFORCE's. importance_cap 0 turns the rollout correction off;
    dual_clip 0 turns that clip off. `lengths` (S,) int64, tokens of each sequence in the order of the rows, is for gspo.
    Statistics whose name ends in `_sum` are sums over tokens with scale > 0 (divide by `token_sum`), those in `_max`
    and `_min` extremes; they are detached and stay on the device. `reference=True`, or no GPU: plain torch.
    """
    arguments = dict(loss=loss, old_logp=old_logp, ref_logp=ref_logp, rollout_logp=rollout_logp, lengths=lengths,
                     importance_cap=importance_cap, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl,
                     kl_coef=kl_coef, entropy_coef=entropy_coef)  # fmt: skip
    check_arguments(logp, advantages=advantages, scale=scale, entropy=entropy, **arguments)
    present = dict(kl=kl != "none", rollout=rollout_logp is not None, entropy=entropy is not None)
    if not len(logp):  # nothing to add up, and still attached to the graph
        neutral = logp.new_tensor([0.0] * len(SUMS) + [1.0, -1.0, 1.0])[:, None]
        return logp.sum() + (0.0 if entropy is None else entropy.sum()), reduce_partials(neutral, **present)[1]
    if reference or not has_kernel(logp):
        return policy_loss_reference(logp, advantages, scale, entropy=entropy, **arguments)
    total, partials = _PolicyLoss.apply(logp, entropy, advantages, scale, arguments)
    return total, reduce_partials(partials, **present)[1]


# ---------------------------------------------------------------- check


def check(device: str) -> None:
    """Every loss and estimator against the reference in fp64, values and gradients, with masked and extreme rows."""
    torch.manual_seed(0)
    logp, old, ref, rollout = (-3 * torch.rand(700, device=device) for _ in range(4))
    logp[::7] -= 3
    logp.requires_grad_()
    advantages, scale = torch.randn(700, device=device), torch.rand(700, device=device)
    scale[::5] = 0
    kwargs = dict(old_logp=old, ref_logp=ref, rollout_logp=rollout, importance_cap=2.0, kl_coef=0.1,
                  lengths=torch.tensor([100, 350, 250], device=device))  # fmt: skip
    for loss in LOSSES:
        for kl in KL_ESTIMATORS:
            ours, stats = policy_loss(logp, advantages, scale, loss=loss, kl=kl, **kwargs)
            wide = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in kwargs.items()}
            given = (x.double() for x in (logp, advantages, scale))
            exact, wanted = policy_loss_reference(*given, loss=loss, kl=kl, **wide)
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(stats, wanted, rtol=1e-5, atol=1e-4)
            (got,), (want,) = (torch.autograd.grad(x, logp) for x in (ours, exact))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    print("policy_loss: every loss and KL estimator, values and gradients equal fp64")
