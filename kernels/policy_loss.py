"""The clipped policy-gradient loss of GRPO with its KL penalty, one number a token, and what to log about it.

For a token with log-prob `logp` now, `old` when it was sampled, advantage A and scale s (mask x 1/normaliser):

    ratio = exp(clamp(logp - old, -20, 20))
    l     = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))
    l     = min(l, -A dual_clip)                    where A < 0: a bad token cannot push without bound
    loss  = sum over tokens of  s w l + s kl_coef kl(logp, ref)
    w     = min(exp(old - rollout), cap)            detached; corrects for an engine that rounds differently

SpatialThinker's published loss is this with clips 0.2 / 0.3 / 3.0 and kl_coef 0.01 on k3 (spec 4.2; the constants are
EasyR1's). Every normalisation (token mean, sequence mean) is a different `scale`, formed by the caller with counts that
are global over ranks and micro-batches, so that no way of splitting a batch changes the gradient.

KL estimators of KL(policy || reference), with q = ref - logp:
    k1 = -q      k2 = q^2 / 2      k3 = exp(q) - q - 1 clamped to [-10, 10]      abs = |q|
    chi2 = clamp((exp(q) - 1)^2, 0, 20)

This file is the reference; a Triton kernel that does one launch will come behind `policy_loss`.
"""

import math

import torch
from torch import Tensor

KL_ESTIMATORS = ("none", "k1", "k2", "k3", "abs", "chi2")


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


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    scale: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    importance_cap: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float = 3.0,
    kl: str = "none",
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All inputs (M,) fp32, one number a completion token -> loss (), statistics {name: ()}.

    old_logp None means one optimiser step a rollout: the current log-prob, detached, so every ratio is 1 and the
    gradient is REINFORCE's. importance_cap 0 turns the rollout correction off; dual_clip 0 turns that clip off.
    Statistics whose name ends in `_sum` are sums over tokens with scale > 0 (divide by `token_sum`), those in `_max`
    and `_min` extremes; they are detached and stay on the device.
    """
    for name, x in dict(advantages=advantages, scale=scale, old=old_logp, ref=ref_logp, rollout=rollout_logp).items():
        assert x is None or x.shape == logp.shape, f"{name} is {tuple(x.shape)}, log-probs are {tuple(logp.shape)}"
    assert kl == "none" or ref_logp is not None, f"KL estimator {kl} needs reference log-probs"
    old = logp.detach() if old_logp is None else old_logp

    log_ratio = (logp - old).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    # The clip happens in log space, as upstream does: the same value, and no gradient through a clipped exp.
    clipped = log_ratio.clamp(math.log(1.0 - clip_low), math.log(1.0 + clip_high)).exp()
    plain, held = -advantages * ratio, -advantages * clipped
    loss = torch.maximum(plain, held)
    if dual_clip > 0:
        dual = torch.where(advantages < 0, -advantages * dual_clip, torch.full_like(loss, float("inf")))
        is_dual = dual < loss
        loss = torch.minimum(loss, dual)
    else:
        is_dual = torch.zeros_like(loss, dtype=torch.bool)

    weight = None
    if rollout_logp is not None:
        weight = (old - rollout_logp).detach().clamp(-20.0, 20.0).exp()  # raw; logged before it is capped
        if importance_cap > 0:
            loss = loss * weight.clamp(max=importance_cap)

    total = (loss * scale).sum()
    live = scale > 0
    stats = {"token_sum": live.sum(), "policy_loss_sum": (loss * scale).sum()}
    if kl != "none":
        penalty = kl_penalty(logp, ref_logp, kl)
        total = total + kl_coef * (penalty * scale).sum()
        stats["kl_sum"] = (penalty * live).sum()
    with torch.no_grad():
        stats["clip_high_sum"] = (live & (plain < held) & (advantages > 0)).sum()
        stats["clip_low_sum"] = (live & (plain < held) & (advantages < 0)).sum()
        stats["clip_dual_sum"] = (live & is_dual).sum()
        stats["old_kl_sum"] = (-log_ratio * live).sum()
        stats["ratio_max"] = torch.where(live, ratio, 1.0).amax()
        stats["ratio_min"] = torch.where(live, ratio, 1.0).amin()
        if weight is not None:
            stats["importance_sum"] = (weight * live).sum()
            stats["importance_capped_sum"] = (live & (weight > importance_cap)).sum() if importance_cap > 0 else live.sum() * 0
            stats["importance_max"] = torch.where(live, weight, 1.0).amax()
    return total, {name: value.detach().float() for name, value in stats.items()}


def check() -> None:
    """On-policy the gradient is REINFORCE's, and a clipped good token has none."""
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages, scale = torch.tensor([1.0, -0.5, 2.0]), torch.full((3,), 1 / 3)
    loss, _ = policy_loss(logp, advantages, scale)
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(grad, -advantages * scale)
    loss, stats = policy_loss(logp, advantages, scale, old_logp=logp.detach() - torch.tensor([0.5, 0.0, 0.0]))
    (grad,) = torch.autograd.grad(loss, logp)
    assert grad[0] == 0 and stats["clip_high_sum"] == 1, (grad, stats)


if __name__ == "__main__":
    check()
    print("policy_loss: on-policy gradient and clip")
