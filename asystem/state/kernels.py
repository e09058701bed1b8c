"""A Triton kernel for checksums: each number is read once, and nothing is written beside the sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 256  # a block of numbers is looked at by so many; those of small blocks have little or nothing to do
_ROWS, _COLUMNS = 4, 1024  # a tile
_BLOCKS = 1 << 15  # in a launch; a grid's second dimension ends at 65535
_VECTOR = 16  # bytes that a thread reads at once where all is aligned
_DTYPES = {torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32}

Weighed = tuple[int, Tensor, Tensor, Tensor]
"""The number of the sum that it is a part of; rows [R, W] of int8, int16 or int32 with any stride between rows; and
int32 weights [R] and [W], of which those of columns begin at 16 bytes."""


@triton.jit
def _weighted_sums_kernel(
    table, results, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Products and sums wrap around at 32 bits, so their order does not matter."""
    entry = table + tl.program_id(1) * 7
    address, rows, width, stride = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    bits = address.to(tl.pointer_type(DTYPE))
    if VECTOR > 1:  # else each number is read alone
        bits = tl.multiple_of(bits, 16)
        width, stride = tl.multiple_of(width, VECTOR), tl.multiple_of(stride, VECTOR)
    row_weights = tl.load(entry + 4).to(tl.pointer_type(tl.int32))
    column_weights = tl.multiple_of(tl.load(entry + 5).to(tl.pointer_type(tl.int32)), 16)
    lane = tl.arange(0, COLUMNS)
    result = tl.zeros([ROWS], tl.int32)
    for first in range(tl.program_id(0) * ROWS, rows, PROGRAMS * ROWS):
        row = first + tl.arange(0, ROWS)
        sums = tl.zeros([ROWS, COLUMNS], tl.int32)
        for start in range(0, width, COLUMNS):
            column = start + lane
            inside = (row < rows)[:, None] & (column < width)[None, :]
            numbers = tl.load(bits + row[:, None] * stride + column[None, :], mask=inside, other=0).to(tl.int32)
            sums += numbers * tl.load(column_weights + column, mask=column < width, other=0)[None, :]
        result += tl.sum(sums, 1) * tl.load(row_weights + row, mask=row < rows, other=0)
    tl.atomic_add(results + tl.load(entry + 6) + tl.zeros([ROWS], tl.int32), result)


class WeightedSums:
    """Sums of rows times both weights, of blocks on one GPU that stay where they are.

    Args:
        count: of sums.
    """

    def __init__(self, parts: Sequence[Weighed], count: int, device: torch.device) -> None:
        self._parts, self._count, self._device = parts, count, device  # parts: tables have their addresses alone
        alike: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = {}
        for number, rows, of_rows, of_columns in parts:
            size, stride = rows.element_size(), rows.stride(0)
            aligned = not (rows.data_ptr() | rows.shape[1] * size | stride * size) % _VECTOR
            entry = rows.data_ptr(), *rows.shape, stride, of_rows.data_ptr(), of_columns.data_ptr(), number
            alike.setdefault((rows.dtype, aligned), []).append(entry)
        self._tables = [
            (*key, table)
            for key, entries in alike.items()
            for table in torch.split(torch.tensor(entries, dtype=torch.int64).to(device), _BLOCKS)
        ]

    def take(self) -> Tensor:
        """Of the numbers as they are now, modulo 2^32 and signed, [count] int64. One launch for all that are alike."""
        results = torch.zeros(self._count, dtype=torch.int32, device=self._device)
        with torch.cuda.device_of(results):
            for dtype, aligned, table in self._tables:
                _weighted_sums_kernel[(_PROGRAMS, len(table))](
                    table, results, PROGRAMS=_PROGRAMS, ROWS=_ROWS, COLUMNS=_COLUMNS, DTYPE=_DTYPES[dtype],
                    VECTOR=_VECTOR // dtype.itemsize if aligned else 1,
                )  # fmt: skip
        return results.to(torch.int64)
