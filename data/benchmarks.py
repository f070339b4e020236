"""The benchmarks of both papers and their kin: one table entry each, read into rows (design section 3).

    rows = load_benchmark("cv-bench")                           # from the hub, through the `datasets` loader
    rows = load_benchmark("vsi-bench", root="/data/benchmarks") # a clone of the hub's repository, or its JSONL or parquet

An entry says where the records are, which function reads one, and how its score is cut: `macro` names the keys whose
groups are averaged with equal weight, nested from left to right; `by` gives further tables; in a group of `together` all
rows must be right. `rule` is the published grader that mode="upstream" applies. Sources: spatialthinker 5.3, spacer 5.

Questions come without their options, which prompts.py renders again in one form for all. To add a benchmark, add an entry.
"""
import ast
import base64
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from data.dataset import jsonl_records, numbered, one_line, parquet_records
from data.options import asked, choice, unlettered
from data.pictures import picture_size
from data.rows import check_answer, picture_list, stvqa_row
from files import read_json
from rewards import LENGTH

AS_FRAMES = "The pictures are frames of a video, in order.\n"  # said before the question
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
Reader = Callable[[dict, int], dict]
Records = Iterator[tuple[str, dict, list[Path]]]  # place, record, folders in which its media may lie


@dataclass(frozen=True)
class Benchmark:
    hub: str  # dataset id
    split: str
    read: Reader  # a record and its number -> fields of a row; `video` is a path without its root
    size: int | None  # rows as published, None where editions differ
    rule: str = "evals"  # see PUBLISHED in rewards.py
    configs: tuple[str | None, ...] = (None,)
    files: tuple[str, ...] = ()  # where a clone holds its records in another way than the hub's tables
    images: int = 1  # at most, of a row; the frames of a video are more
    video: bool = False
    macro: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    together: tuple[str, ...] = ()


# ---------------------------------------------------------------- how each is read


def cv_bench(r: dict, n: int) -> dict:
    meta = {"type": r.get("type"), "source": r.get("source")}
    return choice(r["prompt"], r["choices"], r["answer"]) | {"images": r["image"], "category": r["task"], "meta": meta}


def blink(fields: tuple[str, ...]) -> Reader:
    def read(r: dict, n: int) -> dict:
        images = [r[field] for field in fields if r.get(field) is not None]
        return choice(r["prompt"], r["choices"], r["answer"]) | {"images": images, "own": r.get("idx")}

    return read


def lettered(category: str, *, options: str = "choices", images: tuple[str, ...] = ("image",)) -> Reader:
    """Prompt with options in it, the options once more as a list or the text of one, a letter or a text as answer."""

    def read(r: dict, n: int) -> dict:
        listed = ast.literal_eval(r[options]) if isinstance(r[options], str) else r[options]
        shown = [r[field] for field in images if r.get(field) is not None]
        return choice(r["prompt"], listed, r["answer"]) | {"images": shown, "category": r.get(category)}

    return read


def direct(question: str, answer: str, category: str | None = None) -> Reader:
    def read(r: dict, n: int) -> dict:
        row = asked(r[question], r[answer]) | {"images": r["image"], "own": r.get("question_id")}
        return row | ({"category": r.get(category)} if category else {})

    return read


def mmvp(r: dict, n: int) -> dict:
    text = r["text"] if "text" in r else f"{r['Question']} {r['Options']}"  # hunarbatra/MMVP, and the authors' own columns
    row = asked(text, r["label"] if "label" in r else r["Correct Answer"])
    return row | {"images": r["image"], "meta": {"pair": n // 2}}


def stvqa(r: dict, n: int) -> dict:
    row = stvqa_row(r, folder=Path(), index=n, source="stvqa")
    return {key: row[key] for key in ("question", "options", "gold", "kind", "scene", "problem", "category")} | {
        "images": r["images"], "own": r.get("image_id"), "raw_gold": r["answer_only"], "meta": row["meta"]}  # fmt: skip


def hallusionbench(r: dict, n: int) -> dict:
    gold = str(r["gt_answer"]).strip(" .")
    if gold not in ("0", "1"):
        raise ValueError(f"gt_answer {gold!r} is neither 0 nor 1")
    group = f"{r['category']} {r['subcategory']} {r['set_id']}"
    meta = {"figure": f"{group} {r['figure_id']}", "pair": f"{group} question {r['question_id']}"}
    gold = "A" if gold == "1" else "B"  # the published script turns it into a letter as well
    return {"question": r["question"], "options": ["Yes", "No"], "gold": gold, "kind": "choice", "raw_gold": gold,
            "images": r.get("image") or r.get("filename"), "category": r["subcategory"], "meta": meta}  # fmt: skip


def three_dsr(r: dict, n: int) -> dict:
    """The authors' circular edition: qid is BASE, BASE-1 (options turned), BASE-flip (picture mirrored), BASE-flip-1."""
    options = [r[letter] for letter in "ABCD" if r.get(letter) not in (None, "", "nan")]
    qid, group = str(r["qid"]), r["category"]
    meta = {"circular": re.sub(r"-\d+$", "", qid), "flip": qid.replace("-flip", ""), "both": qid.split("-")[0],
            "task": group}
    main = next((name for name in ("height", "location", "orientation", "multi_object") if group.startswith(name)), group)
    return choice(r["question"], options, r["answer"]) | {"images": r["image"], "category": main, "own": qid, "meta": meta}


def mm_star(r: dict, n: int) -> dict:
    return asked(r["question"], r["answer"]) | {"images": r["image"], "category": r["category"], "own": r.get("index"),
                                                "meta": {"task": r.get("l2_category")}}  # fmt: skip


def mme_realworld(r: dict, n: int) -> dict:
    row = choice(r["question"], unlettered(r["multi-choice options"]), r["answer"])
    image = base64.b64decode(r["bytes"]) if isinstance(r.get("bytes"), str) else r.get("bytes") or r["image"]
    level, _, scene = r["category"].partition("/")
    return row | {"images": image, "category": scene or level, "own": r.get("index"),
                  "meta": {"level": level, "task": r.get("l2-category")}}  # fmt: skip


def mindcube(r: dict, n: int) -> dict:
    setting = r["id"].split("_")[0].replace("aroundnew", "around")
    row = asked(r["question"].replace("<image>", ""), r["gt_answer"])
    return row | {"images": r["images"], "category": setting, "own": r["id"]}


# What a map may hold, the same for every scene (spacer 5.2): a model trained on maps is asked for one here.
MAP_NAMES = ("ceiling light", "trash can", "bed", "heater", "closet", "pillow", "backpack", "chair", "refrigerator", "tv",
             "nightstand", "keyboard", "computer tower", "coat hanger", "table", "trash bin", "whiteboard", "monitor", "sofa",
             "clock", "computer mouse", "radiator", "telephone")  # fmt: skip


def vsi_bench(r: dict, n: int) -> dict:
    category, options = r["question_type"], unlettered(r.get("options") or [])
    question, gold, task = r["question"], r["ground_truth"], re.sub(r"_(easy|medium|hard)$", "", category)
    row = choice(question, options, gold) if options else asked(question, gold, number="mra")
    return row | {"video": f"{r['dataset']}/{r['scene_name']}.mp4", "category": category, "own": r["id"],
                  "meta": {"task": task, "map_names": list(MAP_NAMES)}}


SPATIAL = ("Dimensional Measurement", "Displacement & Path Length", "Ego-Centric Orientation", "Spatial Relation",
           "Speed & Acceleration", "Trajectory Description")  # fmt: skip


def sti_bench(r: dict, n: int) -> dict:
    listed = r["Candidates"] if isinstance(r["Candidates"], dict) else ast.literal_eval(r["Candidates"])
    options = [listed[letter] for letter in sorted(listed) if listed[letter] is not None]
    question = f"From {r['time_start']} seconds to {r['time_end']} seconds. {r['Question']}"
    row, part = choice(question, options, r["Answer"]), "spatial" if r["Task"] in SPATIAL else "other"
    return row | {"video": r["Video"], "category": r["Task"], "own": r["ID"], "meta": {"part": part}}


NORMALISED = "Boxes and points are given on a scale from 0 to 1000, with the origin at the top left of the picture."


NUMERIC_VSI = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
NUMERIC_SPAR = ("depth_prediction", "distance_prediction")  # beginnings of task names


def spar_level(task: str) -> str:
    middle = ("view_change_infer", "position_matching", "camera_motion_infer")
    return "low" if task.startswith(NUMERIC_SPAR) else "middle" if task in middle else "high"


def spar_bench(r: dict, n: int) -> dict:
    task = r["task"]
    row = asked(r["question"], r["answer"], number="mra")
    row |= {"kind": "view_change"} if task == "view_change_infer" else {}
    if task in ("position_matching", "camera_motion_infer"):
        row["question"] += "\n" + NORMALISED
    meta = {"level": spar_level(task), "view": r["img_type"]}
    return row | {"images": r["image"], "category": task, "own": r["id"], "meta": meta}


def video_mme(r: dict, n: int) -> dict:
    meta = {"duration": r["duration"], "domain": r.get("domain")}
    return choice(r["question"], unlettered(r["options"]), r["answer"]) | {
        "video": f"{r['videoID']}.mp4", "category": r["task_type"], "own": r["question_id"], "meta": meta}  # fmt: skip


def tempcompass(r: dict, n: int) -> dict:
    row, captions = asked(r["question"], r["answer"]), re.match("(Caption|Option|Sentence) ", r["answer"])
    form = "yes_no" if row["kind"] == "yes_no" else "caption_matching" if captions else "multi-choice"
    return row | {"video": f"{r['video_id']}.mp4", "category": r["dim"], "own": r["video_id"],
                  "meta": {"aspect": r["dim"], "format": form}}


PERCEPTION = ("S2E", "S2O", "S2A", "E2O", "O2E", "T2E", "T2O", "T2A")


def longvideobench(r: dict, n: int) -> dict:
    options = r.get("candidates") or [r[f"option{i}"] for i in range(5) if r.get(f"option{i}") not in (None, "N/A")]
    level = "perception" if r["question_category"] in PERCEPTION else "relation"
    gold = dict(enumerate(ascii_uppercase)).get(int(r["correct_choice"]), f"number {r['correct_choice']}")
    row = choice(r["question"], options, gold)
    return row | {"video": r.get("video_path") or f"{r['video_id']}.mp4", "category": r["question_category"], "own": r["id"],
                  "meta": {"level": level, "duration": r.get("duration_group")}}


def spatialscore(r: dict, n: int) -> dict:
    paths, meta = r["img_paths"], {"source": r["source"], "form": r["question_type"], "task": r["subcategory"]}
    shown = {"video": paths[0]} if paths and paths[0].endswith((".mp4", ".avi", ".mkv")) else {"images": paths}
    row = asked(r["question"], r["answer"], number="mra" if r["source"].startswith("VSI") else "number")
    row |= {"kind": "length"} if row["kind"] == "text" and LENGTH.fullmatch(row["gold"]) else {}
    return row | shown | {"category": r["category"], "own": r["index"], "meta": meta}


def viewspatial(r: dict, n: int) -> dict:
    row = asked(f"{r['question']}\n{r['choices']}", r["answer"])
    return row | {"images": r.get("images") or r["image_path"], "category": r["question_type"],
                  "meta": {"perspective": r["question_type"].split(" - ")[0]}}


def _blink(config: str, size: int, *fields: str) -> Benchmark:
    fields = fields or ("image_1",)
    return Benchmark("BLINK-Benchmark/BLINK", "val", blink(fields), size, configs=(config,), images=len(fields))


CV, ROBO = "nyu-visionx/CV-Bench", "hunarbatra/RoboSpatial-Home"
BENCHMARKS: dict[str, Benchmark] = {
    "cv-bench": Benchmark(CV, "test", cv_bench, 2638, configs=("default",), macro=("type", "source"), by=("type",)),
    "cv-bench-2D": Benchmark(CV, "test", cv_bench, 1438, configs=("2D",), macro=("source",)),
    "cv-bench-3D": Benchmark(CV, "test", cv_bench, 1200, configs=("3D",)),
    "blink-spatial": _blink("Spatial_Relation", 143),
    "blink-depth": _blink("Relative_Depth", 124),
    "blink-object": _blink("Object_Localization", 122),
    "blink-counting": _blink("Counting", 120),
    "blink-multi-view": _blink("Multi-view_Reasoning", 133, "image_1", "image_2"),
    "blink-jigsaw": _blink("Jigsaw", 150, "image_1", "image_2", "image_3"),
    "realworld_qa": Benchmark("visheratin/realworldqa", "test", direct("question", "answer"), 765, rule="evals-direct"),
    "spatialbench": Benchmark("hunarbatra/SpatialBench", "train", direct("text", "answer", "category"), 174,
                              rule="evals-direct"),
    "mmvp": Benchmark("hunarbatra/MMVP", "train", mmvp, 300, rule="evals-direct", together=("pair",)),
    "3dsrbench": Benchmark("hunarbatra/3DSRBench", "test", lettered("task"), 2625),
    "3dsrbench-circular": Benchmark("oscarqjh/3DSRBench_lmmseval", "test", three_dsr, None, configs=("3dsr_circular",),
                                    by=("task",), together=("circular", "flip", "both")),
    "lego": Benchmark("hunarbatra/LEGO-Puzzles", "train", lettered("category"), 1000, images=8),
    "spatialreasoner": Benchmark("hunarbatra/SpatialReasonerEval", "train", lettered("task"), 1200),
    "robospatial": Benchmark(ROBO, "train", lettered("category", options="options", images=("image", "depth_image")), 228,
                             images=2),
    "robospatial_rgb": Benchmark(ROBO, "train", lettered("category", options="options"), 228),
    "stvqa": Benchmark("hunarbatra/STVQA-7K", "val", stvqa, 692),
    "hallusionbench": Benchmark("lmms-lab/HallusionBench", "image", hallusionbench, 951, together=("figure", "pair")),
    "vstar": Benchmark("lmms-lab/vstar-bench", "test", direct("text", "label", "category"), 191,
                       files=("test_questions.jsonl",)),
    "mm-star": Benchmark("Lin-Chen/MMStar", "val", mm_star, 1500, macro=("category",), by=("task",)),
    "mme-realworld-lite": Benchmark("yifanzhang114/MME-RealWorld-lite-lmms-eval", "train", mme_realworld, 1919,
                                    by=("level",)),
    "mindcube": Benchmark("oscarqjh/MindCube_lmmseval", "combined", mindcube, 1050, configs=("tiny",), images=8,
                          files=("data/raw/MindCube_tinybench.jsonl", "raw/MindCube_tinybench.jsonl",
                                 "MindCube_tinybench.jsonl")),
    "vsi-bench": Benchmark("nyu-visionx/VSI-Bench", "test", vsi_bench, 5130, "vsi-bench", files=("test.jsonl",), video=True,
                           macro=("task", "category"), by=("task",)),
    "sti-bench": Benchmark("MINT-SJTU/STI-Bench", "train", sti_bench, 2064, "sti-bench", files=("qa.parquet",), video=True,
                           macro=("category",), by=("part",)),
    "spar-bench": Benchmark("jasonzhango/SPAR-Bench", "test", spar_bench, 7207, "spar-bench", images=32, macro=("category",),
                            by=("level", "view")),
    "video-mme": Benchmark("lmms-lab/Video-MME", "test", video_mme, 2700, "video-mme", video=True, by=("duration",)),
    "tempcompass": Benchmark("lmms-lab/TempCompass", "test", tempcompass, 5536, "tempcompass", video=True,
                             configs=("multi-choice", "yes_no", "caption_matching"), macro=("format",),
                             by=("aspect", "format")),
    "longvideobench": Benchmark("longvideobench/LongVideoBench", "validation", longvideobench, 1337, "longvideobench",
                                video=True, files=("lvb_val.json",), by=("level", "duration")),
    "spatialscore": Benchmark("haoningwu/SpatialScore", "test", spatialscore, None, images=32, by=("source", "form"),
                              files=("SpatialScore.json", "dataset/SpatialScore.json", "SpatialScore-Hard.json")),
    "viewspatial": Benchmark("oscarqjh/ViewSpatial_lmmseval", "test", viewspatial, 5712, configs=("default",), images=8,
                             files=("ViewSpatial-Bench.json",), by=("perspective",)),
}  # fmt: skip

# Names of the published script that are no spatial benchmarks, or that another entry replaces.
LEFT_OUT = dict.fromkeys(
    ("mathvista", "mathverse", "mathvision", "sftseed", "emma-math", "emma-chem", "emma-code", "emma-physics",
     "mmmu-pro-vision", "mathvista_mcq", "mathverse_vision_mcq", "mmmu_pro", "mmmu_pro_vision_only"),
    "left out: not a spatial benchmark",
) | {"3dsrbench_full": "left out: 3dsrbench-circular has its pairs, and the authors' own grouping"}  # fmt: skip


def chosen(names: str) -> list[str]:
    """'cv-bench,mmvp', 'all-image' or 'all-video' -> names of BENCHMARKS; a name that is none stays (a file, a hub id).
    Raises ValueError for the published script's names that are left out here."""
    found = []
    for name in names.split(","):
        if name in LEFT_OUT:
            raise ValueError(f"--dataset {name}: {LEFT_OUT[name]}")
        parts = ("cv-bench-2D", "cv-bench-3D")  # rows of cv-bench
        every = [key for key, bench in BENCHMARKS.items() if bench.video == (name == "all-video") and key not in parts]
        found += every if name in ("all-image", "all-video") else [name]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- records


def load_benchmark(name: str, *, root: str | None = None, limit: int | None = None, frames: int = 32) -> list[dict]:
    """Rows of a benchmark, from the hub or from `root`: a folder that holds its clone under the benchmark's or the
    repository's name, that clone itself, or one .jsonl, .json or .parquet file in the benchmark's own columns.

    A video that lies there as a folder of pictures becomes at most `frames` of them, evenly spaced; otherwise the row
    has its path under `video`. Raises ValueError naming file, row and cure, FileNotFoundError."""
    bench, rows = BENCHMARKS[name], []
    for place, record, bases in bench_records(name, bench, Path(root).expanduser() if root else None):
        if limit is not None and len(rows) >= limit and not bench.together:  # groups are counted over all rows
            break
        try:
            rows.append(bench_row(name, bench, record, len(rows), bases, frames))
        except KeyError as error:
            raise ValueError(f"{place}: no column {error}: {bench.hub} has it; found {', '.join(record)}") from None
        except (ValueError, TypeError, AttributeError, SyntaxError) as error:
            raise ValueError(f"{place}: {one_line(error)}") from None
    if not rows:
        raise ValueError(f"{name}: no rows in {root or bench.hub}")
    sizes = Counter((key, row["meta"][key]) for row in rows for key in bench.together)
    for row in rows if bench.together else ():  # in every transcript: a group of which one is missing is no whole group
        row["meta"]["rows_of"] = {key: sizes[key, row["meta"][key]] for key in bench.together}
    return rows[:limit]


def bench_row(name: str, bench: Benchmark, record: dict, number: int, bases: list[Path], frames: int) -> dict:
    fields = bench.read(record, number)
    own, video, raw = fields.pop("own", None), fields.pop("video", None), fields.pop("raw_gold")
    images, shown = resolved(picture_list(fields.pop("images", None), Path()), bases), {}
    if video is not None:
        images, shown = video_frames(video, bases, frames)
        fields["question"] = (AS_FRAMES if images else "") + fields["question"]
    meta = {key: value for key, value in (fields.pop("meta", None) or {}).items() if value is not None}
    meta |= {"rule": bench.rule} | ({"raw_gold": raw} if raw != fields["gold"] else {})
    row = {"id": f"{number}" if own in (None, "") else f"{number}-{own}", "source": name, "images": images,
           "size": picture_size(images[0]) if images else None, "scene": None, "map": None, "problem": None, "style": None,
           **fields, "category": str(fields.get("category") or ""), "meta": meta, **shown}  # fmt: skip
    check_answer(row)
    return row


def bench_records(name: str, bench: Benchmark, root: Path | None) -> Records:
    """The records of every config, in order; a file that holds them all is read once."""
    if root is not None and not root.exists():
        raise FileNotFoundError(f"--data-root {root}: no such folder or file")
    read = set()
    for config in bench.configs:
        if root is None:
            yield from loader_records(bench.hub, config, bench.split, [])
            continue
        folder, files = located(name, bench, config, root)
        if not files:
            yield from loader_records(str(folder), config, bench.split, _bases(folder, folder))
        for file in (file for file in files if file not in read):
            read.add(file)
            yield from file_records(file, folder)


def located(name: str, bench: Benchmark, config: str | None, root: Path) -> tuple[Path, list[Path]]:
    """(folder, its record files), or (folder, []) for a clone whose README.md names them. FileNotFoundError if neither."""
    if root.is_file():
        return root.parent, [root]
    for folder in (root / name, root / bench.hub.split("/")[1], root / bench.hub, root):
        if files := local_files(folder, bench, config):
            return folder, files
        if _has_configs(folder) or folder != root and (folder / "README.md").is_file():
            return folder, []
    for kind in ("jsonl", "json", "parquet"):
        if (root / f"{name}.{kind}").is_file():
            return root, [root / f"{name}.{kind}"]
    cure = f"clone {bench.hub} into {root / name}, or give {name}.jsonl"
    raise FileNotFoundError(f"--data-root {root}: no {name} there: {cure}")


def local_files(folder: Path, bench: Benchmark, config: str | None) -> list[Path]:
    """A clone's own record files, or the hub's tables where no README.md says which config they belong to."""
    own = [folder / file for file in bench.files if (folder / file).is_file()]
    if own or _has_configs(folder):
        return own[:1]
    for base in [folder / config, folder / "data" / config] if config else [folder, folder / "data"]:
        for kind in ("parquet", "jsonl"):
            if files := sorted([*base.glob(f"{bench.split}-*.{kind}"), *base.glob(f"{bench.split}.{kind}")]):
                return files
    return []


def _has_configs(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.is_file() and "configs:" in readme.read_text(encoding="utf-8", errors="replace")


def file_records(file: Path, folder: Path) -> Records:
    if file.suffix == ".json":
        content = read_json(file)
        if not isinstance(content, list):
            raise ValueError(f"{file}: a {type(content).__name__}, not a list of records")
        records = ((str(file), number, record) for number, record in enumerate(content, start=1))
    elif file.suffix in (".jsonl", ".parquet"):
        records = jsonl_records(file) if file.suffix == ".jsonl" else parquet_records(file)
    else:
        raise ValueError(f"{file}: unknown kind of file: give .parquet, .jsonl or .json")
    for place, number, record in records:
        yield f"{place}, row {number}", record, _bases(file.parent, folder)


def loader_records(source: str, config: str | None, split: str, bases: list[Path]) -> Records:
    """Through datasets.load_dataset: a hub id, or a clone of one with its README.md."""
    import datasets  # here: a second to import

    where = f"{source}{f' ({config})' if config else ''}@{split}"
    try:
        table = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # hub, network, config, split and file errors share no class; all become one line
        why, cure = f"{type(error).__name__}: {one_line(error)}", "check the network, or clone it and give --data-root"
        raise FileNotFoundError(f"{where}: not loaded ({why}): {cure}") from error
    # The Arrow view hands pictures out as {bytes, path}; the default view would decode them, and stop at a broken one.
    for place, number, record in numbered(where, table.with_format("arrow").iter(batch_size=64)):
        yield f"{place}, row {number}", record, bases


# ---------------------------------------------------------------- media


def _bases(folder: Path, root: Path) -> list[Path]:
    """Where a record's media may lie: beside its file, above it, or in the usual folders of a clone."""
    usual = (root / name for name in ("images", "videos", "video", "data"))
    return list(dict.fromkeys([folder, folder.parent, root, *usual]))


def resolved(images: list, bases: list[Path]) -> list:
    """Paths made complete: the first place where the picture lies, or the first of all places."""

    def complete(path: str) -> str:
        places = [base / path for base in bases] or [Path(path)]
        return str(next((place for place in places if place.is_file()), places[0]))

    return [complete(image) if isinstance(image, str) else image for image in images]


def video_frames(video: str, bases: list[Path], frames: int) -> tuple[list[str], dict]:
    """([], {"video": its path}), or the pictures of the folder that has its name without the ending."""
    places = [base / video for base in bases] or [Path(video)]
    for place in places:
        folder = place.with_suffix("")
        if folder.is_dir():
            shown = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in PICTURES)
            if shown:
                picked = np.linspace(0, len(shown) - 1, min(frames, len(shown))).astype(int)  # cut, as spacer 5.1 does
                return [shown[i] for i in picked], {}
    return [], {"video": str(next((place for place in places if place.is_file()), places[0]))}


def listing() -> list[str]:
    """One line a benchmark: name, what it shows, rows, split, hub id with configs."""
    lines = [f"{'name':20s} {'shows':8s} {'rows':>5s}  {'split':10s} hub id"]
    for name, bench in BENCHMARKS.items():
        shows = "video" if bench.video else "pictures" if bench.images > 1 else "picture"
        configs = f" ({', '.join(c for c in bench.configs if c)})" if bench.configs != (None,) else ""
        lines.append(f"{name:20s} {shows:8s} {bench.size or '?':>5}  {bench.split:10s} {bench.hub}{configs}")
    return lines
