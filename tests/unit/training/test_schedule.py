"""Learning rates against hand-worked numbers."""

from __future__ import annotations

import pytest

from asystem.config import Schedule
from asystem.training.schedule import LearningRate


def _rates(schedule: Schedule, steps: list[int]) -> list[float]:
    lr = LearningRate(peak=8.0, schedule=schedule, warmup_steps=2, total_steps=10)
    return [lr.at(step) for step in steps]


def test_warm_up_rises_to_the_peak_in_a_line() -> None:
    for schedule in Schedule:
        assert _rates(schedule, [0, 1, 2]) == [4.0, 8.0, 8.0]


def test_after_the_warm_up() -> None:
    assert _rates(Schedule.constant, [5, 10, 99]) == [8.0, 8.0, 8.0]
    assert _rates(Schedule.linear, [4, 6, 10, 99]) == [6.0, 4.0, 0.0, 0.0]
    # half a cosine: cos(pi / 4) at a quarter, 0 in the middle
    assert _rates(Schedule.cosine, [4, 6, 10, 99]) == pytest.approx([4 * (1 + 0.5**0.5), 4.0, 0.0, 0.0])


def test_a_schedule_that_is_all_warm_up() -> None:
    assert LearningRate(1.0, Schedule.linear, warmup_steps=4, total_steps=4).at(3) == 1.0
