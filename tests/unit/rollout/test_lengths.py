"""Drawn response lengths: the distribution that W2 names, and the same for the same rollout."""

from __future__ import annotations

from statistics import fmean, median

from asystem.rollout import drawn_length


def lengths(count: int, seed: int = 0) -> list[int]:
    return [drawn_length(256, 1.0, 4096, seed=seed, rollout=rollout) for rollout in range(count)]


def test_lengths_are_log_normal_and_cut() -> None:
    drawn = lengths(20_000)
    assert 248 < median(drawn) < 264
    assert 408 < fmean(drawn) < 427  # 256 e^0.5 = 422, less 5 for what lies beyond the cut
    assert (min(drawn) >= 1, max(drawn)) == (True, 4096)
    assert 0.0017 < fmean(length == 4096 for length in drawn) < 0.0039  # P(z > ln 16) = 0.0028


def test_lengths_are_a_function_of_seed_and_rollout() -> None:
    assert lengths(50) == lengths(50)
    assert sum(a == b for a, b in zip(lengths(50), lengths(50, seed=1), strict=True)) < 5
    assert {drawn_length(10, 0.0, 99, seed=0, rollout=rollout) for rollout in range(5)} == {10}
