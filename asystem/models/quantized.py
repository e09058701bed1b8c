"""Weight-only 8-bit layers for generation: the blocks' matrices in int8 or fp8 (e4m3), a scale a row.

Activations, biases, norms, routers, embedding and head stay in the model's dtype. Scales are numbers of bfloat16, as
all 8-bit numbers are, so that both enter a product in half precision as they are: a weight is rounded once, when it is
quantised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asystem.models.decoder import Decoder
from asystem.models.moe import Experts, GroupedProduct, MoE

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_AT_ONCE = 1 << 24  # numbers that are quantised together, in float32
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
EXPERTS = ("gate_up", "down")  # stacks of them


class QuantizedLinear(nn.Module):
    """What a linear layer computes, from 8-bit weights that `write` fills in place.

    Attributes:
        weight: [N, K] int8 or float8_e4m3fn. channel_scale: [N] float32; weight times it is the matrix.
        bias: [N] in the model's dtype, or None.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        matrix = linear.weight
        self.weight = nn.Parameter(torch.empty_like(matrix, dtype=dtype), requires_grad=False)
        self.channel_scale = nn.Parameter(matrix.new_empty(len(matrix), dtype=torch.float32), requires_grad=False)
        self.bias = linear.bias
        self.write(0, matrix.detach())

    @torch.no_grad()
    def write(self, start: int, rows: Tensor) -> None:
        """Quantises rows [n, K] of the matrix into those from `start` on."""
        count = max(1, _AT_ONCE // rows.shape[1])
        for first in range(0, len(rows), count):
            part = rows[first : first + count].to(self.weight.device)
            place = slice(start + first, start + first + len(part))
            self.weight[place], self.channel_scale[place] = quantize_rows(part, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        out = F.linear(x, self.weight.to(x.dtype)).mul_(self.channel_scale.to(x.dtype))
        return out if self.bias is None else out.add_(self.bias)


class QuantizedExperts(Experts):
    """What a layer's experts compute, from 8-bit matrices that `write` fills in place.

    They are widened for each product, all of them: it saves memory, not time.

    Attributes:
        gate_up: [E, 2 I, D], down: [E, D, I], int8 or float8_e4m3fn.
        gate_up_channel_scale: [E, 2 I], down_channel_scale: [E, D], float32.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.exchange = experts.exchange
        for name in EXPERTS:
            stack: Tensor = getattr(experts, name).detach()
            numbers, scale = torch.empty_like(stack, dtype=dtype), stack.new_empty(stack.shape[:2], dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(numbers, requires_grad=False))
            self.register_parameter(f"{name}_channel_scale", nn.Parameter(scale, requires_grad=False))
            self.write(name, stack)

    @torch.no_grad()
    def write(self, name: str, stack: Tensor) -> None:
        """Quantises all experts' matrices [E, M, K] of ``name``, one after another."""
        for expert, rows in enumerate(stack):
            self.write_rows(name, expert, 0, rows)

    @torch.no_grad()
    def write_rows(self, name: str, expert: int, start: int, rows: Tensor) -> None:
        """Quantises rows [n, K] of an expert's matrix into those from `start` on."""
        numbers, scale = self.get_parameter(name)[expert], self.get_parameter(f"{name}_channel_scale")[expert]
        place = slice(start, start + len(rows))
        numbers[place], scale[place] = quantize_rows(rows.to(numbers.device), numbers.dtype)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor, product: GroupedProduct) -> Tensor:
        """As `Experts.forward`."""

        def widened(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
            scale = self.get_parameter(f"{'gate_up' if weight is self.gate_up else 'down'}_channel_scale")
            owner = torch.searchsorted(ends, torch.arange(len(rows), device=ends.device, dtype=ends.dtype), right=True)
            return product(rows, weight.to(rows.dtype), ends) * scale.to(rows.dtype).index_select(0, owner)

        return super().forward(x, weights, chosen, widened)


def quantize_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [n, K] as 8-bit numbers [n, K] times scales [n] float32.

    An int8 number is off by half a scale at most. One of fp8 is off by a sixteenth of itself, or by 2^-10 scales where
    that is more: for weights spread like a normal distribution about three times the error of int8.
    """
    rows, largest = rows.float(), LARGEST[dtype]
    peak = rows.abs().amax(1)
    scale = (peak / largest).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    numbers = (rows / scale[:, None]).clamp_(-largest, largest)
    return (numbers.round_() if dtype is torch.int8 else numbers).to(dtype), scale


def quantize(model: Decoder, dtype: torch.dtype) -> Decoder:
    """Replaces the blocks' matrices, experts' among them, by 8-bit ones, in place. The model is in its final dtype:
    `to` would undo this.

    Args:
        dtype: int8 or float8_e4m3fn.
    """
    for module in list(model.layers.modules()):
        if isinstance(module, MoE):
            module.experts = QuantizedExperts(module.experts, dtype)
        for name in MATRICES:
            linear = getattr(module, name, None)
            if isinstance(linear, nn.Linear):
                setattr(module, name, QuantizedLinear(linear, dtype))
    return model
