"""Frozen linear layers in 8 or 4 bits, under adapters that train (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A block of a row's numbers shares a scale, its largest number. int8 has 255 even steps; nf4 has 16 values at equal
shares of a normal distribution, two numbers a byte. The matrix is made whole for each product and dropped, in the
backward pass too, which needs it for the gradient of the input alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asystem.errors import ModelError

KINDS = ("int8", "nf4")
BLOCK = 64
_AT_ONCE = 1 << 24  # numbers that are quantised together, in float32
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip  # their appendix E


class FrozenLinear(nn.Module):
    """What a linear layer computes, from its matrix in fewer bits; no gradient reaches the matrix or the bias.

    Attributes:
        codes: [N, K] int8, or [N, K / 2] uint8, the number at the even place in the lower half of a byte.
        scale: [N, K / block], in the dtype that the layer computes in.
        bias: [N] in the same, or None.

    Raises:
        ModelError: nf4 for an odd K.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        matrix = linear.weight.detach()
        self.out_features, self.in_features = matrix.shape
        if kind == "nf4" and self.in_features % 2:
            raise ModelError(
                f"training.lora.base=nf4 keeps pairs of numbers, and a row has {self.in_features}: use int8"
            )
        count = max(1, _AT_ONCE // self.in_features)
        parts = [_quantized(rows, kind) for rows in torch.split(matrix, count)]
        codes, scale = (torch.cat(column) for column in zip(*parts, strict=True))
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)

    def dense(self) -> Tensor:
        """The matrix [N, K] that the layer multiplies with, in its scales' dtype."""
        return dequantized(self.codes, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        out: Tensor = _product(x, self.codes, self.scale)
        return out if self.bias is None else out + self.bias


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """[N, K] in the dtype of the scales."""
    numbers = codes.to(scale.dtype) if codes.dtype is torch.int8 else F.embedding(codes.int(), _pairs(scale))
    return (numbers.view(*scale.shape, -1) * scale[..., None]).view(len(codes), -1)


def _quantized(rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    width = rows.shape[1]
    block = max(size for size in range(1, min(width, BLOCK) + 1) if width % size == 0)
    blocks = rows.float().view(len(rows), -1, block)
    largest = 127.0 if kind == "int8" else 1.0
    scale = (blocks.abs().amax(-1) / largest).to(rows.dtype)  # rounded first: numbers are then nearest to what is kept
    shares = blocks / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if kind == "int8":
        return shares.round().clamp(-largest, largest).to(torch.int8).view(len(rows), width), scale
    values = torch.tensor(NF4, device=rows.device)
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8).view(len(rows), -1, 2)
    return codes[..., 0] | codes[..., 1] << 4, scale


def _pairs(scale: Tensor) -> Tensor:
    return _table(scale.dtype, scale.device)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: both numbers of a byte."""
    values, byte = torch.tensor(NF4, dtype=dtype), torch.arange(256)
    return torch.stack([values[byte % 16], values[byte // 16]], dim=1).to(device)


# Operators of their own, so that neither autograd nor torch.compile keeps the whole matrix for the backward pass.
@torch.library.custom_op("asystem::frozen_linear", mutates_args=())
def _product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, dequantized(codes, scale))


@torch.library.custom_op("asystem::frozen_linear_backward", mutates_args=())
def _input_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return grad @ dequantized(codes, scale)


@_product.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_input_gradient.register_fake
def _(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], codes.shape[1] * (1 if codes.dtype is torch.int8 else 2))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _input_gradient(grad, *ctx.saved_tensors), None, None


_product.register_autograd(_backward, setup_context=_keep)
