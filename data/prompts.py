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
}


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


def build_prompt(row: dict, style: str) -> str:
    """The text part of a row's prompt; `row["style"]` overrides `style`.

    A style is a key of PROMPTS, `row` (the row's own problem text), or the path of a text file with {question} and, if
    wanted, {width} and {height}. `<image>` marks are dropped: pictures always come first, and all of them.
    Raises ValueError naming row and cure.
    """
    style = row["style"] or style
    if style == "row":
        if not row["problem"]:
            raise ValueError(f"row {row['id']}: style row, but the row has no problem text: "
                             "choose another, say --style spatialthinker")
        return row["problem"].replace("<image>", "")
    template = PROMPTS.get(style) or read_template(style)
    fields = {"question": question_text(row, inline=style == "short")}
    if "{width}" in template or "{height}" in template:
        if row["size"] is None:
            raise ValueError(f"row {row['id']}: style {style} prints the picture's size, which is unknown: "
                             "choose another style, or give the row a size")
        fields["width"], fields["height"] = (str(side) for side in row["size"])
    # One pass over the template: a question may itself contain {width}, and JSON braces are no fields.
    return re.sub(r"\{(question|width|height)\}", lambda match: fields[match[1]], template)


@lru_cache(maxsize=8)
def read_template(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"prompt style {path!r} is unknown: use {', '.join([*PROMPTS, 'row'])}, or a text file")
    template = Path(path).read_text(encoding="utf-8").replace("<image>", "")
    if "{question}" not in template:
        raise ValueError(f"{path}: a prompt file without {{question}} asks nothing: add it")
    return template


def build_messages(row: dict, style: str) -> list[dict]:
    """One user turn, pictures first, then the text (spec 3.2); no system turn, the chat template adds its own."""
    text = build_prompt(row, style)
    if not row["images"]:
        return [{"role": "user", "content": text.strip()}]
    return [{"role": "user", "content": [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": text}]}]
