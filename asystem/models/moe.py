"""A mixture of experts in the place of a layer's MLP (Shazeer et al. 2017, arXiv:1701.06538).

    x [T, D] -> router -> weights, chosen [T, top_k]
    rows [T * top_k, D], sorted by expert -> down(silu(gate) * up), each by its expert's matrices -> back in order
    out [T, D] = weighted sum of a token's rows + shared expert(x)

The experts' matrices are stacked, so that one grouped product computes all of them (`grouped_linear`). No token is
dropped, and on a GPU in bfloat16 nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asystem.models.collectives import Exchange
from asystem.models.moe_spec import MoESpec

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]  # as `grouped_linear`


class Routed(NamedTuple):
    """How a router came to its answer: logits and scores [T, E]; its own choice, the one given to it if any (negative =
    none), and the one taken, all [T, top_k]."""

    logits: Tensor
    scores: Tensor
    own: Tensor
    given: Tensor | None
    chosen: Tensor


RouterKernel = Callable[["Router", Tensor], tuple[Tensor, Tensor]]
Watch = Callable[[Tensor, Routed], Tensor]  # weights [T, top_k] -> the same; may hang losses on their gradient


class Router(nn.Module):
    """Chooses each token's experts and how much they count: see `MoESpec`. Computes in float32.

    Attributes:
        weight: [E, D]. bias: [E], or None; no gradient reaches it.
        watch: called wherever gradients are on, and once more where activations are computed again; None = nobody is.
    """

    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.watch: Watch | None = None
        self.register_parameter("bias", nn.Parameter(torch.zeros(moe.num_experts)) if moe.has_bias else None)

    def forward(
        self,
        x: Tensor,
        given: Tensor | None = None,
        kernel: Callable[[Router, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [T, D] -> weights [T, top_k] float32, chosen [T, top_k] int64.

        Args:
            given: [T, top_k], the experts to take in the place of the router's own choice, where they are not negative.
            kernel: computes the same, where nothing is given and no gradient is wanted.
        """
        if kernel is not None:
            return kernel(self, x)
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if self.moe.score == "softmax" else logits.sigmoid()
        own = self._choose(scores)
        chosen = own if given is None else torch.where(given < 0, own, given.long())
        weights = scores.gather(1, chosen)
        if self.moe.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.watch is not None and torch.is_grad_enabled():
            weights = self.watch(weights, Routed(logits, scores, own, given, chosen))
        return weights * self.moe.scaling, chosen

    @torch.no_grad()
    def _choose(self, scores: Tensor) -> Tensor:
        moe = self.moe
        if self.bias is not None:
            scores = scores + self.bias
        if moe.top_groups < moe.groups:
            grouped = scores.view(len(scores), moe.groups, -1)
            totals = grouped.topk(2).values.sum(-1)
            best = totals.topk(moe.top_groups).indices
            is_out = torch.ones_like(totals, dtype=torch.bool).scatter_(1, best, False)
            scores = grouped.masked_fill(is_out[..., None], -torch.inf).flatten(1)
        return scores.topk(moe.top_k).indices


@contextmanager
def record_routing(routers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list of what these routers choose, [T, top_k] each in the order of their calls, while it is open."""
    chosen: list[Tensor] = []

    def record(router: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        chosen.append(outputs[1])

    handles = [router.register_forward_hook(record) for router in routers]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


class Experts(nn.Module):
    """The MLPs that tokens choose from.

    Args:
        count: experts that stand here, where others stand on other ranks; None = all.

    Attributes:
        gate_up: [E, 2 I, D], the gate's half first. down: [E, D, I].
        exchange: brings rows to the ranks of their experts and back, where those stand on several.
    """

    def __init__(self, hidden_size: int, moe: MoESpec, count: int | None = None) -> None:
        super().__init__()
        count = moe.num_experts if count is None else count
        self.gate_up = nn.Parameter(torch.empty(count, 2 * moe.intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(count, hidden_size, moe.intermediate_size))
        self.exchange: Exchange | None = None

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor, product: GroupedProduct) -> Tensor:
        """x [T, D], weights and chosen [T, top_k] -> [T, D]."""
        top_k = chosen.shape[1]
        experts, order = chosen.flatten().sort(stable=True)
        rows, compute = x.index_select(0, order // top_k), partial(self._compute, product)
        rows = compute(rows, experts) if self.exchange is None else self.exchange(rows, experts, compute)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        parts = rows.index_select(0, back).view(len(x), top_k, -1)
        return (parts * weights[..., None]).sum(1).to(x.dtype)

    def _compute(self, product: GroupedProduct, rows: Tensor, experts: Tensor) -> Tensor:
        """rows [N, D] of these experts [N], ascending -> [N, D]."""
        # Found by search: counting waits for the device.
        ends = torch.searchsorted(
            experts, torch.arange(len(self.down), device=rows.device), right=True, out_int32=True
        )  # [E], where each expert's rows end
        gate, up = product(rows, self.gate_up, ends).chunk(2, dim=-1)
        return product(F.silu(gate) * up, self.down, ends)


class MoE(nn.Module):
    """Router, experts, and the shared expert where there is one; called as an MLP is.

    Args:
        shared: [T, D] -> [T, D], computes every token.
    """

    def __init__(self, hidden_size: int, moe: MoESpec, shared: nn.Module | None) -> None:
        super().__init__()
        self.router = Router(hidden_size, moe)
        self.experts = Experts(hidden_size, moe)
        self.shared = shared
        self.product: GroupedProduct = grouped_linear

    def forward(self, x: Tensor, product: GroupedProduct | None = None, given: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D]; `product` in the place of the layer's own, and experts as `Router` takes them."""
        weights, chosen = self.router(x, given)
        out = self._experts(x, weights, chosen, product or self.product)
        return out if self.shared is None else out + self.shared(x)

    def leave_uncompiled(self) -> None:
        """Keeps out of torch.compile's graphs what looks at numbers of tokens: experts in turn, and on other ranks."""
        if not self.router.weight.is_cuda:
            self.product = torch.compiler.disable(self.product)  # type: ignore[no-untyped-call]
        if self.experts.exchange is not None:
            uncompiled = torch.compiler.disable(self._experts)  # type: ignore[no-untyped-call]
            setattr(self, "_experts", uncompiled)  # noqa: B010 (mypy: a method)

    def _experts(self, x: Tensor, weights: Tensor, chosen: Tensor, product: GroupedProduct) -> Tensor:
        out: Tensor = self.experts(x, weights, chosen, product)
        return out


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row times its expert's matrix.

    On CUDA in bfloat16 it is one kernel (`torch.nn.functional.grouped_mm`), else experts take turns.

    Args:
        x: [N, K], sorted by expert. weight: [E, M, K]. ends: [E] int32, where each expert's rows end.

    Returns:
        [N, M]
    """
    if x.is_meta:  # the memory plan's
        return x.new_empty(len(x), weight.shape[1])
    is_aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0  # the kernel reads 16 bytes at a time
    if x.is_cuda and x.dtype is torch.bfloat16 and is_aligned:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out: Tensor = _in_turn(x, weight, ends)
    return out


def _in_turn(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    spans = pairwise([0, *ends.tolist()])
    pieces = ((x[start:end], matrix) for (start, end), matrix in zip(spans, weight.unbind(), strict=True))
    return torch.cat([F.linear(rows, matrix) for rows, matrix in pieces if len(rows)])
