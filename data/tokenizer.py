"""A compact tokenizer and processor for small models trained on the procedural world.

    python -m data.tokenizer --out assets/demo-model

Why not Qwen's: 151,665 tokens x 192 numbers are 29 million parameters, nine times the model that is to use them.
What a small model needs, and gets here (it was seen to fail without):
  - one token for every integer from 0 to 999, so that a coordinate is one decision;
  - one token for "(A) ", and one for an object's name or a relation: the look-up from text to letter is then one hop;
  - one token for a tag and for each fixed piece of the scene's JSON: two objects fit into about 40 tokens.
Any other text is spelled in bytes, so every string round-trips.

How: one regular expression cuts the text, longest piece first, and each cut is looked up whole (BPE that ignores merges
and has none), else spelled in bytes. A token so depends on its own few characters, never on scores or neighbours.

The word lists are frozen here and not read from data/drawing.py: a new colour there must not renumber the vocabulary of
weights that are already trained. Append, and train again.
"""

import argparse
import re
from pathlib import Path

COLOURS = "red green blue yellow purple orange cyan pink white black".split()
SHAPES = "circle square triangle diamond cross ring".split()
PHRASES = [
    "left of", "right of", "apart from", "top left", "top center", "top right", "middle left", "middle right",
    "bottom left", "bottom center", "bottom right", "in front of",
]  # fmt: skip
TAGS = [f"<{slash}{name}>" for name in ("observe", "scene", "think", "answer") for slash in ("", "/")]
LETTERS = [f"({letter}) " for letter in "ABCD"]
JSON_PIECES = [
    '{"objects": [', '{"id": "', '", "bbox": [', "]}, ", "]}", '], "relationships": [', '{"subject": "',
    '", "predicate": "', '", "object": "', '"}, ', '"}',
]  # fmt: skip
THINK_PIECES = ["x ", "; y ", "; so ", "; ", " < ", " > ", " = "]
BEFORE_NUMBERS = [", ", " by "]  # elsewhere these belong to the words around them
WORLD_WORDS = """
    red green blue yellow purple orange cyan pink white black
    circle square triangle diamond cross ring circles squares triangles diamonds crosses rings shape shapes
    above below overlapping touching apart left right top bottom middle center yes no shared gap found
    larger smaller largest smallest Where Which How Is In Are mainly is are the The a an and or of to with respect
    in part image many there these all object objects Question Options x y by so
    behind front closer farther nearest farthest camera before after moves turns up down near far
    user assistant system
""".split()
OTHER_WORDS = """
    that it as for on at from be this have not but they you your his her its their our we he she was were been has had
    do does did will would can could should may must what when who why how which where if then than more most less least
    some any each every other another same different one two three four five six seven eight nine ten first second third
    last only also just very much about between inside outside around through into onto over under next beside against
    along across toward away back side corner edge picture photo video frame frames time map grid point line box boxes
    size width height depth distance length area pixel pixels position place view seen see look show shows find give
    given write put make take use using need needs think answer answers question options option letter correct right
    wrong true false text number numbers count name names id reason reasoning step steps relation relations relationship
    relationships graph scene observe observation person man woman people boy girl child dog cat horse bird car bus
    truck train bike boat table chair bed book cup tree grass sky street building house door window wall floor room road
    sign ground hand head light big small large tall short long wide high low old new face facing standing
    sitting holding wearing walking order block blocks once matters decide now after as made dot their out so far long
    enough here because best better
""".split()
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def byte_alphabet() -> list[str]:
    """Byte -> the printable character that stands for it in byte-level vocabularies (the convention of GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def pieces() -> list[str]:
    """Fixed strings that are one token although they are more than one word."""
    named = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    many = [name + ("es" if name.endswith("ss") else "s") for name in named]
    spaced = [" " + text for text in (*named, *many, *PHRASES)]
    ids = [name.replace(" ", "_") + "." for name in named]
    return [*TAGS, *LETTERS, *JSON_PIECES, *THINK_PIECES, *PHRASES, *named, *spaced, *ids]


def vocabulary() -> list[str]:
    """Every token as text, except the 256 bytes, which come first, and the special tokens, which come last."""
    numbers = [str(n) for n in range(10, 1000)]  # 0 to 9 are bytes
    words = [w for word in WORLD_WORDS for w in (word, " " + word)] + [" " + word for word in OTHER_WORDS]
    return [token for token in dict.fromkeys([*numbers, *pieces(), *BEFORE_NUMBERS, *words]) if len(token) > 1]


def cut_pattern() -> str:
    """The regular expression that cuts text: pieces (longest first), numbers of at most three digits, words."""
    longest_first = sorted(pieces(), key=lambda piece: (-len(piece), piece))
    escaped = [re.sub(r"([^A-Za-z0-9 <>_\"/,:;=])", r"\\\1", piece) for piece in longest_first]
    # A piece that ends in a letter ends a word: "red circle" is not cut out of "red circleish".
    whole = [text + "(?![A-Za-z])" if text[-1].isalpha() else text for text in escaped]
    return "|".join([*whole, *(text + "(?=[0-9])" for text in BEFORE_NUMBERS), "[0-9]{1,3}", " ?[A-Za-z]+"])


def build_tokenizer():
    """The tokenizer as a transformers PreTrainedTokenizerFast with our chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = byte_alphabet()
    tokens = alphabet + ["".join(alphabet[byte] for byte in token.encode()) for token in vocabulary()]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(cut_pattern()), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor():
    """A Qwen2.5-VL processor: this tokenizer; pictures from 56 x 56 to 1,024 merged patches, sides rounded to 28, so
    that a 112 x 112 picture keeps its size (8 x 8 patches, 16 tokens)."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1024 * 28 * 28}  # pixels, in spite of the names
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tokenizer and processor files (no weights).")
    parser.add_argument("--out", type=Path, required=True, help="folder, for instance assets/demo-model")
    args = parser.parse_args()
    processor = build_processor()
    processor.save_pretrained(args.out)
    print(f"wrote {args.out}: {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
