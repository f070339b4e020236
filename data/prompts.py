"""The prompt: one function words a row, for training and evaluation alike.

A style is a key of PROMPTS, `row` (the row's own problem text) or the path of a text file; `row["style"]` overrides the
run's. To add a style, add an entry to PROMPTS.
"""
import re
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase

# Structure after spec 1.3, wording ours. {question} holds the question and its options; the size line keeps the exact
# form that the SpatialThinker reward reads (spec 2.1).
PROMPTS = {
    "spatialthinker": """\
You answer questions about where things are in a picture. You look for the things that matter, note them and their \
relations as a scene graph, and reason over that graph.

Do this:
- Find every object the question depends on, its place in the picture, and how these objects relate.
- Put only what the question needs into the graph.
- Give an object an id made of its name, a dot and a number, such as `cup.1`, and a box `[x1, y1, x2, y2]` in pixels \
of the picture: left, top, right, bottom.
- Think with what you saw and with the graph, then decide.

Write these four blocks in this order, each once:
<observe>what the picture shows, as far as it matters</observe>
<scene>
{
  "objects": [
    {"id": "name.number", "bbox": [x1, y1, x2, y2]},
    ...
  ],
  "relationships": [
    {"subject": "name.number", "predicate": "relation", "object": "name.number"},
    ...
  ]
}
</scene>
<think>your reasoning, one step after another</think>
<answer>(LETTER) text of that option, or the bare answer if no options are given</answer>

An example:
Q. On which side of the sofa does the lamp stand?
Options: (A) left (B) right (C) behind it (D) on top of it
<observe>A grey sofa fills the left half of the room. A tall lamp stands on the floor past its right arm.</observe>
<scene>
{
  "objects": [
    {"id": "lamp.1", "bbox": [412, 60, 498, 330]},
    {"id": "sofa.1", "bbox": [36, 182, 405, 341]}
  ],
  "relationships": [
    {"subject": "lamp.1", "predicate": "right of", "object": "sofa.1"}
  ]
}
</scene>
<think>The box of the lamp begins at x = 412, where the sofa has ended at x = 405. Both reach the floor at nearly the \
same height, so the lamp is beside the sofa, on its right.</think>
<answer>(B) right</answer>

Image size: ({width} x {height})
Now the question to answer:
Q. {question}""",
    "reasoning": """\
Reason about the question as an inner monologue between <think> and </think>. After that write the answer between \
<answer> and </answer>: the letter of the right option in parentheses and its text, as in \
<answer>(LETTER) text</answer>.
Question: {question}""",
    "no_reasoning": "Question: {question}",
    "reasoning_end": """\
{question}
First put your reasoning between <think> and </think>, then put the answer alone between <answer> and </answer>.""",
    "short": "Question: {question}",
    "short_map": "Question: {question}\nMap: {names}",  # for small models: what spacer_map asks for, without saying so
    "spacer": """\
Question: {question}
{ponder}
Write your reasoning between <think> and </think>, then the final answer between <answer> and </answer>.{form}""",
    "spacer_map": """\
Question: {question}
{ponder}
If a map of the place helps you, draw one within your reasoning, between <map> and </map>, like this:
1. Find the objects of the categories below in the video and understand how the place is laid out.
2. Estimate the centre of each of these objects as a cell of a 10 x 10 grid over the place.
3. Note the cells between the map tags.
Rules of the map:
- It has these categories and no others: {categories}
- An object gets one cell, judged from all frames together.
- Of a category, every object is noted.
Write it as a dictionary from category to a list of cells, such as
<map>{'lamp': [[2, 8]], 'shelf': [[0, 4], [9, 4], [9, 7]], 'door': [[5, 0]]}</map>
A map stands between map tags and inside the reasoning, the reasoning between <think> and </think>, and the final answer \
after it between <answer> and </answer>.{form}""",
}
# The parts of SpaceR's templates (sections 1.3 of its notes): how to think, and what the answer tags hold, by kind of row.
PONDER = """\
Take your time and ponder it as a person would who talks to themselves: "let me see", "hold on", "hm", "ah, now I get it", \
"step by step". Doubt what you find and check it before you settle."""
FORMS = {
    "choice": "Between the answer tags put the letter of the right option and nothing else.",
    "number": "Between the answer tags put the value as a number, such as 42 or 3.1.",
    "mra": "Between the answer tags put the value as a number, such as 42 or 3.1.",
    "regression": "Between the answer tags put the value as a number, such as 42 or 3.14.",
    "ocr": "Between the answer tags put the text that you read.",
    "yes_no": "Between the answer tags put yes or no.",
}
FREE_FORM = "Between the answer tags put your answer in words."


def options_text(options: list[str]) -> str:
    """['left', 'right'] -> '(A) left\\n(B) right'."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options))


def question_text(row: dict, *, inline: bool = False) -> str:
    """The question and, below it, `Options:` with one lettered line each (spec 1.3), or all on one line."""
    question = row["question"].replace("<image>", "").strip()
    if not row["options"]:
        return question
    options = options_text(row["options"])
    return f"{question}\nOptions: " + options.replace("\n", " ") if inline else f"{question}\nOptions:\n{options}"


def spacer_fields(row: dict) -> dict[str, str]:
    """What SpaceR's templates have beside the question: options are marked `A.`, since its reward wants the bare letter."""
    question = row["question"].replace("<image>", "").replace("<video>", "").strip()
    options = "".join(f"\n{letter}. {option}" for letter, option in zip(ascii_uppercase, row["options"]))
    return {"question": f"{question}\nOptions:{options}" if options else question, "ponder": PONDER,
            "form": " " + FORMS.get(row["kind"], FREE_FORM), "categories": str(map_names(row))}  # fmt: skip


def map_names(row: dict) -> list[str]:
    """The categories that a row's map may have: those of its gold map, or those that meta["map_names"] lists."""
    return list(row["map"] or row["meta"].get("map_names") or [])


def build_prompt(row: dict, style: str) -> str:
    """The text part of a row's prompt; `row["style"]` overrides `style`.

    A style is a key of PROMPTS, `row` (the row's own problem text), or the path of a text file with {question} and, if
    wanted, {width} and {height}. `<image>` marks are dropped: pictures always come first, and all of them. `spacer_map`
    and `short_map` ask rows without a gold map (general data) as `spacer` and `short` do. Raises ValueError naming row and cure.
    """
    style = row["style"] or style
    if style == "row":
        if not row["problem"]:
            raise ValueError(f"row {row['id']}: style row, but the row has no problem text: "
                             "choose another, say --style spatialthinker")
        return row["problem"].replace("<image>", "")
    if style in ("spacer_map", "short_map") and not map_names(row):
        style = style.removesuffix("_map")
    template = PROMPTS.get(style) or read_template(style)
    fields = {"question": question_text(row, inline=style in ("short", "short_map"))}
    if style == "short_map":
        fields["names"] = ", ".join(map_names(row))
    if style in ("spacer", "spacer_map"):
        fields = spacer_fields(row)
    if "{width}" in template or "{height}" in template:
        if row["size"] is None:
            raise ValueError(f"row {row['id']}: style {style} prints the picture's size, which is unknown: "
                             "choose another style, or give the row a size")
        fields["width"], fields["height"] = (str(side) for side in row["size"])
    # One pass over the template: a question may itself contain {width}, and JSON braces are no fields.
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


@lru_cache(maxsize=8)
def read_template(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"prompt style {path!r} is unknown: use {', '.join([*PROMPTS, 'row'])}, or a text file")
    template = Path(path).read_text(encoding="utf-8").replace("<image>", "")
    if "{question}" not in template:
        raise ValueError(f"{path}: a prompt file without {{question}} asks nothing: add it")
    return template


def build_messages(row: dict, style: str) -> list[dict]:
    """One user turn, pictures or the clip first, then the text (spec 3.2); no system turn: the chat template adds one."""
    text = build_prompt(row, style)
    media = [{"type": "video"}] if row.get("video") else [{"type": "image"} for _ in row["images"]]
    if not media:
        return [{"role": "user", "content": text.strip()}]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
