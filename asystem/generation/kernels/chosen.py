"""A mixture of experts for very few rows: a launch for the router, and two for the experts, whose rows nobody sorts.

Each pair of a row and an expert reads that expert's matrices; with few rows, hardly two pairs share one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps
from asystem.generation.kernels.linear import LANES, columns_of, silu_times, tile_of
from asystem.models.moe import Router

_ROUTED = 8192  # products that a router's program holds


@triton.jit
def _route_kernel(
    x, weight, bias, shares, chosen, num_experts, scaling,
    K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, expert, column = tl.program_id(0), tl.arange(0, EXPERTS), tl.arange(0, BLOCK)
    real = expert < num_experts
    total = tl.zeros([EXPERTS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        there = column + start < K
        value = tl.load(x + row * K + start + column, mask=there, other=0.0).to(tl.float32)
        place = expert[:, None] * K + start + column[None, :]
        total += value[None, :] * tl.load(weight + place, mask=real[:, None] & there[None, :], other=0.0).to(tl.float32)
    logits = tl.sum(total, 1)
    if SOFTMAX:
        scores = tl.where(real, tl.exp(logits - tl.max(tl.where(real, logits, -float("inf")), 0)), 0.0)
        scores /= tl.sum(scores, 0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    ranked = scores
    if BIAS:
        ranked += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    ranked = tl.where(real, ranked, -float("inf"))
    if TOP_GROUPS < GROUPS:
        grouped, group = tl.reshape(ranked, (GROUPS, EXPERTS // GROUPS)), tl.arange(0, GROUPS)
        member = tl.arange(0, EXPERTS // GROUPS)
        best = tl.max(grouped, 1)
        without = tl.where(member[None, :] == tl.argmax(grouped, 1)[:, None], -float("inf"), grouped)
        standing = best + tl.max(without, 1)
        kept = group < 0
        for _ in tl.static_range(TOP_GROUPS):
            winner = group == tl.argmax(standing, 0)
            kept = kept | winner
            standing = tl.where(winner, -float("inf"), standing)
        ranked = tl.reshape(tl.where(kept[:, None], grouped, -float("inf")), (EXPERTS,))
    slot = tl.arange(0, SLOTS)
    share = tl.zeros([SLOTS], tl.float32)
    taken = tl.zeros([SLOTS], tl.int32)
    for turn in tl.static_range(TOP_K):
        winner = tl.argmax(ranked, 0)
        share = tl.where(slot == turn, tl.sum(tl.where(expert == winner, scores, 0.0), 0), share)
        taken = tl.where(slot == turn, winner, taken)
        ranked = tl.where(expert == winner, -float("inf"), ranked)
    if NORMALIZE:
        share /= tl.sum(share, 0) + 1e-20
    tl.store(shares + row * TOP_K + slot, share * scaling, mask=slot < TOP_K)
    tl.store(chosen + row * TOP_K + slot, taken.to(tl.int64), mask=slot < TOP_K)


@triton.jit
def _gate_up_kernel(
    x, weight, chosen, out, n,
    K: tl.constexpr, TOP_K: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = out.dtype.element_ty
    pair, row = tl.program_id(1), tl.program_id(0) * WARPS + tl.arange(0, WARPS)
    matrix = weight + tl.load(chosen + pair).to(tl.int64) * 2 * n * K
    column = columns_of(WARPS, PARTS, LANES)
    place, inside = row[:, None, None].to(tl.int64) * K + column, (row < n)[:, None, None]
    gate = tl.zeros([WARPS, LANES], tl.float32)
    up = tl.zeros([WARPS, LANES], tl.float32)
    for start in tl.static_range(0, K, PARTS * LANES):
        there = column + start < K
        value = tl.load(x + pair // TOP_K * K + start + column, mask=there, other=0.0).to(tl.float32)
        first = tl.load(matrix + place + start, mask=inside & there, other=0.0)
        second = tl.load(matrix + n * K + place + start, mask=inside & there, other=0.0)
        gate += tl.sum(value * first.to(tl.float32), 1)
        up += tl.sum(value * second.to(tl.float32), 1)
    result = silu_times(tl.sum(gate, 1), tl.sum(up, 1), dtype)
    tl.store(out + pair * n + row, result.to(dtype), mask=row < n)


@triton.jit
def _down_kernel(
    x, weight, chosen, shares, out, n,
    K: tl.constexpr, TOP_K: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = out.dtype.element_ty
    batch, row = tl.program_id(1), tl.program_id(0) * WARPS + tl.arange(0, WARPS)
    column = columns_of(WARPS, PARTS, LANES)
    place, inside = row[:, None, None].to(tl.int64) * K + column, (row < n)[:, None, None]
    result = tl.zeros([WARPS], tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = batch * TOP_K + slot
        matrix = weight + tl.load(chosen + pair).to(tl.int64) * n * K
        total = tl.zeros([WARPS, LANES], tl.float32)
        for start in tl.static_range(0, K, PARTS * LANES):
            there = column + start < K
            value = tl.load(x + pair * K + start + column, mask=there, other=0.0).to(tl.float32)
            part = tl.load(matrix + place + start, mask=inside & there, other=0.0)
            total += tl.sum(value * part.to(tl.float32), 1)
        result += tl.sum(total, 1).to(dtype).to(tl.float32) * tl.load(shares + pair)  # rounded where the model rounds
    tl.store(out + batch * n + row, result.to(dtype), mask=row < n)


def can_route(router: Router) -> bool:
    """Whether `route` takes it: groups that are limited have to fill a power of two."""
    moe = router.moe
    return moe.top_groups == moe.groups or triton.next_power_of_2(moe.num_experts) == moe.num_experts


def route(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `models.moe.Router` makes of x [T, D]: shares [T, top_k] float32, chosen [T, top_k] int64."""
    moe, (rows, width) = router.moe, x.shape
    experts, overlap = triton.next_power_of_2(moe.num_experts), overlaps(x.device)
    shares = torch.empty(rows, moe.top_k, dtype=torch.float32, device=x.device)
    chosen = torch.empty(rows, moe.top_k, dtype=torch.int64, device=x.device)
    _route_kernel[(rows,)](
        x, router.weight, x if router.bias is None else router.bias, shares, chosen, moe.num_experts, moe.scaling,
        K=width, EXPERTS=experts, BLOCK=max(16, min(triton.next_power_of_2(width), _ROUTED // experts)),
        TOP_K=moe.top_k, SLOTS=triton.next_power_of_2(moe.top_k), GROUPS=moe.groups, TOP_GROUPS=moe.top_groups,
        SOFTMAX=moe.score == "softmax", BIAS=router.bias is not None, NORMALIZE=moe.normalize, OVERLAP=overlap,
        num_warps=8, launch_pdl=overlap,
    )  # fmt: skip
    return shares, chosen


def chosen_experts(x: Tensor, shares: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What `models.moe.Experts` makes of a few rows.

    Args:
        x: [T, D]. shares: [T, top_k] float32. chosen: [T, top_k] int64. gate_up: [E, 2 I, D]. down: [E, D, I].

    Returns:
        [T, D]
    """
    (rows, top_k), (width, inner) = chosen.shape, down.shape[1:]
    gated, out, overlap = x.new_empty(rows * top_k, inner), torch.empty_like(x), overlaps(x.device)
    warps, parts = tile_of(inner, width)
    _gate_up_kernel[(triton.cdiv(inner, warps), rows * top_k)](
        x, gate_up, chosen, gated, inner, K=width, TOP_K=top_k, WARPS=warps, PARTS=parts, LANES=LANES, OVERLAP=overlap,
        num_warps=warps, launch_pdl=overlap,
    )  # fmt: skip
    warps, parts = tile_of(width, inner)
    _down_kernel[(triton.cdiv(width, warps), rows)](
        gated, down, chosen, shares, out, width, K=inner, TOP_K=top_k, WARPS=warps, PARTS=parts, LANES=LANES,
        OVERLAP=overlap, num_warps=warps, launch_pdl=overlap,
    )  # fmt: skip
    return out
