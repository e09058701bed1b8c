"""One decoder cut over ranks: each with its share of the heads and of the MLPs' width, or of the experts.

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): qkv and gate_up are cut by rows, each of their fused parts
for itself, o and down by columns, those of experts too. The latter's products are partial, and `Block.reduce` adds
them up over the ranks; embedding, head, norms and routers are whole on each rank. A reduced sum is the same bits on all
ranks, so all of them draw the same tokens, and choose the same experts.

Experts may be spread over other ranks besides, which bring rows of their own: see `collectives.Exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asystem.errors import ConfigError
from asystem.models.collectives import Exchange, enter, group_name, leave
from asystem.models.decoder import Block, Decoder
from asystem.models.moe import Experts, MoE
from asystem.models.pieces import Box, Piece
from asystem.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Cut:
    """Along one dimension, this rank has the ``rank``-th of ``ranks`` equal parts of each of the tensors that are fused
    there; ``sizes`` are those of its parts."""

    dim: int
    sizes: tuple[int, ...]
    rank: int
    ranks: int

    def of(self, piece: Piece) -> list[Piece]:
        """What is left of a piece that has the whole dimension."""
        pieces = []
        for before, size in zip([0, *accumulate(self.sizes)], self.sizes, strict=False):
            first = self.ranks * before + self.rank * size
            box = Box(self._with(piece.box.start, first), self._with(piece.box.stop, first + size))
            pieces.append(Piece(box, self._with(piece.at, before)))
        return pieces

    def _with(self, corner: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*corner[: self.dim], value, *corner[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model.

    Attributes:
        rank, size: of the ranks that share each layer.
        group: their torch.distributed process group; None = the default one.
        expert_rank, expert_size, expert_group: the same of those that the experts are spread over.
    """

    rank: int
    size: int
    group: Any = None
    expert_rank: int = 0
    expert_size: int = 1
    expert_group: Any = None

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The shape of the part; the experts are as many as the router knows.

        Raises:
            ConfigError: heads, the MLP's width or the experts do not divide.
        """
        check_parallel(whole, self.size)
        check_experts(whole, self.expert_size)
        moe = whole.moe
        if moe is not None:
            inner, shared = moe.intermediate_size // self.size, moe.shared_size // self.size
            moe = replace(moe, intermediate_size=inner, shared_size=shared)
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=whole.num_kv_heads // self.size,
            intermediate_size=whole.intermediate_size // self.size,
            moe=moe,
        )

    def whole(self, spec: ModelSpec) -> ModelSpec:
        """The shape of the model that a part of this shape belongs to; the inverse of `spec`."""
        moe = spec.moe
        if moe is not None:
            inner, shared = moe.intermediate_size * self.size, moe.shared_size * self.size
            moe = replace(moe, intermediate_size=inner, shared_size=shared)
        return replace(
            spec,
            num_heads=spec.num_heads * self.size,
            num_kv_heads=spec.num_kv_heads * self.size,
            intermediate_size=spec.intermediate_size * self.size,
            moe=moe,
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
            if self.size > 1:
                block.reduce = self._sum
            if isinstance(block.mlp, MoE) and self.expert_size > 1:
                self._spread(block.mlp, model.spec)
        return model

    def pass_gradients(self, model: Decoder) -> None:
        """Lets gradients through the sums of a `decoder`, in place."""
        if self.size > 1:
            name = group_name(self.group)
            for block in model.layers:
                assert isinstance(block, Block), "a decoder's layers are blocks"
                block.enter, block.reduce = partial(enter, group=name), partial(leave, group=name)

    @torch.no_grad()
    def cut(self, whole: Decoder) -> Decoder:
        """The part of a model, copied out of it, on its device and in its dtype."""
        with torch.device("meta"):
            model = self.decoder(whole.spec)
        for name, parameter in list(model.named_parameters()):
            part = self.part(model.spec, name, whole.get_parameter(name)).clone()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(part, parameter.requires_grad))
        return model

    def part(self, spec: ModelSpec, name: str, whole: Tensor) -> Tensor:
        """This rank's part of the whole parameter `name`; `spec` is the part's own."""
        origin = (0,) * whole.ndim
        pieces = [piece.box.of(whole, origin) for piece in self.pieces(spec, name, tuple(whole.shape))]
        fused = [cut.dim for cut in self._cuts(spec, name) if len(cut.sizes) > 1]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, fused[0])

    def pieces(self, spec: ModelSpec, name: str, whole: tuple[int, ...]) -> list[Piece]:
        """Where this rank's part of the parameter `name`, of shape `whole`, lies in it; `spec` is the part's own."""
        pieces = [Piece.whole(whole)]
        for cut in self._cuts(spec, name):
            pieces = [part for piece in pieces for part in cut.of(piece)]
        return pieces

    def whole_shape(self, spec: ModelSpec, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole shape of the parameter `name` whose part has this shape."""
        whole = list(shape)
        for cut in self._cuts(spec, name):
            whole[cut.dim] *= cut.ranks
        return tuple(whole)

    def expert(self, spec: ModelSpec, number: int) -> int | None:
        """Which of the experts that stand here an expert is; None = it stands on another rank."""
        assert spec.moe is not None, "a dense model has no experts"
        each = spec.moe.num_experts // self.expert_size
        return number % each if number // each == self.expert_rank else None

    def is_cut(self, spec: ModelSpec, name: str) -> bool:
        """Whether the ranks that share layers have each a part of the parameter."""
        return self.size > 1 and any(cut.ranks == self.size for cut in self._tensor_cuts(spec, name))

    def least(self, number: int, device: torch.device) -> int:
        """The least of the ranks' numbers."""
        least = torch.tensor(number, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least)

    def _sum(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial, group=self.group)
        return partial

    def _spread(self, mixture: MoE, spec: ModelSpec) -> None:
        assert spec.moe is not None, "a mixture has its shape"
        count = spec.moe.num_experts
        mixture.experts = Experts(spec.hidden_size, spec.moe, count // self.expert_size)
        mixture.experts.exchange = Exchange(count, self.expert_size, self.expert_group)

    def _cuts(self, spec: ModelSpec, name: str) -> list[Cut]:
        """How a parameter is cut; a dimension at a time, of which one at most has fused tensors."""
        cuts = self._tensor_cuts(spec, name)
        if self.expert_size > 1 and ".experts." in name and spec.moe is not None:
            each = spec.moe.num_experts // self.expert_size
            cuts.append(Cut(0, (each,), self.expert_rank, self.expert_size))
        return cuts

    def _tensor_cuts(self, spec: ModelSpec, name: str) -> list[Cut]:
        found = _cut(spec, name)
        return [] if found is None or self.size == 1 else [Cut(*found, self.rank, self.size)]


def check_parallel(spec: ModelSpec, size: int, key: str = "generation.tensor_parallel") -> None:
    """Refuses numbers of ranks that a model's layers cannot be cut over.

    Args:
        key: that asks for it.

    Raises:
        ConfigError: KV heads or the widths of MLPs do not divide, or a norm is over all heads.
    """
    if size == 1:
        return
    if spec.qk_norm_whole:
        raise ConfigError(f"{key}={size}: {spec.family} norms all heads together, which ranks cannot share; use 1")
    widths = [("KV heads", spec.num_kv_heads), ("intermediate_size", spec.intermediate_size)]
    if spec.moe is not None:
        widths += [("experts' width", spec.moe.intermediate_size), ("shared expert's width", spec.moe.shared_size)]
    for what, count in widths:
        if count % size:
            fitting = _dividing([count for _, count in widths], below=size)
            raise ConfigError(f"{key}={size} does not divide the model's {what}, {count}: use {fitting}")


def check_experts(spec: ModelSpec, size: int) -> None:
    """Refuses numbers of ranks that a model's experts cannot be spread over.

    Raises:
        ConfigError: it has none, or they do not divide.
    """
    if size == 1:
        return
    if spec.moe is None:
        raise ConfigError(f"training.expert_parallel={size} needs a model with experts; {spec.family} has none: use 1")
    if spec.moe.num_experts % size:
        count = spec.moe.num_experts
        fitting = _dividing([count], below=size)
        raise ConfigError(f"training.expert_parallel={size} does not divide the {count} experts: use {fitting}")


def _dividing(numbers: Sequence[int], *, below: int) -> int:
    return max(n for n in range(1, below) if not any(number % n for number in numbers))


def _cut(spec: ModelSpec, name: str) -> tuple[int, tuple[int, ...]] | None:
    """The dimension along which ranks that share layers cut a parameter, and the part's sizes of each of its fused
    tensors; None = it is whole on each."""
    q, kv, inner = spec.q_size, spec.kv_size, spec.intermediate_size
    owner, leaf = name.split(".")[-2:]
    if spec.moe is not None and owner == "experts":
        inner = spec.moe.intermediate_size
        return {"gate_up": (1, (inner, inner)), "down": (2, (inner,))}[leaf]
    if spec.moe is not None and ".shared." in name:
        inner = spec.moe.shared_size
    cuts = {
        "qkv_proj": (0, (q, kv, kv)),
        "o_proj": (1, (q,)),
        "gate_up_proj": (0, (inner, inner)),
        "down_proj": (1, (inner,)),
    }
    return cuts.get(owner)
