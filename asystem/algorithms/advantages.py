"""Advantages from rewards: how much better a response was than what was to be expected.

Each function takes a whole batch, N responses in groups (the samples of one prompt), and returns one number a response.
A recipe chooses with `algorithm.advantage`, by a name of `ADVANTAGES` or by a function of its own (`choose`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from asystem.config import AlgorithmConfig

STD_EPS = 1e-6
WHITEN_EPS = 1e-8


class AdvantageFn(Protocol):
    """rewards [N] float32, groups [N] int64, lengths [N] int64 (response tokens) -> advantages [N] float32.

    Only responses whose reward is known and finite are given.
    """

    def __call__(self, rewards: Tensor, groups: Tensor, lengths: Tensor, cfg: AlgorithmConfig, /) -> Tensor: ...


def advantages(
    function: AdvantageFn, rewards: Tensor, groups: Tensor, lengths: Tensor, valid: Tensor, cfg: AlgorithmConfig
) -> Tensor:
    """``function`` over the valid responses; the others, NaN and infinite rewards among them, get 0 and count nowhere.

    Args:
        rewards: [N] float32. groups, lengths: [N] int64. valid: [N] bool, false where the reward failed.

    Returns:
        [N] float32.
    """
    result = torch.zeros_like(rewards)
    valid = valid & torch.isfinite(rewards)
    if bool(valid.any()):
        result[valid] = function(rewards[valid], groups[valid], lengths[valid], cfg)
    return result


def grpo(rewards: Tensor, groups: Tensor, lengths: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """GRPO: against the other samples of the prompt.

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)        mean and std over the group; std with G - 1

    `algorithm.normalize_std=false` leaves the division out. A group of equal rewards, or of one, gets exactly 0,
    whatever rounding does to its mean.

    Source: DeepSeekMath (arXiv 2402.03300) §4.1.2; without the division, Dr. GRPO (arXiv 2503.20783) §3.2.
    """

    def of_group(r: Tensor) -> Tensor:
        centred = r - r.mean()
        return centred / (r.std() + STD_EPS) if cfg.normalize_std else centred

    return _by_group(of_group, rewards, groups)


def rloo(rewards: Tensor, groups: Tensor, lengths: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """RLOO: against the mean of the other samples of the prompt, which leaves the gradient unbiased.

        A_i = r_i - sum_{j != i} r_j / (G - 1) = (r_i - mean(r)) G / (G - 1)

    Source: Ahmadian et al. (arXiv 2402.14740), equation 8.
    """
    return _by_group(lambda r: (r - r.mean()) * (len(r) / (len(r) - 1)), rewards, groups)


def reinforce(rewards: Tensor, groups: Tensor, lengths: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """REINFORCE with the mean reward of the batch as its baseline: A_i = r_i - mean over the batch.

    Source: Williams (1992), §2, with a reinforcement baseline.
    """
    return rewards - rewards.mean()


def reinforce_pp(rewards: Tensor, groups: Tensor, lengths: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """REINFORCE++: normalised over all tokens of the batch, each of which has its response's reward.

        A_i = (r_i - m) / sqrt(v + 1e-8)        m, v: mean and (unbiased) variance over the batch's tokens

    Source: Hu et al. (arXiv 2501.03262), without its KL term in the reward.
    """
    return _whiten(rewards, lengths)


def reinforce_pp_baseline(rewards: Tensor, groups: Tensor, lengths: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """REINFORCE++-baseline: the group's mean is taken off first, then as `reinforce_pp`.

    Source: Hu et al. (arXiv 2501.03262), the variant for several samples a prompt.
    """
    return _whiten(_by_group(lambda r: r - r.mean(), rewards, groups), lengths)


def gae(rewards: Tensor, groups: Tensor, lengths: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """The rewards as they are: the trainers turn them into advantages of tokens, by their values (`values.gae`)."""
    return rewards


ADVANTAGES: dict[str, AdvantageFn] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce": reinforce,
    "reinforce++": reinforce_pp,
    "reinforce++baseline": reinforce_pp_baseline,
    "gae": gae,
}


def _by_group(function: Callable[[Tensor], Tensor], rewards: Tensor, groups: Tensor) -> Tensor:
    """``function`` of each group's rewards; 0 for groups that tell nothing: of one response, or of equal rewards."""
    result = torch.zeros_like(rewards)
    for group in set(groups.tolist()):
        members = groups == group
        own = rewards[members]
        if own.numel() > 1 and bool(own.max() > own.min()):
            result[members] = function(own)
    return result


def _whiten(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean 0 and variance 1 over tokens; all 0 where they are equal."""
    if bool(values.max() == values.min()):
        return torch.zeros_like(values)
    total = lengths.sum()
    mean = (values * lengths).sum() / total
    variance = ((values - mean).square() * lengths).sum() / (total - 1)
    return (values - mean) * torch.rsqrt(variance + WHITEN_EPS)
