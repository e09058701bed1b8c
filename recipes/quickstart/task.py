"""Sort the digits: `52917=` is answered by `12579`. Right or wrong, nothing between."""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]
SHORTEST, LONGEST = 4, 10


def train() -> list[Row]:
    return _all()[512:]


def evaluation() -> list[Row]:
    return _all()[:512]


def demonstrations() -> list[Row]:
    """Part of the task: a fifth of the prompts, answered."""
    return [{"prompt": row["prompt"], "response": row["answer"]} for row in train()[::5]]


def reward(row: Row, response: str) -> float:
    return float(response == row["answer"])


def _all(count: int = 20_000) -> list[Row]:
    """Distinct prompts in an order that never changes, so that the held-out ones stay held out."""
    draw = random.Random(2025)
    prompts = dict.fromkeys(
        "".join(draw.choice("0123456789") for _ in range(draw.randint(SHORTEST, LONGEST))) for _ in range(count)
    )
    return [{"prompt": f"{digits}=", "answer": "".join(sorted(digits))} for digits in prompts]
