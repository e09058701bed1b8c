"""Corrections of the mismatch between training and inference: the weight that each token's surrogate gets.

k = p_train(token; old weights) / p_infer(token; old weights) is 1 but for arithmetic, in theory. In practice the two
engines differ, most so in mixture-of-experts models, and training on tokens with k far from 1 feeds on itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asystem.config import AlgorithmConfig, Correction


def correction_weights(train_logprobs: Tensor, infer_logprobs: Tensor, config: AlgorithmConfig) -> Tensor:
    """The weight of each token, without gradient; 0 where either log-probability is NaN or infinite.

    none: 1.  TIS (Yao et al. 2025): min(k, C).  IcePop (Ring-1T report, Eq. 1-3): k if α <= k <= β else 0, so a token
    in the band keeps its importance weight and one outside, on either side, is masked.

    Args:
        train_logprobs, infer_logprobs: [T] float32, at the old weights.

    Returns:
        [T] float32.
    """
    log_k = (train_logprobs - infer_logprobs).detach()
    finite = torch.isfinite(log_k)
    log_k = torch.where(finite, log_k, 0.0)
    if config.correction is Correction.none:
        weights = torch.ones_like(log_k)
    elif config.correction is Correction.tis:
        weights = log_k.clamp(max=math.log(config.tis_cap)).exp()
    else:  # the band is tested on logarithms: exp may overflow outside it, and inf * 0 is NaN
        inside = (log_k >= math.log(config.icepop_alpha)) & (log_k <= math.log(config.icepop_beta))
        weights = torch.where(inside, torch.where(inside, log_k, 0.0).exp(), 0.0)
    return torch.where(finite, weights, 0.0)
