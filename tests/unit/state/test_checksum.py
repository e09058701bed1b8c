"""Checksums of blocks: they add up however a parameter is cut, and show what changed."""

from __future__ import annotations

import pytest
import torch

from asystem.models import Box
from asystem.state import checksum as module
from asystem.state.checksum import checksum


def _whole(tensor: torch.Tensor) -> int:
    return checksum(tensor, Box.whole(tuple(tensor.shape)), tuple(tensor.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_blocks_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(5, 7, 6).to(dtype)
    hole = Box((1, 2, 3), (4, 5, 6))
    blocks = [hole, *Box.whole((5, 7, 6)).minus(hole)]
    parts = [checksum(box.of(tensor, (0, 0, 0)), box, (5, 7, 6)) for box in blocks]
    assert sum(parts) == _whole(tensor) != 0
    monkeypatch.setattr(module, "_AT_ONCE", 20)  # few rows at a time
    assert sum(parts) == _whole(tensor)


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
