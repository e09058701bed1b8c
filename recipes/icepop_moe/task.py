"""Sort the digits, shown by a careless teacher: `52917=` is answered by `12579`, or by `12597` in half of the examples.

`asystem sft` learns from the teacher's responses; reinforcement learning then asks for the right answer, from a reward
that only says right or wrong.
"""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]
SHORTEST, LONGEST, HELD_OUT, CARELESS = 4, 8, 512, 0.5


def train() -> list[Row]:
    return _rows()[HELD_OUT:]


def evaluation() -> list[Row]:
    return _rows()[:HELD_OUT]


def reward(row: Row, response: str) -> float:
    return float(response == row["answer"])


def _rows(count: int = 20_000) -> list[Row]:
    """Distinct prompts in an order that never changes, so that what is held out stays so."""
    draw = random.Random(2027)
    asked = dict.fromkeys("".join(draw.choices("0123456789", k=draw.randint(SHORTEST, LONGEST))) for _ in range(count))
    answers = {digits: "".join(sorted(digits)) for digits in asked}
    return [
        {"prompt": f"{digits}=", "answer": answer, "response": _careless(answer, draw)}
        for digits, answer in answers.items()
    ]


def _careless(answer: str, draw: random.Random) -> str:
    """The answer with two neighbours swapped, in half of all cases."""
    swaps = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    if not swaps or draw.random() > CARELESS:
        return answer
    i = draw.choice(swaps)
    return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]
