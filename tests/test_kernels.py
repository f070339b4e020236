"""kernels/ as a folder, and prefix attention; the other operations have a test file each.

Tests marked `triton` call a kernel. On a GPU they run like all others; here they run once more, under the interpreter.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import INTERPRETED, close

from kernels.prefix_attention import Layout, hf_attention, prefix_attention, segment_attention

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
ALONE = ["policy_loss", "prefix_attention", "row_logprob"]  # files that import no other of ours
TOGETHER = ["logprob", "linear_policy_loss"]


def test_every_file_checks_itself_in_a_folder_of_its_own(tmp_path):
    """A kernel is copied into another project and runs there: alone, or with the files it imports, as any package."""
    assert {file.stem for file in (ROOT / "kernels").glob("*.py")} == {*ALONE, *TOGETHER, "bench"}
    (tmp_path / "elsewhere").mkdir()
    for name in ALONE + TOGETHER:
        shutil.copy(ROOT / "kernels" / f"{name}.py", tmp_path / "elsewhere")
    run_all = f"""import runpy
for name in {ALONE}: runpy.run_path(f"elsewhere/{{name}}.py", run_name="__main__")
for name in {TOGETHER}: runpy.run_module(f"elsewhere.{{name}}", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", run_all], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_the_triton_kernels_pass_under_the_interpreter():
    """TRITON_INTERPRET has to be set before the first import, hence a process of its own: fp32, small blocks, no GPU."""
    pytest.importorskip("triton")
    files = [f"tests/test_{name}.py" for name in ("row_logprob", "logprob", "policy_loss", "linear_policy_loss")]
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-W", "ignore", "-m", "triton"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


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
