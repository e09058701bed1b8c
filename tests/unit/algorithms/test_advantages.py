"""Group advantages against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from asystem.algorithms import group_advantages


def _advantages(rewards: list[float], valid: list[bool] | None = None, *, normalize_std: bool) -> list[float]:
    flags = torch.tensor(valid if valid is not None else [True] * len(rewards))
    values: list[float] = group_advantages(torch.tensor(rewards), flags, normalize_std=normalize_std).tolist()
    return values


def test_one_right_of_four() -> None:
    # mean 1/4; variance (9/16 + 3/16) / 3 = 1/4, so std 1/2
    assert _advantages([1.0, 0.0, 0.0, 0.0], normalize_std=False) == [0.75, -0.25, -0.25, -0.25]
    assert _advantages([1.0, 0.0, 0.0, 0.0], normalize_std=True) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_invalid_members_get_zero_and_do_not_count() -> None:
    # mean of 3 and 1 is 2, std sqrt(2); the failed reward of 100 is not seen
    expected = [1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)]
    assert _advantages([3.0, 100.0, 1.0], [True, False, True], normalize_std=True) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_invalid(bad: float) -> None:
    assert _advantages([3.0, bad, 1.0], normalize_std=False) == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("normalize_std", [True, False])
def test_no_spread_gives_exact_zeros(normalize_std: bool) -> None:
    # 0.1 has no exact mean in float32: centring alone would leave rounding, which the division by std would blow up
    assert _advantages([0.1] * 7, normalize_std=normalize_std) == [0.0] * 7
    assert _advantages([1.0, 0.0, 0.0], [True, False, False], normalize_std=normalize_std) == [0.0] * 3
    assert _advantages([1.0, 0.0], [False, False], normalize_std=normalize_std) == [0.0] * 2
