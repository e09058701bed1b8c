"""Weights as one flat buffer with a manifest: what a publication carries through shared memory or between hosts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from asystem.errors import ModelError


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in the buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes
    num_bytes: int


@dataclass(slots=True)
class WeightPayload:
    """All parameters of a model. ``buffer`` is [num_bytes] uint8, read without a copy where shared memory carries it."""

    entries: dict[str, TensorEntry]
    buffer: npt.NDArray[np.uint8]

    def tensor(self, name: str) -> Tensor:
        """A view of one tensor; not to be written to."""
        entry = self.entries[name]
        raw = self.buffer[entry.offset : entry.offset + entry.num_bytes]
        return torch.frombuffer(memoryview(raw), dtype=entry.dtype).view(entry.shape)


@torch.no_grad()
def export_weights(model: nn.Module, dtype: torch.dtype | None = None, *, keep: bool = True) -> WeightPayload | None:
    """Gathers a model's parameters into one buffer. All ranks of a sharded model call it; those without ``keep`` get None.

    Args:
        dtype: of the payload, the generation side's own for the fewest bytes; default: each parameter's.
    """
    entries: dict[str, TensorEntry] = {}
    parts: list[Tensor] = []
    offset = 0
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        if not keep:
            continue
        part = whole.to(device="cpu", dtype=dtype or whole.dtype).contiguous().view(-1).view(torch.uint8)
        entries[name] = TensorEntry(tuple(whole.shape), dtype or whole.dtype, offset, part.numel())
        offset += -(-part.numel() // 64) * 64  # keeps every tensor aligned
        parts.append(part)
    if not keep:
        return None
    buffer = np.empty(offset, dtype=np.uint8)
    flat = torch.from_numpy(buffer)
    for entry, part in zip(entries.values(), parts, strict=True):
        flat[entry.offset : entry.offset + entry.num_bytes].copy_(part)
    return WeightPayload(entries, buffer)


@torch.no_grad()
def import_weights(model: nn.Module, payload: WeightPayload) -> None:
    """Copies a payload into a model's parameters, in place.

    Raises:
        ModelError: a tensor is missing on one side or has another shape; nothing was copied then.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ payload.entries.keys()):
        lacking = "generation" if name in payload.entries else "training"
        raise ModelError(f"published weights: {lacking} has no tensor {name}; both sides must load the same model")
    for name, parameter in parameters.items():
        sent = payload.entries[name].shape
        if sent != tuple(parameter.shape):
            raise ModelError(
                f"published weights: {name} is {list(sent)} in training, {list(parameter.shape)} in generation"
            )
    for name, parameter in parameters.items():
        parameter.copy_(payload.tensor(name))
