"""Matrix products of very few rows: bound by reading the weight once, where cuBLAS leaves bandwidth unused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps

MOST_ROWS = 4  # beyond, a library's product on the matrix units is as good
LANES = 256  # numbers of a row that a warp reads at once
_MOST_K = 4096  # of the inner size, where a program norms a row by itself
_MOST_OUT = 1 << 15  # larger outputs (the head) reach the bandwidth in cuBLAS too


@triton.jit
def columns_of(WARPS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):
    """Columns 0..PARTS * LANES - 1, [WARPS, PARTS, LANES]: a warp has a row of weights, and all of the input."""
    part, lane = tl.arange(0, PARTS) * LANES, tl.arange(0, LANES)
    return tl.zeros([WARPS, PARTS, LANES], tl.int32) + part[None, :, None] + lane[None, None, :]


@triton.jit
def input_tile(x, y, gain, scale, source, columns, there, dtype: tl.constexpr, NORM: tl.constexpr):
    """What a tile of weights meets: numbers of a row, or of RMSNorm(x + y), rounded as the model rounds."""
    value = tl.load(x + source, mask=there, other=0.0).to(tl.float32)
    if NORM:
        value = (value + tl.load(y + source, mask=there, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        value *= scale * tl.load(gain + columns, mask=there, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
    return value


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded where the model rounds: after the product, and after silu."""
    gate = gate.to(dtype).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)


@triton.jit
def _skinny_kernel(
    x, y, gain, weight, scales, bias, total_out, out, n, eps,
    K: tl.constexpr, BATCH: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, ALL: tl.constexpr,
    LANES: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr, NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    # A warp computes two outputs by itself, so that warps never wait for each other.
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) * (WARPS if SWIGLU else 2 * WARPS) + tl.arange(0, WARPS)
    other = row + (n if SWIGLU else WARPS)
    column = columns_of(WARPS, PARTS, LANES)
    place = row[:, None, None].to(tl.int64) * K + column
    other_place = other[:, None, None].to(tl.int64) * K + column
    inside = (row < n)[:, None, None]
    other_inside = (other < (2 * n if SWIGLU else n))[:, None, None]
    first = tl.load(weight + place, mask=inside & (column < K), other=0.0)
    second = tl.load(weight + other_place, mask=other_inside & (column < K), other=0.0)
    # No kernel of the step writes weights: they are on their way before the input is there.
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # what follows reads weights first, too
        tl.extra.cuda.gdc_wait()
    norms = ()
    if NORM:  # each warp does it again, which is cheaper than a launch
        wide = columns_of(WARPS, ALL, LANES)
        for b in tl.static_range(BATCH):
            value = tl.load(x + b * K + wide, mask=wide < K, other=0.0).to(tl.float32)
            value += tl.load(y + b * K + wide, mask=wide < K, other=0.0).to(tl.float32)
            rounded = value.to(dtype)
            tl.store(total_out + b * K + wide, rounded, mask=(wide < K) & (row == 0)[:, None, None])
            value = rounded.to(tl.float32)
            norms = norms + (1.0 / tl.sqrt(tl.sum(tl.sum(value * value, 1), 1) / K + eps),)  # type: ignore[assignment]  # noqa: RUF005 (Triton)
    totals = ()
    ups = ()
    for start in tl.static_range(0, K, PARTS * LANES):
        there = column + start < K
        now, also = first, second
        if start + PARTS * LANES < K:  # what comes next is on its way meanwhile
            ahead = start + PARTS * LANES
            there_too = column + ahead < K
            first = tl.load(weight + place + ahead, mask=inside & there_too, other=0.0)
            second = tl.load(weight + other_place + ahead, mask=other_inside & there_too, other=0.0)
        sums = ()
        more = ()
        for b in tl.static_range(BATCH):
            scale = norms[b][:, None, None] if NORM else 1.0
            value = input_tile(x, y, gain, scale, b * K + start + column, start + column, there, dtype, NORM)
            one = tl.sum(value * now.to(tl.float32), 1)
            two = tl.sum(value * also.to(tl.float32), 1)
            if start > 0:
                one += totals[b]
                two += ups[b]
            sums = sums + (one,)  # type: ignore[assignment]  # noqa: RUF005
            more = more + (two,)  # type: ignore[assignment]  # noqa: RUF005
        totals = sums
        ups = more
    for b in tl.static_range(BATCH):
        one = tl.sum(totals[b], 1)
        two = tl.sum(ups[b], 1)
        if SCALED:
            one *= tl.load(scales + row, mask=row < n, other=0.0)
            two *= tl.load(scales + other, mask=other < (2 * n if SWIGLU else n), other=0.0)
        if BIAS:
            one += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
            two += tl.load(bias + other, mask=other < (2 * n if SWIGLU else n), other=0.0).to(tl.float32)
        if SWIGLU:
            one = silu_times(one, two, dtype)
        else:
            tl.store(out + b * n + other, two.to(dtype), mask=other < n)
        tl.store(out + b * n + row, one.to(dtype), mask=row < n)


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
    warps, parts = tile_of(n, k, norm=y is not None, swiglu=swiglu, alone=batch == 1)
    programs = triton.cdiv(n, warps if swiglu else 2 * warps)
    overlap = overlaps(x.device)
    _skinny_kernel[(programs,)](
        x, x if y is None else y, x if gain is None else gain, weight, x if scale is None else scale,
        x if bias is None else bias, total, out, n, eps, K=k, BATCH=batch, WARPS=warps, PARTS=parts,
        ALL=triton.next_power_of_2(triton.cdiv(k, LANES)), LANES=LANES, SCALED=scale is not None,
        BIAS=bias is not None, SWIGLU=swiglu, NORM=y is not None, OVERLAP=overlap, num_warps=warps, launch_pdl=overlap,
    )  # fmt: skip
    return out, total


def tile_of(n: int, k: int, *, norm: bool = False, swiglu: bool = False, alone: bool = False) -> tuple[int, int]:
    """Warps of a program, and parts of LANES numbers that each reads at once of a row: as the products of 0.6B and 4B
    were quickest on an H200, of a dozen tiles each.

    Args:
        n: outputs. k: numbers of a row. alone: there is one row of input.
    """
    divides = next(parts for parts in (4, 2, 1) if k % (parts * LANES) == 0 or parts == 1)
    if not alone:
        return (4 if n >= 2048 else 2), divides
    if swiglu:
        return (4, 1) if k <= 1024 else (1, 2)
    if norm:
        return 1, divides
    return 4, 8 if k > 4096 or k % 2048 == 0 else min(16, triton.next_power_of_2(triton.cdiv(k, LANES)))
