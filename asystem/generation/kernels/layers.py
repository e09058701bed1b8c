"""The small operations between a decode step's matrix products, one launch each.

All round to the model's dtype where `models.decoder` does, so that both paths differ only in the order of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.kernels.launch import overlaps

_HEADS = 8  # heads that one program normalises and rotates


@triton.jit
def _embed_kernel(
    last_token, position, done, control, embedding, weight, x, out, lengths, size, eps, SIZE: tl.constexpr
):
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    mask = columns < size
    active = (row < tl.load(control)) & (tl.load(done + row) == 0)
    tl.store(lengths + row, tl.where(active, tl.load(position + row) + 1, 0).to(tl.int32))
    token = tl.where(active, tl.load(last_token + row), 0)
    raw = tl.load(embedding + token * size + columns, mask=mask, other=0.0)
    tl.store(x + row * size + columns, raw, mask=mask)
    value = raw.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (value * scale * gain).to(out.dtype.element_ty), mask=mask)


def embed(
    last_token: Tensor, position: Tensor, done: Tensor, control: Tensor, embedding: Tensor, weight: Tensor,
    eps: float, lengths: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Looks up the newest tokens and normalises them for the first layer.

    Args:
        last_token, position, done: [B] int64, of `rows.Rows`. control: int64, its first entry the rows in use.
        embedding: [V, D]. weight: [D], of the first layer's norm.
        lengths: [B] int32, written: tokens to attend to, the new one included; 0 for a row that stands still.

    Returns:
        The residual stream [B, D] and its normed copy [B, D].
    """
    rows, size = len(last_token), embedding.shape[1]
    x = embedding.new_empty(rows, size)
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    _embed_kernel[(rows,)](
        last_token, position, done, control, embedding, weight, x, out, lengths, size, eps, SIZE=padded,
        num_warps=_warps(padded),
    )  # fmt: skip
    return x, out


@triton.jit
def _add_rms_norm_kernel(x, y, weight, out, size, eps, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    mask = columns < size
    value = tl.load(x + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(y + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = value.to(x.dtype.element_ty)
    tl.store(x + row * size + columns, rounded, mask=mask)
    value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (value * scale * gain).to(out.dtype.element_ty), mask=mask)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x += y in place, then RMSNorm of x: x, y [B, D], weight [D] -> [B, D]."""
    rows, size = x.shape
    out, padded = torch.empty_like(x), triton.next_power_of_2(size)
    overlap = overlaps(x.device)
    _add_rms_norm_kernel[(rows,)](
        x, y, weight, out, size, eps, SIZE=padded, OVERLAP=overlap, num_warps=_warps(padded),
        launch_pdl=overlap,
    )  # fmt: skip
    return out


@triton.jit
def _swiglu_kernel(gate_up, out, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=mask, other=0.0).to(tl.float32)
    # The model rounds silu(gate) before it multiplies.
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, (silu * up).to(out.dtype.element_ty), mask=mask)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [B, 2 * I], the gate's half first -> [B, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out, block = gate_up.new_empty(rows, size), 1024
    overlap = overlaps(gate_up.device)
    _swiglu_kernel[(triton.cdiv(size, block), rows)](
        gate_up, out, size, BLOCK=block, OVERLAP=overlap, num_warps=4, launch_pdl=overlap
    )
    return out


@triton.jit
def rotated_pairs(columns, HEAD: tl.constexpr, PAIRS: tl.constexpr):
    """Where the two numbers of each pair of a head lie: those that are rotated, i with i + PAIRS, then the rest."""
    half: tl.constexpr = HEAD // 2
    if half == PAIRS:
        left, right = columns, columns + half
    else:
        left = tl.where(columns < PAIRS, columns, columns + PAIRS)
        right = tl.where(columns < PAIRS, columns + PAIRS, columns + half)
    return left, right


@triton.jit
def _rotary_write_kernel(
    qkv, q_weight, k_weight, cos, sin, lengths, table, keys, values, table_stride, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    length = tl.load(lengths + row)
    if length == 0:
        return
    position = length - 1
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = HEAD // 2
    mask = (columns < half) & (heads < Q_HEADS + 2 * KV_HEADS)
    is_q, is_v = heads < Q_HEADS, heads >= Q_HEADS + KV_HEADS
    at_left, at_right = rotated_pairs(columns, HEAD, PAIRS)
    source = qkv + (row * (Q_HEADS + 2 * KV_HEADS) + heads) * HEAD
    raw_left = tl.load(source + at_left, mask=mask, other=0.0)
    raw_right = tl.load(source + at_right, mask=mask, other=0.0)
    left, right = raw_left.to(tl.float32), raw_right.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(left * left + right * right, 1)[:, None] / HEAD + eps)
        column_mask = columns < half
        q_left = tl.load(q_weight + at_left, mask=column_mask, other=0.0).to(tl.float32)
        q_right = tl.load(q_weight + at_right, mask=column_mask, other=0.0).to(tl.float32)
        k_left = tl.load(k_weight + at_left, mask=column_mask, other=0.0).to(tl.float32)
        k_right = tl.load(k_weight + at_right, mask=column_mask, other=0.0).to(tl.float32)
        left = (left * scale * tl.where(is_q, q_left, k_left)).to(qkv.dtype.element_ty).to(tl.float32)
        right = (right * scale * tl.where(is_q, q_right, k_right)).to(qkv.dtype.element_ty).to(tl.float32)
    c = tl.load(cos + position * PAIRS + columns, mask=columns < PAIRS, other=1.0)
    s = tl.load(sin + position * PAIRS + columns, mask=columns < PAIRS, other=0.0)
    new_left = (left * c - right * s).to(qkv.dtype.element_ty)
    new_right = (right * c + left * s).to(qkv.dtype.element_ty)
    tl.store(source + at_left, new_left, mask=mask & is_q)
    tl.store(source + at_right, new_right, mask=mask & is_q)
    block = tl.load(table + row * table_stride + position // BLOCK_SIZE)
    kv_head = tl.where(is_v, heads - Q_HEADS - KV_HEADS, heads - Q_HEADS)
    place = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD
    is_k = (heads >= Q_HEADS) & (heads < Q_HEADS + KV_HEADS)
    tl.store(keys + place + at_left, new_left, mask=mask & is_k)
    tl.store(keys + place + at_right, new_right, mask=mask & is_k)
    tl.store(values + place + at_left, raw_left, mask=mask & is_v)
    tl.store(values + place + at_right, raw_right, mask=mask & is_v)


def rotary_write(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    lengths: Tensor, table: Tensor, keys: Tensor, values: Tensor, num_heads: int,
) -> None:  # fmt: skip
    """Norms and rotates q in place; norms and rotates k, and writes k and v into the paged cache.

    Args:
        qkv: [B, (Hq + 2 * Hk) * d]. q_weight, k_weight: [d], of the heads' RMSNorm; None = the model has none.
        cos, sin: [positions, r / 2] float32, for the first r numbers of a head; the others are not rotated.
        lengths: [B] int32, the new token included; rows with 0 are left alone.
        table: [B, M] int64. keys, values: [blocks, Hk, block_size, d]. num_heads: Hq.
    """
    _, kv_heads, block_size, head = keys.shape
    norm = q_weight is not None
    total, overlap = num_heads + 2 * kv_heads, overlaps(qkv.device)
    _rotary_write_kernel[(triton.cdiv(total, _HEADS), len(qkv))](
        qkv, q_weight if norm else qkv, k_weight if norm else qkv, cos, sin, lengths, table, keys, values,
        table.stride(0), eps, Q_HEADS=num_heads, KV_HEADS=kv_heads, HEAD=head, HALF=triton.next_power_of_2(head // 2),
        PAIRS=cos.shape[-1], BLOCK_SIZE=block_size, NORM=norm, HEADS=_HEADS, OVERLAP=overlap, num_warps=2,
        launch_pdl=overlap,
    )  # fmt: skip


def _warps(columns: int) -> int:
    return min(8, max(1, columns // 256))
