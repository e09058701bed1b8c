"""Advantages: how much better a response was than could be expected."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, valid: Tensor, *, normalize_std: bool = True) -> Tensor:
    """GRPO's advantages within one group: (r - mean) / (std + 1e-6) over its valid members.

    Args:
        rewards: [G] float32. valid: [G] bool, False where the reward failed.
        normalize_std: divide by the (unbiased) standard deviation, as GRPO does; Dr.GRPO does not.

    Returns:
        [G] float32; 0 for invalid members, and for all where fewer than two are valid or their rewards are equal.

    Source: DeepSeekMath (Shao et al. 2024), §4.1.2; Dr.GRPO (Liu et al. 2025) for the version without deviation.
    """
    known = rewards[valid]
    if known.numel() < 2 or bool((known == known[0]).all()):
        return torch.zeros_like(rewards)
    scale = known.std() + 1e-6 if normalize_std else 1.0
    return torch.where(valid, (rewards - known.mean()) / scale, 0.0)
