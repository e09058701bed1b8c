"""Collectives that gradients pass through: sums over the ranks that share layers, and rows on their way to experts.

Sums are Megatron-LM's f and g (Shoeybi et al. 2019, arXiv:1909.08053, §3): what enters a layer that is cut over ranks
is the same on all of them, and each has a part of its gradient; what leaves it is a part on each, and the sum has the
same gradient on all.

    enter   forward: as it is       backward: summed over ranks
    leave   forward: summed         backward: as it is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_groups: dict[str, Any] = {}  # operators take names, which torch.compile can trace


def group_name(group: Any) -> str:
    """The name under which operators find a process group; None = the default one."""
    found = dist.group.WORLD if group is None else group
    assert found is not None, "the process group stands before a model is cut over it"
    _groups[found.group_name] = found
    return str(found.group_name)


# An operator of its own, so that torch.compile leaves the collective alone.
@torch.library.custom_op("asystem::sum_over_ranks", mutates_args=())
def _sum(x: Tensor, group: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_groups[group])
    return out


@_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        out: Tensor = _sum(x, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def enter(x: Tensor, group: str) -> Tensor:
    """Into a layer that is cut over the ranks of a group."""
    out: Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def leave(x: Tensor, group: str) -> Tensor:
    """Out of one: the sum of the ranks' parts."""
    out: Tensor = _Leave.apply(x, group)  # type: ignore[no-untyped-call]
    return out


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def by_rows(
    compute: Callable[[Tensor, Tensor], Sequence[Tensor]], x: Tensor, labels: Tensor, rank: int, size: int, group: str
) -> list[Tensor]:
    """What ``compute`` makes of rows [N, D] and their labels [N], some numbers [N] a row, each rank its share of the
    rows, which all ranks have.

    Weights inside, which all ranks have too, get ``size`` times the gradient of the share: of shares the mean is the
    gradient of all rows.
    """
    each = -(-len(x) // size)
    mine = slice(min(len(x), rank * each), min(len(x), (rank + 1) * each))
    rows: Tensor = _Scale.apply(enter(x, group), 1 / size)  # type: ignore[no-untyped-call]
    whole = []
    for part in compute(rows[mine], labels[mine]):
        padded = F.pad(part, (mine.start, len(x) - mine.stop))
        whole.append(_Scale.apply(leave(padded, group), float(size)))  # type: ignore[no-untyped-call]
    return whole


class _Travel(torch.autograd.Function):
    """Rows to the ranks that they are for, and gradients back to where the rows came from, times ``factor``."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any, factor: float
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.factor = sent, received, group, factor
        return _exchanged(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _exchanged(grad, ctx.received, ctx.sent, ctx.group)
        return back.mul_(ctx.factor), None, None, None, None


def _exchanged(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


class Exchange:
    """Sends rows to the ranks that hold their experts, and what these make of them back.

    Each rank holds ``num_experts / ranks`` experts in a row, and brings rows of its own. Their gradients are divided by
    the ranks here, since the trainer multiplies losses by the ranks that FSDP takes the mean over, and experts are
    sharded over so many times fewer.

    Args:
        group: process group of ``ranks`` ranks, in the order of their experts.
    """

    def __init__(self, num_experts: int, ranks: int, group: Any) -> None:
        self.num_experts, self.ranks, self.group = num_experts, ranks, group

    def __call__(self, rows: Tensor, experts: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What their experts make of rows [N, D].

        Collective, and waits for the device once: how many rows travel is known to the device alone.

        Args:
            experts: [N], each row's, ascending.
            compute: rows and their experts, numbered from this rank's first one, ascending -> as many rows; it is
                given one row at least, so that its weights have a gradient.
        """
        edges = torch.searchsorted(experts, torch.arange(self.num_experts + 1, device=experts.device))
        ours = edges.diff()  # rows for each expert
        theirs = torch.empty_like(ours)  # of each rank for each expert here
        dist.all_to_all_single(theirs, ours, group=self.group)
        sent, received = torch.stack([ours, theirs]).view(2, self.ranks, -1).sum(2).tolist()
        arrived = _travel(rows, sent, received, self.group, float(self.ranks))
        each = self.num_experts // self.ranks
        numbers = torch.arange(each, device=experts.device).repeat(self.ranks)
        numbers = numbers.repeat_interleave(theirs, output_size=sum(received))
        if not sum(received):
            arrived, numbers = torch.cat([arrived, arrived.new_zeros(1, arrived.shape[1])]), numbers.new_zeros(1)
        numbers, order = numbers.sort(stable=True)
        made = compute(arrived.index_select(0, order), numbers)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        made = made.index_select(0, back)[: sum(received)]
        return _travel(made, received, sent, self.group, 1 / self.ranks)


def _travel(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any, factor: float) -> Tensor:
    out: Tensor = _Travel.apply(rows, sent, received, group, factor)  # type: ignore[no-untyped-call]
    return out
