"""data/tokenizer.py and the files it writes into assets/demo-model: exact round trip, single tokens, picture grid."""

import json
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import drawing, questions, scenes
from data.prompts import build_messages
from data.responses import response_text
from data.tokenizer import SPECIAL, build_processor, byte_alphabet, pieces, vocabulary

FOLDER = Path(__file__).parents[1] / "assets" / "demo-model"


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


def cuts(tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]


# ---- round trip ------------------------------------------------------------------------------------------------------

WORLD = st.lists(
    st.sampled_from([*pieces(), "12", "345", "red", "circle", "xred", "\n", " ", "é", ", ", "(A)", "9", "_"])
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), WORLD.map("".join)))
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


AWKWARD = ["", " ", "\n\n  \n", "a  b\t\r\n", " .", "don 't , x !", "01 007 1234567", "\u0663\u0664", "e\u0301 \u00e9",
           "\x00\x7f\u2028\ufeff", "\U0001f642\u200d", "<|im_end|>", "<observe", "]} , ]},  ",
           "(A)(B) (E) "]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_skipping_special_tokens_keeps_the_tags(tokenizer):
    text = response_text(scenes.scene_row(1))
    ids = tokenizer(text + "<|im_end|>\n<|endoftext|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text + "\n"


def test_a_token_does_not_depend_on_its_neighbours(tokenizer):
    """Tokens of a response are those of its lines, so prompt and response may be encoded apart."""
    for row in scenes.scene_rows(50, level="hard"):
        text = response_text(row)
        whole = tokenizer(text)["input_ids"]
        assert whole == [i for line in text.splitlines(keepends=True) for i in tokenizer(line)["input_ids"]]
        assert tokenizer("assistant\n" + text)["input_ids"] == tokenizer("assistant\n")["input_ids"] + whole


# ---- what must be one token ------------------------------------------------------------------------------------------


def test_integers_are_single_tokens_everywhere(tokenizer):
    ids = [tokenizer(str(n))["input_ids"] for n in range(1000)]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == 1000
    for text in ("[12, 345, 6, 78]", "x 12 < 345 by 6", "red_circle.12", "a12b345", "(12)", " 12"):
        assert [c for c in cuts(tokenizer, text) if c.isdigit()] == re.findall(r"\d+", text)
    assert cuts(tokenizer, "1234567") == ["123", "456", "7"]


def test_tags_letters_and_json_pieces_are_single_tokens(tokenizer):
    tags = [f"<{slash}{name}>" for name in ("observe", "scene", "think", "answer") for slash in ("", "/")]
    json_pieces = ['{"objects": [', '{"id": "', '", "bbox": [', "]}, ", '], "relationships": [', '{"subject": "',
                   '", "predicate": "', '", "object": "', "\n"]  # fmt: skip
    for text in (*tags, "(A) ", "(B) ", "(C) ", "(D) ", *json_pieces, *SPECIAL):
        assert len(tokenizer(text)["input_ids"]) == 1, text
        assert cuts(tokenizer, "xx" + text + "yy").count(text) == 1, text
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)
    assert not any(tag in tokenizer.all_special_tokens for tag in ("<think>", "</answer>"))


@pytest.mark.parametrize("level", list(scenes.LEVELS))
def test_every_word_of_the_world_is_a_single_token(tokenizer, level):
    """No word of a question, an option or a response is spelled in bytes, and names and relations are one token."""
    names = questions.object_names(scenes.LEVELS[level])
    phrases = [*drawing.DIRECTIONS, *drawing.CONTACTS, *drawing.CELLS[2], *drawing.CELLS[3]]
    for text in (*names, *(" " + n for n in names), *(" " + questions.plural(n) for n in names), *phrases):
        assert len(tokenizer(text)["input_ids"]) == 1, text
    for row in scenes.scene_rows(150, level=level):
        for text in (row["question"], *row["options"], response_text(row)):
            assert not [c for c in cuts(tokenizer, text) if len(c) == 1 and c.isalpha()], text


def test_option_text_is_the_same_tokens_in_prompt_derivation_and_answer(tokenizer):
    """The look-up from text to letter is a copy of tokens; it must not meet two spellings."""
    for row in scenes.scene_rows(100, level="hard"):
        options = [tokenizer(o)["input_ids"] for o in row["options"]]
        letters = [tokenizer(f"({c}) ")["input_ids"] for c in "ABCD"]
        i = "ABCD".index(row["gold"])
        inline = " ".join(f"({c}) {o}" for c, o in zip("ABCD", row["options"], strict=False))
        response = response_text(row)
        for text, wanted in (
            (inline, letters[i] + options[i]),
            (inline.replace(" (", "\n("), letters[i] + options[i]),
            (response.split("<answer>")[1], letters[i] + options[i]),
            (response.split("<answer>")[0], options[i] + letters[i] + tokenizer("</think>")["input_ids"]),
        ):
            ids = tokenizer(text)["input_ids"]
            assert any(ids[at : at + len(wanted)] == wanted for at in range(len(ids))), text


def test_two_objects_fit_into_ninety_tokens(processor, tokenizer):
    lengths, prompts = [], []
    for row in scenes.scene_rows(200, split="val"):
        response = len(tokenizer(response_text(row))["input_ids"])
        lengths.append(response)
        assert response <= 90, row["id"]
        chat = processor.apply_chat_template(build_messages(row, "short"), tokenize=False, add_generation_prompt=True)
        prompts.append(len(tokenizer(chat)["input_ids"]))
    print(f"mean tokens: prompt {statistics.mean(prompts):.1f} (picture as 1), response {statistics.mean(lengths):.1f}")
    assert statistics.mean(lengths) < 70 and statistics.mean(prompts) < 45


# ---- files and processor ---------------------------------------------------------------------------------------------


def test_the_committed_files_are_what_the_command_writes(tmp_path):
    build_processor().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), (
            f"run: python -m data.tokenizer --out {FOLDER}"
        )
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_vocabulary_is_small_and_each_entry_can_be_reached(tokenizer):
    assert len(tokenizer) <= 2000 and len(set(byte_alphabet())) == 256
    assert len(tokenizer) == 256 + len(vocabulary()) + len(SPECIAL)
    ids = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(ids.values()) == list(range(256 + len(vocabulary())))
    for token in vocabulary():
        reached = tokenizer(token + ("7" if token in (", ", " by ") else ""))["input_ids"][0]
        assert tokenizer.decode([reached]) == token


def test_a_112_pixel_picture_is_sixteen_tokens(processor):
    picture = scenes.scene_row(0)["images"][0]
    out = processor.image_processor(images=[picture], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 8, 8]] and out["pixel_values"].shape == (64, 3 * 2 * 14 * 14)
    large = processor.image_processor(images=[Image.new("RGB", (3000, 2000))], return_tensors="pt")["image_grid_thw"][0]
    assert large.prod() // 4 <= 1024
    batch = processor(text=["<|vision_start|><|image_pad|><|vision_end|>hi"], images=[picture], return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16


def test_the_chat_template_places_pictures_clips_and_text(processor):
    def render(content, **extra):
        return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, **extra)

    seen, clip = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    assert render("hi") == "<|im_start|>user\nhi<|im_end|>\n"
    content = [
        {"type": "image"},
        {"type": "image", "image": "a.png"},
        {"type": "video"},
        {"type": "text", "text": "where?"},
    ]
    expected = f"<|im_start|>user\n{seen}{seen}{clip}where?<|im_end|>\n<|im_start|>assistant\n"
    assert render(content, add_generation_prompt=True) == expected
    turns = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}]
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\n a\n<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert processor.tokenizer.eos_token == "<|im_end|>" and processor.tokenizer.pad_token == "<|endoftext|>"


def test_it_loads_beside_a_qwen_config(processor, tmp_path):
    """With config.json in the folder transformers picks the tokenizer class by model type; ours must win."""
    from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLConfig

    processor.save_pretrained(tmp_path)
    Qwen2_5_VLConfig().save_pretrained(tmp_path)
    text = response_text(scenes.scene_row(5))
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path).tokenizer):
        assert loaded(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
