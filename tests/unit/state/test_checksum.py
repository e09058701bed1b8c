"""Checksums of blocks: they add up however a parameter is cut, and show what changed."""

from __future__ import annotations

import pytest
import torch

from asystem.models import Box
from asystem.state.checksum import MODULUS, checksum


def _whole(tensor: torch.Tensor) -> int:
    return checksum(tensor, Box.whole(tuple(tensor.shape)), tuple(tensor.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_blocks_add_up(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7, 6).to(dtype)
    hole = Box((1, 2, 3), (4, 5, 6))
    blocks = [hole, *Box.whole((5, 7, 6)).minus(hole)]
    parts = [checksum(box.of(tensor, (0, 0, 0)), box, (5, 7, 6)) for box in blocks]
    assert sum(parts) % MODULUS == _whole(tensor) != 0
    large = torch.randn(500, 1500).to(dtype)  # more than is summed at once
    cut = [checksum(part, Box((0, low), (500, low + 750)), (500, 1500)) for low, part in enumerate_halves(large)]
    assert sum(cut) % MODULUS == _whole(large)


def enumerate_halves(tensor: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Column halves and where they begin: views whose rows do not follow each other in memory."""
    return [(0, tensor[:, :750]), (750, tensor[:, 750:])]


def test_any_wrong_bit_shows() -> None:
    tensor = torch.randn(3, 4)
    before, bits = _whole(tensor), tensor.view(torch.int32)
    for row in range(3):
        for bit in range(31):
            bits[row, row] ^= 1 << bit
            assert _whole(tensor) != before
            bits[row, row] ^= 1 << bit
    assert _whole(tensor) == before


def test_what_changed_places_shows() -> None:
    experts = torch.randn(8, 16, 4).bfloat16().float()  # whose low bits are all 0
    before = _whole(experts)
    for other in range(1, 8):
        swapped = experts.clone()
        swapped[[0, other]] = experts[[other, 0]]
        assert _whole(swapped) != before
    assert _whole(experts.flip(1)) != before
    assert _whole(experts.roll(1, 2)) != before
