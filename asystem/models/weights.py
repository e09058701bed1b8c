"""Whole weights into a model that may hold a rank's part of each, or 8-bit numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from asystem.models.decoder import Decoder
from asystem.models.quantized import QuantizedLinear


def whole_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """The shapes in which weights are sent to a model, by parameter."""
    parameters = dict(model.named_parameters())
    shapes = {n: tuple(parameter.shape) for n, parameter in parameters.items() if not n.endswith(".channel_scale")}
    if model.shard is None:
        return shapes
    return {name: model.shard.whole_shape(model.spec, name, shape) for name, shape in shapes.items()}


@torch.no_grad()
def write_weight(model: Decoder, name: str, whole: Tensor) -> None:
    """Takes a whole weight over, in place: the model's part of it, in the dtype that it has here, on its device."""
    part = whole if model.shard is None else model.shard.part(model.spec, name, whole)
    write_rows(model, name, 0, part)


@torch.no_grad()
def write_rows(model: Decoder, name: str, start: int, rows: Tensor, expert: int | None = None) -> None:
    """Writes rows of a parameter, or of one expert's matrix in it, from `start` on, in place."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, QuantizedLinear) and name.endswith(".weight"):
        return owner.write(start, rows)
    matrix_of(model.get_parameter(name), expert).narrow(0, start, len(rows)).copy_(rows)


def matrix_of(tensor: Tensor, expert: int | None) -> Tensor:
    """The matrix of one expert in a stack of them [E, M, K]; without an expert, the tensor itself."""
    return tensor if expert is None else tensor[expert]
