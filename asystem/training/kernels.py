"""Triton kernels of the head (compute capability 8.0 and up): all that `head` does beside its matrix products.

In plain PyTorch softmax, entropy and their gradients write a dozen float32 [rows, vocabulary]; here the logits are read
once forward, and read and overwritten once backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _measure_kernel(logits, labels, result, heat, stride, result_stride, vocab, BLOCK: tl.constexpr):
    """One program a token. Each lane keeps its own maximum and sums, which meet at the end."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], -1e30, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.float32)  # sum of exp(x - peak) x
    for start in range(0, vocab, BLOCK):
        inside = start + lane < vocab
        x = tl.load(line + start + lane, mask=inside, other=-1e30).to(tl.float32) * heat
        top = tl.maximum(peak, x)
        shrink = tl.exp(peak - top)
        part = tl.where(inside, tl.exp(x - top), 0.0)
        mass = mass * shrink + part
        first = first * shrink + part * x
        peak = top
    highest = tl.max(peak, 0)
    scale = tl.exp(peak - highest)
    total = tl.sum(mass * scale, 0)
    lse = highest + tl.log(total)
    chosen = tl.load(line + tl.load(labels + row)).to(tl.float32) * heat
    tl.store(result + row, chosen - lse)
    tl.store(result + result_stride + row, lse - tl.sum(first * scale, 0) / total)
    tl.store(result + 2 * result_stride + row, lse)


@triton.jit
def _differentiate_kernel(
    logits, labels, result, grads, heat, stride, result_stride, grads_stride, vocab, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    entropy, lse = tl.load(result + result_stride + row), tl.load(result + 2 * result_stride + row)
    g, e = tl.load(grads + row), tl.load(grads + grads_stride + row)
    at = logits + row.to(tl.int64) * stride + column
    logp = tl.load(at, mask=inside, other=0.0).to(tl.float32) * heat - lse
    is_label = column == tl.load(labels + row)
    gradient = tl.where(is_label, g, 0.0) - tl.exp(logp) * (g + e * (logp + entropy))
    tl.store(at, (gradient * heat).to(logits.dtype.element_ty), mask=inside)


def measure(logits: Tensor, labels: Tensor, temperature: float, result: Tensor) -> None:
    """Writes log-probability, entropy and log-sum-exp [3, n] float32 of logits [n, V] and labels [n]."""
    tokens, vocab = logits.shape
    assert logits.stride(1) == labels.stride(0) == result.stride(1) == 1
    _measure_kernel[(tokens,)](
        logits, labels, result, 1.0 / temperature, logits.stride(0), result.stride(0), vocab, BLOCK=_BLOCK, num_warps=8
    )


def differentiate(logits: Tensor, labels: Tensor, temperature: float, result: Tensor, grads: Tensor) -> None:
    """Puts the loss's gradient by the logits [n, V] in their place.

    Args:
        result: [3, n] of `measure`. grads: [2, n] of the loss by log-probability and by entropy.
    """
    tokens, vocab = logits.shape
    assert logits.stride(1) == labels.stride(0) == result.stride(1) == grads.stride(1) == 1
    _differentiate_kernel[(triton.cdiv(vocab, _BLOCK), tokens)](
        logits, labels, result, grads, 1.0 / temperature,
        logits.stride(0), result.stride(0), grads.stride(0), vocab, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
