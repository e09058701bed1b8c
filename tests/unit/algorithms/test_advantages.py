"""Advantages against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from asystem.algorithms import advantages
from asystem.algorithms.advantages import ADVANTAGES
from asystem.config import AlgorithmConfig


def _advantages(
    rewards: list[float],
    valid: list[bool] | None = None,
    *,
    name: str = "grpo",
    normalize_std: bool = True,
    groups: list[int] | None = None,
    lengths: list[int] | None = None,
) -> list[float]:
    count = len(rewards)
    values: list[float] = advantages(
        ADVANTAGES[name],
        torch.tensor(rewards),
        torch.tensor(groups or [0] * count),
        torch.tensor(lengths or [1] * count),
        torch.tensor(valid if valid is not None else [True] * count),
        AlgorithmConfig(normalize_std=normalize_std),
    ).tolist()
    return values


def test_one_right_of_four() -> None:
    # mean 1/4; variance (9/16 + 3/16) / 3 = 1/4, so std 1/2
    assert _advantages([1.0, 0.0, 0.0, 0.0], normalize_std=False) == [0.75, -0.25, -0.25, -0.25]
    assert _advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_groups_do_not_see_each_other() -> None:
    found = _advantages([1.0, 5.0, 0.0, 9.0], groups=[7, 3, 7, 3], normalize_std=False)
    assert found == [0.5, -2.0, -0.5, 2.0]


def test_invalid_members_get_zero_and_do_not_count() -> None:
    # mean of 3 and 1 is 2, std sqrt(2); the failed reward of 100 is not seen
    expected = [1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)]
    assert _advantages([3.0, 100.0, 1.0], [True, False, True]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_invalid(bad: float) -> None:
    assert _advantages([3.0, bad, 1.0], normalize_std=False) == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("name", sorted(ADVANTAGES.keys() - {"gae"}))  # whose baseline comes later, from values
def test_no_spread_gives_exact_zeros(name: str) -> None:
    # 0.1 has no exact mean in float32: centring alone would leave rounding, which a division by std would blow up
    if name != "reinforce":
        assert _advantages([0.1] * 7, name=name) == [0.0] * 7
    assert _advantages([1.0, 0.0, 0.0], [True, False, False], name=name) == [0.0] * 3
    assert _advantages([1.0, 0.0], [False, False], name=name) == [0.0] * 2


def test_rloo_leaves_the_sample_itself_out() -> None:
    # 1 - (0 + 0 + 2) / 3, 0 - (1 + 0 + 2) / 3, ...
    assert _advantages([1.0, 0.0, 0.0, 2.0], name="rloo") == pytest.approx([1 / 3, -1.0, -1.0, 5 / 3], abs=1e-6)


def test_reinforce_takes_the_mean_of_the_batch_off() -> None:
    assert _advantages([3.0, 1.0, 0.0, 0.0], name="reinforce", groups=[0, 0, 1, 1]) == [2.0, 0.0, -1.0, -1.0]


def test_reinforce_pp_normalises_over_tokens() -> None:
    # Tokens: 3 of reward 1 and 1 of reward 0. Mean 3/4, variance (3/16 + 9/16) / 3 = 1/4.
    found = _advantages([1.0, 0.0], name="reinforce++", groups=[0, 1], lengths=[3, 1])
    assert found == pytest.approx([0.5, -1.5], abs=1e-5)


def test_reinforce_pp_baseline_takes_the_group_off_first() -> None:
    # Centred: 1, -1, 0, 0; mean 0, variance 2/3 over four tokens.
    found = _advantages([3.0, 1.0, 5.0, 5.0], name="reinforce++baseline", groups=[0, 0, 1, 1])
    assert found == pytest.approx([math.sqrt(1.5), -math.sqrt(1.5), 0.0, 0.0], abs=1e-5)
