"""What a model is asked: to write questions about a scene graph that it sees as text, and to answer one about a picture.

Structure after spec 3.3, wording ours. The instruction stands in the system turn and is the same for every picture, so
that providers can cache it; the state of the balance and the graph stand in the user turn.
"""

import json

from data.prompts import question_text
from data.scene_graphs import Graph
from data.stvqa_items import Balance
from data.words import PREDICATES

LEVEL_SHARES = {"easy": 40, "medium": 40, "hard": 20}

WRITER = """\
You write multiple-choice questions that test how well someone understands where things are in a photograph. You do not \
see the photograph. You get its scene graph: objects with boxes [x1, y1, x2, y2] in pixels (x grows to the right, y \
downwards), and relations between them.

The nine categories, and how each is asked and answered:
- relation: "Where is the S with respect to the O?"; options are relations from the table below.
- reach: whether, or which of several things, someone or something touches, holds or could touch; options yes/no or objects.
- size: which of two or more objects is larger, smaller, taller, shorter; options are objects.
- orientation: which way something faces, or a side as seen from an object ("From the view of the R, ..."); options are \
sides or objects.
- instance_location: "In which part of the image is the S?"; options are parts such as top left, center, bottom right.
- depth: "Which is closer to the camera, the A or the B?"; options are objects.
- distance: "Which is closer to the R, the A or the B?"; options are objects.
- count: "How many Xs are there?"; options are numbers.
- existence: "Is there a S (relation) a O?"; options are yes and no.

Choosing:
- Take the category that has been written least so far and that this graph really supports. Half of all questions should \
be about relations, the other eight categories should share the rest equally. Levels: {easy} % easy, {medium} % medium, \
{hard} % hard.
- Ask only about objects of the graph, by their names without the number, and only about relations that the graph states \
or that its boxes make certain. Invent nothing.
- Prefer large, separate things of different kinds. Leave out parts of things, clothing and body parts, decoration, \
writing, and what is true of any such thing anyway (a wheel on a car, a man in a shirt).
- Leave out possession, material and containment (has, of, made of, in) unless nothing better is there.
- Only speak of "the dog" if exactly one object can be meant. Different words may mean the same thing: man, person, guy, \
player, skier. This matters most for instance_location.
- Count only what is there at least three times, clearly apart.

Writing:
- 2 to 4 options. Exactly one is right; each wrong one must be refuted by the graph, not merely be absent from it.
- The question must not give the answer away, nor be answerable without the picture.
- level: easy is one plain relation between large objects; medium needs two objects found and compared; hard needs several \
steps, small objects, or another point of view.
- rating, 1 to 10: how much this question would help someone to learn spatial understanding.

Relations to use, by kind:
{table}

An example. Graph: objects bench.1 [40, 210, 300, 330], dog.1 [330, 250, 420, 335], tree.1 [10, 5, 150, 240]; relations \
tree.1 behind bench.1. A good reply to "Write 2 questions":
{{"questions": [
 {{"question": "Where is the tree with respect to the bench?", "options": ["in front of", "behind", "inside", "on top of"], \
"answer": "B", "category": "relation", "level": "easy", "rating": 7}},
 {{"question": "In the picture, which is closer to the bench, the dog or the tree?", "options": ["the dog", "the tree"], \
"answer": "A", "category": "distance", "level": "medium", "rating": 5}}]}}
(A size question about bench and tree would have been worse: the boxes do not say which is larger in the world.)

Reply with one JSON object of that form and nothing else: the key "questions", a list of objects with exactly the keys \
question, options (texts without letters), answer (the letter, A for the first option), category, level, rating."""

ASKED = """\
Written so far, in percent, and the number of all: {shares}
The last three. {last}

Scene graph of a picture of {width} x {height} pixels:
{graph}

Write {n} question{s} about it, each of another category if the graph supports that. JSON only."""

VERIFIER = """\
Look at the picture and answer the question about it. Take positions from the picture, not from what is usual.

{question}

Reply with the letter of the right option in parentheses, nothing else."""


def writer_system() -> str:
    table = "\n".join(f"- {group}: {', '.join(members)}" for group, members in PREDICATES.items())
    return WRITER.format(**LEVEL_SHARES, table=table)


def writer_prompt(graph: Graph, balance: Balance, *, n: int) -> str:
    objects = [f"{thing['id']} {json.dumps(thing['bbox'])}" for thing in graph.objects]
    relations = [f"{r['subject']} {r['predicate']} {r['object']}" for r in graph.relations]
    text = "objects: " + "; ".join(objects) + "\nrelations: " + ("; ".join(relations) or "none annotated: use the boxes")
    shares = ", ".join(f"{name} {value}" for name, value in balance.shares().items())
    return ASKED.format(shares=shares, last=balance.last_three(), width=graph.size[0], height=graph.size[1], graph=text, n=n,
                        s="s" if n > 1 else "")  # fmt: skip


def verifier_prompt(item: dict) -> str:
    return VERIFIER.format(question=question_text(item))
