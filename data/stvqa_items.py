"""A question on its way from a writer's reply to a row: read, checked against its scene graph, repaired, cut down to the
part of the graph that it is about (spec 3.3).

Functions with a `mode` give in "upstream" what the published code gives, defects included; the pipeline uses "corrected".
"""

import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from string import ascii_uppercase

from data.drawing import centre
from data.prompts import options_text
from data.scene_graphs import Graph, area, direction
from data.words import OPPOSITE, canonical, confusable, group_of, label, mentions, name_key, singular, tokens
from rewards import extract_answer, extract_choice, plain, read_number

CATEGORIES = (
    "relation", "reach", "size", "orientation", "instance_location", "depth", "distance", "count", "existence",
)  # fmt: skip
LEVELS = ("easy", "medium", "hard")
CONTRARIES = ("size", "along")  # groups in which no predicate stands for another: smaller, bigger
# What 'a left of b' says of b with respect to a, by group; predicates of the other groups say nothing of it.
CONVERSE = {"left": "right of", "right": "left of", "above": "below", "below": "above", "front": "behind",
            "behind": "in front of", "near": "near", "touch": "touching"}  # fmt: skip
COMPARED = ("size", "depth", "distance")  # their objects may stand in the options alone


@dataclass
class Balance:
    """What has been written so far; the next question is steered by it."""

    categories: Counter = field(default_factory=Counter)
    levels: Counter = field(default_factory=Counter)
    answers: Counter = field(default_factory=Counter)  # (category, text of the gold option)
    sets: Counter = field(default_factory=Counter)  # (category, the options as a frozenset, text of the gold one)
    last: list = field(default_factory=list)  # (category, level) of the last three

    def add(self, item: dict) -> None:
        category, level = category_of(item), str(item.get("level")).lower()
        self.categories[category] += 1
        self.levels[level] += 1
        options = item.get("options")
        letter = str(item.get("answer"))[:1].upper() or "?"
        if isinstance(options, list) and letter in ascii_uppercase[: len(options)]:
            gold = str(options[ascii_uppercase.index(letter)])
            self.answers[category, gold] += 1
            self.sets[category, frozenset(map(str, options)), gold] += 1
        self.last = [*self.last[-2:], (category, level)]

    def shares(self) -> dict[str, str]:
        """{"relation": "50.0%", ..., "easy": ..., "total_samples": "4"}: the block of the published prompt."""
        total = sum(self.categories.values())
        counts = [(name, self.categories[name]) for name in CATEGORIES] + [(name, self.levels[name]) for name in LEVELS]
        return {name: f"{100 * n / max(total, 1):.1f}%" for name, n in counts} | {"total_samples": str(total)}

    def last_three(self) -> str:
        """"Categories: ['count', 'size'], Levels: ['hard', 'easy']", oldest first, as in the published prompt."""
        return f"Categories: {[c for c, _ in self.last]}, Levels: {[level for _, level in self.last]}"


# ---- a reply ---------------------------------------------------------------------------------------------------------


def extract_json(text: str, mode: str = "corrected"):
    """The JSON of a reply. upstream: the text from the first brace to the last, whatever stands between. corrected: the
    first value, object or list, that parses; None if there is none."""
    if mode == "upstream":
        start, end = text.find("{"), text.rfind("}")
        return text[start : end + 1] if 0 <= start < end else text
    decode = json.JSONDecoder().raw_decode
    for match in islice(re.finditer(r"[{\[]", text), 50):
        try:
            return decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
    return None


def read_items(text: str) -> list[dict]:
    """The questions of a reply: {"questions": [...]}, a list, objects one after another, in prose or not. What is malformed
    costs itself and no more: of a list that is cut off, or broken in one question, the others are read. Without any
    question the first JSON value, for check to say what is wrong with it; [] if there is none."""
    decode, found, at, tries = json.JSONDecoder().raw_decode, [], text.find("{"), 0
    while at >= 0 and tries < 1000:  # a bound on the time, for a reply of braces
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at
        items = items_of(value)
        asked = any("question" in item for item in items)
        found += items if asked else []
        at, tries = text.find("{", end if asked else at + 1), tries + 1  # without a question: what stands inside
    return found or items_of(extract_json(text))


def items_of(value) -> list[dict]:
    value = value.get("questions", value) if isinstance(value, dict) else value
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def category_of(item: dict) -> str:
    category = str(item.get("category") or "").strip()
    return "relation" if category.upper().startswith("REL_") else category.lower()


# ---- check -----------------------------------------------------------------------------------------------------------


def checked(item: dict, graph: Graph) -> dict:
    """The item with its letters taken off, its count repaired, its options shuffled and the scene that it is about:
    {"id", "graph", "question", "options", "gold", "category", "level", "rating", "scene"}. ValueError('why') if it is
    malformed, or says what the graph does not."""
    question, options, gold, category, level, rating = read_fields(item)
    said = names_said(question, graph)
    if not said and category not in COMPARED:
        raise ValueError("the question names no object of the graph")
    if category == "count":
        options, gold = repaired_count(question, options, gold, graph, said)
    asked = CHECKS[category](question, options, options[gold], graph)
    scene = sub_graph(graph, question, options, asked)
    if not scene["objects"]:  # a comparison of "the red car" and "the brown dog" names them in no form that is one name
        raise ValueError("the question names no object of the graph")
    options, letter = shuffle_options(question, options, ascii_uppercase[gold], seed=hash_seed(graph.id, question))
    digest = hashlib.sha256(json.dumps([question, sorted(options), options[ord(letter) - 65]]).encode()).hexdigest()
    return {"id": f"{graph.id}-{digest[:10]}", "graph": graph.id, "question": question, "options": options,
            "gold": letter, "category": category, "level": level, "rating": rating, "scene": scene}  # fmt: skip


def read_fields(item: dict) -> tuple[str, list[str], int, str, str, int]:
    """question, options without letters, index of the right one, category, level, rating; ValueError('why')."""
    question, options, answer = item.get("question"), item.get("options"), item.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    if not isinstance(options, list) or not all(isinstance(o, str | int | float) for o in options):
        raise ValueError("options are no list of texts")
    options = [re.sub(r"^\(?[A-Fa-f][).]\s+", "", str(option)).strip() for option in options]
    if not 2 <= len(options) <= 4:
        raise ValueError("not 2 to 4 options")
    if re.search("[\0\ud800-\udfff]", question + "".join(options)):
        raise ValueError("a character that no file can hold")
    if "<" in question + "".join(options):  # <answer> and <image> mean something further on
        raise ValueError("a tag in the question or its options")
    if "" in options or len({plain(option) for option in options}) < len(options):
        raise ValueError("an option is empty, or two read the same")
    letter = extract_choice(str(answer), options) if isinstance(answer, str | int) else None
    if letter is None:
        raise ValueError("the answer is none of the options")
    category, level = category_of(item), str(item.get("level")).strip().lower()
    if category not in CATEGORIES or level not in LEVELS:
        raise ValueError("category or level is unknown")
    rating = read_number(str(item.get("rating")))
    if rating is None or not 1 <= rating <= 10:
        raise ValueError("the rating is not 1 to 10")
    return " ".join(question.split()), options, ascii_uppercase.index(letter), category, level, round(rating)


def objects_called(graph: Graph, name: str) -> list[dict]:
    key = name_key(name)
    return [thing for thing in graph.objects if name_key(label(thing["id"])) == key]


def names_said(text: str, graph: Graph) -> list[str]:
    """Names of the graph in a text, each once, in its order."""
    return list(dict.fromkeys(name for name, *_ in mentions(text, {label(t["id"]) for t in graph.objects})))


def repaired_count(question: str, options: list[str], gold: int, graph: Graph, said: list[str]) -> tuple[list[str], int]:
    """Options and gold that say how many there are. The number counts what stands behind 'how many', and where the
    question ties it to another object, those that have this relation to it; not, as upstream, all that are named."""
    rest = re.sub(r"^(\s*(of|the|visible|different|separate))+\b", "", question.lower().partition("how many")[2])
    found = mentions(rest, said)
    if not found or found[0][1] > 0:  # 'red cups' and 'wheels of the bus' are not counted in a graph of cups and buses
        raise ValueError("a count that does not say how many of what")
    asked = found[0][0]
    things = objects_called(graph, asked)
    if any(name_key(name) == name_key(asked) for name in graph.uncounted):
        raise ValueError("a count of a class that is not boxed one by one")
    if len(said) > 1 or len(found) > 1:
        if len(found) != 2:  # 'On the table, how many cups are there?': tied to what stands elsewhere, or to several
            raise ValueError("a count tied to another object in words that are not known")
        predicate, others = words_between(rest, *found), objects_called(graph, found[1][0])
        things = [t for t in things if any(t is not other and holds(graph, t, predicate, other) for other in others)]
    if not things:
        raise ValueError("a count of what the graph does not tie together")
    numbers = [exact_number(option, asked) for option in options]
    if None in numbers:
        raise ValueError("an option of a count that is no number")
    if len(things) in numbers:
        return options, numbers.index(len(things))
    return [*options[:gold], str(len(things)), *options[gold + 1 :]], gold


def exact_number(option: str, name: str) -> float | None:
    """'3', 'three', '3 cups'; None for 'more than 3', which would be right beside another option."""
    words = [word for word in tokens(option) if singular(word) not in name_key(name)]
    return 0 if words in (["no"], ["none"]) else read_number(words[0]) if len(words) == 1 else None


def words_between(text: str, first: tuple, second: tuple) -> str:
    """The words that tie two mentions() together: 'the dog that is left of the car' -> 'left of'."""
    filler = ("a", "an", "the", "that", "which", "is", "are", "there")
    return " ".join(word for word in tokens(text)[first[2] : second[1]] if word not in filler)


# A check takes (question, options, gold text, graph), returns the triple that was asked for or None, or raises.


def check_relation(question: str, options: list[str], gold: str, graph: Graph) -> dict | None:
    said = names_said(question, graph)
    if len(said) == 1 and len(objects_called(graph, said[0])) < 2:
        raise ValueError("a relation of one object")
    start = mentions(question, said)[0][1]
    if re.search(r"\b(respect|relative|relation) to( an?| the)?$", " ".join(tokens(question)[:start])):
        said = [*said[1:2], said[0]]  # 'With respect to the bench, where is the dog?' asks about the dog
    triple = relation_between(graph, said, gold)
    if triple is None:
        raise ValueError("a relation that the graph does not hold")
    if any(relation_between(graph, said, option) for option in options if option != gold):
        raise ValueError("a second option holds in the graph")
    return triple


def relation_between(graph: Graph, said: list[str], predicate: str) -> dict | None:
    """The triple of the first two names said for which the predicate holds, by the graph or by the boxes."""
    subjects = objects_called(graph, said[0])
    others = objects_called(graph, said[1]) if len(said) > 1 else subjects
    for a in subjects:
        for b in others:
            if a is not b and holds(graph, a, predicate, b):
                return {"subject": a["id"], "predicate": canonical(predicate), "object": b["id"]}
    return None


def holds(graph: Graph, a: dict, predicate: str, b: dict) -> bool:
    """Whether `a predicate b` is a relation of the graph, its converse is, or the boxes say so (left, right, above,
    below). Predicates of one group count as one, except in CONTRARIES."""
    wanted, group = canonical(predicate), group_of(predicate)
    for relation in graph.relations:
        ends, given, exact = (relation["subject"], relation["object"]), canonical(relation["predicate"]), CONTRARIES
        if ends == (b["id"], a["id"]):
            given, exact = CONVERSE.get(group_of(given)), (*CONTRARIES, "touch")  # a cup that is held holds nobody
        elif ends != (a["id"], b["id"]):
            continue
        if given and (given == wanted or (group_of(given) == group and group not in (None, *exact))):
            return True
    return group is not None and group_of(direction(a["bbox"], b["bbox"]) or "") == group


def check_existence(question: str, options: list[str], gold: str, graph: Graph) -> dict | None:
    """'Is there a dog behind the car?': yes must be in the graph, no must not."""
    truth = plain(gold)
    if truth not in ("yes", "no") or {plain(option) for option in options} != {"yes", "no"}:
        raise ValueError("existence is answered by yes or no")
    found = mentions(question, {label(thing["id"]) for thing in graph.objects})
    triple = None
    if len(found) > 1:
        first, second = found[:2]
        predicate = words_between(question, first, second)
        triple = relation_between(graph, [first[0], second[0]], predicate)
        if truth == "no" and group_of(predicate) is None:
            raise ValueError("what is denied is in words that are not known")
        if truth == "yes" and triple is None:
            raise ValueError("a relation that the graph does not hold")
    if truth == "no" and (triple or len(found) == 1):
        raise ValueError("what is denied is in the graph")
    return triple


def check_location(question: str, options: list[str], gold: str, graph: Graph) -> None:
    """One object, one of its kind, and its centre where the answer says."""
    said = names_said(question, graph)
    things = objects_called(graph, said[0])
    names = {label(t["id"]) for t in graph.objects}
    if len(things) > 1 or any(confusable(said[0], n) and name_key(n) != name_key(said[0]) for n in names):
        raise ValueError("a location of what is there more than once")
    (x, y), (width, height), words = centre(things[0]["bbox"]), graph.size, set(tokens(gold))
    wrong = {"left": x > 0.5 * width, "right": x < 0.5 * width, "top": y > 0.5 * height, "upper": y > 0.5 * height,
             "bottom": y < 0.5 * height, "lower": y < 0.5 * height}  # fmt: skip
    if words & {"center", "centre", "central", "middle"}:  # of either axis that no other word speaks of
        wrong["middle"] = not (words & {"left", "right"} or width <= 3 * x <= 2 * width) or not (
            words & {"top", "upper", "bottom", "lower"} or height <= 3 * y <= 2 * height)  # fmt: skip
    if any(wrong.get(word) for word in (*words, "middle")):
        raise ValueError("a location that the box does not have")


def check_compared(question: str, options: list[str], gold: str, graph: Graph) -> None:
    """size, depth, distance: question and options name two objects of the graph or more."""
    said = names_said(f"{question} {' . '.join(options)}", graph)
    if sum(len(objects_called(graph, name)) for name in said) < 2:
        raise ValueError("nothing of the graph to compare")


def check_depth(question: str, options: list[str], gold: str, graph: Graph) -> dict | None:
    check_compared(question, options, gold, graph)
    nearer = not re.search(r"\b(farther|further|farthest|furthest|behind)\b", question.lower())
    names = {label(thing["id"]) for thing in graph.objects}
    chosen = [name for name, *_ in mentions(gold, names)]
    for option in options:
        other = [name for name, *_ in mentions(option, names)]
        if option == gold or len(chosen) != 1 or len(other) != 1:
            continue
        if relation_between(graph, [chosen[0], other[0]], "behind" if nearer else "in front of"):
            raise ValueError("a depth that the graph contradicts")
    return None


def check_named(question: str, options: list[str], gold: str, graph: Graph) -> None:
    """reach, orientation: an object of the graph is named, which is known already."""


CHECKS = {
    "relation": check_relation, "existence": check_existence, "instance_location": check_location,
    "depth": check_depth, "size": check_compared, "distance": check_compared, "count": check_named,
    "reach": check_named, "orientation": check_named,
}  # fmt: skip


# ---- the part of the graph -------------------------------------------------------------------------------------------


def sub_graph(graph: Graph, question: str, options: list[str], asked: dict | None = None) -> dict:
    """The objects that the question names or an option is, every one of a name, and the relations among them.

    Upstream compares single words, so that multi-word and hyphenated names never match; here a name matches as a whole,
    and of two that fit the longer. `asked`: the triple in question; it stands first, in the direction asked."""
    names = {label(thing["id"]) for thing in graph.objects}
    said = {name for name, *_ in mentions(question, names)}
    for option in options:
        words = [singular(word) for word in tokens(option) if word not in ("a", "an", "the")]
        said |= {name for name in names if list(name_key(name)) == words}
    keys = {name_key(name) for name in said}
    objects = [thing for thing in graph.objects if name_key(label(thing["id"])) in keys]
    kept = {thing["id"] for thing in objects}
    relations = [r for r in graph.relations if r["subject"] in kept and r["object"] in kept]
    if asked:
        pair, group = {asked["subject"], asked["object"]}, group_of(asked["predicate"])
        same = [r for r in relations if {r["subject"], r["object"]} == pair
                and group_of(r["predicate"]) in (group, OPPOSITE.get(group, group))]  # fmt: skip
        relations = [asked, *(r for r in relations if r not in same)]
    return {"objects": objects, "relationships": relations}


def map_relationships(relations: list[dict], words: list[str]) -> list[dict]:
    """Upstream's rule for relations: one stays if both ends' names are among the words."""
    return [r for r in relations if all(r[end].split(".")[0].lower() in words for end in ("subject", "object"))]


# ---- options, letters, the second model's vote -----------------------------------------------------------------------


def hash_seed(*parts: str) -> int:
    """32 bits of a real hash: Python's own is salted, so that no two runs of the published code agree."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:4], "big")


def shuffle_options(question: str, options: list[str], letter: str, seed: int | None = None) -> tuple[list[str], str]:
    """(options in another order, letter of the same one). The generator is upstream's; the seed there is a salted hash
    of the question."""
    shuffled = list(options)
    random.Random(hash_seed(question) if seed is None else seed).shuffle(shuffled)
    return shuffled, ascii_uppercase[shuffled.index(options[ascii_uppercase.index(letter)])]


def question_with_options(question: str, options: list[str]) -> str:
    return f"{question}\nOptions:\n{options_text(options)}"


def update_answer(answer: str, options: list[str], *, with_letter: bool) -> str:
    """Upstream's `<answer>B</answer>` with the option's text for the letter, or beside it. IndexError past the end."""
    letter = extract_answer(answer)
    text = options[ascii_uppercase.index(letter)]
    return answer.replace(f"<answer>{letter}</answer>", f"<answer>{f'({letter}) ' if with_letter else ''}{text}</answer>")


def read_letter(text: str, options: list[str], mode: str = "corrected") -> str | None:
    """The letter that a reply chooses. upstream: the first of A to D anywhere in it, so that 'The answer is D' reads A."""
    if mode == "corrected":
        return extract_choice(text, options)
    found = re.search("[A-D]", text.upper())
    return found[0] if found else (text.strip()[:1].upper() or None)


def vote(gold: str | None, letters: list[str | None], *, tries: int = 4) -> tuple[bool | None, int]:
    """(kept, letters looked at): kept by the first that agrees, not kept after `tries` that do not, None while open."""
    if gold is None:
        return False, 0
    for number, letter in enumerate(letters[:tries], start=1):
        if letter == gold:
            return True, number
    return (False, tries) if len(letters) >= tries else (None, len(letters))


# ---- how much of the picture -----------------------------------------------------------------------------------------


def share(thing: dict, graph: Graph) -> float:
    return area(thing["bbox"]) / (graph.size[0] * graph.size[1])


def gap(a: dict, b: dict, graph: Graph) -> float:
    """Free pixels between two boxes as a part of the picture's diagonal; 0 where they meet."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a["bbox"], b["bbox"]
    return math.hypot(max(0, bx1 - ax2, ax1 - bx2), max(0, by1 - ay2, ay1 - by2)) / math.hypot(*graph.size)
