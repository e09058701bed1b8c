"""The policy loss: surrogate, correction and normaliser together, and what is measured of them."""

from __future__ import annotations

import torch
from torch import Tensor

from asystem.algorithms.corrections import correction_weights
from asystem.algorithms.surrogates import clipped_surrogate
from asystem.config import AlgorithmConfig
from asystem.data.packing import PackedBatch
from asystem.data.stats import Stats


def policy_loss(
    batch: PackedBatch, logprobs: Tensor, entropy: Tensor, old_logprobs: Tensor | None, config: AlgorithmConfig
) -> tuple[Tensor, Tensor, Stats]:
    """-Σ_t w_t · M(k_t) · min(r_t A_t, clip(r_t) A_t) over the response tokens of a micro-batch.

    Summed over all micro-batches and ranks it is the loss of the global batch (Ring-1T report, Eq. 1, without its KL
    term, whose coefficient is 0 there).

    Args:
        logprobs: [T] of the labels under the present weights, with gradient. entropy: [T], without.
        old_logprobs: [T] under the weights at the start of the step; None when they are the present ones.

    Returns:
        the loss; the correction weights [T] float32, 0 outside the response; the metrics.
    """
    mask = batch.mask
    train = logprobs.detach() if old_logprobs is None else old_logprobs
    weights = correction_weights(train, batch.logprobs, config) * mask
    # A NaN must not reach the sum even with weight 0, for 0 * NaN is NaN, in the gradient too.
    safe = torch.where(weights > 0, logprobs, 0.0)
    surrogate = clipped_surrogate(
        safe,
        torch.where(weights > 0, train, 0.0),
        batch.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    loss = -(surrogate * weights * batch.weights).sum()
    return loss, weights, _metrics(batch, train, logprobs.detach(), entropy, weights, loss.detach())


@torch.no_grad()
def _metrics(
    batch: PackedBatch, train: Tensor, logprobs: Tensor, entropy: Tensor, weights: Tensor, loss: Tensor
) -> Stats:
    stats = Stats()
    mask = batch.mask & (batch.weights > 0)
    log_k = (train - batch.logprobs)[mask]
    finite = torch.isfinite(log_k)
    kept = (weights > 0)[mask]
    tokens = int(mask.sum())
    stats.add_sum("train/loss", float(loss))
    stats.add_sum("mismatch/nan_tokens", tokens - int(finite.sum()))
    stats.add_mean("icepop/masked_fraction", float(tokens - kept.sum()), tokens)
    stats.add_mean("train/entropy", float(entropy[mask].sum()), tokens)
    stats.add_mean("icepop/masked_entropy", float(entropy[mask][~kept].sum()), float((~kept).sum()))
    if bool(finite.any()):
        gaps = log_k[finite].abs()
        stats.add_mean("mismatch/logprob_diff_mean", float(gaps.sum()), gaps.numel())
        stats.add_max("mismatch/logprob_diff_max", float(gaps.max()))
        stats.add_log_ratios("mismatch/ratio", log_k[finite])
        update = (logprobs - train)[mask][finite].abs()
        stats.add_max("train/update_ratio_log_max", float(update.max()))
    return stats
