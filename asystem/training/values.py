"""Advantages of tokens for a whole batch, by the engine's value head: computed before the batch's first update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from asystem.algorithms import gae
from asystem.algorithms.advantages import WHITEN_EPS
from asystem.config import AlgorithmConfig
from asystem.data.packing import PackedBatch
from asystem.stats import Stats
from asystem.training.engine import TrainEngine


def with_token_advantages(
    engine: TrainEngine, micro: Sequence[PackedBatch], cfg: AlgorithmConfig
) -> tuple[list[PackedBatch], Stats]:
    """The micro-batches with advantages by `gae`, normalised over the tokens of all ranks, and with what an update
    compares with: log-probabilities, values and returns under the present weights. Every rank calls it.

    Args:
        micro: of a whole batch, whose ``advantages`` are its responses' rewards. Tokens of weight 0 count nowhere.
    """
    estimated, counted = [], []
    for packed, (logprobs, _, values) in zip(micro, engine.scores(micro), strict=True):
        packed = packed.to(engine.device)
        rows, empty = packed.label_rows, torch.zeros_like(values)
        advantages, returns = gae(values[rows], packed.advantages[rows], packed.sequence[rows], cfg)
        counted.append(torch.stack([advantages, returns])[:, packed.token_weights[rows] > 0])
        estimated.append(
            replace(
                packed,
                advantages=empty.index_copy(0, rows, advantages),
                old_logprobs=logprobs,
                old_values=values,
                returns=empty.index_copy(0, rows, returns),
            )
        )
    count, means, variances = _moments(engine, counted)
    scale = (variances[0] + WHITEN_EPS).rsqrt()
    stats, told = Stats(), float(engine.rank == 0 and count > 1)
    stats.add_mean("value/return_mean", told * float(means[1]), told)
    if variances[1] > 0:  # R - V is the advantage
        stats.add_mean("value/explained_variance", told * float(1 - variances[0] / variances[1]), told)
    return [
        replace(packed, advantages=torch.where(packed.mask, (packed.advantages - means[0]) * scale, 0.0).float())
        for packed in estimated
    ], stats


def _moments(engine: TrainEngine, counted: Sequence[Tensor]) -> tuple[float, Tensor, Tensor]:
    """Tokens, and means [2] and unbiased variances [2] of advantages and returns, over all ranks."""
    sums = torch.zeros(3, 2, dtype=torch.float64, device=engine.device)
    for pair in counted:
        wide = pair.double()
        sums[0] += wide.shape[1]
        sums[1:] += torch.stack([wide.sum(1), wide.square().sum(1)])
    if engine.world_size > 1:
        dist.all_reduce(sums, group=engine.ranks.data_group)
    count = float(sums[0, 0])
    means = sums[1] / max(1.0, count)
    return count, means, (sums[2] - count * means.square()).clamp(min=0) / max(1.0, count - 1)
