"""Log-probability of a chosen token and the entropy of its distribution, row by row over logits that exist already.

    z[m, v]    = logits[m, v] / temperature                   banned v: -inf
    lse[m]     = log sum_v exp(z[m, v])          p[m, v] = exp(z[m, v] - lse[m])
    logp[m]    = z[m, target[m]] - lse[m]
    entropy[m] = - sum_v p[m, v] log p[m, v]
    d / d logits[m, v] = (dlogp[m] (1[v = target] - p) - dentropy[m] p (log p + entropy[m])) / temperature

Two kernels that read every logit once: `row_stats` (one program a row) and `row_dz` (the gradient, into a buffer of the
caller's choice). `logits_logprob` joins them for logits that a model returned; kernels/logprob.py and
kernels/linear_policy_loss.py run them on one chunk of logits at a time. A row with target IGNORE gives 0, 0 and no
gradient.

What plain fp32 gets wrong and these do not:
- a confident token: z_t - lse is exactly 0 from a margin of 16, where the truth is -1e-7. The sum is kept without the
  target, and logp = -softplus(log(sum of the others) - z_t); the gradient at the target is -expm1(logp), not 1 - p.
- the entropy of a peaked row: lse - sum p z cancels. The weighted sum is kept around the running maximum.
- rows x V above 2^31: offsets are 64 bit.

Copy the file and it runs: it needs torch, and Triton for the kernels. Without a GPU the plain torch functions run;
TRITON_INTERPRET=1, set before the import, runs the kernels on a CPU (fp32 only: the interpreter cannot do bf16).
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system (macOS, Windows): the reference runs
    triton = None

IGNORE = -100  # torch's own mark of a row without a target
BLOCK = 4096  # columns at a time: 16 a thread at 8 warps, so that several rows share an SM and hide each other's loads
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def has_kernel(x: Tensor) -> bool:
    """Do the Triton kernels run on this tensor?"""
    return triton is not None and (x.is_cuda or INTERPRETED)


# ---------------------------------------------------------------- reference


def logits_logprob_reference(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None, upcast: bool = True
) -> tuple[Tensor, Tensor]:
    """Plain torch with plain autograd; arguments and results as `logits_logprob`.

    `upcast=True` computes in fp32 (fp64 for fp64 logits), the truth to judge by; `upcast=False` in the logits' dtype,
    the error that bf16 arithmetic makes.
    """
    if upcast:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits / temperature  # (M, V)
    if banned is not None:
        logits = logits.masked_fill(banned, float("-inf"))
    # log_softmax subtracts the maximum first: `logit - logsumexp` of logits in the thousands loses four digits, and
    # so does an entropy formed as lse - sum(p * logit).
    logps = torch.log_softmax(logits, dim=-1)  # (M, V)
    probabilities = logps.exp()
    # 0 * -inf is nan for banned tokens; they carry no probability, so any finite value will do.
    entropy = -(probabilities * logps.masked_fill(probabilities == 0, 0.0)).sum(-1)  # (M,)
    ignored = targets == IGNORE
    logp = logps.gather(-1, targets.masked_fill(ignored, 0)[:, None]).squeeze(-1)
    return logp.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


# ---------------------------------------------------------------- kernels

if triton is not None:

    @triton.jit
    def _log1p(x):
        # log(1 + x) without libdevice, which the interpreter lacks; exact where 1 + x rounds x away
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))

    @triton.jit
    def _expm1(x):
        # exp(x) - 1 without libdevice: the rounding of u cancels in (u - 1) / log(u)
        u = tl.exp(x)
        near = (u != 1.0) & (x > -1.0)  # further down u - 1 is exact enough, and a denormal u has no digits left for log
        return tl.where(near, (u - 1.0) * (x / tl.log(tl.where(near, u, 0.5))), tl.where(u == 1.0, x, u - 1.0))

    @triton.jit
    def _row_stats(logits, stride, targets, banned, logp_out, lse_out, entropy_out, columns, inverse_temperature,
                   IGNORE: tl.constexpr, BANNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # rows x stride passes 2^31
        target = tl.load(targets + row).to(tl.int32)
        top = -float("inf")  # running maximum; not 0, or a row of all-negative logits underflows
        others = 0.0  # sum of exp(z - top) over all but the target
        weighted = 0.0  # sum of exp(z - top) (z - top) over the same, for the entropy
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            live = column < columns
            z = tl.load(logits + row * stride + column, mask=live, other=-float("inf")).to(tl.float32)
            z *= inverse_temperature
            if BANNED:
                z = tl.where(tl.load(banned + column, mask=live, other=1) != 0, -float("inf"), z)
            new = tl.maximum(top, tl.max(z, axis=0))
            shift = tl.where(new == -float("inf"), 0.0, new)  # nothing but banned columns so far
            moved = tl.where(top == -float("inf"), 0.0, top - shift)  # <= 0
            delta = tl.where(z == -float("inf"), 0.0, z - shift)
            e = tl.where(z == -float("inf"), 0.0, tl.exp(delta))
            e = tl.where(column == target, 0.0, e)
            weighted = (weighted + moved * others) * tl.exp(moved) + tl.sum(e * delta, axis=0)
            others = others * tl.exp(moved) + tl.sum(e, axis=0)
            top = new
        allowed = (target >= 0) & (target < columns)
        z_target = tl.load(logits + row * stride + target, mask=allowed, other=-float("inf")).to(tl.float32)
        z_target *= inverse_temperature
        if BANNED:
            z_target = tl.where(tl.load(banned + target, mask=allowed, other=1) != 0, -float("inf"), z_target)
        # log p = -softplus(gap), gap = log(others) + top - z_target
        gap = tl.log(others) + top - z_target
        logp = -(tl.maximum(gap, 0.0) + _log1p(tl.exp(-tl.abs(gap))))
        own_delta = tl.where(z_target == -float("inf"), 0.0, z_target - top)
        own = tl.where(z_target == -float("inf"), 0.0, tl.exp(own_delta))
        total = others + own
        # entropy = log(total) - sum e delta / total; log(total) through the target's own excess when that is the maximum
        log_total = tl.where(own == 1.0, _log1p(others), tl.log(total))
        entropy = log_total - (weighted + own * own_delta) / total
        ignored = target == IGNORE
        tl.store(logp_out + row, tl.where(ignored, 0.0, logp))
        tl.store(entropy_out + row, tl.where(ignored, 0.0, entropy))
        tl.store(lse_out + row, top + log_total)

    @triton.jit
    def _row_dz(logits, stride, targets, banned, logp, lse, entropy, dlogp, dentropy, out, out_stride, first, columns,
                inverse_temperature, IGNORE: tl.constexpr, BANNED: tl.constexpr, ENTROPY: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        live = column < columns
        target = tl.load(targets + row).to(tl.int32)
        g = tl.load(dlogp + row) * inverse_temperature
        g = tl.where(target == IGNORE, 0.0, g)
        h = 0.0
        if ENTROPY:
            h = tl.where(target == IGNORE, 0.0, tl.load(dentropy + row) * inverse_temperature)
        dz = tl.zeros((BLOCK,), tl.float32)
        if (g != 0.0) | (h != 0.0):  # a row of no weight is not read; nan counts as weight
            z = tl.load(logits + row * stride + column, mask=live, other=-float("inf")).to(tl.float32)
            log_p = z * inverse_temperature - tl.load(lse + row)
            if BANNED:
                log_p = tl.where(tl.load(banned + first + column, mask=live, other=1) != 0, -float("inf"), log_p)
            p = tl.exp(log_p)
            dz = tl.where(column + first == target, -g * _expm1(tl.load(logp + row)), -g * p)
            if BANNED:  # also where the target itself is banned
                dz = tl.where(log_p == -float("inf"), 0.0, dz)
            if ENTROPY:
                dz -= tl.where(p == 0.0, 0.0, h * p * (log_p + tl.load(entropy + row)))  # 0 x -inf where banned
        tl.store(out + row * out_stride + column, dz.to(out.dtype.element_ty), mask=live)


# ---------------------------------------------------------------- wrappers


def _check(logits: Tensor, targets: Tensor, temperature: float, banned: Tensor | None) -> None:
    rows = len(logits)
    assert logits.ndim == 2 and logits.stride(1) == 1, f"logits {tuple(logits.shape)}, {logits.stride()}: whole rows"
    assert logits.dtype in (torch.float32, torch.bfloat16, torch.float16), f"logits {logits.dtype}"
    assert targets.shape == (rows,) and targets.dtype == torch.int64, f"targets {tuple(targets.shape)} {targets.dtype}"
    assert targets.is_contiguous() and targets.device == logits.device, f"targets {targets.device}, logits {logits.device}"
    assert banned is None or (banned.dtype == torch.bool and banned.is_contiguous()), "banned is a whole (V,) bool mask"
    assert temperature > 0, f"temperature {temperature}: log-probs of greedy decoding are those at temperature 1"


def row_stats(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (M, V) fp32/bf16/fp16, targets (M,) int64, banned (V,) bool or None -> logp, lse, entropy, each (M,) fp32.

    Not differentiable. A target of IGNORE gives logp 0 and entropy 0; one that is banned or outside the vocabulary has
    probability 0, logp -inf: checking it here would stop the GPU. Needs a GPU or the interpreter.
    """
    _check(logits, targets, temperature, banned)
    assert banned is None or len(banned) == logits.shape[1], f"banned mask {tuple(banned.shape)}, V {logits.shape[1]}"
    rows, columns = logits.shape
    logp, lse, entropy = torch.empty(3, rows, device=logits.device, dtype=torch.float32)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(columns))
        _row_stats[(rows,)](
            logits, logits.stride(0), targets, targets if banned is None else banned.view(torch.uint8), logp, lse, entropy,
            columns, 1.0 / temperature, IGNORE=IGNORE, BANNED=banned is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return logp, lse, entropy


def row_dz(
    logits: Tensor,
    targets: Tensor,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None = None,
    *,
    out: Tensor,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Gradient by the logits, written to `out` (M, V), any float dtype, and returned.

    logp, lse, entropy (M,) are what `row_stats` gave; dlogp and dentropy (M,) the gradients by logp and entropy, None
    for no entropy term. `out` may be `logits` itself, overwritten; another dtype in the same memory would be a race.
    `logits` may hold only the columns from `first` on of a wider row: targets and the mask count from column 0.
    """
    _check(logits, targets, temperature, banned)
    rows, columns = logits.shape
    for name, x in dict(logp=logp, lse=lse, entropy=entropy, dlogp=dlogp, dentropy=dentropy).items():
        ok = x is None or (x.shape == (rows,) and x.dtype == torch.float32 and x.is_contiguous())
        assert ok, f"{name} must be ({rows},) contiguous fp32"
    assert out.shape == logits.shape and out.stride(1) == 1, f"out {tuple(out.shape)}, logits {tuple(logits.shape)}"
    apart = out.data_ptr() != logits.data_ptr()
    assert apart or out.dtype == logits.dtype, "another dtype in the logits' own memory is a race"
    assert banned is None or len(banned) >= first + columns, f"banned mask {tuple(banned.shape)}, V {first + columns}"
    if rows:
        block = min(BLOCK, triton.next_power_of_2(columns))
        _row_dz[(rows, triton.cdiv(columns, block))](
            logits, logits.stride(0), targets, targets if banned is None else banned.view(torch.uint8), logp, lse, entropy,
            dlogp, dlogp if dentropy is None else dentropy, out, out.stride(0), first, columns, 1.0 / temperature,
            IGNORE=IGNORE, BANNED=banned is not None, ENTROPY=dentropy is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out


class _LogitsLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, banned):
        ctx.set_materialize_grads(False)
        logp, lse, entropy = row_stats(logits, targets, temperature=temperature, banned=banned)
        ctx.save_for_backward(logits, targets, banned, logp, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        logits, targets, banned, logp, lse, entropy = ctx.saved_tensors
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        out = torch.empty_like(logits)
        row_dz(logits, targets, logp, lse, entropy, dlogp, dentropy, out=out, temperature=ctx.temperature, banned=banned)
        return out, None, None, None


def logits_logprob(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None, reference: bool = False
) -> tuple[Tensor, Tensor]:
    """logits (M, V), targets (M,) int64 or IGNORE, banned (V,) bool or None -> logp (M,), entropy (M,), fp32.

    Differentiable in the logits through both; the gradient has their dtype, and the logits are kept for it. SFT's loss
    is -logp.sum() / count. `reference=True`, or no GPU: plain torch.
    """
    if reference or not has_kernel(logits):
        return logits_logprob_reference(logits, targets, temperature=temperature, banned=banned)
    return _LogitsLogprob.apply(logits, targets, temperature, banned)


# ---------------------------------------------------------------- check and bench


def check(device: str) -> None:
    """Kernels against the reference in fp64: spiky and shifted rows, a banned tail, an ignored row, an odd vocabulary."""
    torch.manual_seed(0)
    logits = torch.randn(9, 1001, device=device) * torch.tensor([1, 30, 3] * 3, device=device)[:, None]
    logits[3] -= 400
    logits.requires_grad_()
    targets = torch.randint(990, (9,), device=device)
    targets[4] = IGNORE
    banned = torch.arange(1001, device=device) >= 990
    ours = logits_logprob(logits, targets, temperature=0.7, banned=banned)
    exact = logits_logprob_reference(logits.double(), targets, temperature=0.7, banned=banned)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        (got,), (want,) = (torch.autograd.grad(x.sum(), logits, retain_graph=True) for x in (a, b))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def bench(rows: int = 8192, columns: int = 151_936) -> None:
    """Share of the copy bandwidth that each kernel reaches, on bf16 and on fp32 logits."""
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).to(dtype)
        targets = torch.randint(columns, (rows,), device="cuda")
        stats, out = row_stats(logits, targets), torch.empty_like(logits, dtype=torch.bfloat16)
        dlogp = torch.ones(rows, device="cuda")
        runs = {
            "copy": (lambda: out.copy_(logits), logits.itemsize + 2),
            "row_stats": (lambda: row_stats(logits, targets), logits.itemsize),
            "row_dz": (lambda: row_dz(logits, targets, *stats, dlogp, out=out), logits.itemsize + 2),
            "row_dz with entropy": (lambda: row_dz(logits, targets, *stats, dlogp, dlogp, out=out), logits.itemsize + 2),
        }
        for name, (run, size) in runs.items():
            milliseconds = triton.testing.do_bench(run, return_mode="median")
            print(f"{name}, {dtype}: {milliseconds:.3f} ms, {rows * columns * size / milliseconds / 1e9:.2f} TB/s")


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    print("row_logprob: values and gradients equal fp64")
    if device == "cuda":
        bench()
