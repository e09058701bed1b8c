"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from asystem.data.packing import PackedBatch
from asystem.stats import Stats

# (micro-batch, log-probabilities [T] with gradient, entropies [T], and with a value head values [T] with gradient)
# -> its part of the batch's loss, and metrics.
# Parts add up: they are divided by counts of the global batch, never by their own. Metrics that need numbers from the
# device are `Stats.later`.
LossFn = Callable[..., tuple[Tensor, Stats]]


def supervised_loss(
    packed: PackedBatch, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
) -> tuple[Tensor, Stats]:
    """Cross-entropy of the response tokens, weighted by ``packed.token_weights``. It teaches a value head nothing."""
    loss, sums = -(packed.token_weights * logprobs).sum(), (entropy.detach().sum(), logprobs.detach().sum())

    def stats() -> Stats:
        stats = Stats()
        for name, total in zip(("train/entropy", "train/logprob_mean"), sums, strict=True):
            stats.add_mean(name, float(total), len(packed.label_rows))
        return stats

    return loss if values is None else loss + 0.0 * values.sum(), Stats.later(stats)
