"""Which blocks of parameters a model holds, and how they are written: it may hold a rank's part, or 8-bit numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asystem.models.decoder import Decoder
from asystem.models.pieces import Piece
from asystem.models.quantized import QuantizedExperts, QuantizedLinear


def weight_pieces(model: Decoder) -> dict[str, tuple[tuple[int, ...], Sequence[Piece]]]:
    """Of each parameter that is sent from or to a model its whole shape, and which blocks the model holds where."""
    found: dict[str, tuple[tuple[int, ...], Sequence[Piece]]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("channel_scale"):  # comes about with the 8-bit numbers beside it
            continue
        shape = tuple(parameter.shape)
        if model.shard is not None:
            shape = model.shard.whole_shape(model.spec, name, shape)
            found[name] = shape, model.shard.pieces(model.spec, name, shape)
        else:
            found[name] = shape, [Piece.whole(shape)]
    return found


def plain_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """The parameters that are written as they are sent: all but matrices in 8 bits."""
    named = model.named_parameters()
    return {n: p for n, p in named if not n.endswith("channel_scale") and _owner(model, n)[0] is None}


@contextmanager
def writing(model: Decoder, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor into which all of what the model holds of a parameter is to be written.

    It is the parameter itself; for a matrix in 8 bits one beside it, of ``dtype``, which is quantised at the end.
    """
    owner, leaf = _owner(model, name)
    parameter = model.get_parameter(name).detach()
    if owner is None:
        yield parameter
        return
    beside = torch.empty_like(parameter, dtype=dtype)
    yield beside
    if isinstance(owner, QuantizedExperts):
        owner.write(leaf, beside)
    else:
        owner.write(0, beside)


@torch.no_grad()
def write_rows(model: Decoder, name: str, start: int, rows: Tensor, expert: int | None = None) -> None:
    """Writes rows of a parameter, or of one expert's matrix in it, from `start` on, in place."""
    owner, leaf = _owner(model, name)
    if owner is None:
        matrix_of(model.get_parameter(name), expert).narrow(0, start, len(rows)).copy_(rows)
    elif isinstance(owner, QuantizedExperts):
        assert expert is not None, f"{name} holds a matrix for each expert"
        owner.write_rows(leaf, expert, start, rows)
    else:
        owner.write(start, rows)


def matrix_of(tensor: Tensor, expert: int | None) -> Tensor:
    """The matrix of one expert in a stack of them [E, M, K]; without an expert, the tensor itself."""
    return tensor if expert is None else tensor[expert]


def _owner(model: Decoder, name: str) -> tuple[QuantizedLinear | QuantizedExperts | None, str]:
    """The layer that keeps a matrix in 8 bits, None for what is kept as it is; and its name there."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizedExperts) or (isinstance(module, QuantizedLinear) and leaf == "weight"):
        return module, leaf
    return None, leaf
