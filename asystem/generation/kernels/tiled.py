"""Matrix products of a decode batch with 8-bit weights, which are read as they are and widened in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps

MOST_ROWS = 256  # beyond, tiles would read the weight too often: it is widened in memory, for a library's product
_TILE = 64  # rows of x that one program takes
_K = 128  # of the inner size at a time


@triton.jit
def _tiled_kernel(
    x, weight, scales, bias, out, m, n, k,
    BATCH: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    inner = tl.arange(0, K)
    x_place = batch[None, :] * k + inner[:, None]
    place = row[:, None].to(tl.int64) * k + inner[None, :]
    # Transposed: of a product's operands Hopper takes the left one from registers, where the weight is widened.
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for start in range(0, k, K):
        there = inner < k - start
        numbers = tl.load(weight + place + start, mask=(row < n)[:, None] & there[None, :], other=0.0)
        value = tl.load(x + x_place + start, mask=(batch < m)[None, :] & there[:, None], other=0.0)
        total = tl.dot(numbers.to(value.dtype), value, total, input_precision="ieee")
    total *= tl.load(scales + row, mask=row < n, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    mask = (row < n)[:, None] & (batch < m)[None, :]
    tl.store(out + batch[None, :] * n + row[:, None], total.to(out.dtype.element_ty), mask=mask)


def is_tiled(x: Tensor) -> bool:
    """Whether `tiled_linear` is the quick way for x [B, K]."""
    return len(x) <= MOST_ROWS


def tiled_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, K] times (scale * weight) transposed, plus bias [N]: see `models.quantized.QuantizedLinear`.

    Args:
        weight: [N, K] int8 or float8_e4m3fn. scale: [N] float32.
    """
    (batch, k), n = x.shape, len(weight)
    out, overlap = x.new_empty(batch, n), overlaps(x.device)
    tile = min(_TILE, max(16, triton.next_power_of_2(batch)))
    tiles = triton.cdiv(batch, tile)
    rows = _rows(n, tiles, x.device)
    _tiled_kernel[(triton.cdiv(n, rows), tiles)](
        x, weight, scale, x if bias is None else bias, out, batch, n, k, BATCH=tile, ROWS=rows, K=_K,
        BIAS=bias is not None, OVERLAP=overlap, num_warps=4, num_stages=3 if x.itemsize == 2 else 2, launch_pdl=overlap,
    )  # fmt: skip
    return out


def _rows(n: int, tiles: int, device: torch.device) -> int:
    """Outputs that one program computes: so few that each multiprocessor has a program."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return next((rows for rows in (64, 32) if triton.cdiv(n, rows) * tiles >= processors), 16)
