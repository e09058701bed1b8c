"""A layer's attention for very few rows in one launch: norms, rotary, the cache write, attention, joining its parts.

Few rows leave a device waiting, for launches and for memory, more than they make it work. So what stands in the cache
is read before the projection that goes before is done; the newest token's key and value, which it brings, are added
from registers. Each row's keys are cut into parts; whoever finishes a row's last part joins them all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps
from asystem.generation.kernels.layers import rotated_pairs
from asystem.generation.kernels.linear import MOST_ROWS

_KEYS = 64  # a tile; a part is at least one
_MOST_SPLITS = 32
_WARPS = 4


@triton.jit
def _turn(
    source, weight, at_left, at_right, mask, c, s, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Heads [n, d] at ``source``, normed and rotated, as their two halves; rounded as the model rounds."""
    left = tl.load(source + at_left, mask=mask, other=0.0)
    right = tl.load(source + at_right, mask=mask, other=0.0)
    dtype: tl.constexpr = left.dtype
    left, right = left.to(tl.float32), right.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(left * left + right * right, 1)[:, None] / HEAD + eps)
        inside = tl.arange(0, HALF)[None, :] < HEAD // 2
        left = (left * scale * tl.load(weight + at_left, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        right = (right * scale * tl.load(weight + at_right, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        left, right = left.to(tl.float32), right.to(tl.float32)
    return (left * c - right * s).to(dtype), (right * c + left * s).to(dtype)


@triton.jit
def _load_tile(
    keys, values, line, kv_head, begin, end, at_left, at_right, pair_mask, columns,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Cached keys, as two halves, and values of tokens begin..end, and which of N there are; ``line``: of the table."""
    token = begin + tl.arange(0, N)
    inside = token < end
    block = tl.load(line + token // BLOCK_SIZE, mask=inside, other=0)
    source = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE)[:, None] * HEAD
    k_left = tl.load(keys + source + at_left, mask=inside[:, None] & pair_mask, other=0.0)
    k_right = tl.load(keys + source + at_right, mask=inside[:, None] & pair_mask, other=0.0)
    value = tl.load(values + source + columns, mask=inside[:, None] & (columns < HEAD), other=0.0)
    return inside, k_left, k_right, value


@triton.jit
def _attend_tile(
    q_left, q_right, k_left, k_right, value, inside, scale, peak, total, acc, PRECISION: tl.constexpr
):  # fmt: skip
    score = tl.dot(q_left, tl.trans(k_left), input_precision=PRECISION)
    score = tl.dot(q_right, tl.trans(k_right), acc=score, input_precision=PRECISION)
    score = tl.where(inside[None, :], score * scale, -1.0e30)
    top = tl.maximum(peak, tl.max(score, 1))
    weight = tl.where(inside[None, :], tl.exp2(score - top[:, None]), 0.0)
    fade = tl.exp2(peak - top)
    total = total * fade + tl.sum(weight, 1)
    acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    return top, total, acc


@triton.jit
def _few_kernel(
    qkv, q_weight, k_weight, cos, sin, lengths, table, keys, values, out, part_acc, part_sum, part_max, arrived,
    table_stride, num_rows, scale, eps,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    # Lengths were written at the step's beginning, and no kernel but this one writes the cache.
    position = tl.load(lengths + row) - 1
    span = tl.cdiv(tl.cdiv(position, SPLITS), N) * N
    begin = split * span
    end = tl.minimum(begin + span, position)
    pair, half = tl.arange(0, HALF)[None, :], HEAD // 2
    at_left, at_right = rotated_pairs(pair, HEAD, PAIRS)
    columns = tl.arange(0, HEAD_PAD)[None, :]
    line_of = table + row * table_stride
    inside, k_left, k_right, value = _load_tile(
        keys, values, line_of, kv_head, begin, end, at_left, at_right, pair < half, columns, KV_HEADS, HEAD,
        BLOCK_SIZE, N,
    )  # fmt: skip
    c = tl.load(cos + position * PAIRS + pair, mask=(pair < PAIRS) & (position >= 0), other=1.0)
    s = tl.load(sin + position * PAIRS + pair, mask=(pair < PAIRS) & (position >= 0), other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if position < 0:
        return
    lane = tl.arange(0, M)
    real = lane < GROUP
    line = qkv + row * ((GROUP + 2) * KV_HEADS * HEAD)
    q_source = line + (kv_head * GROUP + lane)[:, None] * HEAD
    q_left, q_right = _turn(
        q_source, q_weight, at_left, at_right, real[:, None] & (pair < half), c, s, eps, HEAD, NORM, HALF
    )
    peak = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, HEAD_PAD], tl.float32)
    peak, total, acc = _attend_tile(q_left, q_right, k_left, k_right, value, inside, scale, peak, total, acc, PRECISION)
    for place in range(begin + N, end, N):
        inside, k_left, k_right, value = _load_tile(
            keys, values, line_of, kv_head, place, end, at_left, at_right, pair < half, columns, KV_HEADS, HEAD,
            BLOCK_SIZE, N,
        )  # fmt: skip
        peak, total, acc = _attend_tile(
            q_left, q_right, k_left, k_right, value, inside, scale, peak, total, acc, PRECISION
        )
    if split == 0:  # the newest token
        k_source = line + (GROUP * KV_HEADS + kv_head) * HEAD
        new_left, new_right = _turn(k_source, k_weight, at_left, at_right, pair < half, c, s, eps, HEAD, NORM, HALF)
        v_source = line + ((GROUP + 1) * KV_HEADS + kv_head) * HEAD
        new_value = tl.load(v_source + columns, mask=columns < HEAD, other=0.0)
        own_block = tl.load(line_of + position // BLOCK_SIZE)
        home = ((own_block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD
        tl.store(keys + home + at_left, new_left, mask=pair < half)
        tl.store(keys + home + at_right, new_right, mask=pair < half)
        tl.store(values + home + columns, new_value, mask=columns < HEAD)
        products = q_left.to(tl.float32) * new_left.to(tl.float32) + q_right.to(tl.float32) * new_right.to(tl.float32)
        score = tl.sum(products, 1) * scale
        top = tl.maximum(peak, score)
        weight, fade = tl.exp2(score - top), tl.exp2(peak - top)
        total = total * fade + weight
        rounded = weight.to(new_value.dtype).to(tl.float32)
        acc = acc * fade[:, None] + rounded[:, None] * new_value.to(tl.float32)
        peak = top
    head = row * (KV_HEADS * GROUP) + kv_head * GROUP + lane
    cells = head[:, None] * HEAD + columns
    cell_mask = real[:, None] & (columns < HEAD)
    if SPLITS == 1:
        tl.store(out + cells, (acc / total[:, None]).to(out.dtype.element_ty), mask=cell_mask)
    else:
        heads = num_rows * (KV_HEADS * GROUP)
        tl.store(part_acc + split * heads * HEAD + cells, acc, mask=cell_mask)
        tl.store(part_sum + split * heads + head, total, mask=real)
        tl.store(part_max + split * heads + head, peak, mask=real)
        tl.debug_barrier()
        if tl.atomic_add(arrived + row * KV_HEADS + kv_head, 1) == SPLITS - 1:
            tl.store(arrived + row * KV_HEADS + kv_head, 0)
            slot, member = tl.arange(0, SPLITS_PAD), tl.arange(0, LANES)
            own = row * (KV_HEADS * GROUP) + kv_head * GROUP + member
            places = slot[:, None] * heads + own[None, :]
            there = (slot < SPLITS)[:, None] & (member < GROUP)[None, :]
            peaks = tl.load(part_max + places, mask=there, other=-1.0e30, cache_modifier=".cg")
            sums = tl.load(part_sum + places, mask=there, other=0.0, cache_modifier=".cg")
            highest = tl.max(peaks, 0)
            whole = tl.where(member < GROUP, tl.sum(sums * tl.exp2(peaks - highest[None, :]), 0), 1.0)
            own_cells = own[:, None] * HEAD + columns
            own_mask = (member < GROUP)[:, None] & (columns < HEAD)
            joined = tl.zeros([LANES, HEAD_PAD], tl.float32)
            for other in tl.static_range(SPLITS):
                part = tl.load(
                    part_acc + other * heads * HEAD + own_cells, mask=own_mask, other=0.0, cache_modifier=".cg"
                )
                part_peak = tl.load(
                    part_max + other * heads + own, mask=member < GROUP, other=-1.0e30, cache_modifier=".cg"
                )
                joined += part * tl.exp2(part_peak - highest)[:, None]
            tl.store(out + own_cells, (joined / whole[:, None]).to(out.dtype.element_ty), mask=own_mask)


class FewRows:
    """The launch for up to `MOST_ROWS` rows, with what it keeps between launches.

    Args:
        num_heads: Hq. kv_heads: Hk. max_length: tokens of the longest sequence.
    """

    def __init__(self, num_heads: int, kv_heads: int, max_length: int, device: torch.device) -> None:
        self.num_heads = num_heads
        self.splits = max(1, min(_MOST_SPLITS, -(-max_length // _KEYS)))
        # Parts that have arrived of each row and head; whoever joins them sets it back.
        self._arrived = torch.zeros(MOST_ROWS * kv_heads, dtype=torch.int32, device=device)

    def attend(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
        lengths: Tensor, table: Tensor, keys: Tensor, values: Tensor,
    ) -> Tensor:  # fmt: skip
        """What `rotary_write` and `decode_attention` make of a row's projections, which it leaves as they are.

        Args:
            qkv: [B, (Hq + 2 * Hk) * d], B at most `MOST_ROWS`. q_weight, k_weight: [d], of the heads' RMSNorm, or None.
            cos, sin: [positions, r / 2] float32. lengths: [B] int32, the new token included; 0 = the row stands still.
            table: [B, M] int64. keys, values: [blocks, Hk, block_size, d]; the new token's place is written.

        Returns:
            [B, Hq * d] in qkv's dtype; rows of length 0 are not written.
        """
        rows, (_, kv_heads, block_size, head) = len(qkv), keys.shape
        group, norm, overlap = self.num_heads // kv_heads, q_weight is not None, overlaps(qkv.device)
        out = qkv.new_empty(rows, self.num_heads * head)
        acc, (total, peak) = out, (lengths, lengths)
        if self.splits > 1:
            shape = (self.splits, rows, self.num_heads)
            acc = torch.empty(*shape, head, dtype=torch.float32, device=qkv.device)
            total, peak = torch.empty(2, *shape, dtype=torch.float32, device=qkv.device).unbind()
        _few_kernel[(kv_heads, rows, self.splits)](
            qkv, q_weight if norm else qkv, k_weight if norm else qkv, cos, sin, lengths, table, keys, values, out,
            acc, total, peak, self._arrived, table.stride(0), rows, head**-0.5 * 1.4426950408889634, eps,
            SPLITS=self.splits, SPLITS_PAD=triton.next_power_of_2(self.splits), GROUP=group,
            LANES=triton.next_power_of_2(group), M=max(16, triton.next_power_of_2(group)), KV_HEADS=kv_heads, HEAD=head,
            HEAD_PAD=triton.next_power_of_2(head), HALF=max(16, triton.next_power_of_2(head // 2)),
            PAIRS=cos.shape[-1], BLOCK_SIZE=block_size, N=_KEYS, NORM=norm,
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",  # it only concerns float32
            OVERLAP=overlap, num_warps=_WARPS, launch_pdl=overlap,
        )  # fmt: skip
        return out
