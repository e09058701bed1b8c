"""Verifiers of plain text."""

from __future__ import annotations

from typing import Any


def exact_match(row: dict[str, Any], response: str) -> float:
    """1 if the response equals the row's "answer", but for surrounding white space.

    Raises:
        KeyError: the row has no "answer".
    """
    return float(response.strip() == str(row["answer"]).strip())
