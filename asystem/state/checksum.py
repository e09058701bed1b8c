"""A checksum of a block of a parameter: a sum over its numbers' bits, each weighted by its place in the whole.

    sum over rows r, columns c of  bits[r, c] * u(r) * v(c)   mod 2^32        u, v odd, different at every place

Sums of blocks that do not meet add up to the whole's, however it is cut. As weights are odd, a single wrong bit shows;
as they differ from place to place, so do numbers, rows or experts that changed places, and a layer that was left out.
It costs one product a number: less than copying it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from asystem.models import Box

MODULUS = 1 << 32
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@torch.no_grad()
def checksum(block: Tensor, box: Box, shape: tuple[int, ...]) -> int:
    """Of a block, which lies at ``box`` in a parameter of ``shape``. Equal blocks on any device have equal ones."""
    if not block.numel():
        return 0
    width = box.shape[-1]
    rows = block.reshape(-1, width).view(_BITS[block.element_size()])
    row_weights, column_weights = _place_weights(box, shape, block.device)
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    at_once = 1 << (24 if block.is_cuda else 18)  # numbers: a part that stays in a processor's cache
    count = max(1, at_once // width)
    for start in range(0, len(rows), count):
        part = rows[start : start + count].to(torch.int32)
        # They wrap around. CUDA has no matrix product of integers.
        sums = (part * column_weights).sum(1, dtype=torch.int32) if block.is_cuda else part.mv(column_weights)
        total += (sums * row_weights[start : start + count]).sum()
    return int(total) % MODULUS


@lru_cache(maxsize=256)  # layers have the same shapes
def _place_weights(box: Box, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a block's rows, and of its columns."""
    columns = torch.arange(box.start[-1], box.stop[-1], device=device)
    return _weights(_row_numbers(box, shape, device)), _weights(columns)


def _row_numbers(box: Box, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The number in the whole of each of a block's rows, which lie along the last dimension, [rows] int64."""
    numbers, stride = torch.zeros(1, dtype=torch.int64, device=device), 1
    for low, high, size in reversed(list(zip(box.start[:-1], box.stop[:-1], shape[:-1], strict=True))):
        steps = torch.arange(low, high, device=device) * stride
        numbers = (steps[:, None] + numbers).flatten()
        stride *= size
    return numbers


def _weights(numbers: Tensor) -> Tensor:
    """Odd and different: 2^31 of them, int32."""
    mixed = numbers * 0x9E3779B1 % MODULUS
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA6B % MODULUS  # so that places a power of 2 apart have nothing in common
    return (mixed | 1).to(torch.int32)
