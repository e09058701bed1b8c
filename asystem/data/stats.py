"""Metrics that add up: over micro-batches, over ranks, over steps, in any order, to the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_BINS = 4001  # of log-ratios in [-LIMIT, LIMIT], evenly spaced: quantiles are exact to 0.5 %
_LIMIT = 20.0


@dataclass
class Stats:
    """Sums, means as (total, count), maxima, and quantiles of log-ratios as histograms. Merge with ``+``."""

    sums: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    log_ratios: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def add_sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def add_mean(self, name: str, total: float, count: float) -> None:
        """The mean is total / count over everything that is added; nothing is reported while count is 0."""
        old = self.means.get(name, (0.0, 0.0))
        self.means[name] = (old[0] + total, old[1] + count)

    def add_max(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def add_log_ratios(self, name: str, values: Tensor) -> None:
        """values: log p/q of any shape, finite; reported as <name>_p01, _p50 and _p99 of p/q."""
        bins = ((values.float().clamp(-_LIMIT, _LIMIT) + _LIMIT) * ((_BINS - 1) / (2 * _LIMIT))).round().long()
        counts = torch.bincount(bins.flatten(), minlength=_BINS).cpu().numpy()
        self.log_ratios[name] = self.log_ratios.get(name, np.zeros(_BINS, dtype=np.int64)) + counts

    def __add__(self, other: Stats) -> Stats:
        merged = Stats(dict(self.sums), dict(self.means), dict(self.maxima), dict(self.log_ratios))
        for name, value in other.sums.items():
            merged.add_sum(name, value)
        for name, (total, count) in other.means.items():
            merged.add_mean(name, total, count)
        for name, value in other.maxima.items():
            merged.add_max(name, value)
        for name, counts in other.log_ratios.items():
            old = merged.log_ratios.get(name)
            merged.log_ratios[name] = counts if old is None else old + counts
        return merged

    def to_dict(self) -> dict[str, float]:
        """The metrics by name."""
        result = dict(self.sums) | dict(self.maxima)
        result |= {name: total / count for name, (total, count) in self.means.items() if count}
        for name, counts in self.log_ratios.items():
            if counts.sum():
                shares = np.cumsum(counts) / counts.sum()
                for label, share in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
                    position = int(np.searchsorted(shares, share))
                    result[f"{name}_{label}"] = math.exp(position * 2 * _LIMIT / (_BINS - 1) - _LIMIT)
        return result
