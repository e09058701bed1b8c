"""DPO as a loss of the training engine: pairs in packed micro-batches, against a reference computed once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from asystem.algorithms import preference_losses
from asystem.config import DpoConfig, DpoLoss
from asystem.data.packing import PackedBatch
from asystem.stats import Stats

TIE = 1e-3  # nats; below it the rounding of float32 sums decides


class PreferenceLoss:
    """A `LossFn` for micro-batches in which each chosen answer is followed by its rejected one.

    Args:
        reference: by row number, the sums of log-probabilities that the reference gives to both answers.
        num_pairs: of the global batch, whose mean loss is minimised.
    """

    def __init__(self, cfg: DpoConfig, reference: Mapping[int, tuple[float, float]], *, num_pairs: int) -> None:
        self.cfg, self.reference, self.num_pairs = cfg, reference, num_pairs

    def __call__(self, packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
        sums = sequence_sums(packed, logprobs)  # [N, 2]
        reference = torch.tensor([self.reference[number] for number in packed.rollouts[::2]], device=sums.device)
        ratios = sums - reference
        if self.cfg.loss is DpoLoss.ipo:
            ratios = ratios / sequence_sums(packed, packed.mask.float())
        log_ratio = ratios[:, 0] - ratios[:, 1]
        losses = preference_losses(log_ratio, self.cfg)
        seen = sums.detach(), ratios.detach(), entropy.detach()
        return losses.sum() / self.num_pairs, Stats.later(lambda: self._stats(packed, *seen))

    def _stats(self, packed: PackedBatch, sums: Tensor, ratios: Tensor, entropy: Tensor) -> Stats:
        stats, count = Stats(), len(sums)
        margin = ratios[:, 0] - ratios[:, 1]
        right = (margin > TIE).float() + 0.5 * (margin.abs() <= TIE).float()
        stats.add_mean("dpo/accuracy", float(right.sum()), count)
        stats.add_mean("dpo/margin", self.cfg.beta * float(margin.sum()), count)
        for place, name in enumerate(("chosen", "rejected")):
            stats.add_mean(f"dpo/{name}_logprob", float(sums[:, place].sum()), count)
            stats.add_mean(f"dpo/{name}_reward", self.cfg.beta * float(ratios[:, place].sum()), count)
        stats.add_mean("train/entropy", float(entropy.sum()), len(packed.label_rows))
        return stats


def sequence_sums(packed: PackedBatch, values: Tensor) -> Tensor:
    """[T] -> [N, 2]: the sums over each pair's chosen and rejected answer, ``values`` being 0 elsewhere."""
    empty = torch.zeros(len(packed.rollouts), device=values.device)
    return empty.index_add(0, packed.sequence, values).view(-1, 2)
