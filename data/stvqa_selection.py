"""Which questions go into the data set: shares of the categories, the best rated first, train and val by picture."""

import hashlib
from collections import Counter, defaultdict

from data.stvqa_items import CATEGORIES

OTHERS = CATEGORIES[1:]


def allocations(total_rows: int, target: int | None, *, relation_percent: float = 50, val_split: float = 0.1) -> dict:
    """The published quotas: {category: {"train", "val"}} (spec 3.3). Truncated sums; a shortage is not made good."""
    total = min(target, total_rows) if target else total_rows
    relation = int(total * relation_percent / 100)
    val = max(1, int(relation * val_split)) if relation else 0
    quotas = {"relation": {"train": relation - val, "val": val}}
    share = max(1, int((total - relation) / len(OTHERS)))
    val = max(1, int(share * val_split)) if share > 1 else 0
    return quotas | {name: {"train": max(1, share - val), "val": val} for name in OTHERS}


def quotas(available: Counter, total: int, relation_percent: float) -> Counter:
    """How many of each category: relation_percent of relations, the others equal. What a category lacks goes to the other
    eight in equal parts; relations never fill up, nor are filled up for, so that their share is no more than asked."""
    relation = round(total * relation_percent / 100)
    taken = Counter({"relation": min(relation, available["relation"])})
    left, open_ones = total - relation, [name for name in OTHERS if available[name]]
    while left > 0 and open_ones:
        for place, name in enumerate(sorted(open_ones, key=lambda name: (available[name] - taken[name], name))):
            part = min(-(-left // (len(open_ones) - place)), available[name] - taken[name])
            taken[name] += part
            left -= part
        open_ones = [name for name in open_ones if available[name] > taken[name]]
    others = taken.total() - taken["relation"]
    if relation_percent < 100 and others:
        most = int(others * relation_percent / (100 - relation_percent))
        taken["relation"] = min(taken["relation"], most)
    return +taken


def choose(items: list[dict], *, target: int | None, relation_percent: float, val_split: float, seed: int) -> dict[str, str]:
    """{item id: "train" or "val"} of the chosen. items: {"id", "graph", "category", "rating"}, in any order.

    A picture is wholly in one split, as two questions of it share its scene. Within a category the best rated are taken,
    equals in the order of a hash: the same items and seed give the same choice."""
    pictures = sorted({item["graph"] for item in items}, key=lambda graph: order_of(seed, graph))
    n_val = min(max(1, round(len(pictures) * val_split)), len(pictures) - 1) if val_split else 0
    val = set(pictures[:n_val])
    total = min(target or len(items), len(items))
    chosen = {}
    for split, part in (("val", val_split), ("train", 1 - val_split)):
        pools = defaultdict(list)
        for item in items:
            if (item["graph"] in val) == (split == "val"):
                pools[item["category"]].append(item)
        available = Counter({name: len(pool) for name, pool in pools.items()})
        for name, n in quotas(available, round(total * part), relation_percent).items():
            pools[name].sort(key=lambda item: (-item["rating"], order_of(seed, item["id"])))
            chosen |= {item["id"]: split for item in pools[name][:n]}
    return chosen


def order_of(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()
