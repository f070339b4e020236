"""kernels/: each operation against a plain computation of the same thing, values and gradients."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import logprob as logprob_module
from kernels.logprob import token_logprob, token_logprob_reference
from kernels.policy_loss import KL_ESTIMATORS, kl_penalty, policy_loss
from kernels.prefix_attention import Layout, hf_attention, prefix_attention, segment_attention

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_file_checks_itself_in_a_folder_of_its_own(tmp_path):
    """A kernel is copied into another project and runs there: `python FILE` compares it with its reference."""
    for file in (ROOT / "kernels").glob("*.py"):
        shutil.copy(file, tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert {"logprob.py", "policy_loss.py", "prefix_attention.py"} <= set(names)
    run_all = f"import runpy\nfor name in {names}: runpy.run_path(name, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run_all], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- prefix attention


def token_by_token(q, k, v, layout, scale):
    """Softmax of every single row over the columns it may see, written out."""
    out, first, begin = torch.empty_like(q), 0, layout.prompt_tokens  # all prompts, then all completions
    for prompt, completions in layout.groups:
        segments = [(first, first + prompt, first)]  # (first row, past the last, where its own context begins)
        for n in completions:
            segments.append((begin, begin + n, begin))
            begin += n
        for s, (start, past, own) in enumerate(segments):
            for row in range(start, past):
                columns = list(range(first, first + prompt)) * (s > 0) + list(range(own, row + 1))
                for head in range(q.shape[1]):
                    kv = head * k.shape[1] // q.shape[1]
                    weight = (k[columns, kv] @ q[row, head] * scale).softmax(0)
                    out[row, head] = weight @ v[columns, kv]
        first += prompt
    return out


LAYOUTS = {
    "one group": ((4, (3, 2)),),
    "G = 1": ((5, (6,)),),
    "one-token completions": ((3, (1, 1, 1)), (2, (1,))),
    "one-token prompt": ((1, (4, 1)),),
    "several groups": ((7, (2, 5, 1)), (1, (3,)), (6, (4, 4))),
}


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_prefix_attention_is_the_softmax_over_prompt_and_own_past(name, heads, kv_heads):
    layout, width = Layout(LAYOUTS[name], CPU), 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.tokens, h, width, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
               for h in (heads, kv_heads, kv_heads))  # fmt: skip
    expected = token_by_token(q, k, v, layout, 0.3)
    ours = prefix_attention(q, k, v, layout, scale=0.3)
    close(ours, expected, 1e-10)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), gradient), torch.autograd.grad(expected, (q, k, v), gradient)):
        close(a, b, 1e-10)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_calls_merged_by_log_sum_exp_are_one_softmax(name, monkeypatch):
    """The arithmetic of the GPU path (two calls, merged statistics, their backward), with dense stand-ins."""
    import kernels.prefix_attention as module

    layout, width = Layout(LAYOUTS[name], CPU), 8
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(layout.tokens, h, width, generator=generator, dtype=torch.float64).requires_grad_()
               for h in (4, 2, 2))  # fmt: skip
    gradient = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    expected = prefix_attention(q, k, v, layout, scale=0.4)
    wanted = torch.autograd.grad(expected, (q, k, v), gradient)
    monkeypatch.setattr(module, "_flash_can", lambda q: True)
    monkeypatch.setattr(module.torch.ops, "aten", DenseFlash)
    ours = prefix_attention(q, k, v, layout, scale=0.4)
    close(ours, expected, 1e-10)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), gradient), wanted):
        close(a, b, 1e-10)


class DenseFlash:
    """The variable-length flash calls of aten, forward and backward, written with dense matrices."""

    @staticmethod
    def _scores(q, k, bounds_q, bounds_k, causal, scale):
        """(heads, tq, tk), -inf between segments and, if causal, above the diagonal (aligned at the end)."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.full((q.shape[1], len(q), len(k)), -math.inf, dtype=q.dtype)
        for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
            part = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
            if causal:
                keep = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
                part = part.masked_fill(~keep, -math.inf)
            scores[:, a:b, c:d] = part
        return scores

    @staticmethod
    def _flash_attention_forward(q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, debug, *, scale):
        assert longest_q == max(bounds_q.diff()) and longest_k == max(bounds_k.diff())
        scores = DenseFlash._scores(q, k, bounds_q, bounds_k, causal, scale)
        lse = scores.logsumexp(-1)  # (heads, tq)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return (
            torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), v),
            lse,
            lse.new_zeros(1),
            lse.new_zeros(1),
            None,
        )

    @staticmethod
    def _flash_attention_backward(grad, q, k, v, out, lse, bounds_q, bounds_k, longest_q, longest_k, dropout, causal,
                                  seed, offset, *, scale):  # fmt: skip
        groups = q.shape[1] // k.shape[1]
        weight = (DenseFlash._scores(q, k, bounds_q, bounds_k, causal, scale) - lse[..., None]).exp()  # (heads, tq, tk)
        k_all, v_all = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        delta = (grad * out).sum(-1).T[..., None]  # (heads, tq, 1)
        ds = weight * (torch.einsum("qhd,khd->hqk", grad, v_all) - delta) * scale

        def to_kv(x):
            return x.unflatten(1, (k.shape[1], groups)).sum(2)

        return (torch.einsum("hqk,khd->qhd", ds, k_all), to_kv(torch.einsum("hqk,qhd->khd", ds, q)),
                to_kv(torch.einsum("hqk,qhd->khd", weight, grad)))  # fmt: skip


@pytest.mark.parametrize("bounds", [[0, 4, 8, 12], [0, 1, 7, 9], [0, 5]])
def test_segment_attention_looks_both_ways_and_stays_inside(bounds):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(bounds[-1], 3, 8, generator=generator) for _ in range(3))
    longest = max(b - a for a, b in zip(bounds, bounds[1:]))
    ours = segment_attention(q, k, v, torch.tensor(bounds, dtype=torch.int32), longest, scale=0.5)
    mask = torch.block_diag(*[torch.ones(b - a, b - a) for a, b in zip(bounds, bounds[1:])]).bool()
    weight = (torch.einsum("qhd,khd->hqk", q, k) * 0.5).masked_fill(~mask, -math.inf).softmax(-1)
    close(ours, torch.einsum("hqk,khd->qhd", weight, v))


def test_decoding_goes_through_a_dense_mask():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 8, generator=generator)
    k, v = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()[:, None, None, :]
    out, _ = hf_attention(None, q, k, v, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask, scale=0.3)
    close(out, expected.transpose(1, 2))


def test_a_layout_of_another_length_is_refused():
    q = torch.zeros(9, 2, 4)
    with pytest.raises(AssertionError, match="9 packed tokens, the layout says 8"):
        prefix_attention(q, q, q, Layout(((4, (4,)),), CPU), scale=1.0)


# ---------------------------------------------------------------- log-probs


def spiky(rows=37, width=24, vocabulary=101, seed=0, dtype=torch.float32):
    """Hidden states of very different sizes: some softmaxes are flat, some have one winner."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    hidden[::5] *= 8
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary - 11, (rows,), generator=generator)
    banned = torch.arange(vocabulary) >= vocabulary - 11
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, banned


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


# ---------------------------------------------------------------- the policy loss


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
