"""How a plan's moves are cut into parcels that fit into a bucket, and which parcels go in which round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asystem.models import Box
from asystem.state.payload import aligned
from asystem.state.plan import Move

_SUM = torch.int64.itemsize  # bytes of a checksum


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one rank sends another at once: blocks one after another, then a checksum of each.

    Attributes:
        moves: with where each begins, in bytes.
        dtypes: of the parameters, on the wire.
    """

    moves: tuple[tuple[Move, int], ...]
    dtypes: Mapping[str, torch.dtype]

    @property
    def nbytes(self) -> int:
        return self._sums + _SUM * len(self.moves)

    def blocks(self, flat: Tensor) -> Iterator[tuple[Move, Tensor]]:
        """Each move with its block, a view into the parcel's bytes."""
        for move, offset in self.moves:
            dtype = self.dtypes[move.name]
            yield move, flat[offset : offset + move.box.size * dtype.itemsize].view(dtype).view(move.box.shape)

    def checksums(self, flat: Tensor) -> Tensor:
        """A view, [moves] int64."""
        return flat[self._sums : self.nbytes].view(torch.int64)

    @property
    def _sums(self) -> int:
        move, offset = self.moves[-1]
        return aligned(offset + move.box.size * self.dtypes[move.name].itemsize)


Round = list[tuple[int, Parcel]]
"""Parcels to or from peers, which travel together."""


@dataclass(frozen=True, slots=True)
class Step:
    """A round in its bucket: views that are made once.

    Attributes:
        peers, flats: of each parcel, who sends or gets it, and its bytes.
        moves: of all parcels, one after another, each with its block.
        sums: of each parcel, [moves] int64.
    """

    peers: list[int]
    flats: list[Tensor]
    moves: list[tuple[Move, Tensor]]
    sums: list[Tensor]


def steps(all_rounds: Sequence[Round], device: torch.device) -> list[Step]:
    """The steps of all rounds, in two buckets that take turns: one travels while the other is packed or unpacked."""
    size = max((sum(aligned(parcel.nbytes) for _, parcel in parcels) for parcels in all_rounds), default=0)
    buckets = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    return [_step(parcels, buckets[index % 2]) for index, parcels in enumerate(all_rounds)]


def _step(parcels: Round, bucket: Tensor) -> Step:
    flats, start = [], 0
    for _, parcel in parcels:
        flats.append(bucket[start : start + parcel.nbytes])
        start += aligned(parcel.nbytes)
    found = [(parcel, flat) for (_, parcel), flat in zip(parcels, flats, strict=True)]
    moves = [row for parcel, flat in found for row in parcel.blocks(flat)]
    return Step([peer for peer, _ in parcels], flats, moves, [parcel.checksums(flat) for parcel, flat in found])


def rounds(parcels: Mapping[int, Sequence[Parcel]]) -> list[Round]:
    """The first parcel of each peer, then the second of each, ..."""
    count = max(map(len, parcels.values()), default=0)
    return [[(peer, each[k]) for peer, each in sorted(parcels.items()) if k < len(each)] for k in range(count)]


def cut(moves: Sequence[Move], dtypes: Mapping[str, torch.dtype], limit: int) -> list[Parcel]:
    """Parcels of at most ``limit`` bytes beside checksums, or of one row where that alone is more."""
    parcels: list[Parcel] = []
    current: list[tuple[Move, int]] = []
    end = 0
    for move in moves:
        for part in _rows(move, dtypes[move.name].itemsize, limit):
            size = part.box.size * dtypes[move.name].itemsize
            if current and end + size > limit:
                parcels.append(Parcel(tuple(current), dtypes))
                current, end = [], 0
            current.append((part, end))
            end = aligned(end + size)
    return [*parcels, Parcel(tuple(current), dtypes)] if current else parcels


def _rows(move: Move, itemsize: int, limit: int) -> Iterator[Move]:
    """A move in several of so many rows each."""
    low, high = move.box.start[0], move.box.stop[0]
    count = max(1, limit // max(1, move.box.size // (high - low) * itemsize))
    for first in range(low, high, count):
        box = Box((first, *move.box.start[1:]), (min(high, first + count), *move.box.stop[1:]))
        yield replace(move, box=box)
