"""Every Triton kernel compiled for sm_90 ahead of time, on any machine: no register spills, shared memory that fits.

The interpreter knows neither registers nor shared memory, and a kernel that spills is merely slow: nobody would see it.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from kernels import policy_loss, row_logprob

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted functions do not compile")

SHARED = 227 * 1024  # bytes one block may use on Hopper
FLOAT = "*fp32"
SPILL = """
import triton, triton.language as tl
@triton.jit
def spill(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(x + i, tl.exp(v / tl.sum(v, axis=0)) + tl.cumsum(v, axis=0))
"""


def compile_for_hopper(function, types, constants, warps, aligned=()):
    """types {argument: "*fp32" | "i32" | ...}, the rest are constants -> (registers, spilled bytes, shared bytes)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, {(names.index(name),): v for name, v in constants.items()}, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_90a", "-", "-o", os.devnull]
    done = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    assert spills, f"ptxas says nothing about spills: {done.stderr}"
    return registers, sum(spills), kernel.metadata.shared


ROW = dict(logits="*bf16", stride="i32", targets="*i64", banned="*u8", columns="i32", inverse_temperature="fp32")
STATS = ROW | dict(logp_out=FLOAT, lse_out=FLOAT, entropy_out=FLOAT)
DZ = ROW | dict.fromkeys(("logp", "lse", "entropy", "dlogp", "dentropy"), FLOAT)
DZ |= dict(out="*bf16", out_stride="i32", first="i32")
ROW_FLAGS = dict(IGNORE=row_logprob.IGNORE, BLOCK=row_logprob.BLOCK)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("banned", [True, False])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
def test_row_kernels_compile_without_spills(dtype, banned, aligned):
    whole = ["logits", "banned", "stride", "columns", "out", "out_stride", "first"] if aligned else []
    dz = row_logprob._row_dz
    for function, types, flags in (
        (row_logprob._row_stats, STATS, {}), (dz, DZ, dict(ENTROPY=True)), (dz, DZ, dict(ENTROPY=False)),
        (dz, DZ | dict(out=dtype), dict(ENTROPY=True)),
    ):  # fmt: skip
        registers, spilled, shared = compile_for_hopper(
            function, types | dict(logits=dtype), ROW_FLAGS | flags | dict(BANNED=banned), 8,
            [name for name in whole if name in function.arg_names],
        )  # fmt: skip
        assert spilled == 0 and shared <= SHARED
        assert not aligned or registers <= 85, "three rows share an SM: fewer, and loads stand uncovered"


LOSS = dict.fromkeys("logp old log_ratio ref rollout advantages scale entropy dpolicy dkl partials".split(), FLOAT)
LOSS |= dict(count="i32") | dict.fromkeys("cap log_low log_high clip_high dual kl_coef entropy_coef".split(), "fp32")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kl", policy_loss.KL_ESTIMATORS)
@pytest.mark.parametrize("loss", policy_loss.LOSSES)
def test_the_policy_loss_compiles_without_spills(loss, kl, given):
    flags = dict(LOSS=loss, KL=kl, OLD=given, ROLLOUT=given, ENTROPY=given, BLOCK=policy_loss.BLOCK)
    _, spilled, shared = compile_for_hopper(policy_loss._policy_loss, LOSS, flags, 4)
    assert spilled == 0 and shared <= SHARED


def test_a_kernel_that_spills_is_seen(tmp_path):
    """The judge itself: one warp that holds 8,192 numbers has to spill."""
    import importlib.util

    (tmp_path / "spill.py").write_text(SPILL)
    spec = importlib.util.spec_from_file_location("spill", tmp_path / "spill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert compile_for_hopper(module.spill, dict(x=FLOAT), dict(BLOCK=8192), 1)[1] > 0
