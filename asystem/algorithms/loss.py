"""The policy loss: advantage, clipped surrogate, mismatch correction and normaliser in one place.

    J(theta) = sum over tokens  w_t  M(k_t)  min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)

w_t from `normalizers`, M(k_t) from `corrections`, the rest from `surrogates`; equation 1 of the Ring-1T report (arXiv
2510.18855) without its KL term, whose coefficient was 0 there. The loss is -J.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from asystem.algorithms.corrections import correction_weights
from asystem.algorithms.surrogates import clipped_surrogate
from asystem.config import AlgorithmConfig, Correction
from asystem.stats import Stats


def policy_loss(
    logprobs: Tensor,
    *,
    infer_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    mask: Tensor,
    cfg: AlgorithmConfig,
    old_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The loss of some of a batch's tokens (a micro-batch), to be summed over all parts of the batch.

    Args:
        logprobs: [T] log p(token; theta), with gradient. infer_logprobs: [T] as sampled.
        advantages, token_weights: [T]. mask: [T] bool, true on response tokens.
        old_logprobs: [T] from before the batch's first update; None = this is the first update.
        entropy: [T] of the training distribution, for metrics only.

    Returns:
        loss, a scalar, and what `mismatch/*`, `icepop/*` and `train/*` are made of.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    correction = correction_weights(old, infer_logprobs, cfg)
    keep = mask & (correction != 0)
    # Left-out tokens are replaced before any arithmetic: a NaN times weight 0 would still be NaN, in the loss or in
    # its gradient.
    surrogate, is_clipped = clipped_surrogate(
        torch.where(keep, logprobs, 0.0),
        torch.where(keep, old, 0.0),
        torch.where(keep, advantages, 0.0),
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
    )
    loss = -(torch.where(keep, token_weights * correction, 0.0) * surrogate).sum()
    return loss, _stats(cfg, mask, old, infer_logprobs, correction, is_clipped, entropy)


def _stats(
    cfg: AlgorithmConfig,
    mask: Tensor,
    train: Tensor,
    infer: Tensor,
    correction: Tensor,
    is_clipped: Tensor,
    entropy: Tensor | None,
) -> Stats:
    """Over response tokens, whether the correction keeps them or not; one copy to the host."""
    rows = [train, infer, correction, is_clipped, torch.zeros_like(train) if entropy is None else entropy.detach()]
    host = torch.stack([row.float() for row in rows])[:, mask].cpu().numpy().astype(np.float64)
    logp, sampled, weights, clipped, entropies = host
    finite = np.isfinite(logp) & np.isfinite(sampled)
    log_k = logp[finite] - sampled[finite]
    masked = finite & (weights == 0)
    count = logp.size
    stats = Stats()
    stats.add_mean("mismatch/logprob_diff_mean", float(np.abs(log_k).sum()), log_k.size)
    stats.add_max("mismatch/logprob_diff_max", float(np.abs(log_k).max(initial=0.0)))
    stats.add_mean("mismatch/kl_mean", float(-log_k.sum()), log_k.size)  # KL(infer || train), sampled from infer
    stats.add_log_samples("mismatch/ratio", log_k)
    stats.add_sum("mismatch/nan_tokens", float(count - log_k.size))
    stats.add_mean("train/clip_fraction", float(clipped.sum()), count)
    stats.add_mean("train/logprob_mean", float(logp[finite].sum()), log_k.size)
    if entropy is not None:
        stats.add_mean("train/entropy", float(entropies[finite].sum()), log_k.size)
    if cfg.correction is Correction.icepop:
        stats.add_mean("icepop/masked_fraction", float(masked.sum()), count)
        if entropy is not None and masked.any():
            stats.add_mean("icepop/masked_entropy", float(entropies[masked].sum()), float(masked.sum()))
    elif cfg.correction is Correction.tis:
        stats.add_mean("tis/capped_fraction", float((log_k > np.log(cfg.tis_cap)).sum()), count)
    return stats
