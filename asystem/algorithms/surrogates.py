"""Policy surrogates: what an update maximises, a token.

A recipe chooses with `algorithm.surrogate`, by a name of `SURROGATES` or by a function of its own (`choose`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from asystem.algorithms.sequences import per_sequence
from asystem.config import AlgorithmConfig

# exp(20) is far outside every clip; without a bound an overflow to infinity turns the clipped branch's zero gradient
# into NaN (0 * inf).
MAX_LOG_RATIO = 20.0


class SurrogateFn(Protocol):
    """Response tokens in, what to maximise out.

    logprobs: [M] log p(token; theta), with gradient. old_logprobs: [M] of the weights that the ratio is taken against:
    those before the batch's first update, with one update a batch ``logprobs.detach()``. advantages: [M]. sequence: [M]
    int64, the number of each token's response. Returns the surrogate [M] and where the clip cut the gradient [M] bool.
    """

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence: Tensor, cfg: AlgorithmConfig, /
    ) -> tuple[Tensor, Tensor]: ...


def ppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence: Tensor, cfg: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, with bounds of its own on either side, and dual clip where one is set.

        r = p(token; theta) / p(token; theta_old)        min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        and, where A < 0 and `dual_clip` = c is set,     max(that, c A)

    Source: arXiv 1707.06347, equation 7; clip-higher: DAPO (arXiv 2503.14476) §3.1; dual clip: Ye et al. (arXiv
    1912.09729), equation 5.
    """
    ratio = _ratio(logprobs, old_logprobs)
    return _clipped(ratio, advantages, cfg)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence: Tensor, cfg: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """GSPO: one ratio a response, the geometric mean of its tokens', clipped as PPO's.

        s_i = exp(mean over i's tokens of log p(theta) - log p(theta_old))
        token t of i:  min(s_it A, clip(s_it) A),      s_it = stop(s_i) p(theta) / stop(p(theta))

    s_it has the value of s_i; the mean of its gradients over a response is the gradient of s_i. Its clip is far
    narrower than PPO's: clip_low = 3e-4, clip_high = 4e-4 in the paper. Meant for `algorithm.normalizer=response`.

    Source: arXiv 2507.18071, equations 5 to 7 and 13 to 15 (GSPO-token, of equal advantages within a response).
    """
    mean = per_sequence(logprobs.detach() - old_logprobs, sequence, mean=True)[sequence]
    ratio = (mean + logprobs - logprobs.detach()).clamp(max=MAX_LOG_RATIO).exp()
    return _clipped(ratio, advantages, cfg)


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence: Tensor, cfg: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """CISPO: REINFORCE weighted by a clipped ratio without gradient, so that no token's gradient is cut off.

        stop(clip(r, 1 - clip_low, 1 + clip_high)) A log p(token; theta)

    Source: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5.
    """
    ratio = _ratio(logprobs.detach(), old_logprobs)
    bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return bounded * advantages * logprobs, bounded != ratio


def reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence: Tensor, cfg: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """REINFORCE: A log p(token; theta), without a ratio: on-policy, one update a batch.

    Source: Williams (1992).
    """
    return advantages * logprobs, torch.zeros_like(advantages, dtype=torch.bool)


SURROGATES: dict[str, SurrogateFn] = {"ppo": ppo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}


def _ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    return (logprobs - old_logprobs.detach()).clamp(max=MAX_LOG_RATIO).exp()


def _clipped(ratio: Tensor, advantages: Tensor, cfg: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    is_clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    if cfg.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, cfg.dual_clip * advantages), surrogate)
        is_clipped = is_clipped | ((ratio > cfg.dual_clip) & (advantages < 0))
    return surrogate, is_clipped.detach()
