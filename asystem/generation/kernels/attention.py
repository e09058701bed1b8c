"""Paged, grouped-query attention of one new token a sequence, in parts of about equal length.

Sequences have any length, and a device is busy until the last program ends: so what each row attends to is divided,
once a step, into parts of a length that fills the device some times over (`divide`), one program each and key head.
Whoever finishes a row's last part joins them all.

Samples of one group share the blocks of their prompt. A *crowd* is up to `CROWD` such rows; a launch of its own reads
the shared blocks once for all of them, and what it finds is joined to what each row has alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps

CROWD = 8  # rows that read a shared prefix together
_LEAST_TILE = 16  # queries that matrix units take
_AT_ONCE = 4  # parts that are joined without waiting for each other's numbers


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut: keys a tile, warps a program, loads in flight."""

    keys: int = 64
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Crowds:
    """Rows that share blocks, as tensors that keep their place from step to step.

    Attributes:
        rows: [C, CROWD] int32, the rows of each crowd, -1 beyond the last. shared: [C] int32, tokens that they share,
            whole blocks; 0 = no crowd.
        skip: [B] int32, leading tokens of each row that its crowd reads; 0 for a row alone.
    """

    rows: Tensor
    shared: Tensor
    skip: Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that rows' own tokens are divided into, one row's after another's; for all layers of a step.

    Attributes:
        first: [B + 1] int32, the number of each row's first part; at last, of all parts.
        owner: [P] int32, the row of each part; P is the most that there may be.
        arrived: [B * Hk] int32, parts of each row and key head that are done; whoever joins them sets it back to 0.
    """

    first: Tensor
    owner: Tensor
    arrived: Tensor


@triton.jit
def _divide_kernel(
    lengths, skip, first, owner, num_rows, aim, least, ROWS: tl.constexpr, SHARED: tl.constexpr, OVERLAP: tl.constexpr
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, ROWS)
    own = tl.load(lengths + row, mask=row < num_rows, other=0)
    stands = own == 0
    if SHARED:
        own -= tl.minimum(tl.load(skip + row, mask=row < num_rows, other=0), own)
    span = tl.maximum(tl.cdiv(tl.sum(own, 0), aim), least)
    count = tl.where(stands, 0, tl.maximum(tl.cdiv(own, span), 1))
    begin = tl.cumsum(count, 0) - count
    tl.store(first + row, begin, mask=row < num_rows)
    tl.store(first + num_rows, tl.sum(count, 0))
    for part in range(tl.max(count, 0)):
        tl.store(owner + begin + part, row, mask=part < count)


def divide(lengths: Tensor, kv_heads: int, *, aim: int, least: int, crowds: Crowds | None = None) -> Parts:
    """Divides what rows attend to alone into about `aim` parts, and at most one a row more.

    Args:
        lengths: [B] int32, tokens of each row; 0 = it stands still and has no part. least: tokens of a part that are
            worth a program.
    """
    rows, device = len(lengths), lengths.device
    first = torch.empty(rows + 1, dtype=torch.int32, device=device)
    owner = torch.empty(rows + aim, dtype=torch.int32, device=device)
    padded, overlap = triton.next_power_of_2(rows), overlaps(device)
    _divide_kernel[(1,)](
        lengths, lengths if crowds is None else crowds.skip, first, owner, rows, aim, least, ROWS=padded,
        SHARED=crowds is not None, OVERLAP=overlap, num_warps=min(16, max(1, padded // 32)), launch_pdl=overlap,
    )  # fmt: skip
    return Parts(first, owner, torch.zeros(rows * kv_heads, dtype=torch.int32, device=device))


@triton.jit
def _read(
    query, keys, values, line, kv_head, begin, end, scale,
    M: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of queries [M, d] to tokens begin..end: highest scores, sums of weights, and weighted values."""
    columns = tl.arange(0, HEAD_PAD)
    peak = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, HEAD_PAD], tl.float32)
    for place in range(begin, end, N):
        token = place + tl.arange(0, N)
        inside = token < end
        block = tl.load(line + token // BLOCK_SIZE, mask=inside, other=0)
        source = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE) * HEAD
        tile = source[:, None] + columns[None, :]
        tile_mask = inside[:, None] & (columns < HEAD)[None, :]
        key = tl.load(keys + tile, mask=tile_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = tl.where(inside[None, :], score * scale, -1.0e30)
        top = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - top[:, None])
        fade = tl.exp2(peak - top)
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(values + tile, mask=tile_mask, other=0.0)
        acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        peak = top
    return peak, total, acc


@triton.jit
def _join(
    peak, total, acc, part_acc, part_sum, part_max, cell, mask, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr
):  # fmt: skip
    """What was read of some tokens, and what others have read of others, at ``cell`` [M] of the parts."""
    columns = tl.arange(0, HEAD_PAD)
    # From where all multiprocessors see it: another one has written it meanwhile.
    other_peak = tl.load(part_max + cell, mask=mask, other=-1.0e30, cache_modifier=".cg")
    other_total = tl.load(part_sum + cell, mask=mask, other=0.0, cache_modifier=".cg")
    other = tl.load(
        part_acc + cell[:, None] * HEAD + columns[None, :], mask=mask[:, None] & (columns < HEAD)[None, :], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    top = tl.maximum(peak, other_peak)
    fade, gain = tl.exp2(peak - top), tl.exp2(other_peak - top)
    return top, total * fade + other_total * gain, acc * fade[:, None] + other * gain[:, None]


@triton.jit
def _finish(
    peak, total, acc, crowd_acc, crowd_sum, crowd_max, out, cell, real, shared, num_cells,
    CROWD_SPLITS: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Joins what crowds have read to what was read of all own tokens, and writes the result of heads at ``cell``."""
    if CROWD_SPLITS > 0:
        span = tl.cdiv(tl.cdiv(shared, CROWD_SPLITS), N) * N
        for split in tl.static_range(CROWD_SPLITS):
            there = real & (split * span < shared)
            peak, total, acc = _join(
                peak, total, acc, crowd_acc, crowd_sum, crowd_max, split * num_cells + cell, there, HEAD, HEAD_PAD
            )  # fmt: skip
    columns = tl.arange(0, HEAD_PAD)
    mask = real[:, None] & (columns < HEAD)[None, :]
    result = (acc / tl.where(real, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + cell[:, None] * HEAD + columns[None, :], result, mask=mask)


@triton.jit
def _crowd_kernel(
    q, keys, values, table, crowd_rows, crowd_shared, part_acc, part_sum, part_max, q_stride, table_stride, num_rows,
    scale,
    SPLITS: tl.constexpr, CROWD: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, crowd, split = tl.program_id(0), tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    shared = tl.load(crowd_shared + crowd)
    span = tl.cdiv(tl.cdiv(shared, SPLITS), N) * N
    begin = split * span
    end = tl.minimum(begin + span, shared)
    if begin >= end:
        return  # who joins the parts knows from the same numbers that this one is empty
    lane, columns = tl.arange(0, M), tl.arange(0, HEAD_PAD)
    member = tl.load(crowd_rows + crowd * CROWD + lane // GROUP, mask=lane < CROWD * GROUP, other=-1).to(tl.int64)
    real = member >= 0
    head = kv_head * GROUP + lane % GROUP
    mask = real[:, None] & (columns < HEAD)[None, :]
    query = tl.load(q + member[:, None] * q_stride + head[:, None] * HEAD + columns[None, :], mask=mask, other=0.0)
    line = table + tl.load(crowd_rows + crowd * CROWD).to(tl.int64) * table_stride
    peak, total, acc = _read(
        query, keys, values, line, kv_head, begin, end, scale, M, KV_HEADS, HEAD, HEAD_PAD, BLOCK_SIZE, N, PRECISION
    )
    cell = (split * num_rows + member) * (KV_HEADS * GROUP) + head
    tl.store(part_acc + cell[:, None] * HEAD + columns[None, :], acc, mask=mask)
    tl.store(part_sum + cell, total, mask=real)
    tl.store(part_max + cell, peak, mask=real)


@triton.jit
def _attend_kernel(
    q, keys, values, table, lengths, skip, first, owner, arrived, out, part_acc, part_sum, part_max,
    crowd_acc, crowd_sum, crowd_max, q_stride, table_stride, num_rows, scale,
    CROWD_SPLITS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr, AT_ONCE: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        # Beside a launch that reads for crowds, and has waited for all that came before, it starts at once, and waits
        # for it when it needs what that has read.
        if CROWD_SPLITS == 0:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, part = tl.program_id(0), tl.program_id(1)
    if part >= tl.load(first + num_rows):
        if OVERLAP and CROWD_SPLITS > 0:
            tl.extra.cuda.gdc_wait()
        return
    row = tl.load(owner + part).to(tl.int64)
    before = tl.load(first + row)
    count = tl.load(first + row + 1) - before
    stop = tl.load(lengths + row)
    shared = stop * 0
    if CROWD_SPLITS > 0:
        shared = tl.minimum(tl.load(skip + row), stop)
    span = tl.cdiv(tl.cdiv(stop - shared, count), N) * N
    begin = shared + (part - before) * span
    lane, columns = tl.arange(0, M), tl.arange(0, HEAD_PAD)
    real = lane < GROUP
    head = kv_head * GROUP + lane
    mask = real[:, None] & (columns < HEAD)[None, :]
    query = tl.load(q + row * q_stride + head[:, None] * HEAD + columns[None, :], mask=mask, other=0.0)
    peak, total, acc = _read(
        query, keys, values, table + row * table_stride, kv_head, begin, tl.minimum(begin + span, stop), scale,
        M, KV_HEADS, HEAD, HEAD_PAD, BLOCK_SIZE, N, PRECISION,
    )  # fmt: skip
    if OVERLAP and CROWD_SPLITS > 0:
        tl.extra.cuda.gdc_wait()
    own = row * (KV_HEADS * GROUP) + kv_head * GROUP
    num_cells = num_rows * (KV_HEADS * GROUP)
    if count == 1:
        _finish(
            peak, total, acc, crowd_acc, crowd_sum, crowd_max, out, own + lane, real, shared, num_cells,
            CROWD_SPLITS, HEAD, HEAD_PAD, N,
        )  # fmt: skip
    else:
        cell = part.to(tl.int64) * (KV_HEADS * GROUP) + head
        tl.store(part_acc + cell[:, None] * HEAD + columns[None, :], acc, mask=mask)
        tl.store(part_sum + cell, total, mask=real)
        tl.store(part_max + cell, peak, mask=real)
        tl.debug_barrier()
        if tl.atomic_add(arrived + row * KV_HEADS + kv_head, 1) == count - 1:
            tl.store(arrived + row * KV_HEADS + kv_head, 0)
            # All in their order, so that sums do not depend on who is the last; some at a time are on their way.
            member = tl.arange(0, LANES)
            there = member < GROUP
            top = tl.full([LANES], -1.0e30, tl.float32)
            mass = tl.zeros([LANES], tl.float32)
            mean = tl.zeros([LANES, HEAD_PAD], tl.float32)
            for start in range(before, before + count, AT_ONCE):
                for other in tl.static_range(AT_ONCE):
                    place = tl.cast(start + other, tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + member
                    is_one = there & (start + other < before + count)
                    top, mass, mean = _join(
                        top, mass, mean, part_acc, part_sum, part_max, place, is_one, HEAD, HEAD_PAD
                    )
            _finish(
                top, mass, mean, crowd_acc, crowd_sum, crowd_max, out, own + member, there, shared, num_cells,
                CROWD_SPLITS, HEAD, HEAD_PAD, N,
            )  # fmt: skip


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, num_heads: int, parts: Parts, *,
    crowds: Crowds | None = None, crowd_splits: int = 1, tiling: Tiling = Tiling(),
) -> Tensor:  # fmt: skip
    """Attention of one token a row over its cached keys and values, its own included.

    Args:
        q: [B, at least Hq * d], the heads first; only its rows' stride is free.
        keys, values: [blocks, Hk, block_size, d].
        table: [B, M] int64. lengths: [B] int32, tokens to attend to; a row with 0 is left unwritten.
        parts: of these lengths and crowds, by `divide`.
        crowds: rows that share a prefix; None = each row reads all of its own. crowd_splits: parts of each prefix.

    Returns:
        [B, Hq * d] in q's dtype.
    """
    rows, (_, kv_heads, block_size, head) = len(q), keys.shape
    group, scale = num_heads // kv_heads, head**-0.5 * 1.4426950408889634
    out = q.new_empty(rows, num_heads * head)
    of_parts = _results(len(parts.owner), num_heads, head, q.device)
    overlap = overlaps(q.device)
    common = {
        "GROUP": group, "KV_HEADS": kv_heads, "HEAD": head, "HEAD_PAD": triton.next_power_of_2(head),
        "BLOCK_SIZE": block_size, "N": tiling.keys,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # it only concerns float32
        "OVERLAP": overlap, "num_warps": tiling.warps, "num_stages": tiling.stages, "launch_pdl": overlap,
    }  # fmt: skip
    skip, of_crowds = lengths, of_parts
    if crowds is None:
        crowd_splits = 0
    else:
        skip, of_crowds = crowds.skip, _results(crowd_splits * rows, num_heads, head, q.device)
        _crowd_kernel[(kv_heads, len(crowds.shared) * crowd_splits)](
            q, keys, values, table, crowds.rows, crowds.shared, *of_crowds, q.stride(0), table.stride(0), rows, scale,
            SPLITS=crowd_splits, CROWD=CROWD, M=max(_LEAST_TILE, triton.next_power_of_2(group * CROWD)), **common,
        )  # fmt: skip
    _attend_kernel[(kv_heads, len(parts.owner))](
        q, keys, values, table, lengths, skip, parts.first, parts.owner, parts.arrived, out, *of_parts, *of_crowds,
        q.stride(0), table.stride(0), rows, scale, CROWD_SPLITS=crowd_splits,
        LANES=triton.next_power_of_2(group), M=max(_LEAST_TILE, triton.next_power_of_2(group)), AT_ONCE=_AT_ONCE,
        **common,
    )  # fmt: skip
    return out


def _results(count: int, num_heads: int, head: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for weighted values, sums of weights and highest scores of parts."""
    acc, *sums = (torch.empty(count, num_heads, *last, device=device) for last in ((head,), (), ()))
    return acc, sums[0], sums[1]
