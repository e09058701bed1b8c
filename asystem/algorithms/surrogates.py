"""Surrogates: what is maximised for each token, before correction and normaliser."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's min(r A, clip(r, 1 - ε_low, 1 + ε_high) A) with r = exp(logprobs - old_logprobs).

    All [T] float32. With one update a batch the old weights are the present ones: r is 1 and its gradient that of the
    log-probability.

    Source: PPO (Schulman et al. 2017), Eq. 7; the two ε of DAPO (Yu et al. 2025), Eq. 10.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
