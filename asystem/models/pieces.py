"""Where parts of a parameter lie: a rank of training or generation holds blocks of it, seldom all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from asystem.errors import ModelError


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a tensor: along each dimension from ``start`` up to, but not with, ``stop``."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    def meet(self, other: Box) -> Box | None:
        """What lies in both; None = nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def minus(self, other: Box) -> Iterator[Box]:
        """What lies here and not in ``other``, in blocks that do not meet."""
        common = self.meet(other)
        if common is None:
            yield self
            return
        start, stop = list(self.start), list(self.stop)
        for dim, (low, high) in enumerate(zip(common.start, common.stop, strict=True)):
            if start[dim] < low:
                yield Box(tuple(start), (*stop[:dim], low, *stop[dim + 1 :]))
            if high < stop[dim]:
                yield Box((*start[:dim], high, *start[dim + 1 :]), tuple(stop))
            start[dim], stop[dim] = low, high

    def moved(self, origin: tuple[int, ...], to: tuple[int, ...]) -> Box:
        """The same block where what was at ``origin`` is at ``to``."""
        start, stop = (
            tuple(n - a + b for n, a, b in zip(corner, origin, to, strict=True)) for corner in (self.start, self.stop)
        )
        return Box(start, stop)

    def of(self, tensor: Tensor, origin: tuple[int, ...]) -> Tensor:
        """The block as a view into a tensor whose first element is number ``origin`` of the whole."""
        for dim, (first, low, size) in enumerate(zip(origin, self.start, self.shape, strict=True)):
            tensor = tensor.narrow(dim, low - first, size)
        return tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a whole parameter inside the tensor that a rank has of it, which begins ``at`` there."""

    box: Box
    at: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Piece:
        return cls(Box.whole(shape), (0,) * len(shape))

    def part(self, box: Box, local: Tensor) -> Tensor:
        """A block inside this one, as a view into the rank's tensor."""
        return box.of(local, tuple(low - at for low, at in zip(self.box.start, self.at, strict=True)))


@dataclass(frozen=True)
class Held:
    """What one rank has of a tensor.

    Attributes:
        shape: of the whole.
        blocks: where in the whole each lies, and a view of it; none where other ranks have all.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Sequence[tuple[Box, Tensor]]

    @classmethod
    def of(cls, tensor: Tensor, shape: tuple[int, ...] | None = None, pieces: Sequence[Piece] = ()) -> Held:
        """Of a tensor, of which FSDP may have left this rank a part.

        Args:
            shape, pieces: of the whole that the tensor is itself a part of, where a model is cut over ranks: which
                blocks of it lie where in the tensor.
        """
        found, local = local_piece(tensor.detach())
        whole, blocks = tuple(tensor.shape) if shape is None else shape, []
        for piece in pieces or [Piece.whole(whole)]:
            there = Box(piece.at, tuple(a + n for a, n in zip(piece.at, piece.box.shape, strict=True)))
            if (common := there.meet(found)) is not None:
                blocks.append((common.moved(piece.at, piece.box.start), common.of(local, found.start)))
        return cls(whole, tensor.dtype, blocks)

    def to_host(self) -> Held:
        """A copy in the host's memory."""
        copies = [(box, block.to("cpu", copy=True)) for box, block in self.blocks]
        return Held(self.shape, self.dtype, copies)

    @property
    def num_bytes(self) -> int:
        """Of the whole."""
        return prod(self.shape) * self.dtype.itemsize


def local_piece(tensor: Tensor) -> tuple[Box, Tensor]:
    """What this rank has of a tensor, and where in the whole that lies; a DTensor is cut along one dimension at most.

    Raises:
        ModelError: the DTensor is cut in another way.
    """
    value: Any = tensor
    if not hasattr(value, "placements"):  # not isinstance: importing DTensor takes a second
        return Box.whole(tuple(tensor.shape)), tensor
    start, stop = [0] * tensor.ndim, list(tensor.shape)
    cut = [(mesh_dim, placement.dim) for mesh_dim, placement in enumerate(value.placements) if placement.is_shard()]
    if len(cut) > 1 or any(placement.is_partial() for placement in value.placements):
        raise ModelError(f"a parameter placed as {value.placements} has no simple place in the whole")
    for mesh_dim, dim in cut:  # as torch.chunk cuts: the last ranks may have less, or nothing
        rank, size = value.device_mesh.get_coordinate()[mesh_dim], stop[dim]
        each = -(-size // value.device_mesh.size(mesh_dim))
        start[dim], stop[dim] = min(size, rank * each), min(size, (rank + 1) * each)
    return Box(tuple(start), tuple(stop)), value.to_local()
