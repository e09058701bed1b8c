"""Stats that merge exactly."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asystem.stats import LogHistogram, Stats, merge


def _stats(logs: list[float]) -> Stats:
    stats = Stats()
    stats.add_sum("sum", float(len(logs)))
    stats.add_mean("mean", math.fsum(logs), len(logs))
    stats.add_log_samples("ratio", np.array(logs))
    for value in logs:
        stats.add_max("max", value)
    return stats


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40), st.integers(0, 40))
def test_parts_merge_to_the_whole(logs: list[float], cut: int) -> None:
    merged = (_stats(logs[:cut]) + _stats(logs[cut:])).to_dict()
    assert merged == pytest.approx(_stats(logs).to_dict(), rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.99]))
def test_quantiles_are_near_the_true_ones(logs: list[float], q: float) -> None:
    histogram = LogHistogram()
    histogram.add(np.array(logs))
    exact = sorted(logs)[max(1, math.ceil(q * len(logs))) - 1]
    assert histogram.quantile(q) == pytest.approx(exact, rel=0.02, abs=1e-4)


def test_values_beyond_the_reach_are_counted_at_their_side() -> None:
    histogram = LogHistogram()
    histogram.add(np.array([-1e6, 0.0, 1e6]))
    assert histogram.quantile(0.5) == 0.0
    assert histogram.quantile(0.01) < -90 and histogram.quantile(0.99) > 90


def test_a_mean_of_nothing_is_nan_and_adding_keeps_its_operands() -> None:
    empty, some = Stats(), Stats()
    empty.add_mean("mean", 0.0, 0)
    some.add_mean("mean", 4.0, 2)
    assert math.isnan(empty.to_dict()["mean"])
    assert merge([empty, some, some]).to_dict() == {"mean": 2.0}
    assert some.to_dict() == {"mean": 2.0} and some.means["mean"] == (4.0, 2)


def test_it_pickles() -> None:
    stats = _stats([0.5, -0.25])
    assert pickle.loads(pickle.dumps(stats)).to_dict() == stats.to_dict()
