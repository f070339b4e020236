"""Questions about scene graphs: what a reply must hold, repairs, the rule-based writer, the choice of rows.

python -m pytest tests/test_stvqa.py          `vectors` are inputs and outputs of the published code
"""

import json
import random
import re
from collections import Counter, defaultdict

import pytest

from data.drawing import centre
from data.scene_graphs import Graph, area, read_graphs
from data.stvqa_items import (
    CATEGORIES, Balance, checked, extract_json, hash_seed, map_relationships, question_with_options, read_items,
    read_letter, shuffle_options, sub_graph, update_answer, vote,
)  # fmt: skip
from data.stvqa_page import Guesser
from data.stvqa_prompts import writer_prompt, writer_system
from data.stvqa_selection import allocations, choose, quotas
from data.stvqa_templates import Names, write_items
from data.words import label
from rewards import extract_answer

SIZE = (640, 480)


def graph(objects: dict, relations=(), **more) -> Graph:
    """graph({"man.1": [x1, y1, x2, y2]}, [("man.1", "on", "horse.1")])"""
    return Graph("g", "g.jpg", SIZE, [{"id": name, "bbox": box} for name, box in objects.items()],
                 [dict(zip(("subject", "predicate", "object"), r, strict=True)) for r in relations], **more)  # fmt: skip


STREET = graph(
    {"man.1": [50, 200, 110, 400], "bus.1": [250, 120, 600, 420], "traffic_light.1": [150, 20, 190, 120],
     "light.1": [5, 5, 20, 20], "cup.1": [300, 430, 320, 460], "cup.2": [350, 430, 370, 460], "cup.3": [400, 430, 420, 460]},
    [("man.1", "in front of", "bus.1"), ("bus.1", "near", "traffic_light.1"), ("cup.1", "below", "bus.1"),
     ("cup.2", "below", "bus.1")],
)  # fmt: skip


def item(question="Where is the man with respect to the bus?", options=("behind", "in front of", "inside"), answer="B",
         category="relation", level="easy", rating=7):  # fmt: skip
    return {"question": question, "options": list(options), "answer": answer, "category": category, "level": level,
            "rating": rating}  # fmt: skip


def gold(row: dict) -> str:
    return row["options"]["ABCD".index(row["gold"])]


# ---------------------------------------------------------------- the published code


def vectors_of(vectors, name):
    found = [v for v in vectors if v["function"] == f"data_gen.{name}"]
    assert found
    return found


def test_upstream_json_statistics_and_relations(vectors):
    for v in vectors_of(vectors, "extract_json_from_output"):
        assert extract_json(v["input"]["output"], "upstream") == v["expected"], v["id"]
    for v in vectors_of(vectors, "compute_data_stats"):
        balance = Balance()
        for row in v["input"]["rows"]:
            balance.add(row)
        assert [balance.shares(), balance.last_three()] == v["expected"], v["id"]
    for v in vectors_of(vectors, "map_relationships"):
        assert map_relationships(v["input"]["relationships"], v["input"]["question_words"]) == v["expected"], v["id"]


def test_upstream_letters_votes_and_quotas(vectors):
    for v in vectors_of(vectors, "gpt4o_letter"):
        assert read_letter(v["input"]["model_output"], [], "upstream") == v["expected"], v["id"]
    for v in vectors_of(vectors, "validate_row"):
        found = re.search("<answer>(.*?)</answer>", v["input"]["answer"])  # without DOTALL: a broken line is not found
        asked = found and v["input"]["image_found"]
        kept, calls = vote(found[1], v["input"]["model_letters"]) if asked else (False, 0)
        assert {"kept": kept, "model_calls": calls} == v["expected"], v["id"]
    for v in vectors_of(vectors, "allocations"):
        given = v["input"]
        got = allocations(given["total_rows"], given["target_samples"], relation_percent=given["relation_percent"],
                          val_split=given["val_split"])  # fmt: skip
        assert got == v["expected"], v["id"]


def test_upstream_options_and_answers(vectors):
    for v in vectors_of(vectors, "shuffle_options"):
        given, expected = v["input"], v["expected"]
        letter = extract_answer(given["answer"])
        options, new = shuffle_options(given["question"], given["options"], letter, seed=given["seed"])
        assert options == expected["options"]
        assert given["answer"].replace(f"<answer>{letter}<", f"<answer>{new}<") == expected["answer"]
        assert question_with_options(given["question"], options) == expected["question_with_options"]
    for v in vectors_of(vectors, "update_answer_column"):
        given = v["input"]
        if "error" in (v["expected"] if isinstance(v["expected"], dict) else {}):
            with pytest.raises(IndexError):
                update_answer(given["answer"], given["options"], with_letter=given["with_letter"])
        else:
            assert update_answer(given["answer"], given["options"], with_letter=given["with_letter"]) == v["expected"]


# ---------------------------------------------------------------- replies


@pytest.mark.parametrize(("text", "n"), [
    ('Sure!\n```json\n{"questions": [{"question": "a {b} c"}, {"question": "d"}]}\n``` Hope {this} helps', 2),
    ('[{"question": "a"}, "no", 3]', 1), ('{"question": "a"}', 1), ('{"a": 1} and {"b": 2}', 1), ("", 0), ("no json", 0),
    ('{"questions": [{"question": "cut', 0), ("{" * 5000, 0), ('{"questions": null}', 0), ('{"questions": []}', 0),
])  # fmt: skip
def test_any_reply_is_read_without_raising(text, n):
    assert len(read_items(text)) == n


def test_a_reply_broken_in_one_question_gives_the_others():
    asked = [f"Where is dog {i}?" for i in range(4)]
    whole = json.dumps({"questions": [item(question) for question in asked]})
    assert [one["question"] for one in read_items(whole)] == asked
    for reply, left in ((whole[:-60], asked[:3]),  # cut off in the last
                        (whole.replace("dog 2", 'the "dog" 2'), [*asked[:2], asked[3]]),
                        (whole.replace("dog 0", 'the "dog" 0'), asked[1:]), (whole.replace("}]}", "},]}"), asked),
                        (f"The bench is at [40, 210, 300, 330], as {{S}} and {{}}:\n{whole}", asked),
                        (f'{{"reply": {whole}}}', asked),
                        ("\n".join(json.dumps(item(question)) for question in asked), asked)):  # fmt: skip
        assert [one["question"] for one in read_items(reply)] == left, reply


def test_a_letter_is_read_where_upstream_takes_the_first_capital():
    options = ["left", "right", "above", "below"]
    for said in ("The answer is D", "Answer: (D)", "D", "below"):
        assert read_letter(said, options) == "D"
    assert read_letter("I cannot tell", options) is None and read_letter("The answer is D", options, "upstream") == "A"


def test_votes():
    assert vote("A", ["B", "A", "A"]) == (True, 2)
    assert vote("A", ["B", None, "C"]) == (None, 3)  # open: one try is left
    assert vote("A", ["B", None, "C", "D", "A"]) == (False, 4)
    assert vote("A", ["B"], tries=1) == (False, 1)


# ---------------------------------------------------------------- check


def test_a_good_question_is_kept_whole_and_its_options_move_the_same_way_every_time():
    row = checked(item(options=["(A) behind", "(B) in front of", "(C) inside"], category="REL_position"), STREET)
    assert gold(row) == "in front of" and sorted(row["options"]) == ["behind", "in front of", "inside"]
    assert (row["category"], row["level"], row["rating"], row["graph"]) == ("relation", "easy", 7, "g")
    assert row == checked(item(options=["(A) behind", "(B) in front of", "(C) inside"]), STREET)
    assert checked(item(answer="in front of"), STREET) == checked(item(), STREET)


def test_the_answer_letter_is_spread_over_the_options_by_the_hash():
    letters = Counter()
    for i in range(400):
        options = ["behind", "in front of", "inside", "on top of"]
        question = f"Where is the man with respect to the bus number {i}?"
        letters[checked(item(question, options), STREET)["gold"]] += 1
    assert all(70 < letters[letter] < 130 for letter in "ABCD"), letters


BAD = {
    "the question is empty": item(question=" "),
    "options are no list": item(options=None or []) | {"options": "behind"},
    "not 2 to 4 options": item(options=["a", "b", "c", "d", "e"]),
    "two read the same": item(options=["in front of", "In front of."]),
    "the answer is none of the options": item(answer="D"),
    "category or level": item(category="colour"),
    "rating is not 1 to 10": item(rating=11),
    "names no object of": item(question="Where is the unicorn with respect to the castle?"),
    "relation that the graph does not hold": item(answer="A"),
    "a tag in the question": item(question="Where is the <scene> man with respect to the bus?"),
    "a relation of one object": item(question="Where is the man?"),
    "a second option holds": item(options=["in front of", "left of", "behind"], answer="A"),
    "how many of what": item("How many wheels does the bus have?", ["2", "4"], "A", "count"),
    "existence is answered by yes or no": item("Is there a man in front of the bus?", ["yes", "maybe"], "A", "existence"),
    "what is denied is in the graph": item("Is there a man in front of the bus?", ["yes", "no"], "B", "existence"),
    "a location of what is there more than once": item("In which part of the image is the cup?", ["top left", "center"], "B",
                                                       "instance_location"),
    "a location that the box does not have": item("In which part of the image is the man?", ["top right", "center"], "A",
                                                  "instance_location"),
    "a depth that the graph contradicts": item("Which is closer to the camera, the man or the bus?", ["man", "bus"], "B",
                                               "depth"),
    "question names no object": item("Which of these looks larger?", ["red man", "long bus"], "B", "size"),
    "nothing of the graph to compare": item("Which is larger, the man or his dog?", ["the man", "the dog"], "A", "size"),
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_what_is_malformed_or_not_in_the_graph_is_rejected_with_a_reason(why):
    with pytest.raises(ValueError, match=why):
        checked(BAD[why], STREET)


@pytest.mark.parametrize("value", [None, -3, [], {}, "", {"text": "x"}, float("nan"), ["a", None], "\ud800", "a\0"])
@pytest.mark.parametrize("key", ["question", "options", "answer", "category", "level", "rating"])
def test_any_value_of_any_key_costs_the_item_only(key, value):
    Balance().add(item() | {key: value})
    with pytest.raises(ValueError):
        checked(item() | {key: value}, STREET)
    with pytest.raises(ValueError, match="no file can hold"):
        checked(item(options=["in front of", "be\ud800hind"], answer="A"), STREET)


def test_right_answers_of_each_kind_pass():
    for good in (
        item("Is there a man left of the bus?", ["no", "yes"], "B", "existence"),
        item("Is there a man right of the bus?", ["no", "yes"], "A", "existence"),
        item("In which part of the image is the man?", ["top right", "middle left"], "B", "instance_location"),
        item("Which is closer to the camera, the man or the bus?", ["man", "bus"], "A", "depth"),
        item("Where is the bus with respect to the man?", ["behind", "left of"], "A"),  # the converse is in the graph
    ):
        assert checked(good, STREET)["scene"]["objects"]


def test_a_question_that_names_the_other_object_first_is_read_that_way():
    for start in ("With respect to the bus, where is", "Relative to a bus, where is", "In relation to the bus, where's"):
        row = checked(item(f"{start} the man?", ["left of", "right of"], "A"), STREET)
        assert row["scene"]["relationships"][0] == {"subject": "man.1", "predicate": "left of", "object": "bus.1"}
        with pytest.raises(ValueError, match="the graph does not hold"):
            checked(item(f"{start} the man?", ["left of", "right of"], "B"), STREET)
    checked(item("Where is the man relative to the bus?", ["left of", "right of"], "A"), STREET)


def test_contraries_of_one_group_do_not_stand_for_each_other_and_near_holds_from_both_ends():
    g = graph({"fence.1": [0, 200, 640, 290], "road.1": [0, 250, 640, 480], "cup.1": [100, 100, 140, 220],
               "man.1": [90, 120, 200, 420]},
              [("fence.1", "parallel to", "road.1"), ("cup.1", "smaller", "fence.1"), ("man.1", "holding", "cup.1"),
               ("road.1", "next to", "man.1")])  # fmt: skip
    good = [("fence", "road", "parallel to", "perpendicular to"), ("cup", "fence", "smaller", "bigger"),
            ("man", "cup", "holding", "behind"), ("cup", "man", "touching", "behind"),
            ("man", "road", "next to", "inside"), ("man", "road", "beside", "inside")]  # fmt: skip
    for a, b, right, wrong in good:
        assert gold(checked(item(f"Where is the {a} with respect to the {b}?", [right, wrong], "A"), g)) == right
        with pytest.raises(ValueError, match="the graph does not hold"):
            checked(item(f"Where is the {a} with respect to the {b}?", [right, wrong], "B"), g)
    with pytest.raises(ValueError, match="the graph does not hold"):
        checked(item("Where is the cup with respect to the man?", ["holding", "behind"], "A"), g)
    beside = graph({"chair.1": [10, 200, 60, 300], "table.1": [200, 200, 400, 300]}, [("table.1", "next to", "chair.1")])
    with pytest.raises(ValueError, match="a second option holds"):
        checked(item("Where is the chair with respect to the table?", ["left of", "next to"], "A"), beside)


def test_what_cannot_be_looked_up_is_not_denied():
    for question in ("Is there a man parked in front of the bus?", "Is there a man right next to the bus?"):
        with pytest.raises(ValueError, match="words that are not known"):
            checked(item(question, ["yes", "no"], "B", "existence"), STREET)
    assert gold(checked(item("Is there a man behind the bus?", ["yes", "no"], "B", "existence"), STREET)) == "no"


def test_the_middle_is_the_middle_third_of_what_no_other_word_speaks_of():
    center, corner, top, right = [300, 220, 340, 260], [0, 0, 60, 60], [300, 0, 340, 60], [560, 220, 620, 260]
    for box, good, bad in ((center, ("center", "middle"), ()),
                           (corner, ("top left",), ("center", "middle left", "top center")),
                           (top, ("top center",), ("center", "middle")),
                           (right, ("middle right",), ("center", "middle"))):  # fmt: skip
        for said in (*good, *bad):
            one = item("In which part of the image is the dog?", [said, "bottom left"], "A", "instance_location")
            if said in good:
                assert gold(checked(one, graph({"dog.1": box}))) == said
            else:
                with pytest.raises(ValueError, match="the box does not have"):
                    checked(one, graph({"dog.1": box}))


# ---------------------------------------------------------------- repairs of the published pipeline


def test_a_wrong_count_moves_to_the_option_that_is_right_or_rewrites_it():
    row = checked(item("How many cups are there?", ["2", "3", "4"], "A", "count"), STREET)
    assert gold(row) == "3" and sorted(row["options"]) == ["2", "3", "4"]
    row = checked(item("How many cups are there?", ["two", "5"], "A", "count"), STREET)
    assert gold(row) == "3" and sorted(row["options"]) == ["3", "5"]


def test_a_count_tied_to_another_object_counts_those_with_this_relation_to_it():
    chairs = graph({"chair.1": [10, 200, 60, 300], "chair.2": [80, 200, 130, 300], "chair.3": [500, 200, 560, 300],
                    "table.1": [200, 200, 400, 300]},
                   [("chair.1", "left of", "table.1"), ("table.1", "right of", "chair.2"),
                    ("chair.3", "near", "table.1")])  # fmt: skip
    for question, n in (("How many chairs are left of the table?", 2), ("How many chairs are right of the table?", 1),
                        ("How many chairs are there near the table?", 1), ("How many chairs are there?", 3)):  # fmt: skip
        for options in (["1", "2", "3", "4"], ["one chair", "two chairs", "3", "none"]):
            row = checked(item(question, options, "D", "count"), chairs)
            assert gold(row) == options[n - 1] and sorted(row["options"]) == sorted(options)
    for question, why in (("How many chairs are behind the table?", "does not tie together"),
                          ("How many chairs are there with a leg that the table lacks?", "does not tie together"),
                          ("Next to the table, how many chairs are there?", "words that are not known")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            checked(item(question, ["1", "2"], "A", "count"), chairs)
    for vague in ("more than 2", "about 3", "at least 3", "2-4", "several"):
        with pytest.raises(ValueError, match="no number"):
            checked(item("How many chairs are there?", [vague, "2", "3"], "C", "count"), chairs)
    crowd = graph({"cup.1": [0, 0, 9, 9], "cup.2": [20, 0, 29, 9]}, uncounted=frozenset({"cup"}))
    with pytest.raises(ValueError, match="not boxed one by one"):
        checked(item("How many cups are there?", ["2", "3"], "A", "count"), crowd)


def test_the_scene_of_a_row_is_what_the_question_names_and_never_the_full_graph():
    for good in (item(), item("How many cups are there?", ["2", "3"], "A", "count")):
        row = checked(good, STREET)
        names = {"relation": {"man.1", "bus.1"}, "count": {"cup.1", "cup.2", "cup.3"}}[good["category"]]
        assert {thing["id"] for thing in row["scene"]["objects"]} == names
        assert all({r["subject"], r["object"]} <= names for r in row["scene"]["relationships"])


def test_names_of_several_words_and_with_hyphens_match_in_any_number():
    scene = sub_graph(STREET, "Which is taller in the picture, the traffic-light or the bus?", ["a traffic light", "a bus"])
    assert {thing["id"] for thing in scene["objects"]} == {"traffic_light.1", "bus.1"}
    assert scene["relationships"] == [{"subject": "bus.1", "predicate": "near", "object": "traffic_light.1"}]
    options_only = sub_graph(STREET, "Which of these is the largest?", ["the bus", "a man", "left"])
    assert {thing["id"] for thing in options_only["objects"]} == {"bus.1", "man.1"}
    assert sub_graph(STREET, "Are the buses near the lights?", ["yes", "no"])["objects"][0]["id"] == "bus.1"


def test_a_relation_that_only_the_boxes_say_stands_in_the_scene_as_it_was_asked():
    row = checked(item("In the picture, where is the bus with respect to the man?", ["left of", "right of"], "B"), STREET)
    assert row["scene"]["relationships"][0] == {"subject": "bus.1", "predicate": "right of", "object": "man.1"}
    assert {"subject": "man.1", "predicate": "in front of", "object": "bus.1"} in row["scene"]["relationships"]
    asked = checked(item("Where is the bus with respect to the man?", ["behind", "inside"], "A"), STREET)
    assert asked["scene"]["relationships"] == [{"subject": "bus.1", "predicate": "behind", "object": "man.1"}]


# ---------------------------------------------------------------- the rule-based writer


def written(source: str, n: int, *, questions: int = 1, seed: int = 1):
    balance = Balance()
    for g in read_graphs(source, limit=n):
        items = write_items(g, balance, n=questions, relation_percent=50, seed=seed)
        for one in items:
            balance.add(one)
        yield g, items


def truth(question: str, options: list[str], boxes: dict[str, list], relations: set) -> str | None:
    """The answer from the boxes, worked out another way than the writer does; None where it has no say."""
    def at(name):
        return centre(boxes[name][0])

    said = sorted((n for n in boxes if re.search(rf"\b{n}(s|es)?\b", question)), key=question.find)
    if question.startswith("In the picture, where"):
        (ax, ay), (bx, by) = at(said[0]), at(said[1])
        return ("left of" if ax < bx else "right of") if abs(ax - bx) > abs(ay - by) else ("above" if ay < by else "below")
    if question.startswith("How many"):
        return str(len(boxes[said[0]]))
    if question.startswith("In the picture, is there"):
        (ax, ay), (bx, by) = at(said[0]), at(said[1])
        holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        [asked] = [word for word in holds if word in question]
        return "yes" if holds[asked] else "no"
    if question.startswith("In the picture, which is closer"):
        r = question.split("closer to the ")[1].split(",")[0]
        return min(options, key=lambda name: sum((p - q) ** 2 for p, q in zip(at(name), at(r), strict=True)))
    if " looks " in question:
        kind = re.search(r"looks (\w+)", question)[1][:4]
        return max(options, key=lambda name: {
            "larg": area(boxes[name][0]), "tall": boxes[name][0][3] - boxes[name][0][1],
            "wide": boxes[name][0][2] - boxes[name][0][0]}[kind])  # fmt: skip
    if question.startswith("Imagine"):
        here, there = at(said[0])[0], at(said[1])[0]
        away = "away from" in question
        return "left" if (there < here) == away else "right"
    if question.startswith("In which part"):
        x, y = at(said[0])
        row, column = ("top", "middle", "bottom")[3 * y // 168], ("left", "center", "right")[3 * x // 224]
        return "center" if (row, column) == ("middle", "center") else f"{row} {column}"
    if question.startswith("Which is closer to the camera"):
        return next(a for a, p, b in relations if p == "in front of" and {a, b} == set(options))
    if question.startswith("Does"):
        return "yes" if any({a, b} == set(said) for a, p, b in relations if p == "touching") else "no"
    if question.endswith("touching?"):
        [met] = [name for name in options if any({a, b} == {said[0], name} and p == "touching" for a, p, b in relations)]
        return met
    return None


def test_every_answer_of_the_writer_is_right_by_boxes_worked_out_another_way():
    seen = Counter()
    for g, items in written("scenes:hard", 700, questions=3):
        boxes = defaultdict(list)
        for thing in g.objects:
            boxes[label(thing["id"])].append(thing["bbox"])
        relations = {(label(r["subject"]), r["predicate"], label(r["object"])) for r in g.relations}
        for one in items:
            right = truth(one["question"], one["options"], boxes, relations)
            if right is not None:
                assert one["options"]["ABCD".index(one["answer"])] == right, (g.id, one)
                seen[one["category"]] += 1
            assert checked(one, g)["scene"]["objects"]
    assert set(seen) == set(CATEGORIES) and min(seen.values()) > 20, seen


def test_the_writer_keeps_shares_and_answers_even_and_repeats_itself():
    balance, again = Balance(), []
    for _, items in written("scenes:hard", 500):
        for one in items:
            balance.add(one)
        again.append(items)
    n = sum(balance.categories.values())
    assert 0.45 < balance.categories["relation"] / n < 0.55
    assert all(0.03 < balance.categories[name] / n for name in CATEGORIES)
    for category, pair in (("existence", ("yes", "no")), ("reach", ("yes", "no")), ("orientation", ("left", "right")),
                           ("relation", ("left of", "right of")), ("relation", ("above", "below"))):  # fmt: skip
        a, b = (balance.answers[category, text] for text in pair)
        assert a and b and abs(a - b) <= max(5, 0.2 * (a + b)), (category, a, b)
    assert again == [items for _, items in written("scenes:hard", 500)]
    assert again != [items for _, items in written("scenes:hard", 500, seed=2)]


def cups(n_graphs: int):
    """Graphs of cups alone, few far more often than many, as photos have them; one question each."""
    rng, balance = random.Random(0), Balance()
    for i in range(n_graphs):
        boxes = {f"cup.{k + 1}": [10 + 60 * k, 10, 50 + 60 * k, 60] for k in range(rng.choice((2, 2, 2, 3, 3, 4, 5, 6)))}
        g = Graph(str(i), "g.jpg", SIZE, [{"id": name, "bbox": box} for name, box in boxes.items()], [])
        items = write_items(g, balance, n=1, relation_percent=0, seed=1)
        for one in items:
            balance.add(one)
        yield g, items


@pytest.mark.parametrize(("source", "least"), [("scenes", {("relation", False): 300, ("count", False): 40}),
                                               ("cups", {("count", False): 300})])  # fmt: skip
def test_no_set_of_options_gives_the_answer_away(source, least):
    """A blind guesser that knows which option was right most often among the same options, on the other half of the
    pictures. Allowed is chance and three standard errors of it: what luck does in one of 700 cases."""
    right_ones, questions = (defaultdict(Counter), defaultdict(Counter)), []
    for g, items in written("scenes:hard", 1500, questions=3) if source == "scenes" else cups(800):
        for one in items:
            kind, answer = (one["category"], "In the picture" in one["question"]), gold(one | {"gold": one["answer"]})
            half, key = hash_seed(g.id) % 2, (kind, frozenset(one["options"]))
            right_ones[half][key][answer] += 1
            questions.append((kind, 1 - half, key, answer))
    chance, right, n = Counter(), Counter(), Counter()
    for kind, other, key, answer in questions:
        seen = [right_ones[other][key][option] for option in key[1]]
        right[kind] += (right_ones[other][key][answer] == max(seen)) / seen.count(max(seen))
        chance[kind] += 1 / len(seen)
        n[kind] += 1
    assert all(n[kind] > number for kind, number in least.items()), n
    for kind, total in n.items():
        p = chance[kind] / total
        assert right[kind] / total < p + 3 * (p * (1 - p) / total) ** 0.5, (kind, total, p, right[kind] / total)


def test_relations_that_two_annotators_saw_each_from_one_end_are_asked_unless_they_contradict():
    boxes = {"dog.1": [100, 200, 200, 400], "car.1": [250, 100, 500, 380]}
    agreed = graph(boxes, [("dog.1", "in front of", "car.1"), ("car.1", "behind", "dog.1")])
    contrary = graph(boxes, [("dog.1", "in front of", "car.1"), ("car.1", "in front of", "dog.1")])
    asked = {}
    for g in (agreed, contrary):
        items = write_items(g, Balance(), n=9, relation_percent=100, seed=1)
        asked[g] = {gold(one | {"gold": one["answer"]}) for one in items if one["question"].startswith("Where")}
    assert asked[agreed] == {"in front of", "behind"} and asked[contrary] == set()


def test_several_questions_a_picture_are_of_several_kinds():
    whole = 0
    for _, items in written("scenes:hard", 30, questions=4):
        assert len({one["question"] for one in items}) == len(items)
        if len(items) == 4:
            assert Counter(one["category"] for one in items)["relation"] <= 2
            whole += len({one["category"] for one in items}) >= 3
    assert whole >= 20


def test_only_what_can_mean_one_object_is_asked_about_by_name():
    names = Names(graph({"man.1": [0, 0, 90, 200], "skier.1": [200, 0, 290, 200], "dog.1": [300, 300, 400, 400],
                         "light.1": [500, 0, 560, 60], "traffic_light.1": [400, 0, 460, 60], "cup.1": [10, 300, 60, 350],
                         "cup.2": [80, 300, 130, 350], "wheel.1": [200, 300, 260, 380]}))  # fmt: skip
    assert set(names.alone) == {"dog"}


def test_annotated_relations_are_asked_with_options_that_they_exclude():
    g = graph({"cat.1": [200, 100, 300, 200], "table.1": [150, 180, 450, 400], "tree.1": [500, 20, 620, 300]},
              [("cat.1", "sitting on", "table.1"), ("tree.1", "behind", "table.1"), ("cat.1", "looking at", "tree.1"),
               ("cat.1", "above", "table.1")])  # fmt: skip
    items, balance = [], Balance()
    for _ in range(12):
        new = write_items(g, balance, n=9, relation_percent=50, seed=len(items))
        items += new
        for one in new:
            balance.add(one)
    answers = {(one["question"], one["options"]["ABCD".index(one["answer"])]) for one in items}
    assert ("Where is the cat with respect to the table?", "on") in answers
    assert ("Where is the tree with respect to the table?", "behind") in answers
    assert ("Where is the table with respect to the tree?", "in front of") in answers
    assert ("Which is closer to the camera, the table or the tree?", "table") in answers or (
        "Which is closer to the camera, the tree or the table?", "table") in answers  # fmt: skip
    for one in items:
        if one["question"] == "Where is the cat with respect to the table?":
            assert not set(one["options"]) & {"above", "sitting on", "near"}
        checked(one, g)


def test_a_picture_with_nothing_to_ask_gives_no_question():
    assert write_items(graph({"sky.1": [0, 0, 640, 200]}), Balance(), n=3, relation_percent=50, seed=1) == []


# ---------------------------------------------------------------- prompts


def test_the_writers_prompt_shows_the_graph_and_the_balance():
    balance = Balance()
    balance.add(item())
    text = writer_prompt(STREET, balance, n=2)
    assert "relation 100.0%" in text and "easy 100.0%" in text and "Categories: ['relation'], Levels: ['easy']" in text
    assert "traffic_light.1 [150, 20, 190, 120]" in text and "man.1 in front of bus.1" in text and "640 x 480" in text
    assert "Write 2 questions" in text and "{" not in writer_system().split("A good reply")[0]
    assert all(category in writer_system() for category in CATEGORIES)
    [first, second] = read_items(writer_system().split("A good reply", 1)[1])
    example = graph({"bench.1": [40, 210, 300, 330], "dog.1": [330, 250, 420, 335], "tree.1": [10, 5, 150, 240]},
                    [("tree.1", "behind", "bench.1")])  # fmt: skip
    assert gold(checked(first, example)) == "behind" and gold(checked(second, example)) == "the dog"


# ---------------------------------------------------------------- which rows


def pool(n=3000, seed=0):
    rng = random.Random(seed)
    kinds = CATEGORIES[:2] * 4 + CATEGORIES
    return [{"id": f"i{i}", "graph": f"g{i // 2}", "category": rng.choice(kinds), "rating": rng.randint(1, 10)}
            for i in range(n)]  # fmt: skip


def test_half_are_relations_the_rest_are_even_and_the_best_rated_are_taken():
    items = pool()
    chosen = choose(items, target=1000, relation_percent=50, val_split=0.1, seed=1)
    by_id = {one["id"]: one for one in items}
    counts = Counter(by_id[i]["category"] for i in chosen)
    assert len(chosen) == 1000 and counts["relation"] == 500
    assert all(abs(counts[name] - 62.5) <= 2 for name in CATEGORIES[1:]), counts
    for split in ("train", "val"):
        pictures = {by_id[i]["graph"] for i, s in chosen.items() if s == split}
        for category in CATEGORIES:
            mine = [one for one in items if one["category"] == category]
            worst = min(by_id[i]["rating"] for i, s in chosen.items() if s == split and by_id[i]["category"] == category)
            left = [one["rating"] for one in mine if one["id"] not in chosen and one["graph"] in pictures]
            assert max(left, default=0) <= worst


def test_a_picture_is_in_one_split_and_the_order_of_the_items_is_nothing():
    items = pool(600)
    chosen = choose(items, target=None, relation_percent=50, val_split=0.1, seed=1)
    splits = defaultdict(set)
    for one in items:
        if one["id"] in chosen:
            splits[one["graph"]].add(chosen[one["id"]])
    assert all(len(found) == 1 for found in splits.values())
    assert 0.06 < sum(s == "val" for s in chosen.values()) / len(chosen) < 0.14
    shuffled = random.Random(5).sample(items, len(items))
    assert choose(shuffled, target=None, relation_percent=50, val_split=0.1, seed=1) == chosen
    assert choose(items, target=None, relation_percent=50, val_split=0.1, seed=2) != chosen
    assert set(choose(items, target=None, relation_percent=50, val_split=0.0, seed=1).values()) == {"train"}


def test_what_a_category_lacks_the_other_eight_make_good_and_relations_keep_their_share():
    got = quotas(Counter(relation=600, reach=3, size=100, count=50), 200, 50)
    assert got == {"relation": 100, "reach": 3, "size": 48, "count": 49} or got.total() == 200 and got["reach"] == 3
    short = quotas(Counter(relation=600, size=100), 1000, 50)
    assert short == {"relation": 100, "size": 100}  # not 500 relations beside 100 others
    assert quotas(Counter(relation=40), 30, 100) == {"relation": 30} and quotas(Counter(), 10, 50) == {}


# ---------------------------------------------------------------- blind answers


def guesses(rows):
    guesser = Guesser()
    for i, (category, options, right) in enumerate(rows):
        guesser.add({"image_id": str(i), "category": category, "options": options, "answer_text_only": options[right]})
    return guesser.rates()


def test_the_blind_guesser_sees_a_bias_and_stays_at_chance_without_one():
    rng = random.Random(0)
    fair = [("reach", ["yes", "no"], rng.randrange(2)) for _ in range(2000)]
    assert abs(guesses(fair)["blind"] - 50) < 4 and guesses(fair)["chance"] == 50
    biased = [("reach", *(lambda o: (o, o.index("yes" if rng.random() < 0.9 else "no")))(rng.sample(["yes", "no"], 2)))
              for _ in range(2000)]  # fmt: skip
    assert abs(guesses(biased)["blind"] - 90) < 4 and abs(guesses(biased)["commonest letter"] - 50) < 4
    # no option of these is right more often than another, but each set of them tells
    sets = [("count", *rng.choice([(["2", "3"], 0), (["3", "4"], 0), (["2", "4"], 1)])) for _ in range(600)]
    assert guesses(sets)["blind by option set"] == 100 and guesses(fair)["blind by option set"] < 54
    assert guesses(sets)["blind by option set, each"] == {"count": 100} and guesses(sets)["chance, each"] == {"count": 50}
    once = [("depth", [f"a{i}", f"b{i}"], 0) for i in range(500)]
    # options never seen before tell nothing, wherever the right one stands
    assert guesses(once)["blind"] == guesses(once)["blind by option set"] == 50
