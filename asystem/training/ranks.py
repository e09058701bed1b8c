"""How the ranks of training share a model and a batch.

    ranks = data x tensor          rank = its place in data * tensor + its place in tensor
            data = replicas x expert

    tensor    ranks that have the same rows, and each its share of every layer's heads and MLP (`models.parallel`)
    data      ranks that have rows of their own; FSDP2 shards over them what each of these holds
    expert    neighbours in data that the experts are spread over; rows travel to them (`models.collectives`)

Embedding, final norm and heads, which are not cut, are sharded over all ranks. What a block has whole on the ranks of
tensor, its norms and its router, is there alike: see `RankGradients`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from asystem.config import TrainingConfig
from asystem.models import Block, Held, ModelSpec, Piece, Shard
from asystem.training.policy import Policy
from asystem.training.states import local

if TYPE_CHECKING:  # it takes a second, which processes that shard nothing need not wait for
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Ranks:
    """Sizes and process groups; of one process, ones and none.

    Attributes:
        rank, world: of all.
        data_rank, data: of those with rows of their own.
        shard: what this rank holds of the model; None = all that FSDP leaves it.
        data_group, replica_group: over which FSDP shards blocks, and experts that are spread; None = all ranks.
    """

    rank: int = 0
    world: int = 1
    data_rank: int = 0
    data: int = 1
    shard: Shard | None = None
    data_group: Any = None
    replica_group: Any = None

    @classmethod
    def of(cls, cfg: TrainingConfig, world: int) -> Ranks:
        """Those of the default process group, which stands already when there are several. Collective."""
        if world == 1:
            return cls()
        tensor, expert, rank = cfg.tensor_parallel, cfg.expert_parallel, dist.get_rank()
        assert world % (tensor * expert) == 0, f"{world} ranks are not {tensor} x {expert} times any number"
        data, data_rank = world // tensor, rank // tensor
        columns = [list(range(place, world, tensor)) for place in range(tensor)]  # data, of each place in tensor
        blocks = [column[first : first + expert] for column in columns for first in range(0, data, expert)]
        replicas = [column[place::expert] for column in columns for place in range(expert)]
        shard = Shard(
            rank % tensor,
            tensor,
            _group([list(range(first, first + tensor)) for first in range(0, world, tensor)], tensor),
            expert_rank=data_rank % expert,
            expert_size=expert,
            expert_group=_group(blocks, expert),
        )
        part = shard if tensor * expert > 1 else None
        return cls(rank, world, data_rank, data, part, _group(columns, tensor), _group(replicas, expert))

    @property
    def is_first(self) -> bool:
        """Of those that have the same rows: the one whose answers count."""
        return self.shard is None or self.shard.rank == 0

    def most(self, values: Sequence[int], device: torch.device) -> list[int]:
        """The largest of each value over all ranks. Collective."""
        if self.world == 1:
            return list(values)
        found = torch.tensor(list(values), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(value) for value in found.tolist()]

    def held(self, name: str, tensor: Tensor, spec: ModelSpec) -> Held:
        """What this rank has of a parameter, or of a state of it. `spec` is the part's own."""
        if self.shard is None or not name:
            return Held.of(tensor)
        shape = self.shard.whole_shape(spec, name, tuple(tensor.shape))
        pieces: list[Piece] = self.shard.pieces(spec, name, shape)
        return Held.of(tensor, shape, pieces)


def _group(members: Sequence[Sequence[int]], needed: int) -> Any:
    """The process group of this rank among these; None = the default one, or ``needed`` is 1. All ranks ask for it."""
    if len(members) == 1 or needed == 1:
        return None
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in members])[0]  # type: ignore[no-untyped-call]


def shard_policy(policy: Policy, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> None:
    """FSDP2: a unit for each block, one for each block's experts where they are spread, and one for the rest."""
    # Imported here: it takes a second, which processes that shard nothing need not wait for.
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def mesh(group: Any) -> DeviceMesh:
        return everywhere if group is None else DeviceMesh.from_group(group, device.type)

    everywhere = init_device_mesh(device.type, (ranks.world,))
    data, replicas = mesh(ranks.data_group), mesh(ranks.replica_group)
    # Inputs are not cast, so that rotary tables stay float32, as in decoding.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in policy.decoder.layers:
        assert isinstance(block, Block), "a decoder's layers are blocks"
        if (experts := block.spread_experts) is not None:
            fully_shard(experts, mesh=replicas, mp_policy=precision)
        fully_shard(block, mesh=data, mp_policy=precision)
    fully_shard(policy, mesh=everywhere, mp_policy=precision, reshard_after_forward=False)


def gather(policy: Policy, zero: int, *, is_last: bool) -> None:
    """How forward and backward passes of a sharded policy go about weights and gradients from now on.

    Stages as ZeRO numbers them (Rajbhandari et al. 2020, §5), within a step: masters and moments are sharded always.

        3   a block's weights are gathered for its forward and again for its backward pass, its gradients scattered
        2   weights stay gathered until the step's last backward pass
        1   gradients, too, stay whole and add up until then

    Args:
        is_last: the next backward pass is the step's last.
    """
    for block in policy.decoder.layers:  # the rest stays gathered from forward to backward anyway
        cast("FSDPModule", block).set_reshard_after_forward(zero == 3)
    sharded = cast("FSDPModule", policy)
    sharded.set_reshard_after_backward(zero == 3 or is_last)
    sharded.set_requires_gradient_sync(zero > 1 or is_last)


def reshard(policy: Policy) -> None:
    """Lets go of gathered weights, which the next update changes."""
    from torch.distributed.fsdp import FSDPModule

    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class RankGradients:
    """What several ranks settle about gradients between the backward pass and the update.

    Ranks that share layers hold a block's norms and router alike, each all of it. Gradients of the two norms before
    attention and MLP are whole on each; those of what lies within are parts, of this rank's heads or of its share of
    the experts' width. Both are made equal, the same bits, so that the weights stay so.

    Args:
        names: of the parameters that train. spec: of this rank's part of the model.
    """

    def __init__(self, ranks: Ranks, names: Sequence[str], spec: ModelSpec) -> None:
        shard = ranks.shard
        self._size = 1 if shard is None else shard.size
        self._group: Any = None if shard is None else shard.group
        alike = [name for name in names if name.startswith("layers.") and shard and not shard.is_cut(spec, name)]
        # What a gradient is multiplied with after it was added up over ranks.
        self._alike = {
            name: 1.0 if ".attn." in name or ".mlp." in name else 1 / self._size for name in alike if self._size > 1
        }

    def settle(self, gradients: Mapping[str, Tensor]) -> float:
        """Makes equal in place what is to be, and returns the norm of the whole gradient, each parameter counted once.

        Collective over all ranks, and the same on all.
        """
        alike = [name for name in self._alike if name in gradients]
        self._make_equal({name: local(gradients[name]) for name in alike})
        own = [local(grad) for name, grad in gradients.items() if name not in self._alike]
        total = _square(own)
        if alike:
            total = total + _square([local(gradients[name]) for name in alike]) / self._size
        dist.all_reduce(total)
        return float(total.sqrt())

    def _make_equal(self, parts: Mapping[str, Tensor]) -> None:
        if not parts:
            return
        flat = torch.cat([part.flatten().float() * self._alike[name] for name, part in parts.items()])
        dist.all_reduce(flat, group=self._group)
        sizes = [part.numel() for part in parts.values()]
        for part, summed in zip(parts.values(), torch.split(flat, sizes), strict=True):
            part.copy_(summed.view_as(part))


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return get_total_norm(list(tensors)).float().square()
