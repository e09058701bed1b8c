"""A checksum of a block of a parameter: a sum over its numbers' bits, each weighted by its place in the whole.

    sum over rows r, columns c of  bits[r, c] * u(r) * v(c)   mod 2^32        u, v odd, different at every place

Sums of blocks that do not meet add up to the whole's, however it is cut. As weights are odd, a single wrong bit shows;
as they differ from place to place, so do numbers, rows or experts that changed places, and a layer that was left out.
It costs one product a number, and reads each once: on a GPU half of what copying it moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from asystem.models import Box

Part = tuple[Tensor, Box, tuple[int, ...]]
"""A block, where it lies, and the shape of its parameter."""

MODULUS = 1 << 32
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_AT_ONCE = 1 << 19  # numbers: a part that stays in a processor's cache


def checksum(block: Tensor, box: Box, shape: tuple[int, ...]) -> int:
    """Of a block, which lies at ``box`` in a parameter of ``shape``. Equal blocks on any device have equal ones."""
    return settled([lazy_checksum(block, box, shape)])[0]


def lazy_checksum(block: Tensor, box: Box, shape: tuple[int, ...]) -> Tensor:
    """The same on the block's device, [] int64 and not yet modulo 2^32: nothing waits for it."""
    return lazy_checksums([(block, box, shape)])[0]


@torch.no_grad()
def lazy_checksums(parts: Sequence[Part]) -> list[Tensor]:
    """Of blocks on one device; on a GPU in one launch, which a model's some hundred parameters would else wait for."""
    weighed = [(_bits(block, box), *_place_weights(box, shape, block.device)) for block, box, shape in parts]
    if parts and parts[0][0].is_cuda:
        from asystem.state.kernels import weighted_sums

        return weighted_sums(weighed)
    return [_sum_in_pieces(*each) for each in weighed]


def _bits(block: Tensor, box: Box) -> Tensor:
    """Its rows, [R, W] of integers."""
    width = box.shape[-1] if box.shape else 1
    return block.reshape(-1 if block.numel() else 0, width).view(_BITS[block.element_size()])


def _sum_in_pieces(rows: Tensor, row_weights: Tensor, column_weights: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64)
    count = max(1, _AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, len(rows), count):
        sums = (rows[start : start + count] * column_weights).sum(1, dtype=torch.int32)  # they wrap around
        total += (sums * row_weights[start : start + count]).sum()
    return total


def settled(sums: Sequence[Tensor]) -> list[int]:
    """Checksums as numbers; a device is waited for once, whatever their number."""
    values = [0] * len(sums)
    for device in {value.device for value in sums}:
        chosen = [index for index, value in enumerate(sums) if value.device == device]
        for index, value in zip(chosen, torch.stack([sums[index] for index in chosen]).tolist(), strict=True):
            values[index] = value % MODULUS
    return values


class Ledger:
    """Checksums of both sides, compared all at once: numbers, tensors of one, or blocks that stand until then."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sides: list[tuple[int, int, int]] = []  # what is known of actual less expected; the others of either side
        self._awaited: list[Tensor | Part] = []

    def add(self, name: str, actual: Sequence[Tensor | Part], expected: Sequence[int | Tensor | Part]) -> None:
        """Enters sums that should be equal."""
        awaited = [value for value in expected if not isinstance(value, int)]
        known = sum(value for value in expected if isinstance(value, int))
        self._names.append(name)
        self._sides.append((-known, len(actual), len(awaited)))
        self._awaited += [*actual, *awaited]

    def wrong(self) -> Iterator[str]:
        """The names whose sums differ, in the order in which they were entered."""
        blocks = iter(lazy_checksums([value for value in self._awaited if isinstance(value, tuple)]))
        values = iter(settled([next(blocks) if isinstance(value, tuple) else value for value in self._awaited]))
        for name, (known, actual, awaited) in zip(self._names, self._sides, strict=True):
            difference = known + sum(next(values) for _ in range(actual)) - sum(next(values) for _ in range(awaited))
            if difference % MODULUS:
                yield name


@lru_cache(maxsize=1024)  # layers have the same shapes
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
