"""Ask a model the questions of a dataset, keep every answer, and score them with the graders that training uses.

    python evaluate.py --model runs/demo/step_40 --dataset scenes:demo@val --limit 256 --control blind
    python evaluate.py --model runs/big/step_75 --dataset cv-bench,blink-spatial,mmvp --provider vllm
    python evaluate.py --model gpt-4o-2024-05-13 --provider openai --dataset all-image --data-root /data/benchmarks
    python evaluate.py --rescore evaluations --out evaluations-again        python evaluate.py --list
    python evaluate.py --compare evaluations/cv-bench_base evaluations/cv-bench_trained
    python evaluate.py --model runs/demo/step_40 --image photo.jpg --question "Where is the cup?" --options left right

`transcripts.jsonl` grows as answers come; the same command goes on where it was stopped, however it was stopped.
`scores.json` and the table come from the whole file, never from running counts. A row whose picture cannot be read, or
whose prompt is too long, gets a line with `skipped`: it is not in n, and how many there are stands beside the accuracy;
a request that a served model refuses is listed, and asked again the next time. A control asks the same questions without
the picture (blind) or with another row's (swapped): an accuracy means something only above its controls.

The flags and names of the published script work too (--model_path, --num_samples, --template spatial_thinker, ...).
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import arg

import scores
from answers import ABSENT, BATCH, SERVED, controlled, files_state, open_provider, swapped_pictures, video_problem
from command import Progress, one_line_errors
from data.benchmarks import BENCHMARKS, chosen, listing, load_benchmark
from data.dataset import load_rows
from data.pictures import FACTOR, MAX_PIXELS, MIN_PIXELS, decode_picture, draw_boxes
from data.prompts import PROMPTS, build_prompt, read_template
from data.rows import to_resized_frame, to_row
from files import append_lines, json_lines, replace_file
from rewards import MODES, extract_answer, extract_choice, extract_scene, is_valid_object
from transcripts import (
    FILE, begin, check_settings, judge, locked, read_answers, read_transcripts, report, rescore, weights_hash,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    # checkpoint folder, hub id, random:tiny|demo|3b|7b, or the name of a served model
    model: Annotated[str | None, arg(aliases=["--model-path"])] = None
    # benchmarks of --list with commas between, all-image, all-video; hub id, folder, file or scenes:LEVEL, with @split
    dataset: str = "scenes:demo@val"
    data_root: str | None = None  # folder with clones of the benchmarks' hub repositories; left out: from the hub
    limit: Annotated[int | None, arg(aliases=["--num-samples"])] = None  # first rows only (how many to draw, for scenes)
    control: str = "none"  # none; blind: no picture; swapped: another row's picture, the text as it was
    provider: str = "hf"  # who answers: hf, vllm (fast on a GPU), openai (or any server of that form), anthropic
    out: str | None = None  # folder; default evaluations/DATASET_MODEL, and _CONTROL
    batch: Annotated[int | None, arg(aliases=["--batch-size"])] = None  # rows a call; a kill loses these; hf 16, vllm 4096
    k: int = 1  # answers a row; above 1: mean, pass@k and majority, with a --temperature
    frames: int = 32  # of a video, at most
    # hf, vllm: a video is one clip with its times, as train_grpo.py shows it, its frames by the rule eval or eval-published
    # (width and height exchanged, as all of SpaceR's numbers were made); left out: pictures in order
    clips: str | None = None

    base_url: str | None = None  # of a served model, say http://localhost:8000/v1
    parallel: int = 8  # requests to it under way at once
    timeout: float = 180.0  # seconds for a whole reply
    price: tuple[float, float] | None = None  # dollars for a million tokens in and out

    # tokenizer and picture processor, if not the model's own
    processor: Annotated[str | None, arg(aliases=["--processor-name"])] = None
    dtype: str = "auto"  # auto (bfloat16 on a GPU, float32 otherwise), float32, bfloat16
    device: str = "auto"

    # None takes what the checkpoint was trained with (its prompting.json), else what stands last.
    # prompt style or text file, see train_grpo.py; left out: as trained, else spatialthinker
    style: Annotated[str | None, arg(aliases=["--template"])] = None
    box_frame: str | None = None  # original or resized; left out: as trained, else original
    min_pixels: int | None = None  # pictures are resized into this range first; left out: as trained, else 512 * 512
    max_pixels: int | None = None  # left out: as trained, else 2048 * 2048
    max_tokens: int | None = None  # of an answer; left out: as trained, else 2048
    max_prompt_tokens: int = 16384  # rows with longer prompts are skipped and counted, never cut
    temperature: float | None = 0.0  # 0 is greedy; None is not sent, for served models that take none
    seed: int = 1  # of sampling, and of who gets whose picture under swapped

    list: bool = False  # show the benchmarks and stop
    compare: tuple[str, str] | None = None  # two evaluation folders: their paired difference, and stop
    # old answers, a file or a folder: grade them again without a model, and stop
    rescore: Annotated[str | None, arg(aliases=["--regrade"])] = None
    mode: str = "corrected"  # graders: corrected, or upstream, the published rules with their defects
    image: str | None = None  # a picture: answer one question about it and save it with the boxes of the answer
    question: str | None = None  # for image
    options: tuple[str, ...] = ()  # for image, without letters


def main(cfg: Config) -> None:
    if cfg.list:
        print("\n".join(listing()))
        return
    check_config(cfg)
    if cfg.compare:
        files = [Path(path) / FILE if Path(path).is_dir() else Path(path) for path in cfg.compare]
        if missing := [str(path) for path in files if not path.is_file()]:
            raise FileNotFoundError(f"--compare {missing[0]}: no such transcripts: give two evaluation folders")
        print("\n".join(scores.comparison(scores.compare(*map(read_answers, files)))))
    elif cfg.rescore:
        rescore(cfg.rescore, out=cfg.out, mode=cfg.mode)
    elif cfg.image:
        answer_one(with_trained_settings(cfg))
    else:
        evaluate_all(with_trained_settings(cfg))


CHOICES = {
    "provider": ("hf", "vllm", *SERVED),
    "control": ("none", "blind", "swapped"),
    "dtype": ("auto", "float32", "bfloat16"),
    "mode": MODES,
}


def check_config(cfg: Config) -> None:
    """Settings that cannot work, in one line each, before anything is loaded."""
    for flag, known in CHOICES.items():
        if getattr(cfg, flag) not in known:
            raise ValueError(f"--{flag} {getattr(cfg, flag)}: unknown, choose {', '.join(known[:-1])} or {known[-1]}")
    for flag in ("batch", "limit", "max_tokens", "max_prompt_tokens", "k", "frames", "parallel"):
        value = getattr(cfg, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: give 1 or more")
    if cfg.temperature is None and cfg.provider not in SERVED or cfg.temperature is not None and cfg.temperature < 0:
        raise ValueError(f"--temperature {cfg.temperature}: give 0 (greedy) or more")
    if cfg.k > 1 and cfg.temperature == 0:
        raise ValueError(f"--k {cfg.k} greedy answers are one: give a --temperature, say 1.0")
    if cfg.clips and (cfg.clips not in ("eval", "eval-published") or cfg.provider in SERVED):
        raise ValueError(f"--clips {cfg.clips}: eval or eval-published, with --provider hf or vllm")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device):
        raise ValueError(f"--device {cfg.device}: auto, cpu, cuda or cuda:1")
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {cfg.device}: no NVIDIA GPU here; leave --device out")
    if not (cfg.rescore or cfg.compare or cfg.model):
        raise ValueError("--model is missing: give a checkpoint folder, a hub id, or random:tiny")
    if cfg.provider in SERVED and cfg.box_frame == "resized":
        raise ValueError(f"--box-frame resized with --provider {cfg.provider}: its resizing is not known here, leave it out")
    if cfg.mode != "corrected" and not (cfg.rescore or cfg.compare or cfg.image):
        if own := [name for name in chosen(cfg.dataset) if name not in BENCHMARKS]:
            why = f"{own[0]} has no published rule, only the benchmarks of --list have one"
            raise ValueError(f"--mode {cfg.mode}: {why}: leave it out")
    if cfg.image and not cfg.question:
        raise ValueError('--image needs --question "..."')
    if cfg.image and not Path(cfg.image).is_file():
        raise FileNotFoundError(f"--image {cfg.image}: no such file")


PROMPTING = "prompting.json"  # what train_grpo.py saves in every checkpoint: how it was asked
DEFAULTS = {"style": "spatialthinker", "box_frame": "original", "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS,
            "max_tokens": 2048}  # fmt: skip


def with_trained_settings(cfg: Config) -> Config:
    """The settings left out, as the checkpoint was trained: another prompt, frame of boxes or size of pictures would be
    scored as errors of the model."""
    left_out = {key: value for key, value in DEFAULTS.items() if getattr(cfg, key) is None}
    file = Path(cfg.model) / PROMPTING
    if left_out and file.is_file():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            saved["max_tokens"] = saved.pop("max_completion_tokens")
            left_out = {key: saved[key] for key in left_out}
        except (ValueError, TypeError, AttributeError, KeyError):
            cure = "delete it, and give --style, --box-frame, --min-pixels, --max-pixels and --max-tokens"
            raise ValueError(f"{file}: not what train_grpo.py saves there: {cure}") from None
        print(f"as trained ({file}): " + ", ".join(f"{key} {value}" for key, value in left_out.items()))
    return replace(cfg, **left_out)


# ---------------------------------------------------------------- datasets


def evaluate_all(cfg: Config) -> None:
    """Every dataset in turn with one model; after several, a line each."""
    names, results = chosen(cfg.dataset), []
    opened = partial(once, {}, cfg)
    for name in names:
        out = cfg.out and (cfg.out if len(names) == 1 else f"{cfg.out}/{Path(name).name}")
        results.append(evaluate(replace(cfg, dataset=name, out=out), opened, others=names))
    if len(names) > 1:
        print()
        for name, result in zip(names, results):
            print(f"{name[:32]:32s} {result['n']:6d} {scores.number(result)}")


def once(kept: dict, cfg: Config, own: Config, rows: list[dict], others: list[str]) -> Callable:
    """What answers `own`, made at its first need and kept for the datasets to come: an engine takes a minute to start,
    and must know how many pictures a row may have."""
    if "answer" not in kept:
        frames = 0 if cfg.clips else cfg.frames  # of a video, as pictures
        pictures = [1, *(frames if row.get("video") else len(row["images"]) for row in rows)]
        for bench in (BENCHMARKS[name] for name in others if name in BENCHMARKS):
            pictures.append(frames if bench.video else bench.images)
        kept["answer"] = open_provider(cfg, max(pictures))
    return partial(kept["answer"], own)


def evaluate(cfg: Config, opened: Callable, others: list[str]) -> dict:
    """Answers what is not answered yet, then scores the whole file; returns the scores."""
    rows = rows_of(cfg)
    cfg = with_worded_style(cfg, rows)
    path, settings = Path(cfg.out or default_out(cfg)) / FILE, identity(cfg, rows)
    check_settings(path, settings)  # before a model is loaded, and for nothing
    done = answered(still_valid(path, rows), cfg.k)
    answer = None if all(row["id"] in done for row in rows) else opened(cfg, rows, others)
    with locked(path):
        records = begin(path, settings, asdict(cfg), rows=len(rows))
        if answer is not None:
            answer_rows(cfg, rows, answer, path, records)
        title = f"{cfg.dataset}, {cfg.model}, control {cfg.control}"
        return report(path, records, title=title, mode=cfg.mode, price=cfg.price)


def rows_of(cfg: Config) -> list[dict]:
    """The rows of --dataset in the frame of --box-frame; ValueError where all are videos that are not there."""
    if cfg.dataset not in BENCHMARKS:
        return load_rows(cfg.dataset, limit=cfg.limit, box_frame=cfg.box_frame, min_pixels=cfg.min_pixels,
                         max_pixels=cfg.max_pixels)  # fmt: skip
    rows = load_benchmark(cfg.dataset, root=cfg.data_root, limit=cfg.limit, frames=cfg.frames)
    if all(video_problem(row) for row in rows):
        raise ValueError(f"{cfg.dataset}: {video_problem(rows[0])}")
    bounds = {"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels, "factor": FACTOR}
    return [to_resized_frame(row, **bounds) if cfg.box_frame == "resized" and row["size"] else row for row in rows]


def with_worded_style(cfg: Config, rows: list[dict]) -> Config:
    """Style `row` takes each row's own prompt. Models trained on these wrote scene graphs (spec 3.2); where the rows
    have none of their own, ours of the same structure stands in."""
    if cfg.style != "row" or all(row["problem"] for row in rows):
        return cfg
    print(f"{cfg.dataset}: not every row has a prompt of its own, so style spatialthinker instead of row")
    return replace(cfg, style="spatialthinker")


def still_valid(path: Path, rows: list[dict]) -> list[dict]:
    """The records of a transcript file, after taking out those of rows that were skipped and whose files are there now, or
    others: these are asked again. ValueError where the pictures of an answered row are others now."""
    records, now, again = read_transcripts(path), {row["id"]: row for row in rows}, set()
    for record in records:
        state = files_state(now[record["id"]]) if "files" in record and record["id"] in now else ABSENT
        if state in (ABSENT, record.get("files")):
            continue
        if "skipped" not in record:
            cure = "put the old one back, or choose another --out"
            raise ValueError(f"{path}: the picture of row {record['id']} is another than the one asked about: {cure}")
        again.add(record["id"])
    if again:
        print(f"{path}: {len(again)} rows were skipped and have other files now, they are asked again")
        with locked(path):  # not the lock of the run to come: that is on the file which is replaced here
            replace_file(path, json_lines(record for record in read_transcripts(path) if record["id"] not in again))
    return [record for record in records if record["id"] not in again]


def answered(records: list[dict], k: int) -> set[str]:
    """The ids with all k answers, or a reason for none."""
    counts = Counter(record["id"] for record in records)
    return {record["id"] for record in records if "skipped" in record or counts[record["id"]] >= k}


def answer_rows(cfg: Config, rows: list[dict], answer: Callable, path: Path, records: list[dict]) -> None:
    """Asks batch by batch and appends to `path` and `records` what comes. Batches are cut from the whole list, answered or
    not: a batch of which some lines are missing is asked again whole, so that a resumed file is the one of an unbroken
    run (with vLLM on a GPU: up to rounding, which hangs on what its caches hold). A served model is asked for the missing
    answers alone; those it refuses go into failed.json, and are asked again by the next run."""
    have = {(record["id"], record.get("sample", 0)) for record in records}
    done, failed = answered(records, cfg.k), {}
    donors = swapped_pictures(rows, cfg.seed) if cfg.control == "swapped" else {}
    progress, size = Progress(len(rows), start=len(done), unit="row"), cfg.batch or BATCH.get(cfg.provider, len(rows))
    if any(row.get("video") for row in rows):
        size = min(size, 64)  # a batch's frames are in memory together, 15 MB a video
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        if all(row["id"] in done for row in batch):
            continue
        asked = [controlled(row, cfg.control, donors.get(row["id"]), cfg.frames, cfg.clips) for row in batch]
        refused = [(n, 0, {"skipped": why}) for n, why in enumerate(asked) if isinstance(why, str)]
        places = [n for n, row in enumerate(asked) if isinstance(row, dict)]
        for bundle in answer([asked[n] for n in places], cfg.seed * 1_000_003 + start, have):
            bundle, refused, new = refused + [(places[n], *rest) for n, *rest in bundle], [], []
            for n, sample, reply in sorted(bundle, key=lambda entry: entry[:2]):
                row = batch[n]
                if "failed" in reply:
                    failed[row["id"]] = reply["failed"]
                elif (row["id"], sample) not in have and row["id"] not in done:
                    new.append(transcript(cfg, row, reply, donors.get(row["id"]), sample))
            append_lines(path, new)
            records += new
            if new:
                seen = scores.accuracy(records[-1000:])
                progress.show(len({r["id"] for r in records}) - 1, {"accuracy": seen["accuracy"]} if seen["n"] else {})
    progress.close()
    report_failed(path.with_name("failed.json"), failed, len(rows))


def report_failed(path: Path, failed: dict[str, str], total: int) -> None:
    """Lists the rows that a served model refused; an older list goes when there are none left."""
    if failed or path.exists():
        replace_file(path, json.dumps(failed, indent=1).encode())
    for key, why in [*failed.items()][:5]:
        print(f"failed, row {key}: {why}")
    if failed:
        print(f"{len(failed)} of {total} rows failed, listed in {path}: the same command asks them again")


def transcript(cfg: Config, row: dict, reply: dict, donor: dict | None, sample: int) -> dict:
    """One line: all that grading needs, so that it can be graded again without dataset or model."""
    line = {"id": row["id"], "dataset": cfg.dataset, "model": cfg.model, "control": cfg.control}
    line |= {"sample": sample} if cfg.k > 1 else {}
    line |= {key: row[key] for key in ("category", "question", "options", "gold", "kind", "size", "scene")}
    line |= {"meta": row["meta"]} if cfg.dataset in BENCHMARKS else {}
    line["images"] = [picture for picture in row["images"] if isinstance(picture, str)]  # not the pictures themselves
    line |= {"files": state} if (state := files_state(row)) else {}
    line |= {"picture_of": donor["id"]} if donor else {}
    if "skipped" in reply:
        return line | reply
    return line | {"prompt": build_prompt(row, cfg.style)} | reply | judge(row, reply["text"], cfg.mode)


# ---------------------------------------------------------------- the folder


def default_out(cfg: Config) -> str:
    """evaluations/scenes-demo-val_demo-step_40, and _blind for that control."""
    model = Path(cfg.model)
    model = f"{model.resolve().parent.name}-{model.name}" if model.name.startswith("step_") else model.name
    name = "_".join([Path(cfg.dataset).name, model] + ([] if cfg.control == "none" else [cfg.control]))
    return "evaluations/" + "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def identity(cfg: Config, rows: list[dict]) -> dict:
    """The settings that decide the answers, with the contents of weights, rows and prompt text as hashes: a checkpoint
    trained anew under its old name must not inherit the answers of the one before. Of files only the names: what they
    show stands in each line, for some may come later (still_valid)."""
    template = "" if cfg.style == "row" else PROMPTS.get(cfg.style) or read_template(cfg.style)
    keys = ("id", "question", "options", "gold", "kind", "size", "scene", "problem", "style", "map", "span", "fps")
    files = [[Path(one).name for one in (row.get("video"), *row["images"]) if isinstance(one, str)] for row in rows]
    known = [row | {"size": None} if any(isinstance(one, str) for one in row["images"]) else row for row in rows]
    content = json.dumps([template, files, [[row.get(key) for key in keys] for row in known]])
    others = ("out", "batch", "device", "rescore", "compare", "list", "image", "question", "options", "data_root",
              "parallel", "timeout", "price")  # fmt: skip
    return {
        **{key: value for key, value in asdict(cfg).items() if key not in others},
        "weights": weights_hash(Path(cfg.model)),
        "rows and prompt text": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


# ---------------------------------------------------------------- one picture


def answer_one(cfg: Config) -> None:
    """Answers --question about --image, prints answer and scene, saves the picture with the answer's boxes."""
    picture = decode_picture(cfg.image, row_id=cfg.image)
    record = {"images": [cfg.image], "question": cfg.question, "options": list(cfg.options), "gold": "A"}
    row = to_row(record, folder=Path(), index=0, source=cfg.image)
    if cfg.box_frame == "resized":
        row = to_resized_frame(row, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels, factor=FACTOR)
    cfg = with_worded_style(replace(cfg, dataset=cfg.image), [row])
    [(_, _, reply)] = next(open_provider(cfg, 1)(cfg, [row], cfg.seed, set()))
    if why := reply.get("skipped") or reply.get("failed"):
        raise ValueError(why)
    text, scene = reply["text"], extract_scene(reply["text"])
    found = scene.get("objects")
    objects = [item for item in found if is_valid_object(item)] if isinstance(found, list) else []
    out = Path(cfg.out or default_out(cfg))
    out.mkdir(parents=True, exist_ok=True)
    draw_boxes(picture, objects, row["size"]).save(out / "answer.png")
    letter = extract_choice(text, row["options"]) if row["options"] else None
    named = f"({letter}) {row['options'][ord(letter) - 65]}" if letter else extract_answer(text)
    print(f"\n{text}\n\nanswer: {named or 'none that could be read'}" + ("" if reply["finished"] else " (cut off)"))
    print(f"scene:  {json.dumps(scene) if scene else 'none'}")
    print(f"{out / 'answer.png'}: {len(objects)} boxes")


# ---------------------------------------------------------------- the published script's command line

STYLES = {"spatial_thinker": "spatialthinker", "huggingface": "hf"}
GONE = {"vision": "--template vision", "yes_no": "--template yes_no"}


def translated(arguments: list[str]) -> list[str]:
    """Flags of the published script that are spelt otherwise here; tyro's aliases know the rest. SystemExit for those that
    have nothing to do here."""
    result, rest = [], iter(arguments)
    for argument in rest:
        flag, _, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag == "--resume":  # always
            continue
        if flag in ("--cuda", "--custom-filename"):
            value = value or next(rest, "")
            result += ["--device", f"cuda:{value}"] if flag == "--cuda" else ["--out", f"evaluations/{value}"]
        elif flag in ("--template", "--provider"):
            value = value or next(rest, "")
            if value in GONE:
                here = ", ".join(PROMPTS)
                raise SystemExit(f"error: {GONE[value]}: left out with the benchmarks that it was for; here are {here}")
            result += [flag, STYLES.get(value, value)]
        else:
            result.append(argument)
    return result


if __name__ == "__main__":
    try:
        with one_line_errors():
            main(tyro.cli(Config, args=translated(sys.argv[1:]), description=__doc__.split("\n\n")[0]))
    except KeyboardInterrupt:
        print("\nstopped: what was answered is kept, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
