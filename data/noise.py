"""Rows for measuring speed: a picture or a clip of noise, a prompt of many words, no right answer.

    noise:588x448:270@train         a picture of 588 x 448 and 270 words
    noise:364x280x16:270@train      a clip of 16 frames of 364 x 280

364 x 280 is what the rule `train` of data/video.py makes of a 4:3 frame: such clips are not resized, and 16 frames of it are
8 steps of 130 tokens. Frames of another size are brought to about 100,000 pixels, as those of any clip are.
"""

import numpy as np
from PIL import Image

WORDS = "the red cube is left of the blue sphere .".split()
FPS = 2  # of a clip: the rule `train` then takes every frame, from 4 to 16


def noise_rows(count: int, *, width: int, height: int, words: int, frames: int | None = None) -> list[dict]:
    """`count` rows (design section 3), each with another picture of width x height, or a clip of so many `frames` of that
    size, and `words` words of prompt. Raises ValueError for a number of frames that would not all be shown."""
    if frames is not None and frames not in range(4, 17, 2):
        raise ValueError(f"noise: clips of {frames} frames are not shown whole: give an even number from 4 to 16")
    rows = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (frames or 1, height, width, 3), dtype=np.uint8)
        shown = [Image.fromarray(frame) for frame in pixels]
        media = {"images": shown} if frames is None else {"images": [], "video": shown, "fps": FPS, "span": None}
        text = " ".join(WORDS[j % len(WORDS)] for j in range(words)) + f" {i}"
        rows.append({
            "id": f"noise-{i}", "source": "noise", "category": "noise", **media, "question": text, "options": [], "gold": "none",
            "kind": "text", "size": (width, height), "scene": None, "map": None, "problem": text, "style": None, "meta": {},
        })  # fmt: skip
    return rows
