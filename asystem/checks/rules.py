"""What a rule is, and how figures are refused."""

from __future__ import annotations

Rule = tuple[bool, str]
"""(is it broken?, what is wrong with which numbers, and the remedy)."""


def at_least(name: str, value: float, least: float) -> Rule:
    return not value >= least, f"{name}={plain(value)} is below {plain(least)}"


def above(name: str, value: float, bound: float) -> Rule:
    return not value > bound, f"{name}={plain(value)} must be above {plain(bound)}"


def plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
