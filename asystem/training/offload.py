"""Optimizer states in the host's pinned memory, brought to the GPU and back a piece at a time beside the arithmetic.

    copy in     piece 2          piece 3          piece 4
    compute     piece 1          piece 2          piece 3
    copy out    piece 0          piece 1          piece 2

Three places on the device take turns; streams wait for each other there, the host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

PLACES = 3
ALIGNMENT = 256  # bytes; of a tensor in its place


class HostStates:
    """Streams and places of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._in, self._out = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._places: list[Tensor] = []

    def place(self, state: Tensor) -> Tensor:
        """A copy of a tensor in pinned memory."""
        return torch.empty_like(state, device="cpu", pin_memory=True).copy_(state)

    def wait(self) -> None:
        """Returns when the host's memory holds all that was computed."""
        self._out.synchronize()

    def stream(self, pieces: Sequence[list[list[Tensor]]]) -> Iterator[list[list[Tensor]]]:
        """Each piece's states on the device, to be changed there in place before the next is asked for.

        Tensors that are on the device already are passed on as they are. What is taken off the end of a piece's list
        meanwhile is not written back.
        """
        self._make_room(pieces)
        main = torch.cuda.current_stream(self.device)
        free: list[torch.cuda.Event | None] = [None] * PLACES
        self._in.wait_stream(main)  # the places may be new
        self._in.wait_stream(self._out)  # what the last step wrote back is read again
        coming = self._fetch(pieces[0], 0, free) if pieces else None
        for number, piece in enumerate(pieces):
            assert coming is not None, "each piece is fetched while the one before is computed"
            states, ready = coming
            following = (number + 1) % PLACES
            coming = self._fetch(pieces[number + 1], following, free) if number + 1 < len(pieces) else None
            main.wait_event(ready)
            yield states
            self._out.wait_stream(main)
            with torch.cuda.stream(self._out):
                for kept, copies in zip(piece, states, strict=False):
                    for tensor, copy in zip(kept, copies, strict=True):
                        if tensor is not copy:
                            tensor.copy_(copy, non_blocking=True)
                free[number % PLACES] = self._out.record_event()

    def _fetch(
        self, piece: list[list[Tensor]], place: int, free: list[torch.cuda.Event | None]
    ) -> tuple[list[list[Tensor]], torch.cuda.Event]:
        """Copies a piece into its place, when what lay there has been written back."""
        room, offset, states = self._places[place], 0, []
        with torch.cuda.stream(self._in):
            if (event := free[place]) is not None:
                self._in.wait_event(event)
            for kept in piece:
                copies = []
                for tensor in kept:
                    if tensor.is_cuda:
                        copies.append(tensor)
                        continue
                    copy = room[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                    copies.append(copy.copy_(tensor, non_blocking=True))
                    offset += aligned(tensor)
                states.append(copies)
            return states, self._in.record_event()

    def _make_room(self, pieces: Sequence[list[list[Tensor]]]) -> None:
        needed = max((sum(aligned(t) for kept in piece for t in kept if not t.is_cuda) for piece in pieces), default=0)
        if not self._places or self._places[0].numel() < needed:
            self._places = [torch.empty(needed, dtype=torch.uint8, device=self.device) for _ in range(PLACES)]


def aligned(tensor: Tensor) -> int:
    """Bytes that a tensor takes of a place."""
    size = prod(tensor.shape) * tensor.element_size()
    return -(-size // ALIGNMENT) * ALIGNMENT
