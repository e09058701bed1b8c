"""The policy loss: advantage, surrogate, mismatch correction, normaliser and penalties in one place.

    J(theta) = sum over response tokens  w_t [ M_t S_t(theta) - beta KL_t(theta) + gamma H_t(theta) ]

w_t from `normalizers`, M_t from `corrections`, S_t from `surrogates`, KL_t from `penalties`, H_t the entropy. With
IcePop and PPO's surrogate it is equation 1 of the Ring-1T report (arXiv 2510.18855), whose beta was 0. The loss is -J.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from asystem.algorithms.choose import Algorithm
from asystem.algorithms.corrections import correction_weights
from asystem.algorithms.penalties import kl_to_reference
from asystem.config import Anchor
from asystem.stats import Stats


def policy_loss(
    logprobs: Tensor,
    *,
    infer_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    rows: Tensor,
    sequence: Tensor,
    algorithm: Algorithm,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The loss of some of a batch's responses (a micro-batch), to be summed over all parts of the batch.

    Args:
        logprobs: [T] log p(token; theta), with gradient. infer_logprobs: [T] as sampled.
        advantages, token_weights: [T]. rows: [M] int64, those of response tokens; nothing else counts.
        sequence: [T] the number of each token's response.
        old_logprobs: [T] from before the batch's first update; None = this is the first update.
        ref_logprobs: [T] of the frozen reference, where `algorithm.kl_coefficient` is above 0.
        entropy: [T] of the training distribution; with gradient where `algorithm.entropy_coefficient` is not 0.

    Returns:
        loss, a scalar, and what `mismatch/*`, `train/*` and the correction's own metrics are made of, for later.
    """
    cfg = algorithm.cfg
    new, infer = logprobs.index_select(0, rows), infer_logprobs.index_select(0, rows)
    old = new.detach() if old_logprobs is None else old_logprobs.detach().index_select(0, rows)
    responses = sequence.index_select(0, rows).long()
    weights = correction_weights(algorithm.correction, old, infer, responses, cfg)
    keep = weights != 0
    # Left-out tokens are replaced before any arithmetic: a NaN times weight 0 would still be NaN, in the loss or in
    # its gradient.
    anchor = infer if cfg.anchor is Anchor.behavior else old
    surrogate, is_clipped = algorithm.surrogate(
        torch.where(keep, new, 0.0),
        torch.where(keep, anchor, 0.0),
        torch.where(keep, advantages.index_select(0, rows), 0.0),
        responses,
        cfg,
    )
    scale = token_weights.index_select(0, rows)
    loss = -(torch.where(keep, scale * weights, 0.0) * surrogate).sum()
    kl = known = None
    if ref_logprobs is not None and cfg.kl_coefficient > 0:
        reference = ref_logprobs.detach().index_select(0, rows)
        known = torch.isfinite(new.detach() - reference)
        kl = kl_to_reference(torch.where(known, new, 0.0), torch.where(known, reference, 0.0), cfg.kl_estimator)
        loss = loss + cfg.kl_coefficient * (scale * kl).sum()
        kl = kl.detach()
    entropies = None if entropy is None else entropy.index_select(0, rows)
    if entropies is not None and cfg.entropy_coefficient != 0:
        finite = torch.isfinite(entropies.detach())
        loss = loss - cfg.entropy_coefficient * (scale * torch.where(finite, entropies, 0.0)).sum()
    entropies = None if entropies is None else entropies.detach()

    def stats() -> Stats:
        stats = _stats(algorithm, old, infer, weights, is_clipped, responses, entropies)
        if kl is not None and known is not None:
            stats.add_mean("train/kl_reference", float(kl.sum()), float(known.sum()))
        return stats

    return loss, Stats.later(stats)


def _stats(
    algorithm: Algorithm,
    train: Tensor,
    infer: Tensor,
    weights: Tensor,
    is_clipped: Tensor,
    responses: Tensor,
    entropy: Tensor | None,
) -> Stats:
    """Over response tokens, whether the correction keeps them or not; one copy to the host."""
    rows = [train, infer, weights, is_clipped, responses, torch.zeros_like(train) if entropy is None else entropy]
    host = torch.stack([row.detach().double() for row in rows]).cpu().numpy()
    logp, sampled, kept, clipped, numbers, entropies = host
    finite = np.isfinite(logp) & np.isfinite(sampled)
    log_k = logp[finite] - sampled[finite]
    masked = finite & (kept == 0)
    count, cfg = logp.size, algorithm.cfg
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
    name = cfg.correction if ":" not in cfg.correction else "correction"
    if name == "tis":
        stats.add_mean("tis/capped_fraction", float((log_k > np.log(cfg.tis_cap)).sum()), count)
    elif name != "none":
        stats.add_mean(f"{name}/masked_fraction", float(masked.sum()), count)
        if entropy is not None and masked.any():
            stats.add_mean(f"{name}/masked_entropy", float(entropies[masked].sum()), float(masked.sum()))
    if name in ("mis", "geometric"):
        stats.add_mean(f"{name}/masked_responses", np.unique(numbers[masked]).size, np.unique(numbers).size)
    return stats
