"""What is handed over at a publication: blocks of parameters in a buffer, with their places there and in the whole."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from asystem.errors import ModelError
from asystem.models import Box, Piece
from asystem.spmd import Buffer, DeviceBuffer
from asystem.state.plan import Holdings, Layout

Pair = tuple[Tensor, Tensor]
"""A view to write, and one of the same shape to read."""

SMALL = 1 << 24  # bytes; copies below are launched together: on an H200 one of 4 MB takes 2 us, and 5 to be launched
ALIGNMENT = 64  # bytes; a block starts where any dtype may be read


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block of a parameter lies in a buffer, row-major from ``offset`` (bytes) on."""

    name: str
    shape: tuple[int, ...]  # of the whole
    box: Box
    dtype: str  # float32, bfloat16, ...
    offset: int

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.offset + prod(self.box.shape) * dtype_named(self.dtype).itemsize

    def of(self, flat: Tensor) -> Tensor:
        """The block as a view into a buffer [bytes] uint8."""
        return flat[self.offset : self.end].view(dtype_named(self.dtype)).view(self.box.shape)


class Places(tuple[Place, ...]):
    """Of one buffer. They travel with each publication, and whoever knows them already gets the same object."""

    _blob: bytes | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self._blob is None:
            self._blob = pickle.dumps(tuple(self))
        return _known_places, (self._blob,)


@lru_cache(maxsize=64)
def _known_places(blob: bytes) -> Places:
    return Places(pickle.loads(blob))


@dataclass(frozen=True, slots=True)
class WeightPayload:
    """One rank's part of a model's weights.

    Attributes:
        checksums: of the blocks as they were in the sender's parameters, in the order of ``places``; () = not taken.
        sender: its rank in training.
        frozen: with the first publication, what never changes afterwards, in a buffer that is read once.
    """

    places: tuple[Place, ...]
    buffer: Buffer | DeviceBuffer
    checksums: tuple[int, ...] = ()
    sender: int = 0
    frozen: WeightPayload | None = None

    @property
    def nbytes(self) -> int:
        """Of its buffers, padding included."""
        return self.buffer.nbytes + (0 if self.frozen is None else self.frozen.nbytes)

    def parts(self) -> Iterator[WeightPayload]:
        """Its own places, and the frozen ones where those came along, in parts that have one block of a parameter at
        most: a rank that shares layers with others sends several."""
        if len({place.name for place in self.places}) == len(self.places):
            yield self
        else:
            for turn in turns([place.name for place in self.places]):
                sums = tuple(self.checksums[index] for index in turn if self.checksums)
                yield replace(self, places=tuple(self.places[index] for index in turn), checksums=sums)
        if self.frozen is not None:
            yield from self.frozen.parts()

    def holdings(self) -> Holdings:
        """What the sender has sent, by parameter."""
        return {p.name: Layout(p.shape, [Piece(p.box, (0,) * len(p.shape))]) for p in self.places}

    def blocks(self) -> list[Tensor]:
        """Views into the buffer, which may be read-only: do not write to them.

        Raises:
            ModelError: the buffer is short.
        """
        for place in self.places:
            if place.end > self.buffer.nbytes:
                raise ModelError(
                    f"{place.name} ends at byte {place.end}, but the buffer that rank {self.sender} of training sent "
                    f"has {self.buffer.nbytes}"
                )
        flat = self.buffer.flat()
        return [place.of(flat) for place in self.places]


def turns(names: Sequence[str]) -> list[list[int]]:
    """The numbers of the first ones of each name, of the second ones, ...

    >>> turns(["a", "b", "a"])
    [[0, 1], [2]]
    """
    found: list[list[int]] = []
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        if seen[name] == len(found):
            found.append([])
        found[seen[name]].append(index)
        seen[name] += 1
    return found


def lay_out(blocks: Sequence[tuple[str, tuple[int, ...], Box, torch.dtype]]) -> Places:
    """Places of blocks (name, shape of the whole, box, dtype) one after another."""
    places: list[Place] = []
    for name, shape, box, dtype in blocks:
        offset = aligned(places[-1].end) if places else 0
        places.append(Place(name, shape, box, str(dtype).removeprefix("torch."), offset))
    return Places(places)


def aligned(nbytes: int) -> int:
    """The next byte at which a block may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def dtype_named(name: str) -> torch.dtype:
    """A dtype by its name in torch.

    Raises:
        ModelError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f'weights were sent in the unknown dtype "{name}"')
    return found


def copy_all(pairs: Sequence[Pair]) -> None:
    """Copies into the first of each pair from the second, whatever the dtypes and devices."""
    targets, sources = [], []
    for target, source in pairs:
        if target.nbytes < SMALL and target.get_device() == source.get_device():  # launched together: on one device
            targets.append(target)
            sources.append(source)
        else:
            target.copy_(source)
    if targets:
        torch._foreach_copy_(targets, sources)
