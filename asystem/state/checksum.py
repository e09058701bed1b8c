"""A checksum of a block of a parameter: a sum over its numbers' bits, each weighted by its place in the whole.

    sum over rows r, columns c of  bits[r, c] * u(r) * v(c)   mod 2^32        u, v odd, different at every place

Sums of blocks that do not meet add up to the whole's, however it is cut. As weights are odd, a single wrong bit shows;
as they differ from place to place, so do numbers, rows or experts that changed places, and a layer that was left out.
It costs one product a number, and reads each once: on a GPU half of what copying it moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from asystem.models import Box

Part = tuple[Tensor, Box, tuple[int, ...]]
"""A block, where it lies, and the shape of its parameter."""

Sent = tuple[int, int]
"""The number of a sender, and that of one of its checksums."""

MODULUS = 1 << 32
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_AT_ONCE = 1 << 19  # numbers: a part that stays in a processor's cache


def checksum(block: Tensor, box: Box, shape: tuple[int, ...]) -> int:
    """Of a block, which lies at ``box`` in a parameter of ``shape``. Equal blocks on any device have equal ones."""
    return settled([lazy_checksums([(block, box, shape)])])[0]


def lazy_checksums(parts: Sequence[Part]) -> Tensor:
    """Of blocks as they are now, see `Checksums.take`."""
    return Checksums(parts).take()


class Checksums:
    """Of blocks that stay where they are, on whatever devices: what their sums need is made once, for many times.

    On a GPU all blocks that are alike are read in one launch: a model's some hundred parameters would else wait for it.
    """

    @torch.no_grad()
    def __init__(self, parts: Sequence[Part]) -> None:
        chosen: dict[torch.device, list[int]] = {}
        for index, (block, _, _) in enumerate(parts):
            chosen.setdefault(block.device, []).append(index)
        devices = sorted(chosen, key=lambda device: device.type == "cpu")  # GPUs work while the host does
        self._sums = [_sums_of([parts[index] for index in chosen[device]], device) for device in devices]
        self._order: Tensor | None = None
        if len(devices) > 1:
            numbers = [index for device in devices for index in chosen[device]]
            self._order = torch.tensor(numbers).argsort().to(devices[0])

    @torch.no_grad()
    def take(self) -> Tensor:
        """Of the numbers as they are now, [parts] int64 and not yet modulo 2^32; on a GPU if a block is on one.

        Nothing waits for it, unless blocks lie on several devices.
        """
        sums = [each.take() for each in self._sums]
        if self._order is None:
            return sums[0] if sums else torch.zeros(0, dtype=torch.int64)
        return torch.cat([each.to(self._order.device) for each in sums])[self._order]


class _Sums(Protocol):
    def take(self) -> Tensor: ...


def _sums_of(parts: Sequence[Part], device: torch.device) -> _Sums:
    weighed = [(index, *rows) for index, part in enumerate(parts) for rows in _weighed(*part)]
    if device.type == "cuda":
        from asystem.state.kernels import WeightedSums

        return WeightedSums(weighed, len(parts), device)
    return _HostSums(weighed, len(parts))


class _HostSums:
    """As `kernels.WeightedSums`, in pieces that stay in a processor's cache."""

    def __init__(self, parts: Sequence[tuple[int, Tensor, Tensor, Tensor]], count: int) -> None:
        self._count = count
        self._pieces: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for index, rows, row_weights, column_weights in parts:
            size = max(1, _AT_ONCE // rows.shape[1])
            pieces = zip(torch.split(rows, size), torch.split(row_weights, size), strict=True)
            self._pieces += [(index, *piece, column_weights) for piece in pieces]

    def take(self) -> Tensor:
        totals = [0] * self._count
        for index, rows, row_weights, column_weights in self._pieces:
            sums = (rows * column_weights).sum(1, dtype=torch.int32)  # they wrap around
            totals[index] += int(torch.dot(sums, row_weights))
        return torch.tensor(totals, dtype=torch.int64)


def _weighed(block: Tensor, box: Box, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views [R, W] of a block's bits, never copies, with the weights of their rows and columns."""
    if block.numel():
        row_weights, column_weights = _place_weights(box, shape, block.device)
        yield from _by_rows(block.view(_BITS[block.element_size()]), row_weights, column_weights)


def _by_rows(bits: Tensor, row_weights: Tensor, column_weights: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One view where the same stride leads from each row to the next, else one for each of the first dimension."""
    if any(bits.stride(dim) != bits.stride(dim + 1) * bits.shape[dim + 1] for dim in range(bits.ndim - 2)):
        for part, weights in zip(bits, torch.chunk(row_weights, len(bits)), strict=True):
            yield from _by_rows(part, weights, column_weights)
        return
    rows = bits.view(-1, bits.shape[-1])
    if rows.stride(1) == 1 or rows.shape[1] == 1:
        yield rows, row_weights, column_weights
    else:  # a transposed matrix; a part of the weights is copied to where the kernel can read several at once
        assert rows.stride(0) == 1 or len(rows) == 1, f"numbers of a block are {rows.stride()} apart"
        yield rows.T, column_weights, row_weights.clone()


def settled(sums: Sequence[Tensor]) -> list[int]:
    """Checksums [n] as numbers, one after another; a device is waited for once, whatever their number."""
    numbers: list[list[int]] = [[]] * len(sums)
    for device in {each.device for each in sums}:
        chosen = [index for index, each in enumerate(sums) if each.device == device]
        values = iter(torch.cat([sums[index] for index in chosen]).tolist())
        for index in chosen:
            numbers[index] = [next(values) % MODULUS for _ in range(len(sums[index]))]
    return [value for each in numbers for value in each]


class Ledger:
    """Checksums of both sides, compared all at once, and again whenever blocks that stand have new numbers."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._parts: list[Part] = []
        self._sums: list[Tensor] = []
        self._of_parts: list[tuple[int, int]] = []  # of each: the number of the name, and 1 for actual, -1 for expected
        self._of_sums: list[tuple[int, int]] = []
        self._sent: list[tuple[int, Sent]] = []
        self._blocks: Checksums | None = None

    def add(
        self,
        name: str,
        actual: Sequence[Tensor | Part],
        expected: Sequence[Tensor | Part] = (),
        sent: Sequence[Sent] = (),
    ) -> None:
        """Enters what should have equal sums: blocks that stand until they are compared, or sums of some [n].

        Args:
            sent: more that is expected, of which checksums will be given.
        """
        number = len(self._names)
        self._names.append(name)
        self._sent += [(number, each) for each in sent]
        for sign, values in ((1, actual), (-1, expected)):
            for value in values:
                if isinstance(value, Tensor):
                    self._sums.append(value)
                    self._of_sums += [(number, sign)] * len(value)
                else:
                    self._parts.append(value)
                    self._of_parts.append((number, sign))

    def wrong(self, checksums: Sequence[Sequence[int]] = ()) -> Iterator[str]:
        """The names whose sums differ, in the order in which they were entered.

        Args:
            checksums: that were sent, of each sender.
        """
        if self._blocks is None:
            self._blocks = Checksums(self._parts)
        differences = [0] * len(self._names)
        values = settled([self._blocks.take(), *self._sums])
        for (number, sign), value in zip([*self._of_parts, *self._of_sums], values, strict=True):
            differences[number] += sign * value
        for number, (sender, index) in self._sent:
            differences[number] -= checksums[sender][index]
        yield from (name for name, each in zip(self._names, differences, strict=True) if each % MODULUS)


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
