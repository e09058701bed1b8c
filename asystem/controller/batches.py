"""From a window to a batch: rewards become advantages, and what the window did becomes metrics. No token arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import torch

from asystem.algorithms import advantages, choose, overlong_penalty
from asystem.config import Config
from asystem.data.batch import Batch, BatchRow
from asystem.errors import RewardError
from asystem.plugin import load_function
from asystem.rollout import Group, Window
from asystem.types import FinishedRollout, Score


def build_batch(config: Config, window: Window, scores: dict[int, Score], version: int) -> Batch:
    """The batch of a window's complete groups. Takes the scores of trained and of purged rollouts out of ``scores``.

    A rollout whose reward failed is masked: advantage 0, and its siblings' advantages are computed without it.

    Raises:
        RewardError: more than `reward.max_error_share` of the rewards failed.
    """
    rollouts = [r for group in window.groups for r in sorted(group.finished, key=lambda r: r.rollout)]
    graded = [scores.pop(rollout.rollout) for rollout in rollouts]
    _check_errors(config, rollouts, graded, version)
    for group in window.purged:
        for rollout in group.finished:
            scores.pop(rollout.rollout, None)
    values = _advantages(config, rollouts, graded)
    rows = [_row(*one) for one in zip(rollouts, graded, values, strict=True)]
    kept = _kept_rows(config, rows)
    good = [row for row in kept if row.error is None]
    num_tokens, trained = sum(row.length for row in good), {row.group for row in kept}
    return Batch(kept, version, num_tokens, len(good), dropped=[row for row in rows if row.group not in trained])


def _check_errors(config: Config, rollouts: Sequence[FinishedRollout], graded: Sequence[Score], version: int) -> None:
    failed = [(r, score) for r, score in zip(rollouts, graded, strict=True) if score.error is not None]
    if len(failed) > config.reward.max_error_share * len(graded):
        rollout, score = failed[0]
        raise RewardError(
            f"{len(failed)} of {len(graded)} rewards failed at step {version + 1}, more than reward.max_error_share="
            f"{config.reward.max_error_share}; the first, of prompt {rollout.prompt}: {score.error}"
        )


def _advantages(config: Config, rollouts: Sequence[FinishedRollout], graded: Sequence[Score]) -> list[float]:
    algorithm = choose(config.algorithm, config.recipe_dir)
    limit, buffer = config.rollout.max_new_tokens, algorithm.cfg.overlong_buffer
    shaped = [s.reward + overlong_penalty(r.length, limit, buffer) for r, s in zip(rollouts, graded, strict=True)]
    values: list[float] = advantages(
        algorithm.advantage,
        torch.tensor(shaped),
        torch.tensor([rollout.group for rollout in rollouts]),
        torch.tensor([rollout.length for rollout in rollouts]),
        torch.tensor([score.error is None for score in graded]),
        algorithm.cfg,
    ).tolist()
    return values


def _row(rollout: FinishedRollout, score: Score, advantage: float) -> BatchRow:
    return BatchRow(
        ref=rollout.ref,
        row=rollout.row,
        rollout=rollout.rollout,
        group=rollout.group,
        prompt=rollout.prompt,
        prompt_length=rollout.prompt_length,
        length=rollout.length,
        reward=score.reward,
        advantage=advantage,
        error=score.error,
    )


def _kept_rows(config: Config, rows: Sequence[BatchRow]) -> list[BatchRow]:
    """Without the groups that a filter leaves out; all of them where nothing else would be left."""
    graded: dict[int, list[tuple[float, int]]] = {}
    for row in rows:
        graded.setdefault(row.group, []).extend([(row.reward, row.length)] if row.error is None else [])
    kept = [row for row in rows if _is_kept(config, graded[row.group])]
    return kept or list(rows)


def kept_groups(config: Config, groups: Iterable[Group], scores: Mapping[int, Score]) -> int:
    """How many complete groups no filter leaves out: what dynamic sampling counts."""
    graded = ([(scores[rollout.rollout], rollout.length) for rollout in group.finished] for group in groups)
    return sum(_is_kept(config, [(s.reward, n) for s, n in pairs if s.error is None]) for pairs in graded)


def _is_kept(config: Config, graded: Sequence[tuple[float, int]]) -> bool:
    """Whether a group trains, by (reward, length) of its rollouts whose rewards did not fail."""
    algorithm = config.algorithm
    rewards, lengths = [reward for reward, _ in graded], [length for _, length in graded]
    if algorithm.drop_equal_groups and len(set(rewards)) < 2:
        return False
    if algorithm.group_filter is None:
        return True
    return bool(
        load_function(algorithm.group_filter, config.recipe_dir, key="algorithm.group_filter")(rewards, lengths)
    )


def mean_rewards(batch: Batch) -> list[tuple[int, float]]:
    """(prompt, mean reward) of each group of the window, those left out of the batch included; failed rewards aside."""
    groups: dict[int, list[BatchRow]] = {}
    for row in (*batch.rows, *batch.dropped):
        if row.error is None:
            groups.setdefault(row.group, []).append(row)
    return [(rows[0].prompt, fmean(row.reward for row in rows)) for rows in groups.values()]


def accuracy(scores: Iterable[Score]) -> float:
    """Mean reward of held-out rollouts; one whose reward failed counts as wrong."""
    return fmean(0.0 if score.error is not None else score.reward for score in scores)


def rollout_metrics(window: Window, batch: Batch) -> dict[str, float]:
    """What the design's §5 names of a window: rewards, lengths, staleness (weight versions), carried and purged."""
    rollouts = [rollout for group in window.groups for rollout in group.finished]
    rows = [*batch.rows, *batch.dropped]
    rewards = [row.reward for row in rows if row.error is None]
    mixed = len({row.group for row in rows if row.advantage})
    return {
        "reward/mean": fmean(rewards) if rewards else float("nan"),
        "reward/errors": len(rows) - len(rewards),
        "reward/groups_with_signal": mixed / len(window.groups),
        "rollout/groups": len(window.groups),
        "rollout/windows": window.count,
        "rollout/tokens": batch.num_tokens,
        "rollout/length_mean": fmean(rollout.length for rollout in rollouts),
        "rollout/length_max": max(rollout.length for rollout in rollouts),
        "rollout/cut_fraction": fmean(rollout.finish.value == "length" for rollout in rollouts),
        "rollout/staleness_max": batch.version - min(rollout.first_version for rollout in rollouts),
        "rollout/carried": window.carried,
        "rollout/purged": sum(len(group.rollouts) for group in window.purged),
        "rollout/purged_tokens": sum(rollout.length for group in window.purged for rollout in group.finished),
    }
