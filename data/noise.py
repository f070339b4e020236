"""Rows for measuring speed: one picture of noise, a prompt of many words, no right answer. `noise:588x448:600@train`."""

import numpy as np
from PIL import Image

WORDS = "the red cube is left of the blue sphere .".split()


def noise_rows(count: int, *, width: int, height: int, words: int) -> list[dict]:
    """`count` rows (design section 3), each with another picture of width x height and `words` words of prompt."""
    rows = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        text = " ".join(WORDS[j % len(WORDS)] for j in range(words)) + f" {i}"
        rows.append({
            "id": f"noise-{i}", "source": "noise", "category": "noise", "images": [Image.fromarray(pixels)], "question": text,
            "options": [], "gold": "none", "kind": "text", "size": (width, height), "scene": None, "map": None, "problem": text,
            "style": None, "meta": {},
        })  # fmt: skip
    return rows
