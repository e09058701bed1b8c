"""What each kernel computes, in plain PyTorch: the oracle of the tests."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from asystem.models.decoder import rotate


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `layers.add_rms_norm`."""
    x += y
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `layers.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary_write(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    lengths: Tensor, table: Tensor, keys: Tensor, values: Tensor, num_heads: int,
) -> None:  # fmt: skip
    """See `layers.rotary_write`."""
    _, kv_heads, block_size, head = keys.shape
    heads = qkv.view(len(qkv), -1, head)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        q, k, v = heads[row].split([num_heads, kv_heads, kv_heads])
        if q_weight is not None and k_weight is not None:
            q, k = (F.rms_norm(x, (head,), w, eps) for x, w in ((q, q_weight), (k, k_weight)))
        block, offset = table[row, (length - 1) // block_size], (length - 1) % block_size
        keys[block, :, offset] = rotate(k, cos[length - 1], sin[length - 1])
        values[block, :, offset] = v
        heads[row, :num_heads] = rotate(q, cos[length - 1], sin[length - 1])


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, num_heads: int) -> Tensor:
    """See `attention.decode_attention`; in float32 inside, zeros for rows of length 0."""
    _, kv_heads, block_size, head = keys.shape
    out = q.new_zeros(len(q), num_heads, head)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        blocks = table[row, : -(-length // block_size)]
        k, v = (x[blocks].transpose(0, 1).reshape(kv_heads, -1, head)[:, :length].float() for x in (keys, values))
        query = q[row, : num_heads * head].view(kv_heads, -1, head).float()
        weights = (query @ k.transpose(1, 2) * head**-0.5).softmax(-1)
        out[row] = (weights @ v).view(num_heads, head).to(q.dtype)
    return out.flatten(1)
