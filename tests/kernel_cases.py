"""What the kernel tests share: inputs that a careless softmax gets wrong, and where the Triton kernels can run."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def triton_only(test):
    """For tests that call a kernel: on a GPU as it is; elsewhere test_kernels.py runs them all under the interpreter."""
    here = DEVICE == "cuda" or INTERPRETED
    return pytest.mark.triton(pytest.mark.skipif(not here, reason="needs a GPU or TRITON_INTERPRET=1")(test))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def double(*tensors):
    """fp64 leaves of the same values: gradients that went back through a cast would be rounded again."""
    return [x.detach().double().requires_grad_() for x in tensors]


def spiky(rows=37, width=24, vocabulary=101, seed=0, dtype=torch.float32, device="cpu"):
    """Hidden states of very different sizes: some softmaxes are flat, some have one winner. The last 11 ids are banned."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    hidden[::5] *= 8
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary - 11, (rows,), generator=generator)
    banned = torch.arange(vocabulary) >= vocabulary - 11
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(device), banned.to(device)
