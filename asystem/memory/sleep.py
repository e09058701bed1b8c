"""AMem: what each phase holds of a GPU's memory, and how the rest sleeps in the host's.

    phase         holds
    generation    weights, decoding weights, kv
    training      weights, masters and moments, reference

What a phase does not hold is asleep: its bytes are in pinned memory of the host, or nowhere where nobody will read them
again, and its memory on the GPU is free. Two streams copy, one each way; a storage is let go as soon as it has left,
and what comes takes its room while the next one leaves. Whatever is kept wakes up bit for bit.

Storages of PyTorch's allocator wake at other addresses, which tensors and their views follow; a `MappedRegion` wakes at
its own, so that CUDA graphs over it stay valid.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asystem.memory.mapped import MappedRegion

CHUNK = 2**26  # bytes of one copy and of one piece of pinned memory


class Place(Protocol):
    """Memory on the device that can be let go."""

    nbytes: int

    def bytes(self) -> Tensor: ...

    def release(self) -> None: ...

    def restore(self) -> None: ...


class StoragePlace:
    """A storage of PyTorch's allocator."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage, self.nbytes = storage, storage.nbytes()

    def bytes(self) -> Tensor:
        """All of it, [bytes] uint8."""
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)

    def release(self) -> None:
        """Gives it back to the allocator."""
        self.storage.resize_(0)

    def restore(self) -> None:
        """Takes as much again."""
        self.storage.resize_(self.nbytes)


class MappedPlace:
    """A `MappedRegion`."""

    def __init__(self, region: MappedRegion) -> None:
        self.region, self.nbytes = region, region.tensor.nbytes

    def bytes(self) -> Tensor:
        """All of it, [bytes] uint8."""
        return self.region.tensor

    def release(self) -> None:
        """Unmaps it."""
        self.region.unmap()

    def restore(self) -> None:
        """Maps it."""
        self.region.map()


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that went to the host and came back, those dropped, and the seconds for all of it."""

    slept: int = 0
    woken: int = 0
    dropped: int = 0
    seconds: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.slept + other.slept,
            self.woken + other.woken,
            self.dropped + other.dropped,
            self.seconds + other.seconds,
        )


class AMem:
    """The holdings of one device.

    Args:
        device: on a CPU the same bytes are copied, for tests: nothing is won.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"
        self._places: dict[str, list[Place]] = {}
        self._host: dict[str, list[list[Tensor]]] = {}  # pieces of each place, made at its first sleep
        self._asleep: dict[str, bool] = {}  # by holding: are its bits kept?
        if self._cuda:
            self._out, self._in = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def add(self, name: str, what: Iterable[Tensor] | MappedRegion, *, apart_from: Iterable[Tensor] = ()) -> None:
        """Names tensors, or a region, that some phase can do without.

        Args:
            apart_from: tensors that always stay; storages that they share are left out, as are those elsewhere.
        """
        if isinstance(what, MappedRegion):
            self._places[name] = [MappedPlace(what)]
            return
        staying = {tensor.untyped_storage()._cdata for tensor in apart_from}
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in what
                    if tensor.device.type == self.device.type}  # fmt: skip
        self._places[name] = [
            StoragePlace(storage) for key, storage in storages.items() if key not in staying and storage.nbytes()
        ]

    def held(self) -> dict[str, int]:
        """Bytes on the device by holding; 0 = asleep."""
        return {
            name: 0 if name in self._asleep else sum(place.nbytes for place in places)
            for name, places in self._places.items()
        }

    def enter(self, holds: Collection[str], drop: Collection[str] = ()) -> Moved:
        """Begins a phase that holds these; the others sleep.

        Args:
            drop: of those that fall asleep the ones whose bits nobody needs; they wake up as zeros.
        """
        started = time.perf_counter()
        leaving = [name for name in self._places if name not in holds and name not in self._asleep]
        coming = [name for name in self._places if name in holds and name in self._asleep]
        if not leaving and not coming:
            return Moved()
        if self._cuda:
            current = torch.cuda.current_stream(self.device)
            self._out.wait_stream(current)
            self._in.wait_stream(current)
        dropped = sum(self._drop(name) for name in leaving if name in drop)
        slept, woken = self._swap([name for name in leaving if name not in drop], coming)
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_stream(self._in)
            torch.cuda.synchronize(self.device)
        return Moved(slept, woken, dropped, time.perf_counter() - started)

    def _drop(self, name: str) -> int:
        for place in self._places[name]:
            place.release()
        self._asleep[name] = False
        return sum(place.nbytes for place in self._places[name])

    def _swap(self, leaving: Sequence[str], coming: Sequence[str]) -> tuple[int, int]:
        """One place after another leaves; what comes is restored in the room that has been left."""
        waiting = deque((name, index) for name in coming for index in range(len(self._places[name])))
        copies = []
        for name in leaving:
            for index in range(len(self._places[name])):
                copies.append((name, index, self._copy_out(name, index)))
            self._asleep[name] = True
        room = slept = woken = 0
        for name, index, event in copies:
            if event is not None:
                event.synchronize()
            place = self._places[name][index]
            place.release()
            room += place.nbytes
            slept += place.nbytes
            while waiting and self._size(waiting[0]) <= room:
                room -= self._size(waiting[0])
                woken += self._copy_in(*waiting.popleft())
        for entry in waiting:
            woken += self._copy_in(*entry)
        for name in coming:
            del self._asleep[name]
        return slept, woken

    def _size(self, entry: tuple[str, int]) -> int:
        return self._places[entry[0]][entry[1]].nbytes

    def _copy_out(self, name: str, index: int) -> torch.cuda.Event | None:
        flat = self._places[name][index].bytes()
        pieces = self._pieces(name, index)
        if not self._cuda:
            _copy(flat, pieces, out=True)
            return None
        with torch.cuda.stream(self._out):
            _copy(flat, pieces, out=True)
            event: torch.cuda.Event = self._out.record_event()
            return event

    def _copy_in(self, name: str, index: int) -> int:
        """Restores a place and brings back what it held; bytes that came over the bus."""
        place = self._places[name][index]
        place.restore()
        if not self._asleep[name]:
            place.bytes().zero_()
            return 0
        if not self._cuda:
            _copy(place.bytes(), self._pieces(name, index), out=False)
            return place.nbytes
        self._in.wait_stream(torch.cuda.current_stream(self.device))  # the allocator reuses memory in its order
        with torch.cuda.stream(self._in):
            _copy(place.bytes(), self._pieces(name, index), out=False)
        return place.nbytes

    def _pieces(self, name: str, index: int) -> list[Tensor]:
        """The host's memory for a place: the allocator of pinned memory rounds up to powers of two, so in pieces."""
        kept = self._host.setdefault(name, [[] for _ in self._places[name]])
        if not kept[index]:
            left = self._places[name][index].nbytes
            while left:
                size = min(left, CHUNK)
                kept[index].append(torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda))
                left -= size
        return kept[index]


def _copy(flat: Tensor, pieces: Sequence[Tensor], *, out: bool) -> None:
    for piece, part in zip(pieces, torch.split(flat, CHUNK), strict=True):
        if out:
            piece.copy_(part, non_blocking=True)
        else:
            part.copy_(piece, non_blocking=True)
