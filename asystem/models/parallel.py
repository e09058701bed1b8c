"""Tensor parallelism: one decoder cut over ranks, each with its share of the heads and of the MLP.

As in Megatron-LM (Shoeybi et al. 2019): qkv and gate_up are cut by rows, each of their fused parts for itself, o and
down by columns. The latter's products are partial, and `Block.reduce` adds them up over the ranks; embedding, head and
norms are whole on each rank. A reduced sum is the same bits on all ranks, so all of them draw the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asystem.errors import ConfigError
from asystem.models.decoder import Block, Decoder
from asystem.models.pieces import Box, Piece
from asystem.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model.

    Attributes:
        rank, size: of the ranks that hold the model together.
        group: their torch.distributed process group; None = the default one.
    """

    rank: int
    size: int
    group: Any = None

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The shape of the part.

        Raises:
            ConfigError: heads or the MLP's width do not divide.
        """
        check_parallel(whole, self.size)
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=whole.num_kv_heads // self.size,
            intermediate_size=whole.intermediate_size // self.size,
        )

    def decoder(self, whole: ModelSpec) -> Decoder:
        """A decoder of the part's shape, without weights, whose layers are added up over the ranks.

        Raises:
            ConfigError: as `spec`.
        """
        model = Decoder(self.spec(whole))
        model.shard = self
        for block in model.layers:
            assert isinstance(block, Block), "a decoder's layers are blocks"
            block.reduce = self._sum
        return model

    @torch.no_grad()
    def cut(self, whole: Decoder) -> Decoder:
        """The part of a model, copied out of it."""
        model = self.decoder(whole.spec)
        for name, parameter in model.named_parameters():
            parameter.copy_(self.part(model.spec, name, whole.get_parameter(name)))
        return model

    def part(self, spec: ModelSpec, name: str, whole: Tensor) -> Tensor:
        """This rank's part of the whole parameter `name`; `spec` is the part's own."""
        origin, dim = (0,) * whole.ndim, _cut(spec, name)[0]
        pieces = [piece.box.of(whole, origin) for piece in self.pieces(spec, name, tuple(whole.shape))]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def pieces(self, spec: ModelSpec, name: str, whole: tuple[int, ...]) -> list[Piece]:
        """Where this rank's part of the parameter `name`, of shape `whole`, lies in it; `spec` is the part's own."""
        dim, sizes = _cut(spec, name)
        pieces = []
        for before, size in zip(_before(sizes), sizes, strict=True):
            first = self.size * before + self.rank * size
            start, stop, at = [0] * len(whole), list(whole), [0] * len(whole)
            start[dim], stop[dim], at[dim] = first, first + size, before
            pieces.append(Piece(Box(tuple(start), tuple(stop)), tuple(at)))
        return pieces or [Piece.whole(whole)]

    def whole_shape(self, spec: ModelSpec, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole shape of the parameter `name` whose part has this shape."""
        dim, sizes = _cut(spec, name)
        return tuple(n * self.size if sizes and axis == dim else n for axis, n in enumerate(shape))

    def least(self, number: int, device: torch.device) -> int:
        """The least of the ranks' numbers."""
        least = torch.tensor(number, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least)

    def _sum(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial, group=self.group)
        return partial


def check_parallel(spec: ModelSpec, size: int) -> None:
    """Refuses numbers of ranks that a model cannot be cut over.

    Raises:
        ConfigError: KV heads or the MLP's width do not divide, or there are experts.
    """
    if size > 1 and spec.moe is not None:
        raise ConfigError(
            f"generation.tensor_parallel={size}: models with experts ({spec.family}) cannot be cut over ranks; use 1"
        )
    for what, count in (("KV heads", spec.num_kv_heads), ("intermediate_size", spec.intermediate_size)):
        if count % size:
            fitting = [n for n in range(1, size) if not spec.num_kv_heads % n and not spec.intermediate_size % n]
            raise ConfigError(
                f"generation.tensor_parallel={size} does not divide the model's {what}, {count}: use {fitting[-1]}"
            )


def _cut(spec: ModelSpec, name: str) -> tuple[int, list[int]]:
    """The dimension that a parameter is cut along, and the part's size of each of its fused tensors; [] = not cut."""
    q, kv, inner = spec.q_size, spec.kv_size, spec.intermediate_size
    owner = name.split(".")[-2]
    cuts = {
        "qkv_proj": (0, [q, kv, kv]),
        "o_proj": (1, [q]),
        "gate_up_proj": (0, [inner, inner]),
        "down_proj": (1, [inner]),
    }
    return cuts.get(owner, (0, []))


def _before(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]
