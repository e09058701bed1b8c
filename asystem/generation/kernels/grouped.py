"""Products of a decode step's rows with the matrices of their experts, on every card and without the host.

Experts have few rows each, and all of their matrices are read, so a tile has few rows. How many tiles an expert fills
is known on the device alone: as many programs start as could be needed, and each finds its own, or that it has none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 64
_MOST_ROWS = 64  # of a tile; 16 at least, or the tensor cores are not used


@triton.jit
def _grouped_kernel(
    x, weight, ends, out, num_experts, size, width,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < num_experts, other=0)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < num_experts), other=0)
    tiles = tl.where(expert < num_experts, (end - start + ROWS - 1) // ROWS, 0)
    after = tl.cumsum(tiles, 0)
    mine = tl.sum((after <= tile).to(tl.int32), 0)
    if mine >= num_experts:
        return
    first = tl.sum(tl.where(expert == mine, start + (tile - after + tiles) * ROWS, 0), 0)
    last = tl.sum(tl.where(expert == mine, end, 0), 0)
    rows = (first + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    matrix = weight + mine.to(tl.int64) * width * size
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, size, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        a = tl.load(x + rows * size + depth[None, :], mask=(rows < last) & (depth[None, :] < size), other=0.0)
        b = tl.load(
            matrix + columns * size + depth[:, None], mask=(columns < width) & (depth[:, None] < size), other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + rows * width + columns, total.to(out.dtype.element_ty), mask=(rows < last) & (columns < width))


def grouped_tiles(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row times its expert's matrix, as `models.moe.grouped_linear`.

    Args:
        x: [N, K], sorted by expert. weight: [E, M, K]. ends: [E] int32, where each expert's rows end.

    Returns:
        [N, M]
    """
    (experts, width, size), count = weight.shape, len(x)
    out = x.new_empty(count, width)
    rows = min(_MOST_ROWS, max(16, triton.next_power_of_2(count // experts)))
    tiles = count // rows + min(experts, count)  # each expert may have one that is not full
    _grouped_kernel[(tiles, triton.cdiv(width, _COLUMNS))](
        x, weight, ends, out, experts, size, width, EXPERTS=triton.next_power_of_2(experts), ROWS=rows,
        COLUMNS=_COLUMNS, DEPTH=128 if x.dtype is torch.bfloat16 else 32, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
