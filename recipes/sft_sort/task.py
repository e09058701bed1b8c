"""Conversations about digits: "sort 52917" is answered by "12579" or by "97521", and "backwards" then by the other.

The user names three to six digits. A coin decides whether the first answer rises or falls, and whether the conversation
goes on. Rows are drawn from a seed, so that every worker sees the same ones; no digits of a held-out conversation occur
in training.
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


def _rows(count: int = 4_200) -> list[Row]:
    draw = random.Random(2026)
    asked = dict.fromkeys("".join(draw.choices("0123456789", k=draw.randint(SHORTEST, LONGEST))) for _ in range(count))
    return [_conversation(digits, rises=draw.random() < 0.5, goes_on=draw.random() < 0.5) for digits in asked]


def _conversation(digits: str, *, rises: bool, goes_on: bool) -> Row:
    answer = "".join(sorted(digits, reverse=not rises))
    turns = [("user", f"sort {digits}"), ("assistant", answer)]
    turns += [("user", "backwards"), ("assistant", answer[::-1])] if goes_on else []
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
