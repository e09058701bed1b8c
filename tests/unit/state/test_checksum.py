"""Checksums of blocks: they add up however a parameter is cut, and show what changed."""

from __future__ import annotations

import pytest
import torch

from asystem.models import Box
from asystem.state.checksum import MODULUS, Checksums, Ledger, Part, checksum, settled


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


def test_views_have_the_sums_of_copies() -> None:
    stack = torch.randn(3, 6, 8)
    middle = Box((0, 2, 1), (3, 4, 8))
    cases: list[Part] = [
        (middle.of(stack, (0, 0, 0)), middle, (3, 6, 8)),
        (stack.transpose(1, 2), Box.whole((3, 8, 6)), (3, 8, 6)),
        (stack[0].T, Box.whole((8, 6)), (8, 6)),
        (stack[0, :, 3], Box.whole((6,)), (6,)),
        (stack[:0], Box((1, 0, 0), (1, 6, 8)), (3, 6, 8)),
    ]
    for block, box, shape in cases:
        copy = block.clone(memory_format=torch.contiguous_format)
        assert checksum(block, box, shape) == checksum(copy, box, shape)


def test_what_was_prepared_reads_the_numbers_as_they_are_now() -> None:
    stack, row = torch.randn(3, 6, 8), torch.randn(5)
    cut = Box((0, 2, 0), (3, 4, 8))  # whose rows are not all the same stride apart
    parts: list[Part] = [(cut.of(stack, (0, 0, 0)), cut, (3, 6, 8)), (row, Box.whole((5,)), (5,))]
    prepared = Checksums(parts)
    for _ in range(2):
        assert settled([prepared.take()]) == [checksum(*part) for part in parts]
        stack.mul_(3)
        row[2] = 0
    assert settled([Checksums([]).take()]) == []


def test_a_ledger_is_compared_again_and_again() -> None:
    one, two, half = torch.randn(4, 3), torch.randn(4, 3), Box((2, 0), (4, 3))
    whole, shape = Box.whole((4, 3)), (4, 3)
    rest = Box((0, 0), (2, 3))
    ledger = Ledger()
    ledger.add("same", [(one, whole, shape)], [(one[2:], half, shape), (one[:2], rest, shape)])
    ledger.add("sent", [(two, whole, shape)], sent=[(0, 1), (1, 0)])

    def sent() -> list[list[int]]:
        return [[7, checksum(two[2:], half, shape)], [checksum(two[:2], rest, shape)]]

    assert not list(ledger.wrong(sent()))
    before = sent()
    two[3, 1] += 1
    assert list(ledger.wrong(before)) == ["sent"] and not list(ledger.wrong(sent()))
