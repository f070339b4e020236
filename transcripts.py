"""transcripts.jsonl: every answer of an evaluation, kept as it comes, resumed without loss, graded again without a model.

A line holds the question, gold, the whole text and the verdict; a row asked k times has k lines, told apart by `sample`.
`rescore` takes our files and those of the published scripts, SpatialThinker's JSON lists and SpaceR's JSONL.
"""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import scores
from command import versions
from data.benchmarks import BENCHMARKS, NUMERIC_SPAR, NUMERIC_VSI, spar_level
from data.options import gold_letter, split_options
from files import cut_torn_line, json_lines, read_json, read_lines, replace_file
from files import locked as locked_file
from rewards import extract_scene, format_score, grade, scene_metrics

FILE = "transcripts.jsonl"


def judge(row: dict, text: str, mode: str = "corrected") -> dict:
    """What the graders say of an answer. row: a row, or a line of a transcript."""
    verdict = grade(row, text, mode=mode) | {"format": format_score(text, extract_scene(text))}
    if row["scene"] is not None and row["size"] is not None:
        verdict["scene_metrics"] = scene_metrics(text, row["scene"], row["size"])
    return verdict


# ---------------------------------------------------------------- the file


def read_transcripts(path: Path) -> list[dict]:
    """The whole lines; ValueError naming the line that is no transcript, or holds an id (and sample) a second time."""
    records, lines = read_lines(path), {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or record.get("id") is None:
            raise ValueError(f"{path}, line {number}: not a transcript: delete it, the row is asked again")
        key = record["id"], record.get("sample", 0)
        if key in lines:
            raise ValueError(f"{path}, line {number}: the id {key[0]!r} of line {lines[key]}: delete one")
        lines[key] = number
    return records


def read_answers(path: Path) -> list[dict]:
    """The transcripts, to compare; ValueError naming the line without a verdict."""
    records = read_transcripts(path)
    for number, record in enumerate(records, 1):
        if "skipped" not in record:
            check_keys(record, f"{path}, line {number}", ("category", "question", "gold", "correct"))
    return records


def check_keys(record: dict, place: str, needed: tuple[str, ...]) -> None:
    if missing := [key for key in needed if key not in record]:
        raise ValueError(f"{place}: no {', '.join(missing)}: this is no transcript of evaluate.py")


locked = partial(locked_file, who="another evaluate.py")


def check_settings(path: Path, settings: dict) -> None:
    """ValueError, one line, if the transcripts were made with other settings."""
    saved_at = path.with_name("config.json")
    if not (path.exists() and path.stat().st_size):
        return
    if not saved_at.exists():
        raise ValueError(f"{path.parent} holds transcripts of unknown settings (no config.json): choose another --out")
    saved = read_json(saved_at)
    if not isinstance(saved, dict) or not isinstance(old := saved.get("settings"), dict):
        raise ValueError(f"{saved_at}: not what evaluate.py saves there: choose another --out")
    changed = [f"{key} was {old.get(key)!r}, now {new!r}" for key, new in settings.items() if old.get(key) != new]
    if changed:
        told = f"{path.parent} holds answers of other settings ({'; '.join(changed)})"
        raise ValueError(f"{told}: give the old ones, or choose another --out")


def begin(path: Path, settings: dict, config: dict, *, rows: int) -> list[dict]:
    """The records of a locked transcript file, a torn last line cut off; config.json beside it if there is none yet."""
    check_settings(path, settings)  # once more: since the first time another process may have begun it
    records = read_transcripts(path)
    if not records:
        made = {"settings": settings, "config": config, "rows": rows, "versions": versions()}
        replace_file(path.with_name("config.json"), json.dumps(made, indent=1).encode())
    if cut_torn_line(path):
        print(f"{path}: the last line was cut off, it is asked again")
    return records


def weights_hash(folder: Path) -> str | None:
    """Of all weight files of a local checkpoint (a second a gigabyte, and they are read anyway); None for a hub id."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def report(path: Path, records: list[dict], *, title: str, mode: str = "corrected", price=None) -> dict:
    """Writes scores.json beside the transcripts and prints the table; returns the scores."""
    config, saved_at = path.with_name("config.json"), path.with_name("scores.json")
    result = scores.scores(records, mode=mode, price=price)
    made = read_json(config) if config.exists() else {}
    content = {**result, "evaluation": made, "graded_with": versions() | {"mode": mode}}
    replace_file(saved_at, json.dumps(content, indent=1).encode())
    print("\n".join(["", title, *scores.table(result), *(f"skipped: {row['why']}" for row in result["skipped"][:5])]))
    done = len({record["id"] for record in records})
    if isinstance(made, dict) and done < made.get("rows", 0):  # of a published file's folder it may be anything
        print(f"unfinished: {done} of {made['rows']} rows; the command that began it goes on")
    print(f"{path}, {saved_at}")
    return result


# ---------------------------------------------------------------- grading again


def rescore(source: str, *, out: str | None = None, mode: str = "corrected") -> list[dict]:
    """Grades old answers again and prints what changed: a transcripts.jsonl, a file of a published script, or a folder of
    such. Our files are replaced unless `out` is given; a published file gets a folder of its name, beside it or, with the
    folders above it, in `out`.
    Raises ValueError naming the file, and FileNotFoundError."""
    given = Path(source)
    if not given.exists():
        cure = "give a transcripts.jsonl, a published result, or a folder"
        raise FileNotFoundError(f"--rescore {given}: no such file: {cure}")
    found = [given] if given.is_file() else answer_files(given)
    if not found:
        raise FileNotFoundError(f"--rescore {given}: no transcripts.jsonl and no published result in it")
    if mode != "corrected" and not out:
        raise ValueError(f"--mode {mode} with --rescore needs --out, so that the verdicts you have stay")
    results = []
    for path in found:
        own = path.name == FILE
        place = path.relative_to(given) if given.is_dir() else Path(path.name)  # two folders may hold files of one name
        place = place.parent if own else place.with_suffix("")
        folder = Path(out) / place if out else path.parent / ("" if own else path.stem)
        results.append(rescore_file(path, folder / FILE, mode))
    return results


def answer_files(folder: Path) -> list[Path]:
    """All transcripts.jsonl below a folder, and the published results, known by their keys."""
    own = sorted(folder.rglob(FILE))
    others = [path for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]) if path.name != FILE]
    return own + [path for path in others if is_published(path)]


def is_published(path: Path) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(100_000)
    return '"correct_answer"' in head and '"reasoning"' in head or '"promt"' in head


def rescore_file(path: Path, target: Path, mode: str) -> dict:
    with locked(target):
        if target.stat().st_size and not target.samefile(path):
            raise ValueError(f"{target} exists already: choose another --out")
        old = read_transcripts(path) if path.name == FILE else published_records(path)
        new = [graded_again(record, f"{path}, line {number}", mode) for number, record in enumerate(old, 1)]
        replace_file(target, json_lines(new))
        settings = path.with_name("config.json")
        if path.name == FILE and settings.exists() and settings.parent != target.parent:
            replace_file(target.with_name("config.json"), settings.read_bytes())
    changed = [a["id"] for a, b in zip(old, new, strict=True) if "correct" in a and a["correct"] != b["correct"]]
    named = f": {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}" if changed else ""
    before = scores.accuracy([record for record in old if "correct" in record])["accuracy"]
    was = "" if before is None else f", accuracy was {before:.3f}"
    print(f"{path}: {len(changed)} of {len(new)} verdicts changed{named}{was}")
    return report(target, new, title=f"{path}, graded again, mode {mode}", mode=mode)


def graded_again(record: dict, place: str, mode: str) -> dict:
    if "skipped" in record:
        return record
    check_keys(record, place, ("category", "options", "gold", "kind", "size", "scene", "text", "finished"))
    return record | judge(record, record["text"], mode)


# ---------------------------------------------------------------- files of the published scripts

SPACER_FILES = {"VSI-Bench": "vsi-bench", "STI-Bench": "sti-bench", "SPAR-Bench": "spar-bench", "Video-MME": "video-mme",
                "LongVideoBench": "longvideobench", "TempCompass": "tempcompass"}  # fmt: skip


def published_records(path: Path) -> list[dict]:
    """A result file of SpatialThinker's evals.py (a JSON list) or of SpaceR-Eval (JSONL) as records with its verdicts, if
    it has any. The benchmark is read off the file name, options off the prompt. ValueError naming file and entry."""
    if path.suffix == ".jsonl":
        items, names, convert = read_lines(path), SPACER_FILES, spacer_record
    else:
        items, names, convert = read_json(path), {n: n for n in BENCHMARKS}, evals_record
    fitting = [name for name in names if re.match(rf"{re.escape(name)}(?![a-zA-Z0-9-])", path.name)]
    if not fitting or not isinstance(items, list):
        raise ValueError(f"{path}: not a list of answers to one of {', '.join(names)}, named after it")
    name, records = names[max(fitting, key=len)], []
    for number, item in enumerate(items, 1):
        try:
            fields = convert(name, item)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, entry {number}: {type(error).__name__}: {error}") from None
        meta = {"rule": BENCHMARKS[name].rule, **fields.pop("meta")}
        records.append({"id": str(number - 1), "dataset": name, "model": path.stem, "control": "none", "size": None,
                        "scene": None, "images": [], "finished": True, **fields, "meta": meta})  # fmt: skip
    return records


def evals_record(name: str, item: dict) -> dict:
    """SpatialThinker 5.5: prompt, correct_answer, reasoning (the whole text), correct, task."""
    asked = item["prompt"].replace("Please give the final answer within answer tags.", "").strip()
    gold, (question, options) = str(item["correct_answer"]).strip(), split_options(asked)
    letter = gold_letter(gold, options) if options else None
    if options and len(gold) == 1 and gold.islower() and name != "mmvp":  # a word, of which the script kept one letter
        begins = [i for i, option in enumerate(options) if option.lower().startswith(gold)]
        letter = chr(65 + begins[0]) if len(begins) == 1 else None
    if name == "hallusionbench" and gold in "01":
        letter = "A" if gold == "1" else "B"
    kind = "choice" if letter else "yes_no" if gold.lower() in ("yes", "no") else "text"
    kind = "number" if not letter and re.fullmatch(r"-?[0-9.]+", gold) else kind
    return {"category": str(item.get("task") or ""), "question": question, "options": options if letter else [],
            "kind": kind, "gold": letter or gold, "text": str(item["reasoning"] or ""), "correct": bool(item["correct"]),
            "meta": {"raw_gold": gold}}  # fmt: skip


def spacer_record(name: str, item: dict) -> dict:
    """SpaceR 5.2 to 5.7: predicted_answer, ground_truth and a task under one of three names; TempCompass has its own."""
    gold = str(item["ground_truth"] if "ground_truth" in item else item["answer"])
    gold = (re.search(r"<answer>(.*?)</answer>", gold, re.S) or [gold, gold])[1].strip()
    category = str(item.get("question_type") or item.get("task") or item.get("question_category") or "")
    numeric = category in NUMERIC_VSI or category.startswith(NUMERIC_SPAR)
    kind = "mra" if numeric else "view_change" if category == "view_change_infer" else "choice"
    options = split_options(item["promt"])[1] if kind == "choice" else []
    letter = gold_letter(gold, options) if options else gold[:1]
    meta = {key: item[key] for key in ("duration",) if isinstance(item.get(key), str)}
    if name == "spar-bench":
        meta |= {"level": spar_level(category), "view": item.get("image_type")}
    return {"category": category, "question": item["question"], "options": options, "kind": kind,
            "gold": letter or gold if kind == "choice" else gold, "meta": meta | {"raw_gold": gold},
            "text": str(item["predicted_answer"] if "predicted_answer" in item else item["prediction"])}  # fmt: skip
