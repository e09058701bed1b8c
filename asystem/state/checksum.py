"""A checksum of a block of a parameter: a sum over its numbers' bits, each weighted by its place in the whole.

Sums of blocks that do not meet add up to the whole's, however it is cut. As weights are odd, a single wrong bit shows;
as they differ from place to place, so do numbers, rows or experts that changed places, and a layer that was left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asystem.models import Box

_AT_ONCE = 1 << 21  # numbers; what is written down beside them takes 8 bytes each
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@torch.no_grad()
def checksum(block: Tensor, box: Box, shape: tuple[int, ...]) -> int:
    """Of a block, which lies at ``box`` in a parameter of ``shape``. Equal blocks on any device have equal ones."""
    if not block.numel():
        return 0
    width = box.shape[-1] if box.shape else 1
    rows = block.reshape(-1, width).contiguous().view(_BITS[block.element_size()])
    firsts = _first_places(box, shape, block.device)
    columns = torch.arange(width, dtype=torch.int32, device=block.device)
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    count = max(1, _AT_ONCE // width)
    for start in range(0, len(rows), count):
        places = firsts[start : start + count, None] + columns
        weights = places.mul_(-1640531535)  # wraps, as all of this does; 2^32 divided by the golden ratio
        weights ^= weights >> 15
        total += weights.mul_(0x2C1B3C6D).bitwise_or_(1).mul_(rows[start : start + count]).sum()
    return int(total)


def _first_places(box: Box, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The place in the whole, counted along its rows, of the first number of each row of the block, [rows] int32."""
    places, stride = torch.zeros(1, dtype=torch.int64, device=device), 1
    for dim in reversed(range(len(shape))):
        low, high = box.start[dim], box.stop[dim]
        steps = torch.arange(low, low + 1 if dim == len(shape) - 1 else high, device=device) * stride
        places = (steps[:, None] + places).flatten()
        stride *= shape[dim]
    return places.to(torch.int32)  # wraps
