"""Paged, grouped-query attention of one new token a sequence, split over the keys' length.

Samples of one group share the blocks of their prompt. A *crowd* is up to `CROWD` such rows; one program reads the
shared blocks once for all of them, others read what each row has alone, and the parts are joined by their
softmax sums. Without crowds or splits there is one part a row and no second launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps

CROWD = 8  # rows that read a shared prefix together


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


@triton.jit
def _attend_kernel(
    q, keys, values, table, lengths, skip, crowd_rows, crowd_shared, out, part_acc, part_sum, part_max,
    q_stride, table_stride, num_rows, scale,
    SPLITS: tl.constexpr, CROWD_SPLITS: tl.constexpr, CROWDS: tl.constexpr, CROWD: tl.constexpr,
    GROUP: tl.constexpr, M: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, N: tl.constexpr, DIRECT: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        # A launch that adds the crowds' parts starts beside the launch that computes them, which has waited for all
        # that came before: it waits for it when it needs those parts, at its end.
        if not ADDS:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, item = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, M)
    # Crowds come first: theirs are the longest programs.
    if item < CROWDS * CROWD_SPLITS:
        crowd = item // max(CROWD_SPLITS, 1)
        slot = item % max(CROWD_SPLITS, 1)
        stop = tl.load(crowd_shared + crowd)
        member = tl.load(crowd_rows + crowd * CROWD + lane // GROUP, mask=lane < CROWD * GROUP, other=-1)
        row = tl.load(crowd_rows + crowd * CROWD).to(tl.int64)
        span = tl.cdiv(tl.cdiv(stop, max(CROWD_SPLITS, 1)), N) * N
        begin = slot * span
    else:
        row = ((item - CROWDS * CROWD_SPLITS) // SPLITS).to(tl.int64)
        split = (item - CROWDS * CROWD_SPLITS) % SPLITS
        slot = CROWD_SPLITS + split
        stop = tl.load(lengths + row)
        member = tl.where(lane < GROUP, row, -1).to(tl.int32)
        begin = stop * 0
        if CROWD_SPLITS > 0 or ADDS > 0:
            begin = tl.minimum(tl.load(skip + row), stop)
        span = tl.cdiv(tl.cdiv(stop - begin, SPLITS), N) * N
        begin += split * span
    end = tl.minimum(begin + span, stop)
    if begin >= end:
        if OVERLAP and ADDS > 0:
            tl.extra.cuda.gdc_wait()
        return  # who joins the parts knows from the same numbers that this one is empty
    columns = tl.arange(0, HEAD_PAD)
    column_mask = columns < HEAD
    head = kv_head * GROUP + lane % GROUP
    real = member >= 0
    query = tl.load(
        q + member[:, None].to(tl.int64) * q_stride + head[:, None] * HEAD + columns[None, :],
        mask=real[:, None] & column_mask[None, :], other=0.0,
    )  # fmt: skip
    peak = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, HEAD_PAD], tl.float32)
    for place in range(begin, end, N):
        token = place + tl.arange(0, N)
        inside = token < end
        block = tl.load(table + row * table_stride + token // BLOCK_SIZE, mask=inside, other=0)
        source = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE) * HEAD
        tile = source[:, None] + columns[None, :]
        tile_mask = inside[:, None] & column_mask[None, :]
        key = tl.load(keys + tile, mask=tile_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = tl.where(inside[None, :], score * scale, -1.0e30)
        new_peak = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(values + tile, mask=tile_mask, other=0.0)
        acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        peak = new_peak
    place = member.to(tl.int64) * (KV_HEADS * GROUP) + head
    if ADDS > 0:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        shared = tl.minimum(tl.load(skip + row), tl.load(lengths + row))
        part_span = tl.cdiv(tl.cdiv(shared, ADDS), N) * N
        for other in tl.static_range(ADDS):
            there = real & (lane < tl.where(other * part_span < shared, M, 0))
            part = other * num_rows * (KV_HEADS * GROUP) + place
            part_peak = tl.load(part_max + part, mask=there, other=-1.0e30)
            part_total = tl.load(part_sum + part, mask=there, other=0.0)
            mean = tl.load(
                part_acc + part[:, None] * HEAD + columns[None, :],
                mask=there[:, None] & column_mask[None, :],
                other=0.0,
            )
            new_peak = tl.maximum(peak, part_peak)
            fade, gain = tl.exp2(peak - new_peak), tl.exp2(part_peak - new_peak)
            total = total * fade + part_total * gain
            acc = acc * fade[:, None] + mean.to(tl.float32) * (part_total * gain)[:, None]
            peak = new_peak
    if DIRECT:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * HEAD + columns[None, :], result, mask=real[:, None] & column_mask[None, :])
    else:
        part = slot * num_rows * (KV_HEADS * GROUP) + place
        mean = (acc / total[:, None]).to(part_acc.dtype.element_ty)
        tl.store(part_acc + part[:, None] * HEAD + columns[None, :], mean, mask=real[:, None] & column_mask[None, :])
        tl.store(part_sum + part, total, mask=real)
        tl.store(part_max + part, peak, mask=real)


@triton.jit
def _join_kernel(
    lengths, skip, out, part_acc, part_sum, part_max, num_rows,
    SPLITS: tl.constexpr, CROWD_SPLITS: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    stop = tl.load(lengths + row)
    if stop == 0:
        return
    head = tl.program_id(1) * HEADS_PAD + tl.arange(0, HEADS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    mask = (head < HEADS)[:, None] & (columns < HEAD)[None, :]
    shared = stop * 0
    if CROWD_SPLITS > 0:
        shared = tl.minimum(tl.load(skip + row), stop)
    peak = tl.full([HEADS_PAD], -1.0e30, tl.float32)
    total = tl.zeros([HEADS_PAD], tl.float32)
    acc = tl.zeros([HEADS_PAD, HEAD_PAD], tl.float32)
    for slot in tl.static_range(CROWD_SPLITS + SPLITS):
        if slot < CROWD_SPLITS:
            span = tl.cdiv(tl.cdiv(shared, max(CROWD_SPLITS, 1)), N) * N
            left = shared - slot * span
        else:
            span = tl.cdiv(tl.cdiv(stop - shared, SPLITS), N) * N
            left = stop - shared - (slot - CROWD_SPLITS) * span
        part = (slot * num_rows + row) * HEADS + head
        there = head < tl.where(left > 0, HEADS, 0)
        part_peak = tl.load(part_max + part, mask=there, other=-1.0e30)
        part_total = tl.load(part_sum + part, mask=there, other=0.0)
        value = tl.load(part_acc + part[:, None] * HEAD + columns[None, :], mask=mask & there[:, None], other=0.0)
        new_peak = tl.maximum(peak, part_peak)
        fade, gain = tl.exp2(peak - new_peak), tl.exp2(part_peak - new_peak)
        total = total * fade + part_total * gain
        acc = acc * fade[:, None] + value.to(tl.float32) * (part_total * gain)[:, None]
        peak = new_peak
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * HEADS + head)[:, None] * HEAD + columns[None, :], result, mask=mask)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, num_heads: int, *,
    splits: int = 1, crowds: Crowds | None = None, crowd_splits: int = 1, tiling: Tiling = Tiling(),
) -> Tensor:  # fmt: skip
    """Attention of one token a row over its cached keys and values, its own included.

    Args:
        q: [B, at least Hq * d], the heads first; only its rows' stride is free.
        keys, values: [blocks, Hk, block_size, d].
        table: [B, M] int64. lengths: [B] int32, tokens to attend to; a row with 0 is left unwritten.
        splits: parts that each row's own keys are cut into; more of them keep a device busy with few rows.
        crowds: rows that share a prefix; None = each row reads all of its own. crowd_splits: parts of each prefix.

    Returns:
        [B, Hq * d] in q's dtype.
    """
    rows, (_, kv_heads, block_size, head) = len(q), keys.shape
    group = num_heads // kv_heads
    out = q.new_empty(rows, num_heads * head)
    num_crowds = 0 if crowds is None else len(crowds.shared)
    if crowds is None:
        crowd_splits = 0
    apart = crowds is not None and splits == 1
    direct = crowds is None and splits == 1
    if direct:
        acc = total = peak = out
    else:
        parts = crowd_splits + (0 if apart else splits)
        acc = q.new_empty(parts, rows, num_heads, head)
        total, peak = torch.empty(2, parts, rows, num_heads, dtype=torch.float32, device=q.device).unbind()
    skip, members, shared = (lengths,) * 3 if crowds is None else (crowds.skip, crowds.rows, crowds.shared)
    pad, overlap = triton.next_power_of_2(head), overlaps(q.device)

    def launch(num_crowds: int, crowd_splits: int, splits: int, direct: bool, adds: int) -> None:
        lanes = max(16, triton.next_power_of_2(group * (CROWD if num_crowds else 1)))
        _attend_kernel[(kv_heads, num_crowds * crowd_splits + rows * splits)](
            q, keys, values, table, lengths, skip, members, shared, out, acc, total, peak,
            q.stride(0), table.stride(0), rows, head**-0.5 * 1.4426950408889634,
            SPLITS=max(splits, 1), CROWD_SPLITS=crowd_splits, CROWDS=num_crowds, CROWD=CROWD, GROUP=group, M=lanes,
            KV_HEADS=kv_heads, HEAD=head, HEAD_PAD=pad, BLOCK_SIZE=block_size, N=tiling.keys, DIRECT=direct, ADDS=adds,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # it only concerns float32
            OVERLAP=overlap, num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=overlap,
        )  # fmt: skip

    if apart:
        launch(num_crowds, crowd_splits, 0, direct=False, adds=0)
        launch(0, 0, 1, direct=True, adds=crowd_splits)
        return out
    launch(num_crowds, crowd_splits, splits, direct, adds=0)
    if not direct:
        heads_pad = min(4, triton.next_power_of_2(num_heads))
        _join_kernel[(rows, triton.cdiv(num_heads, heads_pad))](
            lengths, skip, out, acc, total, peak, rows, SPLITS=splits, CROWD_SPLITS=crowd_splits,
            HEADS=num_heads, HEADS_PAD=heads_pad, HEAD=head, HEAD_PAD=pad, N=tiling.keys, OVERLAP=overlap,
            num_warps=2, launch_pdl=overlap,
        )  # fmt: skip
    return out
