"""Floating-point operations that a training step needs, for model FLOPs utilisation (MFU).

    a matrix of n weights     2 n a token forward, 2 n for the gradient of its input, 2 n for its own where it trains
    attention                 4 · heads · head_dim a pair of query and key forward, twice that backward;
                              a sequence of S tokens has S (S + 1) / 2 pairs
    experts                   those that a token chooses, and the router
    the head                  as a matrix, for the tokens that need logits

What is computed again (recompute, attention's own backward, the head's chunks) is not counted, nor are adapters, norms
and softmax: MFU = these operations / seconds / the rate of a large product on the same device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median

import torch

from asystem.data.packing import PackedBatch
from asystem.models import ModelSpec
from asystem.stats import Stats


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


class Meter:
    """Measures the utilisation of one rank's device by optimizer steps.

    Args:
        frozen: as `train_flops`. sharing: ranks that have the same rows, and each its part of the operations.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, *, frozen: bool, sharing: int = 1) -> None:
        self.spec, self.device, self.frozen, self.sharing = spec, device, frozen, sharing
        self.rate = product_rate(device)

    def measure(self, micro: Sequence[PackedBatch], step: Callable[[], Stats]) -> Stats:
        """What the step over these micro-batches returns, and `train/mfu`.

        Ranks and steps add up to all operations over all seconds: a rank that waits for others lowers it.
        """
        started = time.perf_counter()
        stats = step()
        _wait(self.device)
        seconds = time.perf_counter() - started
        needed = train_flops(self.spec, micro, frozen=self.frozen) / self.sharing
        stats.add_mean("train/mfu", needed, seconds * self.rate)
        return stats


@cache
def product_rate(device: torch.device, repeats: int = 5) -> float:
    """Operations a second of a square product: the median of so many, of 8,192 in bfloat16 on CUDA (about 1.5 ms on an
    H100), of 512 in float32 on a CPU (about 5 ms on one core)."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    times = []
    for _ in range(repeats + 2):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pass_flops(
    spec: ModelSpec, tokens: float, pairs: float, labels: float, *, frozen: bool = False, backward: bool = True
) -> float:
    """Of the forward (and backward) pass over tokens with so many pairs of query and key, and logits of ``labels``."""
    per_weight = 2 if not backward else 4 if frozen else 6
    matrices = spec.active_matrix_weights * tokens + spec.hidden_size * spec.vocab_size * labels
    return per_weight * matrices + (12 if backward else 4) * spec.num_layers * spec.q_size * pairs
