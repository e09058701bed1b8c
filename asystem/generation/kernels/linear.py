"""Matrix products of very few rows: bound by reading the weight once, where cuBLAS leaves bandwidth unused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps

MOST_ROWS = 4  # beyond, a library's product on the matrix units is as good
_ELEMENTS = 8192  # of products that one program holds
_MOST_K = 4096  # of the inner size at a time
_MOST_OUT = 1 << 15  # larger outputs (the head) reach the bandwidth in cuBLAS too


@triton.jit
def _skinny_kernel(
    x, y, gain, weight, scales, bias, total_out, out, n, k, eps,
    BATCH: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    SWIGLU: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, K)
    batch = tl.arange(0, BATCH)
    place = row[:, None].to(tl.int64) * k + column[None, :]
    mask = (row < n)[:, None] & (column < k)[None, :]
    first = tl.load(weight + place, mask=mask, other=0.0)
    second = first
    if SWIGLU:
        second = tl.load(weight + n.to(tl.int64) * k + place, mask=mask, other=0.0)
    # No kernel of the step writes weights: they are on their way before the input is there.
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # what follows reads weights first, too
        tl.extra.cuda.gdc_wait()
    source = batch[:, None] * k + column[None, :]
    source_mask = (column < k)[None, :]
    value = tl.load(x + source, mask=source_mask, other=0.0).to(tl.float32)
    if NORM:  # all of a row is here; each program does it again, which is cheaper than a launch of its own
        value += tl.load(y + source, mask=source_mask, other=0.0).to(tl.float32)
        rounded = value.to(out.dtype.element_ty)
        tl.store(total_out + source, rounded, mask=(column < tl.where(tl.program_id(0) == 0, k, 0))[None, :])
        value = rounded.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / k + eps)
        value *= scale[:, None] * tl.load(gain + column, mask=column < k, other=0.0).to(tl.float32)[None, :]
        value = value.to(out.dtype.element_ty).to(tl.float32)
    value = value[:, None, :]
    total = tl.sum(value * first.to(tl.float32)[None, :, :], 2)
    up = total
    if SWIGLU:
        up = tl.sum(value * second.to(tl.float32)[None, :, :], 2)
    for start in range(K, k, K):
        there = (column < k - start)[None, :]
        value = tl.load(x + source + start, mask=there, other=0.0).to(tl.float32)[:, None, :]
        first = tl.load(weight + place + start, mask=mask & there, other=0.0)
        total += tl.sum(value * first.to(tl.float32)[None, :, :], 2)
        if SWIGLU:
            second = tl.load(weight + n.to(tl.int64) * k + place + start, mask=mask & there, other=0.0)
            up += tl.sum(value * second.to(tl.float32)[None, :, :], 2)
    if SCALED:
        total *= tl.load(scales + row, mask=row < n, other=0.0)[None, :]
        if SWIGLU:
            up *= tl.load(scales + n + row, mask=row < n, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
    if SWIGLU:
        # Rounded where the model rounds: after the product, and after silu.
        gate = total.to(out.dtype.element_ty).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
        total = silu * up.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + batch[:, None] * n + row[None, :], total.to(out.dtype.element_ty), mask=(row < n)[None, :])


def is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is the quick way for x [B, K] and weight [N, K]."""
    return len(x) in (1, 2, MOST_ROWS) and weight.shape[0] <= _MOST_OUT


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, *, swiglu: bool = False
) -> Tensor:
    """x [B, K] times weight [N, K] transposed, plus bias [N]; B a power of two.

    Args:
        scale: [N] float32, of the rows of an 8-bit weight (`models.quantized`); None = the weight is as it is.
        swiglu: weight holds gate and up, N / 2 rows each, and the result is silu(gate) * up, [B, N / 2].
    """
    return _launch(x, None, None, 0.0, weight, bias, scale, swiglu)[0]


def takes_norm(weight: Tensor) -> bool:
    """Whether `norm_linear` takes weight [N, K]: a program needs the whole of a row."""
    return weight.shape[1] <= _MOST_K


def norm_linear(
    x: Tensor, y: Tensor, gain: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None,
    scale: Tensor | None = None, *, swiglu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`linear` of RMSNorm(x + y): x, y [B, K], gain [K]; see `linear`, `takes_norm`.

    Returns:
        The product, and x + y [B, K].
    """
    return _launch(x, y, gain, eps, weight, bias, scale, swiglu)


def _launch(
    x: Tensor, y: Tensor | None, gain: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    scale: Tensor | None, swiglu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, k), n = x.shape, weight.shape[0] // (2 if swiglu else 1)
    out = x.new_empty(batch, n)
    total = x if y is None else torch.empty_like(x)
    block = min(triton.next_power_of_2(k), _MOST_K)
    rows = max(1, _ELEMENTS // (batch * block * (2 if swiglu else 1)))
    overlap = overlaps(x.device)
    _skinny_kernel[(triton.cdiv(n, rows),)](
        x, x if y is None else y, x if gain is None else gain, weight, x if scale is None else scale,
        x if bias is None else bias, total, out, n, k, eps, BATCH=batch, ROWS=rows, K=block, SCALED=scale is not None,
        BIAS=bias is not None, SWIGLU=swiglu, NORM=y is not None, OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return out, total
