"""The vision tower as it runs on a GPU, against plain torch in fp32 on the CPU.

    python -m pytest -m gpu tests/test_model_gpu.py          seconds
"""

import copy

import pytest
import torch
from conftest import make_prompt

import model as model_module
from model import load_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
NOISE = 3e-2  # of bf16, through three blocks, relative to the norm
# Heads of 80 as in the published towers, columns that are no multiple of 8, two blocks by windows and one without.
VISION = dict(depth=3, hidden_size=160, num_heads=2, intermediate_size=340, fullatt_block_indexes=[2])


def relative(got, want):
    return float((got.detach().float().cpu() - want.detach()).norm() / want.detach().norm())


def test_features_and_gradients_of_the_vision_tower(monkeypatch):
    shape = copy.deepcopy(model_module.SHAPES["tiny"]) | {"vision": VISION}
    monkeypatch.setitem(model_module.SHAPES, "tiny", shape)
    plain, processor = load_policy("random:tiny", seed=5)
    fast, _ = load_policy("random:tiny", dtype=torch.bfloat16, device="cuda")
    fast.load_state_dict(plain.state_dict())
    plain.load_state_dict(fast.state_dict())  # the same weights after rounding
    assert fast.vision.blocks[0].mlp.forward.__func__.__qualname__.startswith("align_mlp"), "nothing to align in this shape"

    prompt = make_prompt(processor, "where", [(280, 196), (84, 112)])
    found = [policy.picture_features(prompt.pixels.to(policy.device), prompt.grid) for policy in (fast, plain)]
    assert relative(*found) < NOISE
    weight = torch.randn(found[1].shape, generator=torch.Generator().manual_seed(1))
    for features in found:
        (features.float() * weight.to(features.device)).sum().backward()
    wanted = dict(plain.vision.named_parameters())
    for name, parameter in fast.vision.named_parameters():
        assert relative(parameter.grad, wanted[name].grad) < NOISE, name
