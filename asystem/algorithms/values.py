"""PPO's critic: advantages of tokens from the values of a head, and the loss that trains it."""

from __future__ import annotations

import torch
from torch import Tensor

from asystem.config import AlgorithmConfig
from asystem.stats import Stats


def gae(values: Tensor, rewards: Tensor, sequence: Tensor, cfg: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: of each token, what came of it beyond what its state promised.

        d_t = r_t + γ V_{t+1} - V_t        A_t = d_t + γ λ A_{t+1}        R_t = A_t + V_t

    The reward comes with a response's last token; behind it nothing is to be expected, also where a response was cut.

    Args:
        values: [M] V_t, of the state in which token t was chosen. rewards: [M] of each token's whole response.
        sequence: [M] the number of each token's response; its tokens stand together, in order.

    Returns:
        advantages [M], not normalised, and returns [M], what the values should have been.

    Source: Schulman et al. (arXiv 1506.02438), equations 11 to 16.
    """
    goes_on = torch.zeros_like(sequence, dtype=torch.bool)
    goes_on[:-1] = sequence[1:] == sequence[:-1]
    following = torch.where(goes_on, values.roll(-1), 0.0)
    advantages = torch.where(goes_on, 0.0, rewards) + cfg.gamma * following - values
    # After the pass of distance n each sum has 2n terms: log2 of the longest response passes instead of one a token.
    distance, decay = 1, cfg.gamma * cfg.gae_lambda
    while bool(goes_on.any()):
        advantages = advantages + decay**distance * torch.where(goes_on, advantages.roll(-distance), 0.0)
        distance *= 2
        goes_on = torch.zeros_like(goes_on)
        goes_on[:-distance] = sequence[distance:] == sequence[:-distance]
    return advantages, advantages + values


def value_loss(
    values: Tensor,
    *,
    old_values: Tensor,
    returns: Tensor,
    token_weights: Tensor,
    rows: Tensor,
    cfg: AlgorithmConfig,
) -> tuple[Tensor, Stats]:
    """The critic's part of the loss, clipped as PPO's surrogate is: a value moves by at most `value_clip` a batch.

        c/2 Σ w_t max((V_t - R_t)², (clip(V_t, V_old ± value_clip) - R_t)²)        c = `value_coefficient`

    Args:
        values: [T] with gradient. old_values, returns: [T] from before the batch's first update (`gae`).
        token_weights: [T] w. rows: [M] int64, those of response tokens; nothing else counts.

    Source: arXiv 1707.06347, equation 9 (c1); the clip is that of OpenAI's implementation of it.
    """
    new, old, wanted = (part.index_select(0, rows) for part in (values, old_values, returns))
    errors = (new - wanted).square()
    is_clipped = torch.zeros_like(new, dtype=torch.bool)
    if cfg.value_clip is not None:
        clipped = (old + (new - old).clamp(-cfg.value_clip, cfg.value_clip) - wanted).square()
        is_clipped = clipped > errors
        errors = torch.maximum(errors, clipped)
    total = errors.detach().sum()

    def stats() -> Stats:
        stats = Stats()
        stats.add_mean("value/loss", 0.5 * float(total), len(rows))
        stats.add_mean("value/clip_fraction", float(is_clipped.sum()), len(rows))
        return stats

    return 0.5 * cfg.value_coefficient * (token_weights.index_select(0, rows) * errors).sum(), Stats.later(stats)
