"""Policy surrogates: what an update maximises, a token."""

from __future__ import annotations

import torch
from torch import Tensor

# exp(20) is far outside every clip; without a bound an overflow to infinity turns the clipped branch's zero gradient
# into NaN (0 * inf).
MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), with bounds of its own on either side.

        r = p(token; theta) / p(token; theta_old)        surrogate = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    Args:
        logprobs: [T], with gradient. old_logprobs: [T] before the batch's first update; with one update a batch it is
            ``logprobs.detach()``, r is 1 and its gradient that of log p.
        advantages: [T].

    Returns:
        surrogate [T], and where the clip cut the gradient [T] bool.
    """
    ratio = (logprobs - old_logprobs.detach()).clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    is_clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    return surrogate, is_clipped.detach()
