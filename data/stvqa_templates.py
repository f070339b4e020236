"""A writer without a model: questions of all nine categories whose answers follow from the scene graph alone.

What makes them sound: an object is asked about by name only where nothing else in the picture could be called that; every
answer keeps a margin, and what lies within it is not asked; a wrong option is one that boxes or annotations refute, not
one that merely is not annotated. Questions of boxes say "in the picture", because there they are about the picture.

Of the questions that a graph supports the one is taken whose category, then whose answer, has been asked least. Options
give nothing away: where they are words or numbers and not objects, no answer runs ahead of its rival among the same
options, so that yes and no, left and right, on and under stay even.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, permutations

from data.drawing import CELLS, Draw, cell, centre
from data.scene_graphs import Graph, area, direction
from data.stvqa_items import CATEGORIES, Balance, gap, hash_seed, share
from data.words import GROUPS, OPPOSITE, canonical, confusable, group_of, label, name_key, plural, with_article

# Parts, clothing, background and print: poor things to ask about (spec 3.3, salience).
DULL = frozenset(
    """eye ear nose mouth head hair face hand arm leg foot finger neck tail paw horn wing beard wheel tire handle handlebar
    spoke headlight button collar sleeve pocket logo letter number word text writing print line stripe spot shadow
    reflection edge corner part side top bottom front back end middle piece row group area section surface background
    foreground scene view picture image photo shirt t_shirt pant jean short shoe sneaker hat cap jacket coat sock glove
    sunglass glass uniform jersey dress skirt suit tie belt watch sky ground grass floor wall ceiling air cloud water
    weather day night sun color lid strap cord wire pole post nostril knee elbow wrist chest lap waist
    """.replace("_", " ").split()
)
# Of these two in one picture differ little in the world, so that the one that looks twice as long is the nearer.
SIMILAR = frozenset("car bus train truck horse cow sheep elephant zebra giraffe bicycle motorcycle chair person".split())
# The annotated relations that are asked about, each by one word that stands for all of its kind.
ASKED = {"on": "on", "sitting on": "on", "standing on": "on", "lying on": "on", "laying on": "on", "riding": "on",
         "parked on": "on", "on top of": "on", "under": "under", "beneath": "under", "next to": "next to",
         "beside": "next to", "in": "inside", "inside": "inside", "in front of": "in front of", "behind": "behind",
         "at the back of": "behind"}  # fmt: skip
# Words that exclude each other, asked against each other: were one the wrong option of another but not the other way
# round, the two together would tell which is right.
EXCLUDE = (("in front of", "behind"), ("on", "under"), ("on", "next to"), ("under", "inside"), ("next to", "inside"))
COUNTS = tuple((str(n), str(n + 1)) for n in range(2, 9))  # for the same reason no number that is never right
VERBS = {"holding": "holding", "carrying": "carrying", "riding": "riding", "using": "using", "eating": "eating",
         "leaning against": "leaning against", "sitting on": "sitting on", "standing on": "standing on",
         "touching": "touching"}  # fmt: skip
FACING = ("facing", "facing towards", "looking at", "watching")
DIRECTIONS = ("left of", "right of", "above", "below")
SIDES = frozenset(GROUPS[where] for where in DIRECTIONS)


class Names:
    """What can be asked about in a graph. alone: {name: object} of the names that are certain to mean one object."""

    def __init__(self, graph: Graph):
        self.graph, self.by_name = graph, {}
        for thing in graph.objects:
            self.by_name.setdefault(label(thing["id"]), []).append(thing)
        names = list(self.by_name)
        unsure = {name_key(name) for name in graph.uncounted}
        self.clear = {
            name for name in names
            if name_key(name) not in unsure and not any(other != name and confusable(name, other) for other in names)
        }  # fmt: skip
        self.alone = {
            name: things[0] for name, things in self.by_name.items()
            if name in self.clear and len(things) == 1 and name_key(name)[-1] not in DULL
            and name_key(name)[-1] not in ("crowd", "group", "couple", "team", "family")
            and plural(name) != name and 0.002 < share(things[0], graph) < 0.9
        }  # fmt: skip
        self.said: dict[tuple, set[str]] = {}  # (id, id), either order -> predicates annotated between them
        for r in graph.relations:
            for ends in ((r["subject"], r["object"]), (r["object"], r["subject"])):
                self.said.setdefault(ends, set()).add(canonical(r["predicate"]))

    def groups(self, a: dict, b: dict) -> set[str | None]:
        return {GROUPS.get(predicate) for predicate in self.said.get((a["id"], b["id"]), ())}

    def directed(self, a: dict, b: dict) -> set[str | None]:
        """The groups of what is annotated of a with respect to b, its converse included: "b behind a" says front."""
        groups = set()
        for r in self.graph.relations:
            group = group_of(r["predicate"])
            if (r["subject"], r["object"]) == (a["id"], b["id"]):
                groups.add(group)
            elif (r["subject"], r["object"]) == (b["id"], a["id"]):
                groups.add(OPPOSITE.get(group, group))
        return groups

    def apart(self, a: dict, b: dict) -> bool:
        return gap(a, b, self.graph) >= 0.08 and not self.groups(a, b) & {"touch", "on", "inside", "holds", "clothing"}

    def meet(self, a: dict, b: dict) -> bool:
        return bool(self.groups(a, b) & {"touch"}) or inside(a, b) >= 0.6 or inside(b, a) >= 0.6


def inside(a: dict, b: dict) -> float:
    """The part of a's box that lies in b's."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a["bbox"], b["bbox"]
    return max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1)) / area(a["bbox"])


# ---- one function a category: (question, options, gold) of everything that the graph supports ------------------------


def relation(names: Names, draw: Draw) -> Iterator[tuple]:
    for (a, one), (b, other) in permutations(names.alone.items(), 2):
        where = direction(one["bbox"], other["bbox"])
        if where and not names.groups(one, other) & SIDES - {GROUPS[where], OPPOSITE[GROUPS[where]]}:
            yield f"In the picture, where is the {a} with respect to the {b}?", DIRECTIONS, where
    if names.graph.boxes_only:
        return
    by_id = {thing["id"]: name for name, thing in names.alone.items()}
    for r in names.graph.relations:
        if r["subject"] in by_id and r["object"] in by_id and canonical(r["predicate"]) in ASKED:
            a, b, gold = by_id[r["subject"]], by_id[r["object"]], ASKED[canonical(r["predicate"])]
            yield from annotated(names, a, b, gold)
            if gold in ("in front of", "behind"):
                yield from annotated(names, b, a, "behind" if gold == "in front of" else "in front of")


def annotated(names: Names, a: str, b: str, gold: str) -> Iterator[tuple]:
    """A relation that somebody saw, against one that it excludes."""
    one, other = names.alone[a], names.alone[b]
    lower = centre(one["bbox"])[1] - centre(other["bbox"])[1]
    said, seen = names.directed(one, other), GROUPS.get(direction(one["bbox"], other["bbox"]))
    if (gold == "on" and lower >= 0) or (gold == "under" and lower <= 0) or {"front", "behind"} <= said:
        return  # the boxes contradict the annotator, or one annotator another
    if gold in ("in front of", "behind") and not may_be_nearer(*((one, other) if gold != "behind" else (other, one)), names):
        return
    for pair in EXCLUDE:
        if gold in pair and not {GROUPS[option] for option in pair if option != gold} & {*said, seen}:
            yield f"Where is the {a} with respect to the {b}?", pair, gold


def may_be_nearer(near: dict, far: dict, names: Names) -> bool:
    """Not if it stands clearly higher in the picture: "in front of the laptop" may be said from where the laptop is."""
    return near["bbox"][3] >= far["bbox"][3] - 0.1 * names.graph.size[1]


def existence(names: Names, draw: Draw) -> Iterator[tuple]:
    for (a, one), (b, other) in permutations(names.alone.items(), 2):
        where = direction(one["bbox"], other["bbox"])
        for asked in DIRECTIONS:
            opposite = {asked, where} in ({"left of", "right of"}, {"above", "below"})
            if asked == where or opposite:
                question = f"In the picture, is there {with_article(a)} {asked} {with_article(b)}?"
                yield question, ("yes", "no"), "yes" if asked == where else "no"


def size(names: Names, draw: Draw) -> Iterator[tuple]:
    def extent(thing: dict, kind: str) -> float:
        x1, y1, x2, y2 = thing["bbox"]
        return {"larger": area(thing["bbox"]), "taller": y2 - y1, "wider": x2 - x1}[kind]

    for kind, least in (("larger", 2.2), ("taller", 1.3), ("wider", 1.3)):
        for a, b in combinations(names.alone, 2):
            x, y = extent(names.alone[a], kind), extent(names.alone[b], kind)
            if max(x, y) >= least * min(x, y):
                options = draw.sample((a, b), 2)
                question = f"Which looks {kind} in the picture, the {options[0]} or the {options[1]}?"
                yield question, options, a if x > y else b
        if len(names.alone) >= 3:
            some = draw.sample(list(names.alone), min(4, len(names.alone)))
            ordered = sorted(some, key=lambda name: -extent(names.alone[name], kind))
            if extent(names.alone[ordered[0]], kind) >= least * extent(names.alone[ordered[1]], kind):
                superlative = {"larger": "largest", "taller": "tallest", "wider": "widest"}[kind]
                yield f"Which of these looks {superlative} in the picture?", some, ordered[0]


def count(names: Names, draw: Draw) -> Iterator[tuple]:
    for name, things in names.by_name.items():
        n = len(things)
        small = min(share(thing, names.graph) for thing in things) < 0.0005
        if name in names.clear and 2 <= n <= 9 and not small and name_key(name)[-1] not in DULL and plural(name) != name:
            for pair in COUNTS:
                if str(n) in pair:
                    yield f"How many {plural(name)} are there?", pair, str(n)


def instance_location(names: Names, draw: Draw) -> Iterator[tuple]:
    width, height = names.graph.size
    for name, thing in names.alone.items():
        x1, y1, x2, y2 = thing["bbox"]
        gold = cell([round(v) for v in thing["bbox"]], width, height, 3, round(0.04 * min(width, height)))
        if gold and x2 - x1 <= 0.5 * width and y2 - y1 <= 0.5 * height:
            wrong = draw.sample([spot for spot in CELLS[3] if spot != gold], 3)
            yield f"In which part of the image is the {name}?", [gold, *wrong], gold


def distance(names: Names, draw: Draw) -> Iterator[tuple]:
    def apart(a: dict, b: dict) -> float:
        (ax, ay), (bx, by) = centre(a["bbox"]), centre(b["bbox"])
        return ((ax - bx) ** 2 + (ay - by) ** 2) ** 0.5

    graph = names.graph
    for r, there in names.alone.items():
        for a, b in combinations([name for name in names.alone if name != r], 2):
            near, far = sorted((a, b), key=lambda name: apart(names.alone[name], there))
            one, other = names.alone[near], names.alone[far]
            if apart(other, there) >= 1.5 * apart(one, there) and gap(other, there, graph) >= gap(one, there, graph) + 0.08:
                options = draw.sample((a, b), 2)
                question = f"In the picture, which is closer to the {r}, the {options[0]} or the {options[1]}?"
                yield question, options, near


def depth(names: Names, draw: Draw) -> Iterator[tuple]:
    graph = names.graph
    if not graph.boxes_only:
        for a, b in combinations(names.alone, 2):
            one, other = names.alone[a], names.alone[b]
            ends = [
                (r["subject"], r["object"]) if group_of(r["predicate"]) == "front" else (r["object"], r["subject"])
                for r in graph.relations
                if group_of(r["predicate"]) in ("front", "behind")
                and {r["subject"], r["object"]} == {one["id"], other["id"]}
            ]
            near, far = (one, other) if ends and ends[0][0] == one["id"] else (other, one)
            if len(set(ends)) == 1 and may_be_nearer(near, far, names):
                options = draw.sample((a, b), 2)
                question = f"Which is closer to the camera, the {options[0]} or the {options[1]}?"
                yield question, options, a if near is one else b
    for name, things in names.by_name.items():
        if name not in names.clear or len(things) != 2 or name not in SIMILAR:
            continue
        left, right = sorted(things, key=lambda thing: centre(thing["bbox"]))
        far, near = sorted(things, key=lambda thing: area(thing["bbox"]))
        cut = far["bbox"][0] <= 2 or far["bbox"][2] >= graph.size[0] - 2 or far["bbox"][3] >= graph.size[1] - 2
        taller = (near["bbox"][3] - near["bbox"][1]) / (far["bbox"][3] - far["bbox"][1])
        lower = near["bbox"][3] - far["bbox"][3] >= 0.05 * graph.size[1]
        if direction(left["bbox"], right["bbox"]) == "left of" and taller >= 2 and lower and not cut:
            options = ("the one on the left", "the one on the right")
            question = f"There are two {plural(name)} in the picture. Which of them is closer to the camera?"
            yield question, options, options[near is right]


def reach(names: Names, draw: Draw) -> Iterator[tuple]:
    alone = names.alone
    for a, b in permutations(alone, 2):
        met = names.meet(alone[a], alone[b])
        if met or names.apart(alone[a], alone[b]):
            question = f"Does the {a} touch or overlap the {b} in the picture?"
            yield question, ("yes", "no"), "yes" if met else "no"
        for predicate in sorted(names.said.get((alone[a]["id"], alone[b]["id"]), ())):  # sets have a salted order
            if predicate not in VERBS or names.graph.boxes_only or not any(
                canonical(r["predicate"]) == predicate and r["subject"] == alone[a]["id"] and r["object"] == alone[b]["id"]
                for r in names.graph.relations
            ):  # fmt: skip
                continue
            away = [c for c in alone if c not in (a, b) and names.apart(alone[a], alone[c])]
            if away:
                options = [b, *draw.sample(away, min(3, len(away)))]
                yield f"Which of these is the {a} {VERBS[predicate]}?", options, b


def orientation(names: Names, draw: Draw) -> Iterator[tuple]:
    alone = names.alone
    for a, b in permutations(alone, 2):
        where = direction(alone[a]["bbox"], alone[b]["bbox"])
        if where in ("left of", "right of"):
            turned = "right" if where == "left of" else "left"
            start = f"Imagine standing where the {b} is in the picture, facing"
            yield f"{start} the camera. Is the {a} on your left or on your right?", ("left", "right"), turned
            yield f"{start} away from the camera. Is the {a} on your left or on your right?", ("left", "right"), where[:-3]
        looks = names.said.get((alone[a]["id"], alone[b]["id"]), set()) & set(FACING)
        if looks and not names.graph.boxes_only:
            away = [c for c in alone if c not in (a, b) and opposed(alone[a], alone[b], alone[c])
                    and not names.said.get((alone[a]["id"], alone[c]["id"]))]  # fmt: skip
            seen = {(r["subject"], r["object"]) for r in names.graph.relations if canonical(r["predicate"]) in FACING}
            if away and (alone[a]["id"], alone[b]["id"]) in seen:
                options = [b, *draw.sample(away, min(3, len(away)))]
                yield f"Which of these is the {a} facing?", options, b
    for a, thing in alone.items():
        x1, y1, x2, y2 = thing["bbox"]
        across, down = x2 - x1, y2 - y1
        if max(across, down) >= 1.6 * min(across, down):
            options = ("from left to right", "from top to bottom")
            yield f"In which direction does the {a} extend further in the picture?", options, options[down > across]


def opposed(a: dict, b: dict, c: dict) -> bool:
    """Whether c lies on the other side of a than b, by the centres of their boxes."""
    (ax, ay), (bx, by), (cx, cy) = centre(a["bbox"]), centre(b["bbox"]), centre(c["bbox"])
    return (bx - ax) * (cx - ax) + (by - ay) * (cy - ay) < 0


WRITERS = dict(zip(CATEGORIES, (relation, reach, size, orientation, instance_location, depth, distance, count, existence),
                   strict=True))  # fmt: skip
# Of two options here neither may have been right more often than the other, in questions with the same options, by more
# than SLACK before it has to wait: some, or a graph that supports only the one would give no question.
SLACK = 1
PAIRS = (("yes", "no"), ("left", "right"), ("left of", "right of"), ("above", "below"), *EXCLUDE, *COUNTS,
         ("from left to right", "from top to bottom"), ("the one on the left", "the one on the right"))  # fmt: skip
RIVALS = {one: {b for pair in PAIRS if one in pair for b in pair if b != one} for pair in PAIRS for one in pair}


def write_items(graph: Graph, balance: Balance, *, n: int, relation_percent: float, seed: int) -> list[dict]:
    """Up to n items of a graph; `balance` is not changed. No more than relation_percent of them are relations and each
    other category comes once, unless nothing else is left to ask."""
    names, draw = Names(graph), Draw(hash_seed(str(seed), graph.id))
    wanted = {c: (100 - relation_percent) / 8 if c != "relation" else relation_percent for c in CATEGORIES}
    counts = dict(balance.categories)
    most = {c: 1 if c != "relation" else max(1, math.ceil(n * relation_percent / 100)) for c in CATEGORIES}
    items, asked = [], set()
    candidates: dict[str, list] = {}
    while len(items) < n:
        here = Counter(item["category"] for item in items)
        order = sorted((c for c in CATEGORIES if wanted[c] > 0),
                       key=lambda c: (here[c] >= most[c], counts.get(c, 0) / wanted[c]))  # fmt: skip
        for category in order:
            if category not in candidates:
                candidates[category] = list(WRITERS[category](names, draw))
            chosen = least_used(candidates[category], category, balance, items, asked, draw)
            if chosen:
                break
        else:
            return items
        question, options, gold = chosen
        asked.add(question)
        counts[category] = counts.get(category, 0) + 1
        items.append(finished(graph, names, draw, category, question, list(options), gold))
    return items


def least_used(candidates: list, category: str, balance: Balance, items: list, asked: set, draw: Draw) -> tuple | None:
    """The candidate whose answer the category has given least, drawn among equals; None if all would tip the balance."""
    here = Balance()
    for item in items:
        here.add(item)
    fresh = []
    for question, options, gold in candidates:
        key, rivals = (category, frozenset(options)), RIVALS.get(gold, set()) & {*options}
        used = {answer: balance.sets[*key, answer] + here.sets[*key, answer] for answer in (gold, *rivals)}
        if question not in asked and all(used[gold] <= used[rival] + SLACK for rival in rivals):
            fresh.append((balance.answers[category, gold] + here.answers[category, gold], question, options, gold))
    if not fresh:
        return None
    least = min(entry[0] for entry in fresh)
    return draw.pick([entry[1:] for entry in fresh if entry[0] == least])


def finished(graph: Graph, names: Names, draw: Draw, category: str, question: str, options: list, gold: str) -> dict:
    """The keys that a model's reply has. level: by the crowd, the options and the smallest object asked about; rating:
    by how much of the picture these objects fill, which is the published preference."""
    options = draw.sample(options, len(options))
    text = f"{question} {' . '.join(options)}".replace("?", " ")
    shares = [share(t, graph) for name, things in names.by_name.items() if name in text for t in things] or [0.0]
    points = (len(options) > 2) + (len(graph.objects) > 6) + (len(graph.objects) > 15) + (min(shares) < 0.02)
    level = ("easy", "easy", "medium", "hard", "hard")[points]
    rating = min(10, 3 + round(10 * sum(shares)))
    return {"question": question, "options": options, "answer": "ABCD"[options.index(gold)], "category": category,
            "level": level, "rating": rating}  # fmt: skip
