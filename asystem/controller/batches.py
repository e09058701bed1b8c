"""From a window to a batch: rewards become advantages, and what the window did becomes metrics. No token arrays."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

import torch

from asystem.algorithms import group_advantages
from asystem.config import Config
from asystem.data.batch import Batch, BatchRow
from asystem.errors import RewardError
from asystem.rollout import Group, Window
from asystem.types import Score


def build_batch(config: Config, window: Window, scores: dict[int, Score], version: int) -> Batch:
    """The batch of a window's complete groups. Takes the scores of trained and of purged rollouts out of ``scores``.

    A rollout whose reward failed is masked: advantage 0, and its siblings' advantages are computed without it.

    Raises:
        RewardError: more than `reward.max_error_share` of the rewards failed.
    """
    rows = [row for group in window.groups for row in _group_rows(config, group, scores)]
    failed = [row for row in rows if row.error is not None]
    if len(failed) > config.reward.max_error_share * len(rows):
        raise RewardError(
            f"{len(failed)} of {len(rows)} rewards failed at step {version + 1}, more than reward.max_error_share="
            f"{config.reward.max_error_share}; the first, of prompt {failed[0].prompt}: {failed[0].error}"
        )
    for group in window.purged:
        for rollout in group.finished:
            scores.pop(rollout.rollout, None)
    good = [row for row in rows if row.error is None]
    return Batch(rows, version, num_tokens=sum(row.length for row in good), num_rollouts=len(good))


def _group_rows(config: Config, group: Group, scores: dict[int, Score]) -> list[BatchRow]:
    rollouts = sorted(group.finished, key=lambda rollout: rollout.rollout)
    graded = [scores.pop(rollout.rollout) for rollout in rollouts]
    rewards = torch.tensor([score.reward for score in graded])
    valid = torch.tensor([score.error is None for score in graded])
    advantages = group_advantages(rewards, valid, normalize_std=config.algorithm.normalize_std)
    return [
        BatchRow(
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
        for rollout, score, advantage in zip(rollouts, graded, advantages.tolist(), strict=True)
    ]


def accuracy(scores: Iterable[Score]) -> float:
    """Mean reward of held-out rollouts; one whose reward failed counts as wrong."""
    return fmean(0.0 if score.error is not None else score.reward for score in scores)


def rollout_metrics(window: Window, batch: Batch) -> dict[str, float]:
    """What the design's §5 names of a window: rewards, lengths, staleness (weight versions), carried and purged."""
    rollouts = [rollout for group in window.groups for rollout in group.finished]
    rewards = [row.reward for row in batch.rows if row.error is None]
    mixed = sum(any(row.advantage for row in batch.rows if row.group == group.id) for group in window.groups)
    return {
        "reward/mean": fmean(rewards) if rewards else float("nan"),
        "reward/errors": len(batch.rows) - len(rewards),
        "reward/groups_with_signal": mixed / len(window.groups),
        "rollout/groups": len(window.groups),
        "rollout/tokens": batch.num_tokens,
        "rollout/length_mean": batch.num_tokens / len(rollouts),
        "rollout/length_max": max(rollout.length for rollout in rollouts),
        "rollout/cut_fraction": fmean(rollout.finish.value == "length" for rollout in rollouts),
        "rollout/staleness_max": batch.version - min(rollout.first_version for rollout in rollouts),
        "rollout/carried": window.carried,
        "rollout/purged": sum(len(group.rollouts) for group in window.purged),
        "rollout/purged_tokens": sum(rollout.length for group in window.purged for rollout in group.finished),
    }
