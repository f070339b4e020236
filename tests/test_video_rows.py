"""Rows with a clip: from JSONL and from SpaceR-151k's records, their prompts, and what encode() makes of them.

python -m pytest tests/test_video_rows.py
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import new_policy

from data.dataset import encode, encode_rows, load_rows, shuffled_clip
from data.prompts import FORMS, build_messages, build_prompt
from data.spacer_rows import read_maps
from model import mrope_positions, pack_groups
from rewards import PROBLEM_TYPES, parse_map, spacer_reward
from rollout import HFRollout
from video_fixtures import film

PLAN = {"chair": [[1, 1], [9, 9]], "trash can": [[0, 9]]}
REAL = Path("/work/shared/realdata/vsi/scene_47334096_frames")


@pytest.fixture(autouse=True)
def clips(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAL_GRPO_CLIPS", str(tmp_path / "clips"))
    read_maps.cache_clear()


def frames(count=4, size=(112, 84)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)) for _ in range(count)]


def make_row(**changes):
    row = {"id": "v1", "source": "test", "category": "", "images": [], "video": frames(), "fps": 2, "span": None,
           "question": "How many chairs are there?", "options": [], "gold": "2", "kind": "mra", "size": None, "scene": None,
           "map": PLAN, "problem": None, "style": None, "meta": {}}  # fmt: skip
    return {**row, **changes}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---- encode ----


def test_a_clip_becomes_one_placeholder_and_its_patches(tiny):
    prompt = encode(make_row(), tiny.processor, style="spacer")
    video = tiny.processor.video_token_id
    assert prompt.ids.count(video) == 1 and tiny.processor.image_token_id not in prompt.expanded
    t, h, w = prompt.grid[0].tolist()
    assert (t, h, w) == (2, 20, 28) and prompt.grid.shape == (1, 3)  # 4 frames of 392 x 280
    assert prompt.expanded.count(video) == t * h * w // 4 and len(prompt.pixels) == t * h * w
    at = prompt.ids.index(video)
    assert prompt.expanded == prompt.ids[:at] + [video] * (t * h * w // 4) + prompt.ids[at + 1 :]
    assert (prompt.fps, prompt.seconds) == (2, 1.0) and [frame.size for frame in prompt.images] == [(392, 280)] * 4
    pictures = encode(make_row(images=frames(1), video=None, map=None), tiny.processor, style="spacer")
    assert pictures.fps is None and pictures.ids.count(tiny.processor.image_token_id) == 1


def test_the_processor_neither_samples_nor_resizes_again(tiny):
    prompt = encode(make_row(), tiny.processor, style="spacer")
    tool = tiny.processor.video_processor
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tool.image_mean, tool.image_std))
    pixels = torch.from_numpy(np.stack(prompt.images)).permute(0, 3, 1, 2)  # (F, C, H, W)
    pixels = (pixels / 255 - mean) / std
    first = torch.stack([pixels[0, :, :14, :14], pixels[1, :, :14, :14]], dim=1)  # (C, temporal, patch, patch)
    assert torch.allclose(prompt.pixels[0], first.flatten(), atol=1e-4)


def test_seconds_follow_the_sampled_rate_and_odd_clips_are_padded(tiny):
    slow = encode(make_row(video=frames(41), fps=1.0), tiny.processor, style="spacer")
    assert slow.seconds == pytest.approx(2 * 41 / 16, rel=2**-8) and slow.grid[0, 0] == 8
    assert slow.seconds == float(torch.tensor(slow.seconds, dtype=torch.bfloat16)) and slow.fps * slow.seconds == 2
    odd = encode(make_row(video=frames(9), fps=1.0), tiny.processor, style="spacer", frame_rule="eval")
    assert len(odd.images) == 9 and odd.grid[0, 0] == 5 and odd.images[0].size == (112, 84)


def test_a_shuffled_clip_has_the_same_frames_in_another_order(tiny):
    prompt = encode(make_row(video=frames(16)), tiny.processor, style="spacer")
    other = shuffled_clip(prompt, tiny.processor, seed=1)
    assert other.expanded == prompt.expanded and torch.equal(other.grid, prompt.grid) and other.seconds == prompt.seconds
    places = [[frame.tobytes() for frame in prompt.images].index(frame.tobytes()) for frame in other.images]
    assert places != sorted(places) and sorted(places) == list(range(16))
    again = shuffled_clip(prompt, tiny.processor, seed=1)
    assert torch.equal(again.pixels, other.pixels) and not torch.equal(other.pixels, prompt.pixels)


def test_prompts_are_counted_without_pixels(tiny):
    rows = [make_row(), make_row(id="v2", video=frames(9), fps=3), make_row(id="v3", video="none.mp4")]
    for rule in ("train", "eval"):
        lengths = [len(encode(row, tiny.processor, style="spacer_map", frame_rule=rule).expanded) for row in rows[:2]]
        kept, counts = encode_rows(rows, tiny.processor, style="spacer_map", max_prompt_tokens=max(lengths), frame_rule=rule,
                                   verbose=False)  # fmt: skip
        assert [row["id"] for row in kept] == ["v1", "v2"] and counts == {"kept": 2, "overlong": 0, "broken": 1}
        kept, counts = encode_rows(rows, tiny.processor, style="spacer_map", max_prompt_tokens=max(lengths) - 1,
                                   frame_rule=rule, verbose=False)  # fmt: skip
        assert counts["overlong"] == sum(length == max(lengths) for length in lengths)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real frames here")
def test_a_real_scene(tiny):
    prompt = encode(make_row(video=str(REAL), fps=1), tiny.processor, style="spacer_map")
    assert len(prompt.images) == 16 and prompt.grid.tolist() == [[8, 26, 20]] and prompt.seconds == pytest.approx(3.5)


# ---- rows from files ----


def test_video_rows_from_jsonl(tmp_path):
    film(tmp_path / "a.mp4")
    frames(1)[0].save(tmp_path / "f.png")
    rows = load_rows(write(tmp_path / "rows.jsonl", [
        {"video": "a.mp4", "span": [0.5, 2], "question": "How many?", "gold": 2, "kind": "mra", "map": PLAN},
        {"video": ["f.png", "f.png"], "fps": 1, "question": "What is it?", "gold": "lamp"},
        {"images": ["f.png"], "question": "What is it?", "gold": "lamp"},
    ]))  # fmt: skip
    assert rows[0]["video"] == str(tmp_path / "a.mp4") and rows[0]["span"] == (0.5, 2) and rows[0]["map"] == PLAN
    assert rows[1]["video"] == [str(tmp_path / "f.png")] * 2 and rows[1]["fps"] == 1 and "video" not in rows[2]


@pytest.mark.parametrize("record, message", [
    ({"video": 3}, "the video is '3'"), ({"video": "a.mp4", "fps": "2"}, "fps is 2: give frames a second"),
    ({"video": "a.mp4", "images": ["b.png"]}, "in one row"),
    ({"video": "a.mp4", "map": {"a": [1, 2]}}, "the map has .1, 2. for a: give a list of cells"),
    ({"video": "a.mp4", "map": [1]}, "the map is no object"), ({"video": "a.mp4", "clip": 1}, "unknown key clip"),
    *(({"video": "a.mp4", "span": span}, "span is .*: give .start, end. in seconds") for span in (
        [2, 1], [1, "2"], ["1", "5"], [None, 3], [[1], [2]], [False, True], [1], [1, 2, 3], [0, float("inf")], [1, 10**400],
        "15", 3)),
])  # fmt: skip
def test_bad_video_rows_name_the_cure(tmp_path, record, message):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "gold": "g", **record}])
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: .*{message}"):
        load_rows(path)


# ---- SpaceR-151k ----


def spacer_record(**changes):
    record = {"problem_id": 7, "problem": "Which is nearest?", "data_type": "video", "problem_type": "multiple choice",
              "options": ["A. the bed", "B. the tv"], "solution": "<answer>B</answer>", "path": "scans/scene0001_00.mp4",
              "data_source": "SR_dataset"}  # fmt: skip
    return {**record, **changes}


def spacer_file(folder, records, maps=({"video_id": "scene0001_00", "cognitive_map": PLAN, "object_list": []},)):
    if maps is not None:
        write(folder / "annotation" / "cognitive_map.jsonl", maps)
    return write(folder / "SpaceR-151k.jsonl", records)


def test_records_of_spacer_become_rows(tmp_path):
    path = spacer_file(tmp_path, [
        spacer_record(),
        spacer_record(problem_type="numerical", options=[], solution="<answer> 4.7 </answer>"),
        spacer_record(problem_type="OCR", data_type="image", data_source="general", path="b.jpg", options=None,
                      solution="<answer>EXIT</answer>"),
        spacer_record(problem_type="free-form", data_source="general", solution="<answer>a cat</answer>"),
        spacer_record(problem_type="regression", data_source="general", solution="<answer>1,203.14</answer>"),
    ])  # fmt: skip
    rows = load_rows(path)
    assert [row["kind"] for row in rows] == ["choice", "mra", "ocr", "text", "regression"]
    assert rows[0]["options"] == ["the bed", "the tv"] and rows[0]["gold"] == "B" and rows[1]["gold"] == "4.7"
    assert rows[0]["video"] == str(tmp_path / "scans/scene0001_00.mp4") and rows[2]["images"] == [str(tmp_path / "b.jpg")]
    assert [row["map"] for row in rows] == [PLAN, PLAN, None, None, None] and len({row["id"] for row in rows}) == 5
    for row in rows:
        answer = f"<think>t</think><answer>{row['gold']}</answer>"
        assert spacer_reward(answer, f"<answer>{row['gold']}</answer>", PROBLEM_TYPES[row["kind"]])["total"] > 1.99


@pytest.mark.parametrize("record, maps, message", [
    (spacer_record(), None, "no annotation/cognitive_map.jsonl or cognitive_map.jsonl in .*: put it there"),
    (spacer_record(path="x.mp4"), [{"video_id": "y", "cognitive_map": PLAN}], "has no map of x: add it"),
    (spacer_record(), [{"video_id": "y"}], "cognitive_map.jsonl, line 1: no .*: correct it"),
    (spacer_record(), [{"video_id": "scene0001_00", "cognitive_map": {"a": [5, 5]}}], "the map has .* for a: give a list"),
    (spacer_record(problem_type="essay"), (), "problem_type 'essay' is unknown: use one of multiple choice, numerical"),
    (spacer_record(problem_type=["numerical"]), (), "problem_type .* is unknown: use one of multiple choice, numerical"),
    (spacer_record(data_source=["SR_dataset"]), (), "data_source is .*: give a text"),
    *((spacer_record(options=options), (), "options are .*: give a list of texts") for options in (
        "AB", {"A": "the bed", "B": "the tv"}, [1, 2], ["A. the bed", None])),
    *((spacer_record(options=options), (), f"options have the letters {letters}: write A, B, C") for options, letters in (
        (["B. the bed", "A. the tv"], "B, A"), (["A. the bed", "the tv"], "A, none"), (["(b) bed", "(a) tv"], "B, A"),
        (["A. the bed", "C. the tv"], "A, C"))),
    *((spacer_record(problem_type=kind, solution=f"<answer>{gold}</answer>"), (), f"gold '{gold}' .* not one plain number")
      for kind, gold in (("numerical", "three"), ("numerical", "1,200"), ("numerical", "nan"), ("numerical", "1e999"),
                         ("regression", "3 m"), ("regression", "1,2"), ("regression", "inf"))),
    (spacer_record(data_type="audio"), (), "data_type 'audio' is unknown"),
    (spacer_record(solution="B"), (), "solution is 'B': write <answer>"),
    (spacer_record(solution="<answer>C</answer>"), (), "gold letter 'C' is out of range"),
    (spacer_record(path=None), (), "path is 'None'"),
])  # fmt: skip
def test_bad_records_of_spacer_name_the_cure(tmp_path, record, maps, message):
    with pytest.raises(ValueError, match=f"SpaceR-151k.jsonl, row 1: .*{message}"):
        load_rows(spacer_file(tmp_path, [record], maps))


@pytest.mark.parametrize("options", [["A. the bed", "B. the tv"], ["the bed", "the tv"], ["(a) the bed", "(b) the tv"]])
def test_letters_of_options_are_taken_off(tmp_path, options):
    (row,) = load_rows(spacer_file(tmp_path, [spacer_record(options=options)]))
    assert row["options"] == ["the bed", "the tv"] and row["gold"] == "B"


def test_an_empty_file_of_maps_means_none(tmp_path):
    assert load_rows(spacer_file(tmp_path, [spacer_record()], maps=()))[0]["map"] is None


# ---- prompts ----


def test_the_map_template_names_the_categories_and_only_then_speaks_of_maps():
    text = build_prompt(make_row(), "spacer_map")
    assert "['chair', 'trash can']" in text and "10 x 10" in text and "{" not in text.replace("{'lamp'", "")
    example = parse_map(text[text.index("<map>{") + 5 : text.index("}</map>") + 1], ["lamp", "shelf", "door"])
    assert example == {"lamp": [[2, 8]], "shelf": [[0, 4], [9, 4], [9, 7]], "door": [[5, 0]]}
    assert not any(str(spot) in text for spots in PLAN.values() for spot in spots)  # names, not places
    without = build_prompt(make_row(map=None), "spacer_map")
    assert without == build_prompt(make_row(), "spacer") and "map" not in without and len(text) > 2 * len(without)
    listed = build_prompt(make_row(map=None, meta={"map_names": ["sofa", "tv"]}), "spacer_map")
    assert "['sofa', 'tv']" in listed
    assert build_prompt(make_row(), "short_map") == "Question: How many chairs are there?\nMap: chair, trash can"
    assert build_prompt(make_row(map=None), "short_map") == "Question: How many chairs are there?"


def test_both_templates_end_with_what_the_answer_tags_hold():
    for style in ("spacer", "spacer_map"):
        for kind, form in FORMS.items():
            assert build_prompt(make_row(kind=kind), style).endswith(form)
        assert build_prompt(make_row(kind="text"), style).endswith("in words.")
        text = build_prompt(make_row(kind="choice", options=["left", "right"]), style)
        assert "Question: How many chairs are there?\nOptions:\nA. left\nB. right\n" in text


def test_the_clip_comes_before_the_text():
    (message,) = build_messages(make_row(), "spacer")
    assert [part["type"] for part in message["content"]] == ["video", "text"]


# ---------------------------------------------------------------- the trainer's side


def test_positions_of_a_clip():
    """Two steps of t, 0.75 s apart at 4 positions a second, of 2 x 3 merged patches; text goes on after the largest."""
    config = SimpleNamespace(image_token_id=7, video_token_id=8,
                             vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=4))  # fmt: skip
    found = mrope_positions([1, 2, *[8] * 12, 3], torch.tensor([[2, 4, 6]]), config, seconds=0.75)
    assert found[0].tolist() == [0, 1] + [2] * 6 + [5] * 6 + [6]
    assert found[1].tolist() == [0, 1] + [2, 2, 2, 3, 3, 3] * 2 + [6]
    assert found[2].tolist() == [0, 1] + [2, 3, 4] * 4 + [6]


def test_log_probs_of_a_clip_are_those_of_plain_transformers_and_of_decoding():
    """At one second a step and this size transformers' own positions agree with the engine's."""
    policy, processor = new_policy(seed=3)
    prompt = encode(make_row(video=frames(4), fps=2), processor, style="spacer")
    assert prompt.seconds == 1.0 and prompt.grid.tolist() == [[2, 20, 28]]
    (group,) = HFRollout(policy, processor).generate([prompt], n=2, max_tokens=5, temperature=1.0, seed=1)
    packed = pack_groups([prompt], [group], policy.config)
    found = policy(packed)[0].detach()
    torch.testing.assert_close(found, packed.rollout_logp, rtol=1e-4, atol=1e-4)
    plain = copy.deepcopy(policy.model).eval()
    for part in (plain.config, plain.config.text_config, plain.config.vision_config):
        part._attn_implementation = "sdpa"
    expected = []
    for c in group:
        ids = torch.tensor([prompt.expanded + c.token_ids])
        with torch.no_grad():
            logits = plain(
                input_ids=ids, pixel_values_videos=prompt.pixels, video_grid_thw=prompt.grid, attention_mask=torch.ones_like(ids),
                second_per_grid_ts=torch.tensor([prompt.seconds]), mm_token_type_ids=2 * (ids == policy.config.video_token_id).int(),
            ).logits[0]  # fmt: skip
        rows = logits[len(prompt.expanded) - 1 : -1].masked_fill(policy.banned, float("-inf"))
        expected.append(rows.log_softmax(-1).gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_clip_of_noise_is_sampled_and_packed_as_it_was_made(tiny):
    """16 frames of 364 x 280 are 8 steps of 130 tokens, unresized: the shape that measurements of SpaceR use."""
    first, second = load_rows("noise:364x280x16:20@train", limit=2)
    prompt = encode(first, tiny.processor, style="row")
    assert prompt.grid.tolist() == [[8, 20, 26]] and prompt.expanded.count(tiny.processor.video_token_id) == 1040
    assert [frame.size for frame in prompt.images] == [(364, 280)] * 16 and prompt.seconds == 1.0
    assert all(np.array_equal(a, b) for a, b in zip(prompt.images, first["video"], strict=True))
    assert first["images"] == [] and not np.array_equal(first["video"][0], second["video"][0])
    (group,) = HFRollout(tiny.policy, tiny.processor).generate([prompt], n=2, max_tokens=3, temperature=1.0, seed=1)
    packed = pack_groups([prompt], [group], tiny.config)
    torch.testing.assert_close(tiny.policy(packed)[0].detach(), packed.rollout_logp, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="clips of 18 frames are not shown whole: give an even number from 4 to 16"):
        load_rows("noise:364x280x18:20@train")
