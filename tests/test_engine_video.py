"""What vLLM's own processor and positions make of Prompt.engine_media: no engine is started.

python -m pytest -m slow tests/test_engine_video.py
"""

from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset import encode

MODEL = Path(__file__).resolve().parent.parent / "assets" / "demo-model"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vllm_side():
    pytest.importorskip("vllm")
    from transformers import AutoProcessor
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = ModelConfig(model=str(MODEL), limit_mm_per_prompt={"video": 1})
    engine = MULTIMODAL_REGISTRY.create_processor(config)
    return SimpleNamespace(processor=AutoProcessor.from_pretrained(MODEL), engine=engine, config=config.hf_config)


def clip_row(count, fps):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (96, 160, 3), np.uint8)) for _ in range(count)]
    return {"id": "v", "images": [], "video": frames, "fps": fps, "question": "how many cubes are there", "options": [],
            "kind": "mra", "size": None, "map": None, "problem": None, "style": None, "meta": {}}  # fmt: skip


def through_vllm(side, prompt, given):
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    items = side.engine.info.parse_mm_data(given["multi_modal_data"])
    inputs = ProcessorInputs(prompt=prompt.ids, mm_data_items=items, hf_processor_mm_kwargs=given["mm_processor_kwargs"])
    return side.engine.apply(inputs, TimingContext(enabled=False))


def positions(prompt, config):
    """(3, P) as docs/video.md has them."""
    t, h, w = prompt.grid[0].tolist()
    h, w, at = h // 2, w // 2, prompt.ids.index(config.video_token_id)
    time = (torch.arange(t) * (prompt.seconds * config.vision_config.tokens_per_second)).long()
    clip = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1) + at
    after = torch.arange(len(prompt.ids) - at - 1) + int(clip.max()) + 1
    return torch.cat([torch.arange(at).expand(3, -1), clip, after.expand(3, -1)], dim=1)


@pytest.mark.parametrize("count, fps", [(16, 2.0), (40, 1.1), (300, 29.97), (5, 1.0), (9, 20.0)])
def test_the_engine_sees_what_the_trainer_sees(vllm_side, count, fps):
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

    prompt = encode(clip_row(count, fps), vllm_side.processor, style="spacer")
    seen = through_vllm(vllm_side, prompt, prompt.engine_media)
    item = seen["mm_kwargs"]["video"][0]
    assert seen["prompt_token_ids"] == prompt.expanded and item["video_grid_thw"].data.tolist() == prompt.grid[0].tolist()
    assert item["pixel_values_videos"].data.float().numpy() == pytest.approx(prompt.pixels.numpy(), abs=0.02)  # bfloat16
    assert float(item["second_per_grid_ts"].data) == prompt.seconds
    model = SimpleNamespace(config=vllm_side.config)
    model.iter_mm_grid_thw = MethodType(Model.iter_mm_grid_thw, model)
    feature = SimpleNamespace(modality="video", mm_position=seen["mm_placeholders"]["video"][0], data=item)
    theirs, _ = Model.get_mrope_input_positions(model, prompt.expanded, [feature])
    assert torch.equal(theirs, positions(prompt, vllm_side.config))


def test_without_metadata_the_engine_takes_24_frames_a_second(vllm_side):
    """The reason for Prompt.engine_media: when this fails, vLLM reads the rate elsewhere, and it can become simpler."""
    prompt = encode(clip_row(16, 2.0), vllm_side.processor, style="spacer")
    given = prompt.engine_media | {"mm_processor_kwargs": {"fps": prompt.fps}}
    item = through_vllm(vllm_side, prompt, given)["mm_kwargs"]["video"][0]
    assert prompt.seconds == 1 and float(item["second_per_grid_ts"].data) == pytest.approx(2 / 24, rel=0.01)
