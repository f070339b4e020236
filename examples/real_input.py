"""Real photos, real boxes, real questions and a real tokenizer through the whole path, in minutes on two CPU cores.

    python -m examples.real_input --realdata ../shared/realdata --out /tmp/real_input

1. VSR (photos, COCO boxes, human-checked statements) as STVQA-7K parquet      2. python -m data.dataset --check on it
3. three GRPO steps from random weights, with the Qwen2.5-VL tokenizer         4. evaluate.py on BLINK Spatial_Relation,
and the stored answers of five models there under our grader, beside what BLINK's authors read in them.

The model is two random layers, so its accuracy is noise: what is shown is that the path carries real input. Everything
is written below --out, which must be empty and outside this repository: the photos are not ours to pass on.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

from data.dataset import load_rows
from data.rows import write_stvqa

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("vsr/dev_index.jsonl", "blink_spatial_relation/prompt.csv", "model_outputs/blink/saved_outputs",
          "qwen/Qwen2.5-VL-7B-Instruct/vocab.json")  # fmt: skip
SHARED_PHOTOS = (17, 19, 26, 27, 46, 49, 115)  # BLINK questions whose photo is a VSR photo too (vsr/SOURCE.txt)
STEPS = 3
# The preset spatialthinker-3b made small. A photo has at most 256 x 256 pixels (about 80 tokens), an answer 32 tokens.
SMALL = """--prompts-per-step 8 --group-size 4 --mini-batches 2 --min-pixels 3136 --max-pixels 65536 --dtype float32
    --max-prompt-tokens 1024 --max-completion-tokens 32 --token-budget 4096 --val-limit 8 --val-every 3 --save-every 3
    --samples-every 1 --device cpu"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--realdata", default="../shared/realdata", help="folder with vsr/, qwen/, ...")
    parser.add_argument("--out", default="/tmp/real_input", help="an empty or new folder outside this repository")
    parser.add_argument("--vsr", type=int, help="first VSR statements only")
    parser.add_argument("--blink", type=int, help="first BLINK questions only, for the random model")
    args = parser.parse_args(argv)
    real, out = check_folders(Path(args.realdata), Path(args.out))

    splits = write_vsr(vsr_rows(real / "vsr")[: args.vsr], out / "vsr")
    for split in splits:
        run("-m", "data.dataset", "--check", f"vsr@{split}", out=out)
    processor = real / "qwen" / "Qwen2.5-VL-7B-Instruct"
    # Twice: under the published reward random text earns 0, every group is flat and the policy loss is 0. The second
    # reward, with a learning rate for it, pays for what random text has more or less of: there the policy must move.
    own = f"{Path(__file__).resolve()}:letters"
    for name, reward, rate in (("real", "spatialthinker", "1e-6"), ("real-letters", own, "1e-3")):
        run("train_grpo.py", "spatialthinker-3b", "--name", name, "--model", "random:tiny", "--processor", processor,
            "--data", "vsr@train", "--val-data", "vsr@val", "--steps", STEPS, "--reward", reward, "--lr", rate,
            *SMALL.split(), out=out)  # fmt: skip
        show_steps(out / "runs" / name)

    rows = blink_rows(real / "blink_spatial_relation")
    fresh = [row for row in rows if int(row["id"].rpartition("_")[2]) not in SHARED_PHOTOS][: args.blink]
    write_lines(out / "blink.jsonl", fresh)
    run("evaluate.py", "--model", f"runs/real-letters/step_{STEPS}", "--dataset", "blink.jsonl",
        "--out", "blink-random", "--device", "cpu", out=out)  # fmt: skip
    print_comparison(regraded(rows, real / "model_outputs" / "blink" / "saved_outputs", out))


def check_folders(real: Path, out: Path, needed: tuple[str, ...] = NEEDED) -> tuple[Path, Path]:
    """Both as absolute paths. Raises FileNotFoundError or ValueError, one line, if they cannot be used."""
    missing = [name for name in needed if not (real / name).exists()]
    if missing:
        raise FileNotFoundError(f"--realdata {real}: no {missing[0]} there: give the folder that holds the real data")
    if out.resolve().is_relative_to(ROOT):
        raise ValueError(f"--out {out} is inside the repository: choose a folder outside, photos must not get in")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty: choose another folder, or delete this one")
    out.mkdir(parents=True, exist_ok=True)
    return real.resolve(), out.resolve()


def run(*command, out: Path) -> None:
    """One of the project's own commands, inside `out`, so that runs/ lands there. It prints where we print.
    Raises RuntimeError when it fails."""
    words = [str(word) for word in command]
    script = words if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *script], cwd=out, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          stderr=subprocess.STDOUT, check=False)  # fmt: skip
    print(f"[{time.monotonic() - began:.0f} s]", flush=True)
    if done.returncode:
        raise RuntimeError(f"{words[words[0] == '-m']} ended with status {done.returncode}: it says why above")


# ---------------------------------------------------------------- VSR


def vsr_rows(folder: Path) -> list[dict]:
    """One choice row a VSR statement ("The cat is on the bench."): is it right or wrong?

    The gold scene holds every COCO box of the two classes named, in pixels of the photo. The statement becomes a gold
    relation only when it is true and each class has one box: otherwise nobody said which of them it is about."""
    text = (folder / "coco80_class_names.yaml").read_text(encoding="utf-8")
    names = dict(re.findall(r"^\s*(\d+): (.+)$", text, re.MULTILINE))
    boxes = {
        entry["image"]: [(names[str(kind)], box) for kind, *box in entry["boxes"]]
        for entry in read_lines(folder / "coco_boxes_yolo_dev.jsonl")
    }
    return [vsr_row(entry, boxes[entry["image"]], list(names.values()), folder)
            for entry in read_lines(folder / "dev_index.jsonl")]  # fmt: skip


def vsr_row(entry: dict, boxes: list[tuple[str, list[float]]], names: list[str], folder: Path) -> dict:
    size, caption = (entry["width"], entry["height"]), entry["caption"]
    ends = [name.replace(" ", "_") for name in named_classes(caption, entry["relation"], names)]
    objects = []
    for name in dict.fromkeys(ends):
        found = [box for kind, box in boxes if kind.replace(" ", "_") == name]
        objects += [{"id": f"{name}.{n}", "bbox": pixels(box, size)} for n, box in enumerate(found, start=1)]
    subject, target = (f"{name}.1" for name in ends)
    relations = []
    if entry["label"] and [thing["id"] for thing in objects] == [subject, target]:
        relations = [{"subject": subject, "predicate": entry["relation"], "object": target}]
    # "right" first in one half of the rows, by a hash of the id: the letter tells nothing, on every machine.
    options = ["right", "wrong"] if zlib.crc32(entry["idx"].encode()) % 2 else ["wrong", "right"]
    return dict(
        id=entry["idx"], source="vsr", category="relation", images=[str(folder / "images_dev" / entry["image"])],
        question=f"Is this statement about the picture right or wrong? {caption}", options=options,
        gold="AB"[options.index("right" if entry["label"] else "wrong")], kind="choice", size=size,
        scene={"objects": objects, "relationships": relations}, map=None, problem=None, style=None,
        meta={"image_id": entry["idx"], "relation": entry["relation"], "photo": entry["image"]},
    )  # fmt: skip


def named_classes(caption: str, relation: str, names: list[str]) -> tuple[str, str]:
    """('cat', 'bench') of "The cat is on the bench.": the longest class name before and behind the relation."""
    before, _, behind = f" {caption.lower().rstrip('.')} ".partition(f" {relation.lower()} ")
    held = [[name for name in names if re.search(rf"\b{re.escape(name)}\b", part)] for part in (before, behind)]
    if not all(held):
        raise ValueError(f"VSR caption {caption!r}: no COCO class on both sides of {relation!r}: correct the index")
    return max(held[0], key=len), max(held[1], key=len)


def pixels(box: list[float], size: tuple[int, int]) -> list[int]:
    """YOLO box (centre x, centre y, width, height, as shares) -> [x1, y1, x2, y2] in pixels of the (W, H) photo."""
    (x, y, w, h), (width, height) = box, size
    x1, y1 = max(0, round((x - w / 2) * width)), max(0, round((y - h / 2) * height))
    x2, y2 = min(width, round((x + w / 2) * width)), min(height, round((y + h / 2) * height))
    return [x1, y1, max(x1 + 1, x2), max(y1 + 1, y2)]


def write_vsr(rows: list[dict], folder: Path) -> list[str]:
    """train and val parquet in the STVQA-7K columns, split by photo: statements about one photo stay together."""
    parts = {"train": [], "val": []}
    for row in rows:
        parts["train" if zlib.crc32(row["meta"]["photo"].encode()) % 5 else "val"].append(row)
    for split, part in parts.items():
        write_stvqa(part, folder / f"{split}-00000-of-00001.parquet")
        back = load_rows(f"{folder}@{split}")
        if [(r["question"], r["gold"], r["scene"], r["size"]) for r in back] != [
            (r["question"], r["gold"], r["scene"], r["size"]) for r in part]:  # fmt: skip
            raise RuntimeError(f"{folder}@{split}: what was read is not what was written")
        letters = Counter(row["gold"] for row in part)
        print(f"vsr@{split}: {len(part)} statements over {len({row['meta']['photo'] for row in part})} photos, gold "
              f"A {letters['A']}, B {letters['B']}, {sum(len(row['scene']['objects']) for row in part)} boxes, "
              f"{sum(len(row['scene']['relationships']) for row in part)} relations")  # fmt: skip
    return list(parts)


# ---------------------------------------------------------------- GRPO


def letters(response: str, row: dict) -> dict[str, float]:
    """A reward of one's own: the share of plain letters and spaces. Random text has more or less of them."""
    plain = sum(character.isascii() and (character.isalpha() or character == " ") for character in response)
    return {"total": plain / max(1, len(response))}


def show_steps(folder: Path) -> None:
    """The numbers of metrics.jsonl that say whether something was learned from."""
    keys = ("reward/total", "reward/flat_groups", "optim/grad_norm", "loss/kl", "rollout/logprob_gap")
    print("step " + " ".join(f"{key:>19s}" for key in keys))
    for step, line in enumerate(read_lines(folder / "metrics.jsonl"), start=1):
        print(f"{step:4d} " + " ".join(f"{line[key]:19.2e}" for key in keys))


# ---------------------------------------------------------------- BLINK

OPTION = re.compile(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|$)")
ASK = "Select from the following choices."


def blink_rows(folder: Path) -> list[dict]:
    """Rows by hand, as a user would write them, of a folder with prompt.csv, val_answers.json and images/.

    A prompt reads `Is the cup on the table? Select from the following choices. (A) yes (B) no`; gold is `(B)`."""
    gold, rows = json.loads((folder / "val_answers.json").read_text()), []
    with open(folder / "prompt.csv", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            question, ask, options = line["prompt"].partition(ASK)
            found = OPTION.findall(options)
            if not ask or [letter for letter, _ in found] != [chr(65 + i) for i in range(len(found))]:
                raise ValueError(f"{folder}/prompt.csv, {line['idx']}: no lettered choices after {ASK!r}")
            rows.append(
                dict(id=line["idx"], source="blink", category="spatial_relation", question=question.strip(),
                     images=[str((folder / "images" / f"{line['idx']}.jpg").resolve())],
                     options=[text for _, text in found], gold=gold[line["idx"]].strip("()"))
            )  # fmt: skip
    return rows


def regraded(rows: list[dict], saved: Path, out: Path) -> dict[str, list[tuple[dict, str]]]:
    """For each model whose answers BLINK's authors kept: (our transcript, the letter that the authors read) a row.

    The stored texts become transcripts.jsonl, and evaluate.py --regrade, which needs no model, grades them."""
    pairs = {}
    for folder in sorted(saved.iterdir()):
        theirs = {entry["idx"]: entry for entry in json.loads((folder / "Spatial_Relation.json").read_text())["val"]}
        place = f"blink-{folder.name}/transcripts.jsonl"
        write_lines(out / place, [
            {**row, "dataset": "BLINK", "model": folder.name, "control": "none", "kind": "choice", "size": None,
             "scene": None, "text": theirs[row["id"]]["full_prediction"], "finished": True}
            for row in rows
        ])  # fmt: skip
        run("evaluate.py", "--regrade", place, out=out)
        ours = {line["id"]: line for line in read_lines(out / place)}
        pairs[folder.name] = [(ours[row["id"]], theirs[row["id"]]["prediction"].strip("()")) for row in rows]
    return pairs


def print_comparison(models: dict[str, list[tuple[dict, str]]]) -> None:
    """One table, then each answer in which we read another letter than the authors; `-` is none."""
    print(f"\n{'stored answers':16s} {'n':>4s} {'authors':>8s} {'ours':>8s} {'same letter':>12s} {'same verdict':>13s}")
    different = []
    for name, pairs in models.items():
        theirs = [letter == line["gold"] for line, letter in pairs]
        ours = [line["correct"] for line, _ in pairs]
        # The authors write Z where they found no letter.
        read = [(line["answer"] or "-", letter.replace("Z", "-")) for line, letter in pairs]
        different += [(name, line, *two) for (line, _), two in zip(pairs, read) if two[0] != two[1]]
        print(f"{name:16s} {len(pairs):4d} {sum(theirs) / len(pairs):8.3f} {sum(ours) / len(pairs):8.3f} "
              f"{sum(a == b for a, b in read):12d} {sum(a == b for a, b in zip(ours, theirs)):13d}")  # fmt: skip
    for name, line, own, their in different:
        print(f"{name} {line['id']}: ours {own}, authors {their}, gold {line['gold']}: "
              f"{' '.join(line['text'].split())[:150]!r}")  # fmt: skip


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
