"""Qwen3-VL, the other family: a tiny random one through loading, packing, decoding and evaluation."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_group, make_prompt

import evaluate
from model import DEMO_PROCESSOR, Policy, banned_ids, load_model, load_processor, mrope_positions, pack_groups, save_hf
from rollout import hf_rollout

SIZES = [(112, 84), (56, 56)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three layers, features of the first two vision blocks added to the first two language layers."""
    processor = load_processor(DEMO_PROCESSOR)
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5])
    config = transformers.Qwen3VLConfig(
        text_config=dict(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=32, intermediate_size=128, rope_parameters=rope,
                         max_position_embeddings=4096, tie_word_embeddings=True),
        vision_config=dict(depth=3, hidden_size=64, num_heads=2, intermediate_size=96, out_hidden_size=64, patch_size=14,
                           num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen3")
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_clips_are_refused_in_one_line(folder):
    model, _ = load_model(str(folder))
    with pytest.raises(ValueError, match="qwen3_vl: clips are shown to Qwen2.5-VL only"):
        mrope_positions([5, model.config.video_token_id], torch.tensor([[1, 2, 2]]), model.config, seconds=1.0)


def test_packed_log_probs_are_those_of_plain_transformers(folder):
    model, processor = load_model(str(folder))
    policy = Policy(model, banned_ids(processor, model))
    prompt, group = make_prompt(processor, "where is it", SIZES), make_group(policy, (5, 3))
    found = policy(pack_groups([prompt], [group], policy.config))[0].detach()
    plain = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()
    expected = []
    for c in group:
        ids = torch.tensor([prompt.expanded + c.token_ids])
        with torch.no_grad():
            logits = plain(input_ids=ids, pixel_values=prompt.pixels, image_grid_thw=prompt.grid, attention_mask=torch.ones_like(ids),
                           mm_token_type_ids=(ids == policy.config.image_token_id).int()).logits[0]  # fmt: skip
        rows = logits[len(prompt.expanded) - 1 : -1].masked_fill(policy.banned, float("-inf"))
        expected.append(rows.log_softmax(-1).gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_features_of_deeper_layers_matter_and_are_trained(folder):
    model, processor = load_model(str(folder))
    policy = Policy(model, banned_ids(processor, model))
    packed = pack_groups([make_prompt(processor, "x", SIZES)], [make_group(policy, (4,))], policy.config)
    before = policy(packed)[0]
    before.sum().backward()
    merger = policy.vision.deepstack_merger_list[1].linear_fc2.weight
    assert merger.grad.abs().max() > 0
    with torch.no_grad():
        merger.add_(torch.randn(merger.shape))
    assert (policy(packed)[0] - before).abs().max() > 1e-4


def test_decoding_has_the_log_probs_of_the_packed_pass_and_a_saved_copy_loads(folder, tmp_path):
    rollout, processor = hf_rollout(str(folder), device="cpu")
    prompts = [make_prompt(processor, "where is it", SIZES), make_prompt(processor, "no picture")]
    groups = rollout.generate(prompts, n=2, max_tokens=6, temperature=1.0, seed=0)
    packed = pack_groups(prompts, groups, rollout.policy.config)
    torch.testing.assert_close(rollout.policy(packed)[0].detach(), packed.rollout_logp, rtol=1e-4, atol=1e-4)
    save_hf(rollout.policy, processor, tmp_path)
    assert load_model(str(tmp_path))[0].config.model_type == "qwen3_vl"


def test_it_is_evaluated_like_the_others(folder, tmp_path):
    evaluate.main(evaluate.Config(model=str(folder), dataset="scenes:demo@val", limit=3, max_tokens=8, out=str(tmp_path), style="short",
                                  min_pixels=784, max_pixels=448 * 448, device="cpu"))  # fmt: skip
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 3
