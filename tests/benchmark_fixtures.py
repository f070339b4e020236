"""A few records of every benchmark in its true columns (dataset cards, and the authors' own files), with words and
pictures of our own. write(name, folder) makes a clone of the hub's repository of it."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "orange", "purple", "grey", "black", "white")


def png(n: int = 0, size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[n % len(COLOURS)]).save(buffer, "PNG")
    return buffer.getvalue()


def pic(n: int = 0) -> dict:
    return {"bytes": png(n), "path": None}


def listed(options, form="({}) {}", joint="\n"):
    return joint.join(form.format(chr(65 + i), option) for i, option in enumerate(options))


SIDES, COUNTS, CLOSER = ["to the left of", "to the right of"], ["0", "3", "2", "1"], ["A is closer", "B is closer"]
CHOOSE = "Select from the following choices."


def cv(n, kind, task, source, options, answer):
    question = f"Question number {n} about {task}?"
    return {"idx": n, "type": kind, "task": task, "image": pic(n), "question": question, "choices": options,
            "answer": answer, "prompt": f"{question} {CHOOSE}\n{listed(options)}", "filename": f"{n}.png", "source": source,
            "source_dataset": source, "source_filename": "", "target_class": None, "target_size": None,
            "bbox": None}  # fmt: skip


CV2D = [cv(0, "2D", "Count", "ADE20K", COUNTS, "(C)"), cv(1, "2D", "Relation", "COCO", SIDES, "(A)"),
        cv(2, "2D", "Count", "ADE20K", COUNTS, "(D)")]  # fmt: skip
CV3D = [cv(3, "3D", "Depth", "Omni3D", ["table", "chair"], "(B)"),
        cv(4, "3D", "Distance", "Omni3D", ["sofa", "lamp"], "(A)")]  # fmt: skip


def blink(task, options, images, question="Which of these is it?"):
    rows = []
    for n, answer in enumerate(("(A)", "(B)")):
        row = {"idx": f"val_{task}_{n + 1}", "question": question, "sub_task": task, "choices": options, "answer": answer,
               "explanation": ""}  # fmt: skip
        row["prompt"] = f"Look closely, points A and B are marked. {question}\n{CHOOSE}\n{listed(options)}"
        row |= {f"image_{i}": pic(i) if i <= images else None for i in range(1, 5)}
        rows.append(row)
    return rows


def vsi(n, kind, truth, options=None):
    return {"id": n, "dataset": "scannet", "scene_name": f"scene{n % 2:04d}_00", "question_type": kind,
            "question": f"What about {kind} number {n}?", "ground_truth": truth, "pruned": False,
            "options": options and [f"{chr(65 + i)}. {o}" for i, o in enumerate(options)]}  # fmt: skip


def spar(n, task, question, answer, views=1):
    return {"id": f"scannet_{n}", "task": task, "img_type": "multi_view" if views > 1 else "single_view",
            "format_type": "select", "source": "scannet", "question": question, "answer": answer,
            "image": [pic(i) for i in range(views)]}  # fmt: skip


def dsr(qid, options, answer, category="orientation_viewpoint"):
    four = {letter: (options + ["nan"] * 4)[i] for i, letter in enumerate("ABCD")}
    return {"index": qid, "qid": qid, "question": f"Seen from where ({qid[:8]})?", **four, "answer": answer, "image": pic(),
            "category": category, "image_source": "COCO"}  # fmt: skip


def hallusion(n, category, figure, question, answer):
    return {"category": category, "subcategory": "chart", "visual_input": "1", "set_id": "4", "figure_id": str(figure),
            "sample_note": "", "question_id": str(question), "question": f"Is bar {question} the highest?",
            "gt_answer_details": "", "gt_answer": answer, "image": pic(n),
            "filename": f"./hallusion_bench/{category}/chart/4_{figure}.png"}  # fmt: skip


def stvqa(n, options, letter):
    text, scene = options[ord(letter) - 65], {"objects": [{"id": "cup.1", "bbox": [4, 4, 20, 20]}], "relationships": []}
    block = f"<scene>{json.dumps(scene)}</scene>\n"
    return {"image_id": f"{100 + n}", "images": pic(n), "problem": "<image>Image size: (40 x 30)\nWhere is it?",
            "question_only": "Where is it?", "question_with_options": f"Where is it?\nOptions:\n{listed(options)}",
            "options": options, "answer": f"{block}<answer>{letter}</answer>", "answer_only": letter,
            "answer_text": f"{block}<answer>{text}</answer>", "answer_text_only": text,
            "answer_option_text": f"{block}<answer>({letter}) {text}</answer>",
            "answer_option_text_only": f"({letter}) {text}", "category": "relation", "level": "easy",
            "rating": 5}  # fmt: skip


def temp(n, dim, question, answer):
    return {"video_id": f"10{n}", "question": question, "answer": answer, "dim": dim}


ROOM = ["the sofa", "the table", "the lamp", "the door"]
MOVES = "move_right:1.2,move_left:0.0,move_up:0.0,move_forward:0.5,rotate_right:10,rotate_up:0"
ROBO = [
    {"image": pic(1), "depth_image": pic(5), "prompt": f"Is the cup left of the bowl?\n{CHOOSE}\n{listed(['yes', 'no'])}",
     "answer": answer, "options": ["yes", "no"], "category": category}
    for answer, category in (("yes", "configuration"), ("B", "compatibility"))
]  # fmt: skip
LVB = {"video_id": "abc", "video_path": "abc.mp4", "question_wo_referring_query": "", "position": [1, 2],
       "topic_category": "KC", "level": "L1-Perception", "subtitle_path": "abc.json",
       "starting_timestamp_for_subtitles": 0.0, "duration": 12.0,
       "view_count": 3}  # fmt: skip
PLAIN = "Please answer directly with only the letter of the correct option and nothing else."
WORD = "Please answer directly with a single word or number."

# name -> records, or config -> records
FIXTURES: dict = {
    "cv-bench": {"default": CV2D + CV3D, "2D": CV2D, "3D": CV3D},
    "cv-bench-2D": {"default": CV2D + CV3D, "2D": CV2D, "3D": CV3D},
    "cv-bench-3D": {"default": CV2D + CV3D, "2D": CV2D, "3D": CV3D},
    "blink-spatial": {"Spatial_Relation": blink("Spatial_Relation", ["yes", "no"], 1, "Is the cup on the table?")},
    "blink-depth": {"Relative_Depth": blink("Relative_Depth", CLOSER, 1)},
    "blink-object": {"Object_Localization": blink("Object_Localization", ["Box A", "Box B"], 1)},
    "blink-counting": {"Counting": blink("Counting", ["3", "4", "5", "2"], 1)},
    "blink-multi-view": {"Multi-view_Reasoning": blink("Multi-view_Reasoning", ["left", "right"], 2)},
    "blink-jigsaw": {"Jigsaw": blink("Jigsaw", ["the second image", "the third image"], 3)},
    "realworld_qa": [
        {"image": pic(), "question": f"Where does it go?\n\nA. Left\nB. Right\nC. Straight\n{PLAIN}", "answer": "C"},
        {"image": pic(1), "question": f"How many lanes are there? {WORD}", "answer": "4"},
        {"image": pic(2), "question": f"Is the light green? {WORD}", "answer": "No"},
        {"image": pic(3), "question": "What is the speed limit on the sign?", "answer": "fifty five"},
    ],
    "spatialbench": [
        {"image": pic(), "text": "Is there a cup on the table?", "answer": "Yes", "category": "existence"},
        {"image": pic(1), "text": "How many chairs are there?", "answer": "3", "category": "counting"},
        {"image": pic(2), "text": f"Which is larger?\n{listed(ROOM, '{}. {}')}", "answer": "B", "category": "size"},
    ],
    "mmvp": [
        {"image": pic(n), "text": "Are the wings open or closed? (a) Open (b) Closed", "label": label}
        for n, label in enumerate(("(a)", "(b)", "(b)", "(a)"))
    ],
    "3dsrbench": [
        {"image": pic(n), "prompt": f"Which is higher up?\n{CHOOSE}\n{listed(ROOM[:2])}", "choices": ROOM[:2],
         "answer": answer, "task": task}
        for n, (answer, task) in enumerate((("A", "height"), ("B", "location"), ("B", "multi_object")))
    ],
    "3dsrbench-circular": {"3dsr_circular": [
        dsr("AAAAAAAA", ["front", "left"], "A"), dsr("AAAAAAAA-1", ["left", "front"], "B"),
        dsr("AAAAAAAA-flip", ["front", "right"], "A"),
        dsr("AAAAAAAA-flip-1", ["right", "front"], "B"), dsr("BBBBBBBB", ["yes", "no"], "B", "height_higher"),
        dsr("BBBBBBBB-1", ["no", "yes"], "A", "height_higher"),
    ]},
    "lego": [
        {"image": [pic(n), pic(n + 1)], "prompt": f"Which piece comes next?\nOptions:\n{listed(ROOM, '{}. {}')}",
         "choices": ROOM, "answer": answer, "category": category}
        for n, (answer, category) in enumerate((("C", "next_step"), ("A", "height")))
    ],
    "spatialreasoner": [
        {"image": pic(n), "prompt": f"Which is closer to the camera?\n{CHOOSE}\n{listed(['mug', 'pan'])}",
         "choices": "['mug', 'pan']", "answer": answer, "task": task}
        for n, (answer, task) in enumerate((("A", "Depth"), ("B", "Distance")))
    ],
    "robospatial": ROBO,
    "robospatial_rgb": ROBO,
    "stvqa": [stvqa(0, ["left of", "right of", "above"], "B"), stvqa(1, ["in front of", "behind"], "A")],
    "hallusionbench": [hallusion(0, "VD", 0, 0, "1"), hallusion(1, "VD", 0, 1, "0"), hallusion(2, "VD", 1, 0, "0"),
                       hallusion(3, "VD", 1, 1, "1"), hallusion(4, "VS", 1, 0, "0")],
    "vstar": [
        {"image": pic(n), "label": label, "category": category, "question_id": f"{n}",
         "text": f"What is the colour of the glove?\n{listed(['red', 'blue', 'green', 'black'])}\n"
                 "Answer with the option's letter from the given choices directly."}
        for n, (label, category) in enumerate((("A", "direct_attributes"), ("D", "relative_position")))
    ],
    "mm-star": [
        {"index": n, "question": f"Which option fits the picture?\nOptions: {listed(ROOM, '{}: {}', ', ')}", "image": pic(n),
         "answer": answer, "category": "instance reasoning", "l2_category": "single-instance reasoning",
         "meta_info": {"source": "MMBench", "split": "val", "image_path": "x.jpg"}} for n, answer in enumerate("BD")
    ],
    "mme-realworld-lite": [
        {"index": f"a/{n}", "bytes": base64.b64encode(png(n)).decode(), "question": "What number is on the car?",
         "path": "x.png", "multi-choice options": ["(A) 12", "(B) 34", "(C) 56", "(D) 78", "(E) Not to be seen."],
         "answer": answer, "category": category, "l2-category": "vehicle"}
        for n, (answer, category) in enumerate((("B", "Perception/Monitoring"), ("E", "Reasoning/Autonomous_Driving")))
    ],
    "mindcube": {"tiny": [
        {"id": f"{setting}_group{n}_q0_1_2", "images": [pic(n), pic(n + 1)], "gt_answer": answer,
         "category": ["P-P", setting], "type": setting, "input_prompt": "unused",
         "question": f"<image>\n<image>\nBased on these images: what is behind you? {listed(ROOM, '{}. {}', ' ')}"}
        for n, (setting, answer) in enumerate((("among", "A"), ("aroundnew", "C"), ("rotation", "D")))
    ]},
    "vsi-bench": [
        vsi(0, "object_rel_direction_easy", "A", ["left", "right"]), vsi(1, "object_rel_direction_hard", "B", ROOM),
        vsi(2, "object_counting", "3"), vsi(3, "object_abs_distance", "2.3"), vsi(4, "route_planning", "C", ROOM[:3]),
    ],
    "sti-bench": [
        {"ID": n, "Video": f"scene_{n % 2}.mp4", "Source": "ScanNet", "Scene": "indoor", "Task": task, "time_start": 1.5,
         "time_end": 4.0, "Question": "How large is the box?", "Answer": answer, "QType": "q",
         "Candidates": {"A": "0.1 m", "B": "0.5 m", "C": "1.0 m", "D": "2.0 m", "E": "3.0 m"}}
        for n, (task, answer) in enumerate((("Dimensional Measurement", "E"), ("Pose Estimation", "A")))
    ],
    "spar-bench": [
        spar(0, "depth_prediction_oc", "What is the depth of the chair in metres?", "1.8"),
        spar(1, "distance_prediction_oo_mv", "How far apart are the two, in metres?", "2.5", 3),
        spar(2, "position_matching", f"Which box is the sofa in the second picture?\n{listed(ROOM, '{}. {}')}", "B", 2),
        spar(3, "view_change_infer", "How did the camera move?", MOVES, 2),
        spar(4, "obj_spatial_relation_oo_mv", f"Where is the lamp?\n{listed(SIDES, '{}. {}')}", "A", 3),
    ],
    "video-mme": [
        {"video_id": "001", "duration": duration, "domain": "Knowledge", "sub_category": "x", "url": "u", "videoID": f"v{n}",
         "question_id": f"001-{n}", "task_type": "Spatial Reasoning", "question": "What is in the room?",
         "options": [f"{c}. {o}." for c, o in zip("ABCD", ROOM)], "answer": answer}
        for n, (duration, answer) in enumerate((("short", "B"), ("long", "D")))
    ],
    "tempcompass": {
        "multi-choice": [temp(0, "action", f"What does he do?\n{listed(['run', 'walk', 'sit'], '{}. {}')}", "B. walk")],
        "yes_no": [temp(0, "action", "Is the man walking?", "yes"), temp(1, "speed", "Is the car fast?", "no")],
        "caption_matching": [
            temp(0, "order", "Which fits?\nCaption A: First a cup, then a bowl.\nCaption B: First a bowl, then a cup.",
                 "Caption B: First a bowl, then a cup."),
            temp(1, "direction", "Which one matches?\nOption 1: It falls.\nOption 2: It rises.", "Option 2: It rises."),
        ],
    },
    "longvideobench": [
        LVB | {"id": f"abc_{n}", "question": "What is on the wall?", "question_category": category, "duration_group": 15,
               "correct_choice": n + 1, "option0": "a clock", "option1": "a map", "option2": "a mirror", "option3": "N/A",
               "option4": "N/A"} for n, category in enumerate(("S2E", "SSS"))
    ],
    "spatialscore": [
        {"index": 258, "category": "Others", "subcategory": "Miscellaneous", "question_type": "multi-choice",
         "source": "MMVP", "input_modality": "single-image", "question": "To the left or to the right?\n(a) Left (b) Right",
         "answer": "(a)", "img_paths": ["./dataset/MMVP/1.png"], "index_origin": 259, "category_origin": "unknown"},
        {"index": 3, "category": "Counting", "subcategory": "Object", "question_type": "judgment", "source": "VSR",
         "input_modality": "single-image", "question": "Is the cup on the table?", "answer": "yes",
         "img_paths": ["./dataset/VSR/2.png"], "index_origin": 7, "category_origin": ""},
        {"index": 4, "category": "3D", "subcategory": "Distance", "question_type": "open-ended", "source": "VSI-Bench",
         "input_modality": "video", "question": "How far is it in metres?", "answer": 2.4,
         "img_paths": ["./dataset/VSI/scene.mp4"], "index_origin": 9, "category_origin": "object_abs_distance"},
        *({"index": 5 + n, "category": "3D", "subcategory": "Depth", "question_type": "open-ended", "source": source,
           "input_modality": "single-image", "question": question, "answer": answer, "img_paths": ["./dataset/VG/3.png"],
           "index_origin": n, "category_origin": ""} for n, (source, question, answer) in enumerate((
              ("VGBench", "How deep is the cup, in meters?", "1.72 meters"), ("RealWorldQA", "How many cars are there?", "3"))
        )),
    ],
    "viewspatial": {"default": [
        {"question_type": "Camera perspective - Relative Direction", "images": [pic(n)], "question": "Where is the counter?",
         "answer": answer, "choices": listed(["right", "front-up", "back-left", "front"], "{}. {}")}
        for n, answer in enumerate(("A. right", "C. back-left"))
    ]},
}  # fmt: skip

SPLITS = {"hallusionbench": "image", "mindcube": "combined", "longvideobench": "validation", "mm-star": "val"}
JSON_ONLY = {"spatialscore": "SpatialScore.json"}  # no table: answers are numbers and texts in one column


def write(name: str, split: str, folder: Path) -> Path:
    """A clone of the hub's repository: parquet tables, and a README.md that says which config they belong to. Videos are
    there as folders of pictures, pictures that are named by path as files."""
    import datasets

    folder.mkdir(parents=True)
    records = FIXTURES[name]
    if name in JSON_ONLY:
        (folder / JSON_ONLY[name]).write_text(json.dumps(records))
        for record in records:
            write_media(folder, record["img_paths"][0])
        return folder
    configs = records if isinstance(records, dict) else {"default": records}
    readme = ["---", "configs:"]
    for config, rows in configs.items():
        table = datasets.Dataset.from_list(rows)
        for column, feature in table.features.items():
            if holds_pictures(feature):
                single = isinstance(feature, dict)
                table = table.cast_column(column, datasets.Image() if single else datasets.List(datasets.Image()))
        table.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        readme += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}/{split}-*"]
        readme += ["  default: true"] if config == next(iter(configs)) and config != "default" else []
        for row in rows:
            for video in videos(name, row):
                write_media(folder, video)
    (folder / "README.md").write_text("\n".join([*readme, "---", ""]))
    return folder


def holds_pictures(feature) -> bool:
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, dict) and set(inner) == {"bytes", "path"}


def videos(name: str, row: dict) -> list[str]:
    if name == "vsi-bench":
        return [f"{row['dataset']}/{row['scene_name']}.mp4"]
    key = {"sti-bench": "Video", "video-mme": "videoID", "tempcompass": "video_id", "longvideobench": "video_path"}.get(name)
    return [Path(str(row[key])).stem + ".mp4"] if key else []


def write_media(folder: Path, path: str) -> None:
    path = folder / path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(png())
    else:
        frames = path.with_suffix("")
        frames.mkdir(exist_ok=True)
        for n in range(5):
            (frames / f"frame_{n:03d}.png").write_bytes(png(n))
