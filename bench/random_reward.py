"""A reward for measuring speed with random weights, whose text earns nothing: a number from the text's hash."""

import hashlib


def reward(response: str, row: dict) -> dict[str, float]:
    return {"total": hashlib.sha256(response.encode()).digest()[0] / 255}
