"""Sort the digits, few or many: `52917=` is answered by `12579`. Lengths have a long tail, and so have the responses.

As in the quickstart, a careless teacher has two neighbours swapped in six demonstrations out of ten. Most prompts have
about five digits, a few have three times as many: a window that waits for all waits for those.
"""

from __future__ import annotations

import math
import random
from typing import Any

Row = dict[str, Any]
MEDIAN, SIGMA, SHORTEST, LONGEST = 5, 0.5, 2, 16  # digits: log-normal
HELD_OUT = 512
CARELESS = 0.6


def train() -> list[Row]:
    return _rows()[HELD_OUT:]


def evaluation() -> list[Row]:
    return _rows()[:HELD_OUT]


def demonstrations() -> list[Row]:
    draw = random.Random(7)
    return [{"prompt": row["prompt"], "response": _careless(row["answer"], draw)} for row in train()]


def reward(row: Row, response: str) -> float:
    return float(response == row["answer"])


def _rows(count: int = 16_000) -> list[Row]:
    """Distinct prompts in an order that never changes, so that what is held out stays so."""
    draw = random.Random(2025)
    prompts = dict.fromkeys("".join(draw.choices("0123456789", k=_length(draw))) for _ in range(count))
    return [{"prompt": f"{digits}=", "answer": "".join(sorted(digits))} for digits in prompts]


def _length(draw: random.Random) -> int:
    return min(LONGEST, max(SHORTEST, round(draw.lognormvariate(math.log(MEDIAN), SIGMA))))


def _careless(answer: str, draw: random.Random) -> str:
    swaps = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    if not swaps or draw.random() > CARELESS:
        return answer
    i = draw.choice(swaps)
    return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]
