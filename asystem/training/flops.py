"""Floating-point operations that a training step needs, for model FLOPs utilisation (MFU).

    a matrix of n weights     2 n a token forward, 2 n for the gradient of its input, 2 n for its own where it trains
    attention                 4 · heads · head_dim a pair of query and key forward, twice that backward;
                              a sequence of S tokens has S (S + 1) / 2 pairs
    experts                   those that a token chooses, and the router
    the head                  as a matrix, for the tokens that need logits

What is computed again (recompute, attention's own backward, the head's chunks) is not counted, nor are adapters, norms
and softmax: MFU = these operations / seconds / the rate of a large bf16 product on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence

from asystem.data.packing import PackedBatch
from asystem.models import ModelSpec


def train_flops(spec: ModelSpec, micro: Sequence[PackedBatch], *, frozen: bool = False) -> float:
    """Of the forward and backward pass over packed micro-batches.

    Args:
        frozen: matrices have no gradient of their own, as beside LoRA's adapters.
    """
    total = 0.0
    for packed in micro:
        lengths = packed.cu_seqlens.diff().double()
        pairs = float((lengths * (lengths + 1) / 2).sum())
        total += pass_flops(spec, len(packed.tokens), pairs, len(packed.label_rows), frozen=frozen)
    return total


def pass_flops(
    spec: ModelSpec, tokens: float, pairs: float, labels: float, *, frozen: bool = False, backward: bool = True
) -> float:
    """Of the forward (and backward) pass over tokens with so many pairs of query and key, and logits of ``labels``."""
    per_weight = 2 if not backward else 4 if frozen else 6
    matrices = spec.active_matrix_weights * tokens + spec.hidden_size * spec.vocab_size * labels
    return per_weight * matrices + (12 if backward else 4) * spec.num_layers * spec.q_size * pairs
