"""Weights of blocks in the host's pinned memory, brought to the GPU one block ahead of the arithmetic.

    copy in     block 1     block 2     block 3            in the backward pass the other way round
    compute     block 0     block 1     block 2
    copy out                                               and gradients, added to sums in the host's memory

Two places on the device take turns. A block's parameters are its place while it computes, and the host's copies at all
other times: so the optimizer, checkpoints and publications find them there. Autograd must keep no weight from forward
to backward, because its place has another block's by then: activations are computed again (`training.recompute`), which
reads weights where the block is back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from asystem.training.offload import aligned

WAITING = 24  # gradients on their way to the host, those of two or three blocks: more would pile up on the device


class StreamedBlocks:
    """Blocks that are called one after another, forward, then maybe backward.

    Args:
        blocks: in the dtype that they compute in. device: on a CPU all is as on a GPU, but nothing overlaps.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._params = [list(block.parameters()) for block in blocks]
        for p in (p for params in self._params for p in params):
            p.data = _pinned(p.data, device)
        self._host = [[p.data for p in params] for params in self._params]
        size = max(sum(map(aligned, tensors)) for tensors in self._host)
        self._places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copies.wait_stream(torch.cuda.current_stream(device))  # the places may be new
        self._place, self._resident = 0, -1  # the place in use, and the block in it; -1 = none
        self._next: tuple[int, list[Tensor], torch.cuda.Event | None] | None = None  # the block in the other place
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, index))
            block.register_forward_hook(partial(self._after_forward, index))

    def leave(self) -> None:
        """The host's copies are the parameters again; what was fetched is forgotten, for it may be changed there."""
        self._let_go()
        self._next = None

    def _before_forward(self, index: int, *_: Any) -> None:
        self._enter(index, 1)

    def _after_forward(self, index: int, block: nn.Module, inputs: Any, out: Tensor) -> None:
        if out.requires_grad:  # its gradient comes before all others of the block
            out.register_hook(lambda grad: self._enter(index, -1))  # type: ignore[no-untyped-call]

    def _enter(self, index: int, step: int) -> None:
        """Makes a block compute from its place, and begins to fetch the one that follows."""
        if self._resident != index:
            self._let_go()
            if self._next is None or self._next[0] != index:
                self._next = self._fetch(index)
            _, tensors, ready = self._next
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
            for p, tensor in zip(self._params[index], tensors, strict=True):
                p.data = tensor
            self._place, self._resident, self._next = 1 - self._place, index, None
        if 0 <= index + step < len(self._params) and (self._next is None or self._next[0] != index + step):
            self._next = self._fetch(index + step)

    def _let_go(self) -> None:
        if self._resident < 0:
            return
        for p, host in zip(self._params[self._resident], self._host[self._resident], strict=True):
            p.data = host
        if self._copies is not None:
            self._free[self._place] = torch.cuda.current_stream(self.device).record_event()
        self._resident = -1

    def _fetch(self, index: int) -> tuple[int, list[Tensor], torch.cuda.Event | None]:
        """Copies a block into the place that is not in use, once what was there has been computed with."""
        place, offset, tensors = self._places[1 - self._place], 0, []
        for host in self._host[index]:
            tensors.append(place[offset : offset + host.nbytes].view(host.dtype).view(host.shape))
            offset += aligned(host)
        if self._copies is None:
            torch._foreach_copy_(tensors, self._host[index])
            return index, tensors, None
        with torch.cuda.stream(self._copies):
            if (event := self._free[1 - self._place]) is not None:
                self._copies.wait_event(event)
            for tensor, host in zip(tensors, self._host[index], strict=True):
                tensor.copy_(host, non_blocking=True)
            return index, tensors, self._copies.record_event()


class HostSums:
    """Sums of gradients in pinned memory, float32, for parameters of a CUDA device.

    Attributes:
        norms: by parameter, of its sum, on the device: PyTorch's norm on a CPU adds up a large matrix's squares one
            after another in float32, which for 50 million of them comes out 0.4 % too small.
    """

    def __init__(self, params: dict[str, nn.Parameter], device: torch.device) -> None:
        self.device = device
        self._sums = {name: torch.empty(p.shape, dtype=torch.float32, pin_memory=True) for name, p in params.items()}
        self.norms: dict[str, Tensor] = {}
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sent: deque[torch.cuda.Event] = deque()

    def add(self, name: str, grad: Tensor, *, first: bool) -> Tensor:
        """The parameter's sum, with this gradient in it after `wait`; ``first``: and nothing else."""
        held = self._sums[name]
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        grad.record_stream(self._out)
        with torch.cuda.stream(self._out):
            total = grad.float() if first else held.to(self.device, non_blocking=True).add_(grad)
            (self.norms[name],) = torch._foreach_norm([total])
            held.copy_(total, non_blocking=True)
            self._sent.append(self._out.record_event())
        if len(self._sent) > WAITING:
            self._sent.popleft().synchronize()
        return held

    def wait(self) -> None:
        """Returns when the host's memory holds all that was added, and norms are known."""
        self._out.synchronize()
        self._sent.clear()


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
