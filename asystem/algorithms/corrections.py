"""Corrections of the mismatch between training and inference: one weight a token, without gradient.

Tokens are sampled by the inference engine and scored by the training engine. Even with the same weights the two
disagree, and with stale weights they disagree more:

    k = p_train(token; theta_old) / p_infer(token; theta_old)

    none      M(k) = 1
    TIS       M(k) = min(k, C)                            every token is updated
    IcePop    M(k) = k if alpha <= k <= beta else 0       tokens outside the band are masked, on both sides

IcePop is equation 1-3 of the Ring-1T report (arXiv 2510.18855, §2.3.2); those inside the band keep the weight k, it is
no 0/1 mask. A token whose log-probability is NaN or infinite in either engine gets weight 0 under every correction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asystem.config import AlgorithmConfig, Correction


def correction_weights(train_logprobs: Tensor, infer_logprobs: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """M(k) of each token, [T] float32, detached.

    The band is tested on log k and exponentials are taken inside it only: exp would overflow to infinity for tokens
    that are to be masked, and infinity times 0 is NaN.

    Args:
        train_logprobs: [T] under the weights before this batch's first update. infer_logprobs: [T] as sampled.
    """
    log_k = (train_logprobs - infer_logprobs).detach().float()
    keep = torch.isfinite(log_k)  # finite minus finite: NaN or infinity in either one shows here
    if cfg.correction is Correction.icepop:
        keep = keep & (log_k >= _log(cfg.icepop_alpha)) & (log_k <= _log(cfg.icepop_beta))
    if cfg.correction is Correction.none:
        return keep.float()
    log_k = torch.where(keep, log_k, 0.0)
    if cfg.correction is Correction.tis:
        log_k = log_k.clamp(max=_log(cfg.tis_cap))
    return torch.where(keep, log_k.exp(), 0.0)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
