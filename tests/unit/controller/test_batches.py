"""From a window to a batch: advantages, failed rewards, and what is measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from asystem.config import Config
from asystem.controller.batches import accuracy, build_batch, kept_groups, mean_rewards, rollout_metrics
from asystem.errors import RewardError
from asystem.rollout import Group, Window
from asystem.types import Finish, FinishedRollout, Ref, Score


def group(number: int, lengths: list[int], first_version: int = 3) -> Group:
    rollouts = [number * 10 + i for i in range(len(lengths))]
    finished = [
        FinishedRollout(rollout, number, number, 5, length, first_version, 4, Finish.STOP, Ref(None), row)
        for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True))
    ]
    return Group(number, number, rollouts, replica=0, finished=list(reversed(finished)))


def scores(*rewards: float | str) -> dict[int, Score]:
    return {
        i: Score(i, 0.0, reward) if isinstance(reward, str) else Score(i, reward) for i, reward in enumerate(rewards)
    }


def test_rows_carry_group_advantages_in_the_order_of_rollouts() -> None:
    window = Window(0, [group(0, [4, 6])], [], carried=7)
    batch = build_batch(Config(), window, scores(1.0, 0.0), version=4)
    assert [row.rollout for row in batch.rows] == [0, 1]
    assert [row.advantage for row in batch.rows] == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5)
    assert (batch.num_tokens, batch.num_rollouts, batch.version) == (10, 2, 4)
    metrics = rollout_metrics(window, batch)
    assert metrics["reward/mean"] == 0.5
    assert metrics["rollout/staleness_max"] == 1
    assert metrics["rollout/length_mean"] == 5
    assert metrics["rollout/carried"] == 7


def test_a_failed_reward_is_masked_and_counts_nowhere() -> None:
    config = Config()
    config.reward.max_error_share = 0.5
    window = Window(0, [group(0, [4, 6, 8])], [], carried=0)
    batch = build_batch(config, window, scores(1.0, "ValueError: no", 0.0), version=4)
    assert batch.rows[1].advantage == 0.0
    assert batch.rows[0].advantage == pytest.approx(math.sqrt(0.5), abs=1e-5)
    assert (batch.num_tokens, batch.num_rollouts) == (12, 2)
    metrics = rollout_metrics(window, batch)
    assert (metrics["reward/errors"], metrics["reward/mean"]) == (1, 0.5)


def test_too_many_failed_rewards_stop_the_run_with_the_first_reason() -> None:
    window = Window(0, [group(0, [4, 6])], [], carried=0)
    with pytest.raises(RewardError, match=r"1 of 2 rewards failed at step 5.*0\.2.*ValueError: no"):
        build_batch(Config(), window, scores(1.0, "ValueError: no"), version=4)


def test_scores_of_trained_and_purged_rollouts_are_forgotten() -> None:
    known = scores(1.0, 0.0) | {10: Score(10, 1.0), 20: Score(20, 1.0)}
    purged = group(1, [4])
    build_batch(Config(), Window(0, [group(0, [4, 6])], [purged], carried=0), known, version=4)
    assert list(known) == [20]


def test_accuracy_counts_failed_rewards_as_wrong() -> None:
    assert accuracy([Score(0, 1.0), Score(1, 1.0, "broken"), Score(2, 0.0), Score(3, 1.0)]) == 0.5


def test_groups_of_equal_rewards_may_be_left_out() -> None:
    config = Config()
    config.algorithm.drop_equal_groups = True
    window = Window(0, [group(0, [4, 6]), group(1, [5, 5])], [], carried=0)
    known = {0: Score(0, 1.0), 1: Score(1, 0.0), 10: Score(10, 1.0), 11: Score(11, 1.0)}
    batch = build_batch(config, window, dict(known), version=4)
    assert [row.rollout for row in batch.rows] == [0, 1]
    assert (batch.num_tokens, batch.num_rollouts) == (10, 2)
    metrics = rollout_metrics(window, batch)
    assert (metrics["reward/mean"], metrics["reward/groups_with_signal"], metrics["rollout/groups"]) == (0.75, 0.5, 2)
    known[0] = Score(0, 0.0)  # no group tells anything: a step without gradient, rather than none
    assert len(build_batch(config, window, known, version=4).rows) == 4


def test_groups_with_signal_and_what_prompts_scored() -> None:
    config = Config()
    config.algorithm.drop_equal_groups, config.reward.max_error_share = True, 1.0
    window = Window(0, [group(0, [4, 6]), group(1, [5, 5]), group(2, [3, 3])], [], carried=0)
    known = {0: Score(0, 1.0), 1: Score(1, 0.0), 10: Score(10, 1.0), 11: Score(11, 1.0)}
    known |= {20: Score(20, 1.0), 21: Score(21, 0.0, "broken")}
    assert kept_groups(config, window.groups, known) == 1
    assert kept_groups(config, window.groups[1:], known) == 0
    batch = build_batch(config, window, known, version=4)
    assert {row.group for row in batch.rows} == {0}
    assert sorted(mean_rewards(batch)) == [(0, 0.5), (1, 1.0), (2, 1.0)]


def test_a_recipe_may_filter_groups_by_a_function_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def hard(rewards, lengths): return sum(rewards) < 2 and max(lengths) > 4")
    config = Config(recipe_dir=str(tmp_path))
    config.algorithm.group_filter = "task.py:hard"
    window = Window(0, [group(0, [4, 6]), group(1, [5, 5]), group(2, [3, 3])], [], carried=0)
    known = {0: Score(0, 0.0), 1: Score(1, 0.0), 10: Score(10, 1.0), 11: Score(11, 1.0), 20: Score(20, 1.0)}
    known[21] = Score(21, 0.0)
    assert kept_groups(config, window.groups, known) == 1
    batch = build_batch(config, window, known, version=4)
    assert ({row.group for row in batch.rows}, {row.group for row in batch.dropped}) == ({0}, {1, 2})


def test_long_responses_are_punished_before_they_are_compared() -> None:
    config = Config()
    config.algorithm.overlong_buffer, config.algorithm.normalize_std = 20, False
    config.rollout.max_new_tokens = 64
    window = Window(0, [group(0, [64, 54])], [], carried=0)
    batch = build_batch(config, window, scores(1.0, 0.0), version=4)
    assert [row.advantage for row in batch.rows] == pytest.approx([0.25, -0.25])  # 1 - 1 = 0 against 0 - 0.5
    assert [row.reward for row in batch.rows] == [1.0, 0.0]  # what is reported
