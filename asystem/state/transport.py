"""AState, first cut: all weights in one flat buffer with a manifest, from a trainer to any reader.

The buffer is a numpy array of bytes, so that shared memory and object stores carry it without a copy. A tied head is
the embedding and goes once. Readers copy into the tensors they have, converting the dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asystem.errors import ModelError, nearest
from asystem.models import Decoder, PlainWeight, plain_weights, whole_shapes, write_weight

ALIGNMENT = 64  # bytes; a tensor starts where any dtype may be read


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor lies in the buffer, row-major from ``offset`` (bytes) on."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # float32, bfloat16, ...
    offset: int

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        return prod(self.shape) * _dtype(self.dtype).itemsize

    def of(self, flat: Tensor) -> Tensor:
        """The tensor as a view into the buffer [bytes] uint8."""
        return flat[self.offset : self.offset + self.num_bytes].view(_dtype(self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class WeightPayload:
    """A model's weights: ``places`` in ``buffer`` [bytes] uint8."""

    places: tuple[TensorPlace, ...]
    buffer: npt.NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        """Of the buffer, padding included."""
        return self.buffer.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Views into the buffer, which may be read-only: do not write to them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.buffer)
        return {place.name: place.of(flat) for place in self.places}


@torch.no_grad()
def export_weights(model: nn.Module, dtype: torch.dtype | None = None, *, keep: bool = True) -> WeightPayload | None:
    """Copies a model's parameters into a payload, adapters merged into the matrices that they stand beside.

    FSDP's shards are gathered one parameter at a time, so every rank must call it, in step.

    Args:
        dtype: on the wire; None = as the parameters are.
        keep: false on ranks that take part only.

    Returns:
        the payload, or None where it is not kept.
    """
    weights = plain_weights(model)
    places = _plan(weights, dtype)
    size = max((place.offset + place.num_bytes for place in places), default=0)
    buffer = torch.zeros(size, dtype=torch.uint8) if keep else None
    for place, weight in zip(places, weights, strict=True):
        whole = weight.value(dtype)
        if buffer is not None:
            place.of(buffer).copy_(whole)
    return None if buffer is None else WeightPayload(tuple(places), buffer.numpy())


def import_weights(model: Decoder, payload: WeightPayload) -> None:
    """Copies a payload into a model's parameters in place, in their dtype and on their device; of a model that is cut
    over ranks, into this rank's part.

    Raises:
        ModelError: names or shapes differ, or the buffer is short; nothing is changed then.
    """
    _check(whole_shapes(model), payload)
    for name, tensor in payload.tensors().items():
        write_weight(model, name, tensor)


def _plan(weights: Sequence[PlainWeight], dtype: torch.dtype | None) -> list[TensorPlace]:
    places: list[TensorPlace] = []
    offset = 0
    for weight in weights:
        wire = str(dtype or weight.dtype).removeprefix("torch.")
        places.append(TensorPlace(weight.name, weight.shape, wire, offset))
        offset += -(-places[-1].num_bytes // ALIGNMENT) * ALIGNMENT
    return places


def _check(shapes: dict[str, tuple[int, ...]], payload: WeightPayload) -> None:
    sent = {place.name: place for place in payload.places}
    for name in sent.keys() - shapes.keys():
        raise ModelError(f"weights were sent for {name}, which the receiving model has not{nearest(name, shapes)}")
    for name, shape in shapes.items():
        if name not in sent:
            raise ModelError(f"the receiving model has {name}, for which no weights were sent{nearest(name, sent)}")
        if sent[name].shape != shape:
            raise ModelError(f"{name} was sent as {sent[name].shape}, the receiving model's is {shape}")
        end = sent[name].offset + sent[name].num_bytes
        if end > payload.num_bytes:
            raise ModelError(f"{name} ends at byte {end}, but the buffer sent has {payload.num_bytes}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f'weights were sent in the unknown dtype "{name}"')
    return found
