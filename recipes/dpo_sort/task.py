"""Pairs of answers to "sort 52917": the one that rises, "12579", is chosen, the one that falls, "97521", is rejected.

The model of sft_sort gives either, as its examples did. ``reward`` lets `asystem train` measure (or train) the same
model by what it says: the share of sampled answers that are sorted and rise.
"""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]
SHORTEST, LONGEST, HELD_OUT = 3, 5, 256


def train() -> list[Row]:
    return _rows()[HELD_OUT:]


def evaluation() -> list[Row]:
    return _rows()[:HELD_OUT]


def reward(row: Row, response: str) -> float:
    return float(response == row["chosen"])


def _rows(count: int = 1_500) -> list[Row]:
    draw = random.Random(2027)
    asked = dict.fromkeys("".join(draw.choices("0123456789", k=draw.randint(SHORTEST, LONGEST))) for _ in range(count))
    return [_pair(digits) for digits in asked if len(set(digits)) > 1]


def _pair(digits: str) -> Row:
    rising = "".join(sorted(digits))
    return {"prompt": [{"role": "user", "content": f"sort {digits}"}], "chosen": rising, "rejected": rising[::-1]}
