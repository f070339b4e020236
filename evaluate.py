"""Ask a model the questions of a dataset, keep every answer, and score them with the graders that training uses.

    python evaluate.py --model runs/demo/step_40 --dataset scenes:demo@val --limit 256
    python evaluate.py --model runs/demo/step_40 --dataset scenes:demo@val --limit 256 --control blind
    python evaluate.py --model runs/big/step_75 --dataset OX-PIXL/STVQA-7K@val --provider vllm --batch 256
    python evaluate.py --regrade evaluations/scenes-demo-val_demo-step_40/transcripts.jsonl
    python evaluate.py --model runs/demo/step_40 --image photo.jpg --question "Where is the cup?" --options left right

`transcripts.jsonl` grows by a line a row, a batch at a time; the same command goes on where it was stopped, however it
was stopped. `scores.json` and the table come from the whole file, never from running counts. A row whose picture cannot
be read, or whose prompt is too long, gets a line with `skipped`: it is not in n, and how many there are stands beside
the accuracy. A control asks the same questions without the picture (blind) or with another row's (swapped): an
accuracy means something only above its controls.
"""

import fcntl
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

import runs
from data.dataset import encode, load_rows, sizes_or_error
from data.pictures import FACTOR, MAX_PIXELS, MIN_PIXELS, BrokenPicture, decode_picture
from data.prompts import PROMPTS, build_prompt, read_template
from data.rows import to_resized_frame, to_row
from rewards import extract_answer, extract_choice, extract_scene, format_score, grade, is_valid_object, scene_metrics


@dataclass(frozen=True)
class Config:
    model: str | None = None  # checkpoint folder, hub id, or random:tiny|demo|3b|7b
    dataset: str = "scenes:demo@val"  # hub id, folder, .parquet, .jsonl, name@split, or scenes:LEVEL@val
    limit: int | None = None  # first rows only (how many to draw, for scenes)
    control: str = "none"  # none; blind: no picture; swapped: another row's picture, the text as it was
    provider: str = "hf"  # who answers: hf, or vllm (fast on a GPU, with a batch of hundreds)
    out: str | None = None  # folder; default evaluations/DATASET_MODEL, and _CONTROL
    batch: int = 16  # rows asked side by side; a kill loses at most these

    processor: str | None = None  # tokenizer and picture processor, if not the model's own
    dtype: str = "auto"  # auto (bfloat16 on a GPU, float32 otherwise), float32, bfloat16
    device: str = "auto"

    # None takes what the checkpoint was trained with (its prompting.json), else what stands last.
    style: str | None = None  # prompt style or file, see train_grpo.py; left out: as trained, else spatialthinker
    box_frame: str | None = None  # original or resized; left out: as trained, else original
    min_pixels: int | None = None  # pictures are resized into this range first; left out: as trained, else 512 * 512
    max_pixels: int | None = None  # left out: as trained, else 2048 * 2048
    max_tokens: int | None = None  # of an answer; left out: as trained, else 2048
    max_prompt_tokens: int = 16384  # rows with longer prompts are skipped and counted, never cut
    temperature: float = 0.0  # 0 is greedy
    seed: int = 1  # of sampling, and of who gets whose picture under swapped

    regrade: str | None = None  # a transcripts.jsonl: grade it again, without a model, and ask nothing
    image: str | None = None  # a picture: answer one question about it and save it with the boxes of the answer
    question: str | None = None  # for image
    options: tuple[str, ...] = ()  # for image, without letters


def main(cfg: Config) -> None:
    check_config(cfg)
    if cfg.regrade:
        regrade(cfg)
    elif cfg.image:
        answer_one(with_trained_settings(cfg))
    else:
        evaluate(with_trained_settings(cfg))


CHOICES = {
    "provider": ("hf", "vllm"),
    "control": ("none", "blind", "swapped"),
    "dtype": ("auto", "float32", "bfloat16"),
}


def check_config(cfg: Config) -> None:
    """Settings that cannot work, in one line each, before anything is loaded."""
    for flag, known in CHOICES.items():
        if getattr(cfg, flag) not in known:
            raise ValueError(f"--{flag} {getattr(cfg, flag)}: unknown, choose {', '.join(known[:-1])} or {known[-1]}")
    for flag in ("batch", "limit", "max_tokens", "max_prompt_tokens"):
        value = getattr(cfg, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: give 1 or more")
    if cfg.temperature < 0:
        raise ValueError(f"--temperature {cfg.temperature}: give 0 (greedy) or more")
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {cfg.device}: no NVIDIA GPU here; leave --device out")
    if not cfg.regrade and not cfg.model:
        raise ValueError("--model is missing: give a checkpoint folder, a hub id, or random:tiny")
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


# ---------------------------------------------------------------- a dataset


def evaluate(cfg: Config) -> dict:
    """Answers what is not answered yet, then scores the whole file; returns the scores."""
    rows = load_rows(cfg.dataset, limit=cfg.limit, box_frame=cfg.box_frame, min_pixels=cfg.min_pixels,
                     max_pixels=cfg.max_pixels)  # fmt: skip
    cfg = with_worded_style(cfg, rows)
    path, settings = Path(cfg.out or default_out(cfg)) / "transcripts.jsonl", identity(cfg, rows)
    check_settings(path, settings)  # before a model is loaded, and for nothing
    done = {record["id"] for record in read_transcripts(path)}
    answer = None if all(row["id"] in done for row in rows) else open_provider(cfg, rows)
    with locked(path):
        records = begin(path, cfg, settings, rows=len(rows))
        if answer is not None:
            answer_rows(cfg, rows, answer, path, records)
        return report(path, records, title=f"{cfg.dataset}, {cfg.model}, control {cfg.control}")


def with_worded_style(cfg: Config, rows: list[dict]) -> Config:
    """Style `row` takes each row's own prompt. Models trained on these wrote scene graphs (spec 3.2); where the rows
    have none of their own, ours of the same structure stands in."""
    if cfg.style != "row" or all(row["problem"] for row in rows):
        return cfg
    print(f"{cfg.dataset}: not every row has a prompt of its own, so style spatialthinker instead of row")
    return replace(cfg, style="spatialthinker")


def answer_rows(cfg: Config, rows: list[dict], answer: Callable, path: Path, records: list[dict]) -> None:
    """Asks batch by batch and appends to `path` and `records`. Batches are cut from the whole list, answered or not: a
    batch of which some lines are missing is asked again whole, so that a resumed file is the one of an unbroken run
    (with vLLM on a GPU: up to rounding, which hangs on what its caches hold)."""
    done = {record["id"] for record in records}
    donors = swapped_pictures(rows, cfg.seed) if cfg.control == "swapped" else {}
    progress = runs.Progress(len(rows), start=len(done), unit="row")
    for start in range(0, len(rows), cfg.batch):
        batch = rows[start : start + cfg.batch]
        if all(row["id"] in done for row in batch):
            continue
        asked = [controlled(row, cfg.control, donors.get(row["id"])) for row in batch]
        replies = iter(answer([row for row in asked if isinstance(row, dict)], cfg.seed * 1_000_003 + start))
        replies = [next(replies) if isinstance(row, dict) else {"skipped": row} for row in asked]
        new = [
            transcript(cfg, row, reply, donors.get(row["id"]))
            for row, reply in zip(batch, replies, strict=True) if row["id"] not in done
        ]  # fmt: skip
        runs.append_lines(path, new)
        records += new
        seen = accuracy(records)
        progress.show(len(records) - 1, {"accuracy": seen["accuracy"]} if seen["n"] else {})
    progress.close()


def transcript(cfg: Config, row: dict, reply: dict, donor: dict | None) -> dict:
    """One line: all that grading needs, so that it can be graded again without dataset or model."""
    line = {"id": row["id"], "dataset": cfg.dataset, "model": cfg.model, "control": cfg.control}
    line |= {key: row[key] for key in ("category", "question", "options", "gold", "kind", "size", "scene")}
    line["images"] = [picture for picture in row["images"] if isinstance(picture, str)]  # not the pictures themselves
    line |= {"picture_of": donor["id"]} if donor else {}
    if "skipped" in reply:
        return line | reply
    return line | {"prompt": build_prompt(row, cfg.style)} | reply | judge(row, reply["text"])


def judge(row: dict, text: str) -> dict:
    """What the graders say of an answer. row: a row, or a line of a transcript."""
    verdict = grade(row, text) | {"format": format_score(text, extract_scene(text))}
    if row["scene"] is not None and row["size"] is not None:
        verdict["scene_metrics"] = scene_metrics(text, row["scene"], row["size"])
    return verdict


# ---------------------------------------------------------------- controls


def controlled(row: dict, control: str, donor: dict | None) -> dict | str:
    """The row as the model gets it, or why it cannot be asked. Its text stays as it is, the printed size too."""
    if control == "none":
        return row
    own = sizes_or_error(row)
    if isinstance(own, BrokenPicture):  # left out of the controls as well, or they would be over other rows
        return str(own)
    if control == "blind":
        return {**row, "images": []}
    if donor is None:
        return f"row {row['id']}: no other row of its kind has another picture to swap with"
    # without meta: encode compares the frame noted there with the picture shown, which here is another row's
    return {**row, "images": donor["images"], "meta": {}}


def swapped_pictures(rows: list[dict], seed: int) -> dict[str, dict | None]:
    """For each row's id the row whose pictures it gets: never its own nor equal ones, of the same kind and number, each
    used once; None where there is none. The same rows and seed give the same pairs."""
    groups: dict[tuple, list[tuple[str, dict]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], len(row["images"])), []).append((picture_key(row, seed), row))
    donors = {}
    for group in groups.values():
        # Rows of one picture stand together in hash order; a step as long as the longest such block leaves any block.
        group.sort(key=lambda pair: pair[0])
        longest = max(Counter(key for key, _ in group).values())
        for i, (key, row) in enumerate(group):
            other_key, other = group[(i + longest) % len(group)]
            donors[row["id"]] = other if other_key != key else None
    return donors


def picture_key(row: dict, seed: int) -> str:
    """A number of the pictures' content: one photo may stand in many rows, and under several names."""
    digest = hashlib.sha256(str(seed).encode())
    for picture in row["images"]:
        if isinstance(picture, Image.Image):
            picture = repr(picture.size).encode() + picture.tobytes()
        elif isinstance(picture, str):
            picture = Path(picture).read_bytes() if Path(picture).is_file() else picture.encode()
        digest.update(hashlib.sha256(picture).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- who answers


def open_provider(cfg: Config, rows: list[dict]) -> Callable[[list[dict], int], list[dict]]:
    """The function that answers: rows and a seed in; for each row {"text", "finished", "tokens"} out, or {"skipped":
    why}. A checkpoint answers in this process, through the rollout that training samples with."""
    runs.check_shadowed_kernels()  # before transformers is imported
    from rollout import hf_rollout, vllm_rollout  # here: regrading needs no model code

    where = {"processor": cfg.processor, "dtype": cfg.dtype, "device": cfg.device}
    if cfg.provider == "hf":
        rollout, processor = hf_rollout(cfg.model, **where)
    else:
        rollout, processor = vllm_rollout(
            cfg.model, **where, max_prompt_tokens=cfg.max_prompt_tokens, max_tokens=cfg.max_tokens,
            max_sequences=cfg.batch, max_images=max([1, *(len(row["images"]) for row in rows)]),
        )  # fmt: skip
    return partial(answer_batch, cfg, rollout, processor)


def answer_batch(cfg: Config, rollout, processor, rows: list[dict], seed: int) -> list[dict]:
    prompts, replies = [], [{} for _ in rows]
    for row, reply in zip(rows, replies, strict=True):
        try:
            prompt = encode(row, processor, style=cfg.style, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
        except BrokenPicture as error:
            reply["skipped"] = str(error)
            continue
        if len(prompt.expanded) <= cfg.max_prompt_tokens:
            prompts.append(prompt)
        else:
            length = f"{len(prompt.expanded)} tokens, more than --max-prompt-tokens {cfg.max_prompt_tokens}"
            reply["skipped"] = f"row {row['id']}: a prompt of {length}"
    settings = {"n": 1, "max_tokens": cfg.max_tokens, "temperature": cfg.temperature, "seed": seed}
    try:
        groups = rollout.generate(prompts, **settings) if prompts else []
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--batch {cfg.batch} does not fit the GPU: lower it, the run goes on") from error
    asked = [reply for reply in replies if not reply]
    for reply, [c] in zip(asked, groups, strict=True):
        reply |= {"text": c.text, "finished": c.finished, "tokens": len(c.token_ids)}
    return replies


# ---------------------------------------------------------------- the folder


def default_out(cfg: Config) -> str:
    """evaluations/scenes-demo-val_demo-step_40, and _blind for that control."""
    model = Path(cfg.model)
    model = f"{model.resolve().parent.name}-{model.name}" if model.name.startswith("step_") else model.name
    name = "_".join([Path(cfg.dataset).name, model] + ([] if cfg.control == "none" else [cfg.control]))
    return "evaluations/" + "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def identity(cfg: Config, rows: list[dict]) -> dict:
    """The settings that decide the answers, with the contents of weights, rows and prompt text as hashes: a checkpoint
    trained anew under its old name must not inherit the answers of the one before."""
    template = "" if cfg.style == "row" else PROMPTS.get(cfg.style) or read_template(cfg.style)
    keys = ("id", "question", "options", "gold", "kind", "size", "scene", "problem", "style")
    content = json.dumps([template, [[row[key] for key in keys] for row in rows]])
    others = ("out", "batch", "device", "regrade", "image", "question", "options")
    return {
        **{key: value for key, value in asdict(cfg).items() if key not in others},
        "weights": weights_hash(Path(cfg.model)),
        "rows and prompt text": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


def weights_hash(folder: Path) -> str | None:
    """Of all weight files of a local checkpoint (a second a gigabyte, and they are read anyway); None for a hub id."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def check_settings(path: Path, settings: dict) -> None:
    """ValueError, one line, if the transcripts were made with other settings."""
    saved_at = path.with_name("config.json")
    if not (path.exists() and path.stat().st_size):
        return
    if not saved_at.exists():
        raise ValueError(f"{path.parent} holds transcripts of unknown settings (no config.json): choose another --out")
    old = json.loads(saved_at.read_text(encoding="utf-8"))["settings"]
    changed = [f"{key} was {old.get(key)!r}, now {new!r}" for key, new in settings.items() if old.get(key) != new]
    if changed:
        told = f"{path.parent} holds answers of other settings ({'; '.join(changed)})"
        raise ValueError(f"{told}: give the old ones, or choose another --out")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The transcript file is there and ours alone until the end; ValueError, one line, if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another evaluate.py is writing it: wait, or choose another --out") from None
        yield


def begin(path: Path, cfg: Config, settings: dict, *, rows: int) -> list[dict]:
    """The records of a locked transcript file, a torn last line cut off; config.json beside it if there is none yet."""
    check_settings(path, settings)  # once more: since the first time another process may have begun it
    records = read_transcripts(path)
    if not records:
        made = {"settings": settings, "config": asdict(cfg), "rows": rows, "versions": runs.versions()}
        runs.replace_file(path.with_name("config.json"), json.dumps(made, indent=1).encode())
    if runs.cut_torn_line(path):
        print(f"{path}: the last line was cut off, it is asked again")
    return records


def read_transcripts(path: Path) -> list[dict]:
    """The whole lines; ValueError naming the line that is no transcript, or holds an id for the second time."""
    records, lines = runs.read_lines(path), {}
    for number, record in enumerate(records, 1):
        key = record.get("id") if isinstance(record, dict) else None
        if key is None:
            raise ValueError(f"{path}, line {number}: not a transcript: delete it, the row is asked again")
        if key in lines:
            raise ValueError(f"{path}, line {number}: the id {key!r} of line {lines[key]}: delete one")
        lines[key] = number
    return records


# ---------------------------------------------------------------- scores


def scores(records: list[dict]) -> dict:
    """All numbers of a transcript file, from its records alone. Shares are of the n answered rows, None if n is 0."""
    answered = [record for record in records if "skipped" not in record]
    categories = sorted({record["category"] for record in answered})
    drawn = [record for record in answered if "scene_metrics" in record]
    related = [record for record in drawn if record["scene"]["relationships"]]  # else saying nothing would score 1
    all_choices = all(record["kind"] == "choice" for record in answered)
    return {
        **accuracy(answered),
        "chance": mean([1 / len(record["options"]) for record in answered]) if all_choices else None,
        "unparsed": mean([record["answer"] is None for record in answered]),
        "truncated": mean([not record["finished"] for record in answered]),
        "format": mean([record["format"] for record in answered]),
        "by_category": {c: accuracy([record for record in answered if record["category"] == c]) for c in categories},
        "scene": {
            "n": len(drawn), "n_relation": len(related),
            "iou": mean([record["scene_metrics"]["iou"] for record in drawn]),
            "object_f1": mean([record["scene_metrics"]["object_f1"] for record in drawn]),
            "relation_f1": mean([record["scene_metrics"]["relation_f1"] for record in related]),
        },
        "skipped": [{"id": record["id"], "why": record["skipped"]} for record in records if "skipped" in record],
    }  # fmt: skip


def accuracy(records: list[dict]) -> dict:
    """Of the answered records: n, mean correctness p, its standard error. That is the deviation over sqrt(n), which for
    right and wrong is sqrt(p (1 - p) / n); regression gives parts of a point."""
    values = [float(record["correct"]) for record in records if "skipped" not in record]
    p, n = mean(values), len(values)
    return {"n": n, "accuracy": p, "se": math.sqrt(sum((v - p) ** 2 for v in values) / n / n) if n else None}


def mean(values: list) -> float | None:
    return math.fsum(values) / len(values) if values else None


def report(path: Path, records: list[dict], *, title: str) -> dict:
    """Writes scores.json beside the transcripts and prints the table; returns the scores."""
    result, config, saved_at = scores(records), path.with_name("config.json"), path.with_name("scores.json")
    made = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    content = {**result, "evaluation": made, "graded_with": runs.versions()}
    runs.replace_file(saved_at, json.dumps(content, indent=1).encode())
    print("\n".join(["", title, *table(result), *(f"skipped: {row['why']}" for row in result["skipped"][:5])]))
    if len(records) < made.get("rows", 0):
        print(f"unfinished: {len(records)} of {made['rows']} rows; the command that began it goes on")
    print(f"{path}, {saved_at}")
    return result


def table(result: dict) -> list[str]:
    """Lines of text: a row a category, then all, then the shares."""

    def line(name: str, part: dict) -> str:
        numbers = f"{part['accuracy']:9.3f} {part['se']:7.3f}" if part["n"] else f"{'-':>9s} {'-':>7s}"
        return f"{name[:32]:32s} {part['n']:6d} {numbers}"

    lines = [f"{'category':32s} {'n':>6s} {'accuracy':>9s} {'+-':>7s}"]
    lines += [line(category or "-", part) for category, part in result["by_category"].items()]
    beside = [] if result["chance"] is None else [f"chance {result['chance']:.3f}"]
    beside += [f"{len(result['skipped'])} rows skipped, not counted"] if result["skipped"] else []
    lines.append(line("all", result) + ("   " + ", ".join(beside) if beside else ""))
    if result["n"]:
        lines.append(f"unparsed {result['unparsed']:.3f}, truncated {result['truncated']:.3f}, "
                     f"four-block format {result['format']:.3f}")  # fmt: skip
    scene = result["scene"]
    if scene["n"]:
        lines.append(f"{scene['n']} gold scenes: box IoU {scene['iou']:.3f}, object F1 {scene['object_f1']:.3f}")
    if scene["n_relation"]:
        lines.append(f"{scene['n_relation']} of them with relations: relation F1 {scene['relation_f1']:.3f}")
    return lines


def regrade(cfg: Config) -> dict:
    """Grades a transcript file again: texts stay, verdicts are new. Writes to --out, or in place of the old ones."""
    path = Path(cfg.regrade)
    if not path.is_file():
        raise FileNotFoundError(f"--regrade {path}: no such file: give the transcripts.jsonl of an evaluation")
    target = Path(cfg.out) / "transcripts.jsonl" if cfg.out else path
    with locked(target):
        if target.stat().st_size and not target.samefile(path):
            raise ValueError(f"{target} exists already: choose another --out")
        old = read_transcripts(path)
        new = [graded_again(record, f"{path}, line {number}") for number, record in enumerate(old, 1)]
        runs.replace_file(target, runs.json_lines(new))
        settings = path.with_name("config.json")
        if cfg.out and settings.exists():
            runs.replace_file(target.with_name("config.json"), settings.read_bytes())
    changed = [a["id"] for a, b in zip(old, new, strict=True) if "correct" in a and a["correct"] != b["correct"]]
    named = f": {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}" if changed else ""
    print(f"{path}: {len(changed)} of {len(new)} verdicts changed{named}")
    return report(target, new, title=f"{path}, graded again")


def graded_again(record: dict, place: str) -> dict:
    if "skipped" in record:
        return record
    needed = ("category", "options", "gold", "kind", "size", "scene", "text", "finished")
    if missing := [key for key in needed if key not in record]:
        raise ValueError(f"{place}: no {', '.join(missing)}: this is no transcript of evaluate.py")
    return record | judge(record, record["text"])


# ---------------------------------------------------------------- one picture


def answer_one(cfg: Config) -> None:
    """Answers --question about --image, prints answer and scene, saves the picture with the answer's boxes."""
    picture = decode_picture(cfg.image, row_id=cfg.image)
    record = {"images": [cfg.image], "question": cfg.question, "options": list(cfg.options), "gold": "A"}
    row = to_row(record, folder=Path(), index=0, source=cfg.image)
    if cfg.box_frame == "resized":
        row = to_resized_frame(row, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels, factor=FACTOR)
    cfg = with_worded_style(replace(cfg, dataset=cfg.image), [row])
    [reply] = open_provider(cfg, [row])([row], cfg.seed)
    if "skipped" in reply:
        raise ValueError(reply["skipped"])
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


COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


def draw_boxes(picture: Image.Image, objects: list[dict], size: tuple[int, int]) -> Image.Image:
    """A copy of the picture, small ones enlarged, with each object's box and id. Boxes are in a frame of `size` (W, H);
    corners may come in any order, and what lies outside is moved to the border."""
    zoom = max(1, -(-448 // min(picture.size)))
    shown = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(max(13, min(shown.size) // 40))
    for number, item in enumerate(objects):
        # clipped in the frame first: a coordinate may be nan (then 0) or too large for a float
        x1, y1, x2, y2 = (
            min(max(0, v), side) * full / side
            for v, side, full in zip(item["bbox"], (*size, *size), (*shown.size, *shown.size), strict=True)
        )
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=max(2, min(shown.size) // 200))
        name = item["id"][:40]
        _, _, width, height = pen.textbbox((0, 0), name, font=font)
        # above the box, or below where there is no room, and inside the picture
        at = (max(0, min(x1, shown.width - width)), y1 - height - 4 if y1 >= height + 4 else y2 + 4)
        pen.rectangle(pen.textbbox(at, name, font=font), fill=colour)
        pen.text(at, name, fill="white", font=font)
    return shown


if __name__ == "__main__":
    try:
        with runs.one_line_errors():
            main(tyro.cli(Config, description=__doc__.split("\n\n")[0]))
    except KeyboardInterrupt:
        print("\nstopped: what was answered is kept, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
