"""What a packed data set looks like: its numbers, and a page of samples with their boxes."""

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data.stvqa_items import CATEGORIES, LEVELS, hash_seed
from rewards import extract_scene

COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


def records(path: Path, columns: list[str]) -> Iterator[dict]:
    """Rows of a parquet file with these columns, a batch in memory at a time."""
    import pyarrow.parquet as pq  # here: the stages before write no parquet

    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
        yield from batch.to_pylist()


# ---- numbers ---------------------------------------------------------------------------------------------------------


def statistics(path: Path) -> dict:
    """Shares of categories, levels and letters, lengths, and how far one gets without the picture."""
    shares = {name: Counter() for name in ("category", "level", "answer_only", "options", "rating")}
    lengths, guesser = defaultdict(list), Guesser()
    columns = ["image_id", "category", "level", "rating", "answer_only", "answer_text_only", "options", "question_only",
               "problem", "answer_option_text"]  # fmt: skip
    pictures = set()
    for row in records(path, columns):
        for name in ("category", "level", "answer_only", "rating"):
            shares[name][str(row[name])] += 1
        shares["options"][str(len(row["options"]))] += 1
        scene = extract_scene(row["answer_option_text"])
        lengths["question, characters"].append(len(row["question_only"]))
        lengths["problem, characters"].append(len(row["problem"]))
        lengths["objects of the scene"].append(len(scene["objects"]))
        lengths["relations of the scene"].append(len(scene["relationships"]))
        guesser.add(row)
        pictures.add(row["image_id"])
    n = shares["category"].total()
    return {
        "rows": n, "pictures": len(pictures),
        **{name: {key: round(100 * k / n, 1) for key, k in count.most_common()} for name, count in shares.items()},
        "lengths": {name: {"mean": round(sum(v) / n, 1), "least": min(v), "most": max(v)} for name, v in lengths.items()},
        **guesser.rates(),
    }  # fmt: skip


class Guesser:
    """Answers without the picture, learnt on one half of the pictures and asked on the other, both ways round: of the
    options take the one that was right most often in questions of its category. Two guessers: one looks at every option by
    itself, wherever it stood, the other at questions with these very options, which may tell what no option does alone."""

    def __init__(self):
        self.seen: list[Counter] = [Counter(), Counter()]  # by half: (category, option) -> questions, and right ones
        self.right: list[Counter] = [Counter(), Counter()]
        self.sets: list[Counter] = [Counter(), Counter()]  # by half: (category, options, right one) -> questions
        self.rows: list[tuple] = []  # half, category, options, gold text, letter

    def add(self, row: dict) -> None:
        half, gold = hash_seed(row["image_id"]) % 2, row["answer_text_only"]
        keys = [hash_seed(row["category"], option) for option in row["options"]]  # 32 bits a text: kept for every row
        self.seen[half].update(keys)
        self.right[half][keys[row["options"].index(gold)]] += 1
        self.sets[half][hash_seed(*map(str, sorted(keys))), keys[row["options"].index(gold)]] += 1
        self.rows.append((half, row["category"], keys, row["options"].index(gold)))

    def rates(self) -> dict:
        """chance, always the commonest letter, and the guessers' rates, over all and by category; in percent."""
        chance, hits, set_hits, totals = Counter(), Counter(), Counter(), Counter()
        for half, category, keys, gold in self.rows:
            seen, right, among = self.seen[1 - half], self.right[1 - half], hash_seed(*map(str, sorted(keys)))
            hits[category] += hit([(right[key] + 1 / len(keys)) / (seen[key] + 1) for key in keys], gold)
            set_hits[category] += hit([self.sets[1 - half][among, key] for key in keys], gold)
            chance[category] += 1 / len(keys)
            totals[category] += 1
        n = max(1, len(self.rows))
        letters = Counter(gold for *_, gold in self.rows)
        result = {"commonest letter": round(100 * max(letters.values(), default=0) / n, 1)}
        for name, rate in (("chance", chance), ("blind", hits), ("blind by option set", set_hits)):
            result[name] = round(100 * sum(rate.values()) / n, 1)
            result[f"{name}, each"] = {c: round(100 * rate[c] / totals[c], 1) for c in CATEGORIES if totals[c]}
        return result


def hit(scores: list[float], gold: int) -> float:
    """How often one is right who takes the highest score, of equal ones any."""
    return (scores[gold] == max(scores)) / scores.count(max(scores))


def table(result: dict[str, dict]) -> list[str]:
    """Lines of text: a column a split."""

    def line(name: str, values: list) -> str:
        return f"{name[:28]:28s}" + "".join(f"{'-' if value is None else value:>10}" for value in values)

    parts = list(result.values())
    lines = [line("", list(result)), *(line(name, [p[name] for p in parts]) for name in ("rows", "pictures"))]
    groups = (("category", CATEGORIES), ("level", LEVELS), ("answer_only", tuple("ABCD")), ("options", ("2", "3", "4")))
    for group, names in groups:
        lines.append(f"{group.replace('_only', '')}, percent")
        found = [name for name in names if any(name in p[group] for p in parts)]
        lines += [line(f"  {name}", [p[group].get(name) for p in parts]) for name in found]
    lines.append("length, mean")
    lines += [line(f"  {name}", [p["lengths"][name]["mean"] for p in parts]) for name in parts[0]["lengths"]]
    lines.append("right without the picture, percent")
    rates = ("chance", "commonest letter", "blind", "blind by option set")
    lines += [line(f"  {name}", [p[name] for p in parts]) for name in rates]
    for short, name in (("chance", "chance"), ("blind", "blind"), ("by set", "blind by option set")):
        lines += [line(f"  {short}: {c}", [p[f"{name}, each"].get(c) for p in parts]) for c in CATEGORIES]
    return lines


# ---- page ------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.4 system-ui,sans-serif;margin:2em;background:#fafafa;color:#222}}
main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(400px,1fr));gap:20px}}
article{{background:#fff;border:1px solid #ddd;border-radius:6px;padding:12px}}
svg{{width:100%;height:auto;max-height:420px;display:block}} .right{{font-weight:700;color:#176b2c}}
small{{color:#666}} ol{{margin:.4em 0;padding-left:1.6em;list-style:upper-alpha}}</style>
<h1>{title}</h1><p>{counts}</p><main>{cards}</main>
"""


def view_page(paths: list[Path], *, samples: int, title: str) -> str:
    """One HTML page with everything in it: up to `samples` rows of every kind, in the order of a hash."""
    picked, counts = defaultdict(list), []
    for path in paths:
        n = 0
        for index, row in enumerate(records(path, ["image_id", "question_only", "category"])):
            picked[row["category"]].append((hash_seed(row["image_id"], row["question_only"]), str(path), index))
            n += 1
        counts.append(f"{path.name}: {n} rows")
    ranked = [pool for pool in (sorted(pool) for pool in picked.values())]
    turns = [pool[i] for i in range(max(map(len, ranked))) for pool in ranked if i < len(pool)][:samples]
    wanted = {(path, index) for _, path, index in turns}
    columns = ["images", "question_only", "options", "answer_only", "answer_option_text", "category", "level", "rating",
               "image_id"]  # fmt: skip
    found = [
        (row["category"], card(row, path.name.partition("-")[0]))
        for path in paths for index, row in enumerate(records(path, columns)) if (str(path), index) in wanted
    ]  # fmt: skip
    found.sort(key=lambda pair: CATEGORIES.index(pair[0]))
    return PAGE.format(title=html.escape(title), counts=html.escape("; ".join(counts)), cards="".join(c for _, c in found))


def card(row: dict, split: str) -> str:
    """One row: picture, boxes with ids, question, options with the right one marked, relations."""
    scene, options = extract_scene(row["answer_option_text"]), []
    for letter, option in zip("ABCD", row["options"], strict=False):
        mark = ' class="right"' if letter == row["answer_only"] else ""
        options.append(f"<li{mark}>{html.escape(option)}</li>")
    relations = "; ".join(f"{r['subject']} {r['predicate']} {r['object']}" for r in scene["relationships"][:12])
    about = f"{row['category']} · {row['level']} · rating {row['rating']} · {split} · {row['image_id']}"
    return (f"<article>{drawing(row['images']['bytes'], scene['objects'])}<p>{html.escape(row['question_only'])}</p>"
            f"<ol>{''.join(options)}</ol><small>{html.escape(about)}<br>{html.escape(relations)}</small></article>")


def drawing(picture: bytes, objects: list[dict]) -> str:
    """The picture, large ones made smaller, with a box and the id of each object over it."""
    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
        shown = image.convert("RGB")
    shown.thumbnail((640, 640))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=85)
    line, text, marks = max(width, height) / 250, max(width, height) / 28, []
    for number, thing in enumerate(objects):
        (x1, y1, x2, y2), colour = thing["bbox"], COLOURS[number % len(COLOURS)]
        marks.append(f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" fill="none" stroke="{colour}" '
                     f'stroke-width="{line:.1f}"/><text x="{x1 + line:.1f}" y="{max(y1 - line, text):.1f}" '
                     f'font-size="{text:.1f}" fill="{colour}" stroke="#fff" stroke-width="{line:.1f}" '
                     f'paint-order="stroke">{html.escape(thing["id"])}</text>')  # fmt: skip
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<svg viewBox="0 0 {width} {height}"><image width="{width}" height="{height}" '
            f'href="data:image/jpeg;base64,{data}"/>{"".join(marks)}</svg>')  # fmt: skip
