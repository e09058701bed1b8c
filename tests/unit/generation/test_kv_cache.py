"""Paged attention against plain attention over each whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asystem.generation.kv_cache import DecodeAttention, KVCache, PrefillAttention

LAYERS, KV_HEADS, DIM = 2, 2, 6


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, heads, d] over one sequence."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("group", [1, 3])
def test_prefill_then_context_then_decode_equals_whole_attention(block_size: int, group: int) -> None:
    torch.manual_seed(block_size + group)
    lengths, contexts = [1, 9, 4, 17], [0, 5, 3, 16]  # the last 9 - 5, 4 - 3, 17 - 16 tokens come in a second prefill
    cache = KVCache(LAYERS, 90, KV_HEADS, block_size, DIM, torch.float32, torch.device("cpu"))
    order = torch.randperm(90).tolist()
    num_blocks = [-(-(n + 1) // block_size) for n in lengths]
    blocks = [[order.pop() for _ in range(n)] for n in num_blocks]
    q, k, v = (
        [torch.randn(LAYERS, n + 1, heads, DIM) for n in lengths] for heads in (KV_HEADS * group, KV_HEADS, KV_HEADS)
    )
    whole = [[causal(q[i][x], k[i][x], v[i][x]) for i in range(4)] for x in range(LAYERS)]

    first = [context or n for context, n in zip(contexts, lengths, strict=True)]
    attend = PrefillAttention(cache, blocks, [0] * 4, first)
    for x in range(LAYERS):
        packed = [torch.cat([t[i][x, :n] for i, n in enumerate(first)]) for t in (q, k, v)]
        want = torch.cat([whole[x][i][:n] for i, n in enumerate(first)])
        torch.testing.assert_close(attend(x, *packed), want)

    later = [i for i in range(4) if contexts[i]]
    spans = [slice(contexts[i], lengths[i]) for i in later]
    attend = PrefillAttention(
        cache, [blocks[i] for i in later], [contexts[i] for i in later], [lengths[i] - contexts[i] for i in later]
    )
    for x in range(LAYERS):
        packed = [torch.cat([t[i][x, s] for i, s in zip(later, spans, strict=True)]) for t in (q, k, v)]
        want = torch.cat([whole[x][i][s] for i, s in zip(later, spans, strict=True)])
        torch.testing.assert_close(attend(x, *packed), want)

    table = torch.zeros(4, max(num_blocks), dtype=torch.int64)
    for i, line in enumerate(blocks):
        table[i, : len(line)] = torch.tensor(line)
    decode = DecodeAttention(cache, table, torch.tensor(lengths))
    for x in range(LAYERS):
        newest = [torch.stack([t[i][x, -1] for i in range(4)]) for t in (q, k, v)]
        torch.testing.assert_close(decode(x, *newest), torch.stack([whole[x][i][-1] for i in range(4)]))


def test_copied_blocks_hold_the_same_keys_and_values_in_all_layers() -> None:
    cache = KVCache(LAYERS, 5, KV_HEADS, 4, DIM, torch.float32, torch.device("cpu"))
    cache.data.normal_()
    before = cache.data.clone()
    cache.copy_blocks([1, 1], [3, 4])
    assert torch.equal(cache.data[:, :, [3, 4]], before[:, :, [1, 1]])
    assert torch.equal(cache.data[:, :, :3], before[:, :, :3])
