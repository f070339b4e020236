"""Numbers of an evaluation from its transcripts alone: accuracies with standard errors, groups, samples, differences.

A record is a line of transcripts.jsonl (see transcripts.py). A row asked k times has k records with one id; its value is
their mean, and rows are what n and standard errors count. Errors take rows as independent, see docs/evaluation.md.
"""

import math
from collections.abc import Iterable

from data.benchmarks import BENCHMARKS, SPATIAL, Benchmark
from providers import cost
from rewards import plain

NO_CUTS = Benchmark("", "", dict, None)  # a dataset outside the table: categories only


def scores(records: list[dict], *, mode: str = "corrected", price: tuple[float, float] | None = None) -> dict:
    """All numbers of a transcript file. Shares are of the answered records, None if there are none; what is cut how is
    the benchmark's table entry. mode="upstream" adds the published code's own overall numbers under `published`."""
    answered = [record for record in records if "skipped" not in record]
    bench = BENCHMARKS.get(records[0].get("dataset"), NO_CUTS) if records else NO_CUTS
    drawn = [record for record in answered if "scene_metrics" in record]
    all_choices = all(record["kind"] == "choice" and record["options"] for record in answered)
    skipped = {record["id"]: record["skipped"] for record in records if "skipped" in record}
    return {
        **accuracy(answered),
        "chance": mean([1 / len(record["options"]) for record in answered]) if all_choices else None,
        "unparsed": mean([record["answer"] is None for record in answered]),
        "truncated": mean([not record["finished"] for record in answered]),
        "format": mean([record["format"] for record in answered]),
        "by_category": by_group(answered, "category"),
        "by": {key: by_group(answered, key) for key in bench.by},
        "macro": macro_scores(answered, bench.macro) if bench.macro else None,
        "together": {key: together(records, key) for key in bench.together},
        "samples": samples(answered),
        "scene": scene_scores(drawn),
        "usage": usage(answered, price),
        "published": published(answered, bench.rule) if mode == "upstream" else None,
        "skipped": [{"id": key, "why": why} for key, why in skipped.items()],
    }  # fmt: skip


def mean(values: Iterable) -> float | None:
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def row_values(records: list[dict]) -> dict:
    """{id: mean correctness of its samples}, in order; a record without an id is a row of its own."""
    rows: dict = {}
    for number, record in enumerate(records):
        if "skipped" not in record:
            rows.setdefault(record.get("id", number), []).append(float(record["correct"]))
    return {key: mean(values) for key, values in rows.items()}


def accuracy(records: list[dict]) -> dict:
    """Of the answered rows: n, mean correctness p, its standard error. That is the deviation over sqrt(n), which for
    right and wrong is sqrt(p (1 - p) / n); MRA and several samples give parts of a point."""
    return with_error(list(row_values(records).values()))


def with_error(values: list[float]) -> dict:
    p, n = mean(values), len(values)
    return {"n": n, "accuracy": p, "se": math.sqrt(sum((v - p) ** 2 for v in values) / n / n) if n else None}


# ---------------------------------------------------------------- cuts


def group_of(record: dict, key: str) -> str:
    return str(record["category"] if key == "category" else record.get("meta", {}).get(key, ""))


def groups(records: list[dict], key: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(group_of(record, key), []).append(record)
    return dict(sorted(found.items()))


def by_group(records: list[dict], key: str) -> dict[str, dict]:
    return {name: accuracy(part) for name, part in groups(records, key).items()}


def macro(records: list[dict], keys: tuple[str, ...]) -> tuple[float | None, float | None]:
    """The mean over the groups of keys[0], each the mean over its groups of keys[1] and so on, every group with equal
    weight; and its standard error, rows being independent."""
    if not keys or not records:
        part = accuracy(records)
        return part["accuracy"], part["se"]
    parts = [macro(part, keys[1:]) for part in groups(records, keys[0]).values()]
    return mean(p for p, _ in parts), math.sqrt(math.fsum(e * e for _, e in parts)) / len(parts)


def macro_scores(records: list[dict], keys: tuple[str, ...]) -> dict:
    p, error = macro(records, keys)
    return {"accuracy": p, "se": error, "over": keys}


def together(records: list[dict], key: str) -> dict:
    """Of the whole groups: how many, and the share in which every row is right (MMVP's pairs, circular questions), over
    the samples. `incomplete` groups are left out: a row or a sample of them was skipped, failed or cut off by --limit."""
    k = max((len(part) for part in by_row(records)), default=0)
    values, incomplete = [], 0
    for part in groups(records, key).values():
        rows, size = by_row(part), part[0].get("meta", {}).get("rows_of", {}).get(key, 0)
        if len(rows) >= size and all("skipped" not in row[0] and len(row) == k for row in rows):
            values.append(mean(min(float(record["correct"]) for record in turn) for turn in zip(*rows)))
        else:
            incomplete += 1
    return with_error(values) | {"incomplete": incomplete}


def by_row(records: list[dict]) -> list[list[dict]]:
    """The records of each row, its samples in order."""
    rows: dict = {}
    for record in sorted(records, key=lambda record: record.get("sample", 0)):
        rows.setdefault(record["id"], []).append(record)
    return list(rows.values())


def samples(records: list[dict]) -> dict | None:
    """Of rows asked k times: mean, pass@k (any sample right) and majority (the answer that most samples give, ties
    shared), each with its error; the last two of rows with all k samples. None if no row was asked twice."""
    rows = by_row(records)
    k = max(map(len, rows), default=0)
    if k < 2:
        return None
    whole = [part for part in rows if len(part) == k]  # a served model may have failed at some samples
    passed = [max(float(record["correct"]) for record in part) for part in whole]
    return {"k": k, "mean": accuracy(records), "pass": with_error(passed),
            "majority": with_error([majority(part) for part in whole])}  # fmt: skip


def majority(part: list[dict]) -> float:
    """Correctness of the most frequent answer; the mean of those that tie; 0 if none could be read. Texts count as the
    grader compares them: "Left." and "the left" are one answer."""
    values: dict[str, list[float]] = {}
    for record in part:
        if (answer := record["answer"]) is not None:
            answer = plain(answer) if record["kind"] in ("text", "ocr") else answer
            values.setdefault(answer, []).append(float(record["correct"]))
    most = max(map(len, values.values()), default=0)
    return mean(mean(found) for found in values.values() if len(found) == most) or 0.0


def scene_scores(drawn: list[dict]) -> dict:
    """Of the records with a gold scene; relations where gold has any, else saying nothing would score 1. `ciou` is the
    mean over the boxes with a right label, of the records that have one."""
    related = [record for record in drawn if record["scene"]["relationships"]]
    boxed = [ciou for record in drawn if (ciou := record["scene_metrics"].get("ciou")) is not None]
    return {
        "n": len(drawn), "n_relation": len(related), "ciou": mean(boxed),
        "iou": mean(record["scene_metrics"]["iou"] for record in drawn),
        "object_f1": mean(record["scene_metrics"]["object_f1"] for record in drawn),
        "relation_f1": mean(record["scene_metrics"]["relation_f1"] for record in related),
    }  # fmt: skip


def usage(records: list[dict], price: tuple[float, float] | None) -> dict | None:
    """Tokens in and out and dollars, where a served model counted them; cost None if nothing says the price."""
    if not any("tokens_in" in record for record in records):
        return None
    tokens_in, tokens_out = (sum(record.get(key) or 0 for record in records) for key in ("tokens_in", "tokens"))
    dollars = cost(records[0]["model"], tokens_in, tokens_out, price)
    return {"tokens_in": tokens_in, "tokens_out": tokens_out, "cost": dollars}


def published(records: list[dict], rule: str) -> dict | None:
    """SpaceR's overall numbers as its first code computes them (spacer 5.2 to 5.4), from verdicts by its own rules."""
    if rule not in ("vsi-bench", "sti-bench", "spar-bench"):
        return None
    tasks = {name: part["accuracy"] for name, part in by_group(records, "category").items()}
    result = {}
    if rule == "vsi-bench":  # one missing level makes the direction 0, and loses the levels before it
        levels: list[float] | None = []
        for level in ("easy", "medium", "hard"):
            if f"object_rel_direction_{level}" not in tasks:
                levels = None
                break
            levels.append(tasks.pop(f"object_rel_direction_{level}"))
        tasks["object_rel_direction"] = mean(levels) if levels else 0.0
    if rule == "sti-bench":  # the mean of its part is one more task
        result["spatial"] = tasks["spatial"] = mean(tasks[name] for name in SPATIAL if name in tasks) or 0.0
    if rule == "spar-bench":  # view_change_infer is in no level
        levels = {record["category"]: group_of(record, "level") for record in records}
        for level in ("low", "middle", "high"):
            names = [name for name in tasks if levels[name] == level and name != "view_change_infer"]
            result[level] = mean(tasks[name] for name in names)
    return result | {"overall": mean(tasks.values())}


# ---------------------------------------------------------------- two files


def compare(a: list[dict], b: list[dict]) -> dict:
    """The paired difference b - a over the rows that both answered: n, both accuracies, the difference and its standard
    error, rows that only one side gets right, by category. Raises ValueError if an id stands for two questions."""
    of_a, of_b = row_values(a), row_values(b)
    asked_a, asked_b = ({record["id"]: record for record in side} for side in (a, b))
    both = [key for key in of_a if key in of_b]
    for key in both:
        if any(asked_a[key][field] != asked_b[key][field] for field in ("question", "gold")):
            raise ValueError(f"id {key!r} is another question in the second file: these are not one dataset")
    if not both:
        raise ValueError("no row was answered in both files: are they of one dataset?")
    differences = [of_b[key] - of_a[key] for key in both]
    error = with_error(differences)
    categories: dict[str, list[float]] = {}
    for key, difference in zip(both, differences):
        categories.setdefault(asked_a[key]["category"], []).append(difference)
    return {
        "n": len(both), "a": mean(of_a[key] for key in both), "b": mean(of_b[key] for key in both),
        "difference": error["accuracy"], "se": error["se"],
        "only_b_right": sum(d > 0 for d in differences), "only_a_right": sum(d < 0 for d in differences),
        "only_in_a": len(of_a) - len(both), "only_in_b": len(of_b) - len(both),
        "by_category": {name: with_error(part) for name, part in sorted(categories.items())},
    }  # fmt: skip


def comparison(result: dict) -> list[str]:
    """Lines of text for compare()."""
    lines = [f"{'category':32s} {'n':>6s} {'b - a':>9s} {'+-':>7s}"]
    for name, part in (*result["by_category"].items(), ("all", {**result, "accuracy": result["difference"]})):
        lines.append(f"{(name or '-')[:32]:32s} {part['n']:6d} {part['accuracy']:+9.3f} {part['se']:7.3f}")
    difference, error = result["difference"], result["se"]
    told = f" = {difference / error:+.1f} standard errors" if error else ""
    lines.append(f"a {result['a']:.3f}, b {result['b']:.3f}, difference {difference:+.3f} ± {error:.3f}{told}")
    lines.append(f"only b right {result['only_b_right']}, only a right {result['only_a_right']}")
    if result["only_in_a"] or result["only_in_b"]:
        lines.append(f"left out: {result['only_in_a']} rows only in a, {result['only_in_b']} only in b")
    return lines


# ---------------------------------------------------------------- text


def number(part: dict) -> str:
    return f"{part['accuracy']:9.3f} {part['se']:7.3f}" if part["accuracy"] is not None else f"{'-':>9s} {'-':>7s}"


def table(result: dict) -> list[str]:
    """Lines of text: a row a category, then all, then the other cuts and the shares."""

    def line(name: str, part: dict) -> str:
        return f"{name[:32]:32s} {part['n']:6d} {number(part)}"

    lines = [f"{'category':32s} {'n':>6s} {'accuracy':>9s} {'+-':>7s}"]
    lines += [line(category or "-", part) for category, part in result["by_category"].items()]
    beside = [] if result["chance"] is None else [f"chance {result['chance']:.3f}"]
    beside += [f"{len(result['skipped'])} rows skipped, not counted"] if result["skipped"] else []
    lines.append(line("all", result) + ("   " + ", ".join(beside) if beside else ""))
    for key, cut in result["by"].items():
        lines += [line(f"{key}: {name or '-'}", part) for name, part in cut.items()]
    if result["macro"]:
        lines.append(f"{'mean of ' + ', of '.join(result['macro']['over']):39s} {number(result['macro'])}")
    for key, part in result["together"].items():
        told = f"   {part['incomplete']} incomplete, left out" if part["incomplete"] else ""
        lines.append(line(f"all right in each {key}", part) + told)
    if several := result["samples"]:
        k = several["k"]
        lines += [line(f"mean of {k}", several["mean"]), line(f"pass@{k}", several["pass"]),
                  line(f"majority of {k}", several["majority"])]  # fmt: skip
    if result["n"]:
        lines.append(f"unparsed {result['unparsed']:.3f}, truncated {result['truncated']:.3f}, "
                     f"four-block format {result['format']:.3f}")  # fmt: skip
    scene = result["scene"]
    if scene["n"]:
        boxes = "-" if scene["ciou"] is None else f"{scene['ciou']:.3f}"
        lines.append(f"{scene['n']} gold scenes: box IoU {scene['iou']:.3f}, object F1 {scene['object_f1']:.3f}, "
                     f"CIoU of rightly named boxes {boxes}")  # fmt: skip
    if scene["n_relation"]:
        lines.append(f"{scene['n_relation']} of them with relations: relation F1 {scene['relation_f1']:.3f}")
    if spent := result["usage"]:
        dollars = "price unknown, give --price" if spent["cost"] is None else f"{spent['cost']:.2f} dollars"
        lines.append(f"{spent['tokens_in']} tokens in, {spent['tokens_out']} out, {dollars}")
    if result["published"]:
        told = ", ".join(f"{name} {value:.3f}" for name, value in result["published"].items() if value is not None)
        lines.append(f"as the published code averages: {told}")
    return lines
