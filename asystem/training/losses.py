"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from asystem.data.packing import PackedBatch
from asystem.stats import Stats

# (micro-batch, log-probabilities [T] with gradient, entropies [T], and with a value head values [T] with gradient)
# -> its part of the batch's loss, and metrics.
# Parts add up: they are divided by counts of the global batch, never by their own.
LossFn = Callable[..., tuple[Tensor, Stats]]


def supervised_loss(
    packed: PackedBatch, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
) -> tuple[Tensor, Stats]:
    """Cross-entropy of the response tokens, weighted by ``packed.token_weights``. It teaches a value head nothing."""
    stats = Stats()
    num_tokens = len(packed.label_rows)
    stats.add_mean("train/entropy", float(entropy.sum()), num_tokens)
    stats.add_mean("train/logprob_mean", float(logprobs.detach().sum()), num_tokens)
    loss = -(packed.token_weights * logprobs).sum()
    return loss if values is None else loss + 0.0 * values.sum(), stats
