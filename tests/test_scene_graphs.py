"""Words and scene graphs: names, predicates, one small file of each layout.

python -m pytest tests/test_scene_graphs.py
"""

import json
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.drawing import COLOURS
from data.scene_graphs import clipped, direction, json_array, read_graphs
from data.words import (
    GROUPS, canonical, confusable, group_of, identifier_name, label, mentions, plural, singular,
)  # fmt: skip
from rewards import is_valid_scene

ROOT = Path(__file__).resolve().parent.parent
REAL = next((p / "shared" / "realdata" for p in ROOT.parents if (p / "shared" / "realdata").is_dir()), ROOT / "none")

VG150 = """above, across, against, along, and, at, attached to, behind, belonging to, between, carrying, covered in,
covering, eating, flying in, for, from, growing on, hanging from, has, holding, in, in front of, laying on, looking at,
lying on, made of, mounted on, near, of, on, on back of, over, painted on, parked on, part of, playing, riding, says,
sitting on, standing on, to, under, using, walking in, walking on, watching, wearing, wears, with"""
ADDED = """below, beneath, left of, right of, left, right, at the back of, inside, consist, contain, on top of,
touching, leaning against, next to, beside, reached, far from, alongside, far, far away, close, in between, facing,
facing towards, facing away, bigger, smaller, taller, shorter, parallel to, perpendicular to, across from, surrounding,
outside"""


def picture(path: Path, size=(100, 80)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, dtype=np.uint8)).save(path)
    return path


# ---------------------------------------------------------------- words


def test_the_predicates_are_those_of_vg150_and_the_34_that_the_paper_adds():
    given = [" ".join(name.split()) for name in f"{VG150}, {ADDED}".split(",")]
    assert len(given) == 84 and set(given) == set(GROUPS)


@pytest.mark.parametrize(("said", "is_"), [
    ("To the LEFT of", "left of"), ("on the right side of", "right of"), ("right", "right of"), ("left of it", "left of"),
    ("standing behind", "behind"), ("standing on", "standing on"), ("underneath", "below"), ("pulling", "pulling"),
])  # fmt: skip
def test_predicates_in_other_words(said, is_):
    assert canonical(said) == is_


@pytest.mark.parametrize("one", ["man", "knife", "box", "bus", "baby", "wine glass", "traffic light", "vase", "horse",
                                 "potato", "person", "dish", "tie", "key", "shoe", "leaf"])  # fmt: skip
def test_plural_and_back(one):
    before, _, word = plural(one).rpartition(" ")
    assert plural(one) != one and " ".join(filter(None, [before, singular(word)])) == one
    assert plural(plural(one)) == plural(one)


def test_names_are_found_whole_in_either_number_and_the_longest_wins():
    names = {"light", "traffic light", "t shirt", "man", "bus"}
    found = mentions("Which traffic-lights are left of the men's T-shirt and the buses?", names)
    assert [name for name, *_ in found] == ["traffic light", "man", "t shirt", "bus"]
    assert found[0][1:] == (1, 3)
    assert mentions("a lightning strike, a mandate, abuse", names) == []


def test_names_that_may_mean_one_thing():
    assert confusable("man", "skier") and confusable("light", "traffic light") and confusable("men", "man")
    assert not confusable("red circle", "blue circle") and not confusable("car", "cart")


@pytest.mark.parametrize(("name", "id_"), [("T-Shirt", "t_shirt"), ("man's hat", "man_hat"), ("café", "cafe"), ("2", "")])
def test_names_become_ids_that_the_format_reward_takes(name, id_):
    assert identifier_name(name) == id_


# ---------------------------------------------------------------- readers


def vg_file(folder: Path) -> Path:
    picture(folder / "VG_100K_2" / "7.jpg")

    def thing(number, name, x, y, w, h):
        return {"object_id": number, "names": [name], "x": x, "y": y, "w": w, "h": h, "synsets": [], "attributes": ["red"]}

    objects = [thing(1, "Man", 10, 10, 30, 60), thing(2, "man", 11, 10, 30, 60), thing(3, "traffic light", 60, -5, 20, 40),
               thing(4, "speck", 5, 5, 0, 3), thing(5, "man", 70, 30, 25, 45)]  # fmt: skip
    relations = [{"predicate": "ON ", "subject_id": 2, "object_id": 3, "relationship_id": 1, "synsets": []},
                 {"predicate": "near", "subject_id": 1, "object_id": 4, "relationship_id": 2, "synsets": []},
                 {"predicate": "near", "subject_id": 1, "object_id": 2, "relationship_id": 3, "synsets": []}]  # fmt: skip
    graphs = [{"image_id": 7, "objects": objects, "relationships": relations},
              {"image_id": 8, "objects": objects, "relationships": []}]  # fmt: skip
    (folder / "scene_graphs.json").write_text(json.dumps(graphs, indent=1))
    (folder / "image_data.json").write_text(json.dumps([{"image_id": i, "width": 100, "height": 80} for i in (7, 8)]))
    return folder / "scene_graphs.json"


def test_visual_genome_as_released(tmp_path):
    skipped = Counter()
    [graph] = read_graphs(str(vg_file(tmp_path)), skipped=skipped)
    assert graph.id == "7" and graph.size == (100, 80) and graph.picture.endswith("VG_100K_2/7.jpg")
    # clipped to the picture; the second man is the first drawn again; what has no area is gone, with its relations
    assert graph.objects == [{"id": "man.1", "bbox": [10, 10, 40, 70]}, {"id": "traffic_light.1", "bbox": [60, 0, 80, 35]},
                             {"id": "man.2", "bbox": [70, 30, 95, 75]}]  # fmt: skip
    assert graph.relations == [{"subject": "man.1", "predicate": "on", "object": "traffic_light.1"}]
    assert sum(skipped.values()) == 1 and "no picture" in next(iter(skipped))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_vg150_layout(tmp_path, kind, packed):
    photo = picture(tmp_path / "photos" / "12.jpg")
    objects = [{"id": "man.1", "bbox": [1, 2, 30, 40]}, {"id": "t-shirt.1", "bbox": [5, 6, 20, 30.25]}]
    relations = [{"subject": "man.1", "predicate": "wearing", "object": "t-shirt.1"}]
    record = {"image_id": "12", "objects": json.dumps(objects) if packed else objects,
              "relationships": json.dumps(relations) if packed else relations}  # fmt: skip
    file = tmp_path / f"graphs.{kind}"
    if kind == "parquet":
        record["image"] = {"bytes": photo.read_bytes(), "path": None}
        pq.write_table(pa.Table.from_pylist([record]), file)
    else:
        file.write_text(json.dumps(record) + "\n" if kind == "jsonl" else json.dumps([record]))
    [graph] = read_graphs(str(file), str(tmp_path / "photos"))
    assert graph.size == (100, 80) and isinstance(graph.picture, bytes) == (kind == "parquet")
    assert graph.objects == [{"id": "man.1", "bbox": [1, 2, 30, 40]}, {"id": "t_shirt.1", "bbox": [5, 6, 20, 30.2]}]
    assert graph.relations == [{"subject": "man.1", "predicate": "wearing", "object": "t_shirt.1"}]


def coco_file(folder: Path) -> Path:
    picture(folder / "images" / "000000000009.jpg")
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "person"}, {"id": 44, "name": "dining table"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 1, "bbox": [5, 20, 20, 40], "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 44, "bbox": [40, 15, 55.5, 50], "iscrowd": 0},
            {"id": 3, "image_id": 9, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def test_coco_instances(tmp_path):
    [graph] = read_graphs(str(coco_file(tmp_path)), str(tmp_path / "images"))
    assert graph.objects == [{"id": "person.1", "bbox": [5, 20, 25, 60]},
                             {"id": "dining_table.1", "bbox": [40, 15, 95.5, 65]}]  # fmt: skip
    said = [(r["subject"], r["predicate"], r["object"]) for r in graph.relations]
    assert said == [("person.1", "left of", "dining_table.1"), ("person.1", "smaller", "dining_table.1")]
    assert graph.boxes_only and graph.uncounted == {"person"}


def test_the_procedural_world_is_read_with_what_is_in_front_of_what():
    fronts = 0
    for graph in read_graphs("scenes:hard", limit=150, seed=3):
        boxes = {thing["id"]: thing["bbox"] for thing in graph.objects}
        pixels = np.asarray(graph.picture, dtype=int)
        assert is_valid_scene({"objects": graph.objects, "relationships": graph.relations})
        for r in graph.relations:
            if r["predicate"] != "in front of":
                continue
            # in the middle of what two squares share stands the colour of the one in front
            a, b = boxes[r["subject"]], boxes[r["object"]]
            shared = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
            if not all(label(name).endswith("square") for name in (r["subject"], r["object"])):
                continue
            x, y = (shared[0] + shared[2]) // 2, (shared[1] + shared[3]) // 2
            near = [np.abs(pixels[y, x] - COLOURS[label(r[end]).split()[0]]).max() for end in ("subject", "object")]
            assert near[0] < near[1]
            fronts += 1
    assert fronts >= 2
    assert [g.id for g in read_graphs("scenes:demo", limit=2, seed=3)] != [g.id for g in read_graphs("scenes:demo", limit=2)]


def test_direction_is_said_only_where_it_is_plain():
    assert direction([0, 0, 10, 10], [20, 2, 30, 12]) == "left of"
    assert direction([0, 20, 10, 30], [2, 0, 12, 10]) == "below"
    assert direction([0, 0, 10, 10], [20, 20, 30, 30]) is None  # on the diagonal
    assert direction([0, 0, 22, 10], [20, 0, 40, 10]) is None  # they overlap
    for a, b in permutations([[0, 0, 10, 10], [20, 2, 30, 12], [2, 40, 9, 60]], 2):
        there, back = direction(a, b), direction(b, a)
        assert {there, back} in ({"left of", "right of"}, {"above", "below"}, {None})


def test_boxes_outside_the_picture_or_without_area_are_none():
    assert clipped([-5, 10, 50, 200], (100, 80)) == [0, 10, 50, 80]
    for box in ([120, 0, 140, 10], [5, 5, 5, 9], [9, 9, 3, 20], [float("nan"), 0, 5, 5], [0, 0, 5], ["1", 0, 5, 5]):
        assert clipped(box, (100, 80)) is None


@pytest.mark.parametrize("size", [1, 7, 300_000])
def test_a_json_list_is_read_an_item_at_a_time_across_the_chunks(tmp_path, size):
    items = [{"n": i, "text": "é,]}[{" + "x" * (i * size % 2_500_000)} for i in range(12)]
    for indent in (None, 3):
        (tmp_path / "list.json").write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert list(json_array(tmp_path / "list.json")) == items
    (tmp_path / "list.json").write_text("[]")
    assert list(json_array(tmp_path / "list.json")) == []


@pytest.mark.parametrize(("text", "named"), [
    ('[{"image_id": 1, "objects": [', "record 1: not JSON, or cut off"),
    ('[{"image_id": 1}]', "record 1: no Visual Genome graph"),
    ('{"images": []}', "no COCO instances file"), ("hello", "neither a JSON list nor an object"),
    ('[{"image_id": 1, "objects": [{"id": "a.1", "bbox": [0, 0, 1, 1]}]}]', "record 1: no VG150 graph"),
])  # fmt: skip
def test_a_wrong_file_is_named_with_its_record(tmp_path, text, named):
    (tmp_path / "graphs.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        list(read_graphs(str(tmp_path / "graphs.json")))


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("wrong", [
    {"objects": [{"id": 5, "bbox": [0, 0, 1, 1]}]}, {"objects": [{"id": "a.1", "bbox": None}]}, {"objects": {"a": 1}},
    {"objects": [3]}, {"width": "64", "height": 80}, {"width": 64.5, "height": 80}, {"image": 5}, {"image": ["1.jpg"]},
    {"relationships": [{"subject": ["a.1"], "predicate": "on", "object": "a.1"}]},
])  # fmt: skip
def test_a_record_of_the_wrong_form_is_named_with_its_file(tmp_path, kind, wrong):
    record = {"image_id": 1, "objects": [{"id": "a.1", "bbox": [0, 0, 9, 9]}], "relationships": []} | wrong
    picture(tmp_path / "1.jpg")
    (tmp_path / f"graphs.{kind}").write_text(json.dumps(record) if kind == "jsonl" else json.dumps([record]))
    with pytest.raises(ValueError, match=rf"graphs.{kind}, record 1: no (VG150|Visual Genome) graph"):
        list(read_graphs(str(tmp_path / f"graphs.{kind}")))


@pytest.mark.parametrize("wrong", [{"width": None}, {"width": "100"}, {"height": float("nan")}, {"file_name": 5},
                                   {"id": [9]}])  # fmt: skip
def test_a_coco_picture_of_the_wrong_form_is_named_with_its_file(tmp_path, wrong):
    file = coco_file(tmp_path)
    content = json.loads(file.read_text())
    whole, content["images"][0] = content["images"][0], content["images"][0] | wrong
    broken = [content, content | {"images": [{key: value for key, value in whole.items() if key not in wrong}]}]
    for one in broken:
        file.write_text(json.dumps(one))
        with pytest.raises(ValueError, match="instances.json: no COCO instances file"):
            list(read_graphs(str(file), str(tmp_path / "images")))


@pytest.mark.parametrize("entry", [{"width": 100, "height": 80}, {"image_id": 7, "width": None, "height": 80}, 3])
def test_image_data_of_the_wrong_form_is_named(tmp_path, entry):
    file = vg_file(tmp_path)
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 8, "width": 100, "height": 80}, entry]))
    with pytest.raises(ValueError, match="image_data.json, record 2: no picture's size"):
        list(read_graphs(str(file)))


def test_a_file_cut_off_or_in_another_encoding_is_named(tmp_path):
    coco = coco_file(tmp_path)
    whole = coco.read_bytes()
    for content, why in ((whole[:-30], "instances.json: not JSON, or cut off"),
                         (whole.replace(b"person", b"caf\xe9"), "instances.json: not UTF-8")):  # fmt: skip
        coco.write_bytes(content)
        with pytest.raises(ValueError, match=why):
            list(read_graphs(str(coco), str(tmp_path / "images")))
    graphs = vg_file(tmp_path)
    for at in (b"Man", b'"image_id": 8'):  # where the layout is found out, and further on
        graphs.write_bytes(vg_file(tmp_path).read_bytes().replace(at, b'"\xe9'))
        with pytest.raises(ValueError, match="scene_graphs.json: not UTF-8"):
            list(read_graphs(str(graphs)))


def test_a_missing_file_or_folder_and_a_picture_with_two_graphs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read_graphs(str(tmp_path / "none.json")))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(read_graphs(str(vg_file(tmp_path)), str(tmp_path / "none")))
    picture(tmp_path / "1.jpg")
    record = json.dumps({"image_id": 1, "objects": [{"id": "a.1", "bbox": [0, 0, 9, 9]}], "relationships": []})
    (tmp_path / "twice.jsonl").write_text(f"{record}\n{record}\n")
    with pytest.raises(ValueError, match="image_id 1 comes twice"):
        list(read_graphs(str(tmp_path / "twice.jsonl")))


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/realdata is not here")
def test_tinycoco_is_read():
    tiny = REAL / "tinycoco"
    graphs = list(read_graphs(str(tiny / "annotations/instances_val2017.json"), str(tiny / "images/val2017")))
    assert len(graphs) == 6 and all(graph.objects and graph.boxes_only for graph in graphs)
    for graph in graphs:
        assert Image.open(graph.picture).size == graph.size
        assert is_valid_scene({"objects": graph.objects, "relationships": graph.relations})
        assert {group_of(r["predicate"]) for r in graph.relations} <= {"left", "right", "above", "below", "size", "inside"}
