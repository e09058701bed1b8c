"""Losses that need no reinforcement."""

from __future__ import annotations

from torch import Tensor

from asystem.data.packing import PackedBatch
from asystem.data.stats import Stats


def supervised_loss(batch: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
    """Cross-entropy on the response tokens, each with its weight in the batch: logprobs, entropy [T] -> scalar."""
    loss = -(logprobs * batch.weights).sum()
    stats = Stats()
    stats.add_sum("train/loss", float(loss.detach()))
    return loss, stats
