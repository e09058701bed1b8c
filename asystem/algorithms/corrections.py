"""Corrections of the mismatch between training and inference: one weight a token, without gradient.

Tokens are sampled by the inference engine and scored by the training engine. Even with the same weights the two
disagree, and with stale weights they disagree more:

    k = p_train(token; theta_old) / p_infer(token; theta_old)        K = product of k over a response of n tokens

    none        M = 1
    tis         M = min(k, C)                                 every token is updated
    icepop      M = k if alpha <= k <= beta else 0            tokens outside the band are masked, on both sides
    kpop        M = k if both binary KL divergences of p_train and p_infer are <= phi, else 0
    mis         M = K if K <= C else 0                        responses that drifted too far are masked whole
    geometric   M = 1 if low <= K^(1/n) <= high else 0        the same, whatever their length

A token whose log-probability is NaN or infinite in either engine gets weight 0 under every correction. A recipe chooses
with `algorithm.correction`, by a name of `CORRECTIONS` or by a function of its own (`choose`).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from asystem.algorithms.sequences import per_sequence
from asystem.config import AlgorithmConfig


class CorrectionFn(Protocol):
    """Response tokens in, their weights out.

    train_logprobs: [M] under the weights before this batch's first update. infer_logprobs: [M] as sampled. Both are 0
    where ``finite`` [M] bool is false. sequence: [M] int64, the number of each token's response. Returns [M] float32,
    0 = masked.
    """

    def __call__(
        self, train_logprobs: Tensor, infer_logprobs: Tensor, finite: Tensor, sequence: Tensor, cfg: AlgorithmConfig, /
    ) -> Tensor: ...


def correction_weights(
    function: CorrectionFn, train_logprobs: Tensor, infer_logprobs: Tensor, sequence: Tensor, cfg: AlgorithmConfig
) -> Tensor:
    """M of each response token, [M] float32, detached; 0 where either log-probability is NaN or infinite."""
    train, infer = train_logprobs.detach().float(), infer_logprobs.detach().float()
    finite = torch.isfinite(train - infer)  # finite minus finite: NaN or infinity in either one shows here
    weights = function(torch.where(finite, train, 0.0), torch.where(finite, infer, 0.0), finite, sequence, cfg)
    return torch.where(finite, weights, 0.0)


def none(train: Tensor, infer: Tensor, finite: Tensor, sequence: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """No correction: M = 1."""
    return torch.ones_like(train)


def tis(train: Tensor, infer: Tensor, finite: Tensor, sequence: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """Truncated importance sampling: M = min(k, `tis_cap`).

    Source: Yao et al. (2025), "Your efficient RL framework secretly brings you off-policy RL training"; the Ring-1T
    report (arXiv 2510.18855), appendix A.1.
    """
    return (train - infer).clamp(max=_log(cfg.tis_cap)).exp()


def icepop(train: Tensor, infer: Tensor, finite: Tensor, sequence: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """IcePop: M = k if `icepop_alpha` <= k <= `icepop_beta`, else 0. Tokens inside the band keep the weight k.

    Source: equations 1 to 3 of the Ring-1T report (arXiv 2510.18855), §2.3.2.
    """
    # The band is tested on log k and exponentials are taken inside it only: exp would overflow to infinity for tokens
    # that are to be masked, and infinity times 0 is NaN.
    log_k = train - infer
    return _exp_where((log_k >= _log(cfg.icepop_alpha)) & (log_k <= _log(cfg.icepop_beta)), log_k)


def kpop(train: Tensor, infer: Tensor, finite: Tensor, sequence: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """KPop: M = k if D(p_train || p_infer) <= phi and D(p_infer || p_train) <= phi, else 0.

        D(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))        nats

    A fixed band of ratios masks mostly improbable tokens; D weighs a ratio by what it moves. The report does not give
    phi; ours (`kpop_phi`) is 0.1, which a token of probability 0.5 exceeds when the other engine gives it 0.28.

    Source: the Ling/Ring 2.6 report (arXiv 2606.15079), §3.2.3; that kept tokens weigh k is our reading.
    """
    p, q = train.double(), infer.double()
    divergence = torch.maximum(_binary_kl(p, q), _binary_kl(q, p))
    return _exp_where(divergence <= cfg.kpop_phi, train - infer)


def mis(train: Tensor, infer: Tensor, finite: Tensor, sequence: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """Masked importance sampling of whole responses: M = K if K <= `mis_cap`, else 0 for all its tokens.

    Source: Liu et al. (2025), "When speed kills stability: demystifying RL collapse from the training-inference
    mismatch", sequence-level MIS.
    """
    total = per_sequence(train - infer, sequence, mean=False, keep=finite)[sequence]
    return _exp_where(total <= _log(cfg.mis_cap), total)


def geometric(train: Tensor, infer: Tensor, finite: Tensor, sequence: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """Masks whole responses by the geometric mean of k: M = 1 if it lies in `geometric_band`, else 0.

    Source: as `mis`, geometric sequence-level masking.
    """
    mean = per_sequence(train - infer, sequence, mean=True, keep=finite)[sequence]
    low, high = cfg.geometric_band
    return ((mean >= _log(low)) & (mean <= _log(high))).float()


CORRECTIONS: dict[str, CorrectionFn] = {
    "none": none,
    "tis": tis,
    "icepop": icepop,
    "kpop": kpop,
    "mis": mis,
    "geometric": geometric,
}


def _exp_where(keep: Tensor, log_weights: Tensor) -> Tensor:
    return torch.where(keep, torch.where(keep, log_weights, 0.0).exp(), 0.0)


def _binary_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p || q) of a token and all others together, [M] float64. A q of exactly 1 under a smaller p gives infinity."""
    rest_p, rest_q = -torch.expm1(log_p), -torch.expm1(log_q)
    return log_p.exp() * (log_p - log_q) + torch.xlogy(rest_p, rest_p) - torch.xlogy(rest_p, rest_q)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
