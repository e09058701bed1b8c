"""Cutting a call's first argument over ranks, and putting the ranks' answers together again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from asystem.errors import ConfigError
from asystem.spmd.remote import Collect


def cut(value: Any, parts: int, *, even: bool) -> list[Any]:
    """Cuts ``value`` into one share a rank, in order.

    Lists, tuples, arrays and tensors are sliced along their first dimension; any other object brings ``split(parts)``,
    which returns that many shares and may balance or pad them as it likes.

    Args:
        even: refuse a length that does not divide, because ranks that meet in collectives must do equal work;
            otherwise the first ranks take one item more, and the last ones may get none.

    Raises:
        ConfigError: the length does not divide and must.
        TypeError: the value can be neither sliced nor split.
    """
    if isinstance(value, (list, tuple)) or hasattr(value, "shape"):
        return _slices(value, parts, even)
    if not hasattr(value, "split") or isinstance(value, (str, bytes)):
        raise TypeError(f"cannot split a {type(value).__name__} over {parts} ranks: give it a method split(parts)")
    shares = list(value.split(parts))
    if len(shares) != parts:
        raise TypeError(f"{type(value).__name__}.split({parts}) returned {len(shares)} shares")
    return shares


def _slices(value: Any, parts: int, even: bool) -> list[Any]:
    share, rest = divmod(len(value), parts)
    if rest and even:
        raise ConfigError(f"cannot split {len(value)} items over {parts} ranks: make it a multiple of {parts}")
    ends = [share * (part + 1) + min(part + 1, rest) for part in range(parts)]
    return [value[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def gather(answers: Sequence[Any], collect: Collect) -> Any:
    """Puts the answers of the ranks, in their order, together as `Collect` says."""
    return _GATHER[collect](answers)


def _concat(answers: Sequence[Any]) -> Any:
    first = answers[0]
    if isinstance(first, (list, tuple)):
        return type(first)(item for answer in answers for item in answer)
    if isinstance(first, np.ndarray):
        return np.concatenate(answers)
    if hasattr(first, "shape"):
        import torch

        return torch.cat(list(answers))
    raise TypeError(f"cannot join answers of type {type(first).__name__}: lists, tuples, arrays and tensors can be")


def _sum(answers: Sequence[Any]) -> Any:
    return functools.reduce(_add_dicts if isinstance(answers[0], dict) else operator.add, answers)


def _add_dicts(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    return left | {key: left[key] + value if key in left else value for key, value in right.items()}


_GATHER: dict[Collect, Callable[[Sequence[Any]], Any]] = {
    Collect.ALL: list,
    Collect.FIRST: lambda answers: answers[0],
    Collect.CONCAT: _concat,
    Collect.GATHER: _concat,
    Collect.SUM: _sum,
}
