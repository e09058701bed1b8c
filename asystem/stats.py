"""Metrics that merge exactly: over micro-batches, over ranks, over steps.

A mean is kept as total and count, a quantile as a histogram, so that adding two `Stats` gives what one pass over all
tokens would have given, in whatever order parts arrive. Plain numbers and numpy: it pickles, once
settled, and holds no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
V = TypeVar("V")

QUANTILES = {"p01": 0.01, "p50": 0.50, "p99": 0.99}

# Bins of a logarithm x, uniform in asinh(x / _UNIT): about _UNIT wide near 0, 2 % of x wide far from it, |x| <= _REACH.
_UNIT, _REACH, _HALF = 1e-4, 100.0, 700
_STEP = math.asinh(_REACH / _UNIT) / _HALF


@dataclass
class LogHistogram:
    """Counts of a logarithm in fixed bins; the middle bin holds exactly zero's neighbourhood."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * _HALF + 1, np.int64))
    low: float = math.inf
    high: float = -math.inf

    def add(self, logs: FloatArray) -> None:
        """Counts finite values; those beyond the reach stand in the last bin of their side."""
        if logs.size == 0:
            return
        bins = np.rint(np.arcsinh(logs.astype(np.float64) / _UNIT) / _STEP).astype(np.int64)
        self.counts += np.bincount(np.clip(bins, -_HALF, _HALF) + _HALF, minlength=2 * _HALF + 1)
        self.low, self.high = min(self.low, float(logs.min())), max(self.high, float(logs.max()))

    def quantile(self, q: float) -> float:
        """The centre of the bin in which the q-quantile lies, within the values seen; NaN when there are none."""
        total = int(self.counts.sum())
        if total == 0:
            return math.nan
        index = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(q * total))))
        centre = _UNIT * math.sinh((index - _HALF) * _STEP)
        return min(max(centre, self.low), self.high)

    def __add__(self, other: LogHistogram) -> LogHistogram:
        return LogHistogram(self.counts + other.counts, min(self.low, other.low), max(self.high, other.high))


@dataclass
class Stats:
    """Named sums, means, maxima and quantiles.

    >>> a, b = Stats(), Stats()
    >>> a.add_mean("train/entropy", total=3.0, count=1)
    >>> b.add_mean("train/entropy", total=1.0, count=3)
    >>> (a + b).to_dict()
    {'train/entropy': 1.0}
    """

    sums: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)  # total, count
    maxima: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, LogHistogram] = field(default_factory=dict)
    pending: list[Callable[[], Stats]] = field(default_factory=list)  # parts whose numbers are still on a device

    @classmethod
    def later(cls, part: Callable[[], Stats]) -> Stats:
        """What ``part`` returns when it is asked: so that nobody waits for a device before all its work is queued."""
        return cls(pending=[part])

    def settled(self) -> Stats:
        """The same with nothing pending; waits for devices."""
        plain = replace(self, pending=[])
        return merge([plain, *(part().settled() for part in self.pending)]) if self.pending else self

    def add_sum(self, name: str, value: float) -> None:
        """Adds to what is reported as ``name``."""
        self.sums[name] = self.sums.get(name, 0.0) + value

    def add_mean(self, name: str, total: float, count: float) -> None:
        """Reports total / count over all that was added; NaN while the count is 0."""
        before = self.means.get(name, (0.0, 0.0))
        self.means[name] = (before[0] + total, before[1] + count)

    def add_max(self, name: str, value: float) -> None:
        """Reports the largest value added."""
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def add_log_samples(self, name: str, logs: FloatArray) -> None:
        """Reports quantiles of exp(logs) as ``name_p01``, ``name_p50`` and ``name_p99``, to 2 % of the logarithm."""
        self.histograms.setdefault(name, LogHistogram()).add(logs)

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            _merge(self.sums, other.sums, lambda a, b: a + b),
            _merge(self.means, other.means, lambda a, b: (a[0] + b[0], a[1] + b[1])),
            _merge(self.maxima, other.maxima, max),
            _merge(self.histograms, other.histograms, lambda a, b: a + b),
            self.pending + other.pending,
        )

    def to_dict(self) -> dict[str, float]:
        """One number by name."""
        if self.pending:
            return self.settled().to_dict()
        result = dict(self.sums)
        result |= {name: total / count if count else math.nan for name, (total, count) in self.means.items()}
        result |= self.maxima
        for name, histogram in self.histograms.items():
            result |= {f"{name}_{label}": math.exp(histogram.quantile(q)) for label, q in QUANTILES.items()}
        return result


def merge(parts: Iterable[Stats]) -> Stats:
    """All parts added up; no parts give empty stats."""
    total = Stats()
    for part in parts:
        total = total + part
    return total


def _merge(a: Mapping[str, V], b: Mapping[str, V], join: Callable[[V, V], V]) -> dict[str, V]:
    return {**a, **{name: join(a[name], value) if name in a else value for name, value in b.items()}}
