"""Whole weights into a model that may hold only a rank's part of each."""

from __future__ import annotations

import torch
from torch import Tensor

from asystem.models.decoder import Decoder


def whole_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """The shapes in which weights are sent to a model, by parameter."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if model.shard is None:
        return shapes
    return {name: model.shard.whole_shape(model.spec, name, shape) for name, shape in shapes.items()}


@torch.no_grad()
def write_weight(model: Decoder, name: str, whole: Tensor) -> None:
    """Takes a whole weight over, in place: the model's part of it, in the model's dtype and on its device."""
    part = whole if model.shard is None else model.shard.part(model.spec, name, whole)
    write_rows(model, name, 0, part)


@torch.no_grad()
def write_rows(model: Decoder, name: str, start: int, rows: Tensor) -> None:
    """Writes rows of a parameter from `start` on, in place."""
    model.get_parameter(name).narrow(0, start, len(rows)).copy_(rows)
