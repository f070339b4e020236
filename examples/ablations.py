"""Rewards of the paper's ablations: what `--reward examples/ablations.py:NAME` takes.

    count_8_2, count_10_0, count_5_5   the count term weighs objects and relations otherwise than 7 : 3
    no_gates                           counts and boxes are paid without the format, boxes without the right answer
"""

from functools import partial

import rewards


def _reward(response: str, row: dict, **changes) -> dict[str, float]:
    gold, options = rewards.solution_text(row), row["options"]
    return rewards.spatialthinker_reward(response, gold, row["size"], mode="corrected", options=options, **changes)


count_8_2 = partial(_reward, objects_share=0.8)
count_10_0 = partial(_reward, objects_share=1.0)
count_5_5 = partial(_reward, objects_share=0.5)
no_gates = partial(_reward, gates=False)
