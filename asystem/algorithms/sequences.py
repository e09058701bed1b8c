"""Sums and means over the tokens of each response."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sequence(values: Tensor, sequence: Tensor, *, mean: bool, keep: Tensor | None = None) -> Tensor:
    """The sum or mean of each response's tokens.

    Args:
        values: [M]. sequence: [M] int64, the number of each token's response. keep: [M] bool, tokens that count.

    Returns:
        [S] float32, S being the highest number + 1; 0 for a response without a token that counts.
    """
    count = int(sequence.max()) + 1 if sequence.numel() else 0
    weights = torch.ones_like(values) if keep is None else keep.to(values.dtype)
    kept = values if keep is None else torch.where(keep, values, 0.0)
    totals = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, sequence, kept)
    if not mean:
        return totals
    return totals / torch.zeros_like(totals).index_add_(0, sequence, weights).clamp(min=1)
