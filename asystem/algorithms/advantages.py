"""Advantages from rewards."""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPS = 1e-6


def group_advantages(rewards: Tensor, valid: Tensor, *, normalize_std: bool) -> Tensor:
    """GRPO's group advantages: how much better a sample is than the other samples of its prompt.

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)        mean and std over the valid members; std with G - 1

    Source: DeepSeekMath (arXiv 2402.03300) §4.1.2; without the division, Dr. GRPO (arXiv 2503.20783).

    Args:
        rewards: [G] float32. valid: [G] bool, false where the reward failed or is to be left out.
        normalize_std: divide by the standard deviation.

    Returns:
        [G] float32. Invalid members, NaN and infinite rewards among them, get 0 and do not
        count in the mean. All get 0 if fewer than two are valid or if the valid rewards are equal: exactly 0, whatever
        rounding does to their mean.
    """
    advantages = torch.zeros_like(rewards)
    valid = valid & torch.isfinite(rewards)
    known = rewards[valid]
    if known.numel() < 2 or bool(known.max() == known.min()):
        return advantages
    centred = known - known.mean()
    advantages[valid] = centred / (known.std() + STD_EPS) if normalize_std else centred
    return advantages
