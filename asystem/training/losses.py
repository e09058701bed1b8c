"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from asystem.data.packing import PackedBatch
from asystem.stats import Stats

# (micro-batch, log-probabilities [T] with gradient, entropies [T]) -> its part of the batch's loss, and metrics.
# Parts add up: they are divided by counts of the global batch, never by their own.
LossFn = Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, Stats]]


def supervised_loss(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
    """Cross-entropy of the response tokens, weighted by ``packed.token_weights``."""
    stats = Stats()
    num_tokens = len(packed.label_rows)
    stats.add_mean("train/entropy", float(entropy.sum()), num_tokens)
    stats.add_mean("train/logprob_mean", float(logprobs.detach().sum()), num_tokens)
    return -(packed.token_weights * logprobs).sum(), stats
