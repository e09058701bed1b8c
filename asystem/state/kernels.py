"""A Triton kernel for checksums: each number is read once, and nothing is written beside the sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers that one program looks at together


@triton.jit
def _weighted_sum_kernel(bits, row_weights, column_weights, result, rows, width, stride,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program a few rows. Products and sums wrap around at 32 bits, so their order does not matter."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    lines = bits + row.to(tl.int64)[:, None] * stride
    sums = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, width, COLUMNS):
        column = start + lane
        inside = (row < rows)[:, None] & (column < width)[None, :]
        numbers = tl.load(lines + column[None, :], mask=inside, other=0).to(tl.int32)
        weights = tl.load(column_weights + column, mask=column < width, other=0)
        sums += numbers * weights[None, :]
    factor = tl.load(row_weights + row, mask=row < rows, other=0)
    tl.atomic_add(result, tl.sum(tl.sum(sums, 1) * factor, 0))


def weighted_sum(rows: Tensor, row_weights: Tensor, column_weights: Tensor) -> Tensor:
    """The sum of rows [R, W] (int8, int16 or int32, any stride between rows) times weights [R] and [W] int32, modulo
    2^32 and signed: [] int64."""
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count, width = rows.shape
    columns = min(1024, triton.next_power_of_2(width))
    each = max(1, _TILE // columns)
    result = torch.zeros((), dtype=torch.int32, device=rows.device)
    _weighted_sum_kernel[(triton.cdiv(count, each),)](
        rows, row_weights, column_weights, result, count, width, rows.stride(0), ROWS=each, COLUMNS=columns
    )
    return result.to(torch.int64)
