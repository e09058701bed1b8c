"""How a master weight or a moment is kept between steps: in float32, in bfloat16, or in 8 bits.

All of it is float32 while it is updated, some rows at a time; `read` and `write` stand between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_BLOCK = 256


class Kind(Protocol):
    """A way to keep a tensor [rows, ...] in tensors that can be cut along their rows in the same way."""

    def zeros(self, like: Tensor) -> tuple[Tensor, ...]:
        """Room for a tensor of that shape and sharding, holding 0."""
        ...

    def read(self, kept: Sequence[Tensor]) -> Tensor:
        """The values in float32; the kept tensor itself where it is that already."""
        ...

    def write(self, kept: Sequence[Tensor], values: Tensor, noise: torch.Generator) -> None:
        """Takes new values over, in place."""
        ...


class Float32:
    """As it is."""

    def zeros(self, like: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros_like(like, dtype=torch.float32, requires_grad=False),)

    def read(self, kept: Sequence[Tensor]) -> Tensor:
        return kept[0]

    def write(self, kept: Sequence[Tensor], values: Tensor, noise: torch.Generator) -> None:
        assert values is kept[0], "float32 states are updated in place"


class StochasticBFloat16:
    """Rounded at random, so that updates far below a weight's last bit add up as they should on average."""

    def zeros(self, like: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros_like(like, dtype=torch.bfloat16, requires_grad=False),)

    def read(self, kept: Sequence[Tensor]) -> Tensor:
        return kept[0].float()

    def write(self, kept: Sequence[Tensor], values: Tensor, noise: torch.Generator) -> None:
        stochastic_round_(kept[0], values, noise)


class Dynamic8Bit:
    """8-bit codes into a table, scaled by the largest value of each block (Dettmers et al. 2022, arXiv:2110.02861).

    Blocks lie along the last axis, so that a shard of rows has whole blocks.

    Args:
        signed: as first moments are; second ones have the whole table for what is above 0.
    """

    def __init__(self, *, signed: bool) -> None:
        self.signed = signed

    def zeros(self, like: Tensor) -> tuple[Tensor, ...]:
        codes = torch.zeros_like(like, dtype=torch.uint8, requires_grad=False)
        return codes, _zero_scales(like, like.shape[-1] // block_size(like.shape[-1]))

    def read(self, kept: Sequence[Tensor]) -> Tensor:
        codes, scales = kept
        table = dynamic_table(self.signed, codes.device)
        values = F.embedding(codes.int(), table[:, None]).view(*scales.shape, -1)
        return (values * scales[..., None]).view(codes.shape)

    def write(self, kept: Sequence[Tensor], values: Tensor, noise: torch.Generator) -> None:
        codes, scales = kept
        blocks = values.view(*scales.shape, -1)
        torch.amax(blocks.abs(), dim=-1, out=scales)
        table = dynamic_table(self.signed, codes.device)
        borders = (table[1:] + table[:-1]) / 2
        nearest = torch.bucketize(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None], borders)
        codes.copy_(nearest.view(codes.shape))


def stochastic_round_(target: Tensor, values: Tensor, noise: torch.Generator) -> None:
    """Rounds float32 ``values`` to the bfloat16 ``target`` up or down at random, so that their mean is exact.

    A bfloat16 is the upper half of a float32: the lower half, as a share of 2^16, is the probability of rounding up.
    """
    added = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=noise)
    rounded = (values.view(torch.int32) + added) & -(2**16)
    target.copy_(rounded.view(torch.float32))


@cache
def dynamic_table(signed: bool, device: torch.device) -> Tensor:
    """256 values up to 1, ascending: evenly spaced within a decade, and half as many in each decade below the first.

    Of seven decades; the signed table has 0, 1 and as many values below 0 as above it. The unsigned one has no 0 but
    1e-7: a second moment of 0 under a first moment that is not would make the update explode.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** ((6 if signed else 7) - decade) + 1, dtype=torch.float64)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0**-decade)
    positive = torch.cat(decades)
    rest = [-positive, torch.tensor([0.0, 1.0])] if signed else [torch.tensor([1e-7, 1.0])]
    return torch.cat([positive, *rest]).sort().values.float().to(device)


def block_size(width: int) -> int:
    """Values that share a scale: the largest divisor of ``width`` up to 256, or all where there is none above 31."""
    largest = max(size for size in range(1, min(width, LONGEST_BLOCK) + 1) if width % size == 0)
    return largest if largest >= 32 else width


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    tensor = tensor.detach()
    # Not isinstance: importing DTensor takes a second, which processes without FSDP need not wait for.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _zero_scales(like: Tensor, blocks: int) -> Tensor:
    part = local(like)
    scales = torch.zeros(*part.shape[:-1], blocks, device=part.device)
    if not hasattr(like, "to_local"):
        return scales
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    whole = torch.empty(*like.shape[:-1], blocks, device="meta")
    return DTensor.from_local(
        scales, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
