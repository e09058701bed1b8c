"""The paged KV cache and attention over it, in plain PyTorch on any device: the oracle of faster ways.

A sequence's keys and values lie in blocks of `block_size` tokens anywhere in the pool; its block table lists them in
order of position. `PrefillAttention` and `DecodeAttention` are the `attend` that `models.decoder.Decoder` calls in
each layer: they write the new keys and values into the cache, then attend over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asystem.models.attention import varlen_attention

Memory = Callable[[int], Tensor]


class KVCache:
    """Keys and values of all layers: `data` is [layers, 2, blocks, kv heads, block_size, head_dim].

    Args:
        memory: makes [bytes] uint8 of so many bytes on the device; None = PyTorch's allocator does.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Memory | None = None,
    ) -> None:
        shape = (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)
        # Zeros, not empty: a masked position's value is multiplied by 0, and 0 times a stray NaN is NaN.
        if memory is None:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.data = memory(prod(shape) * dtype.itemsize).view(dtype).view(shape).zero_()
        self.num_kv_heads, self.block_size, self.head_dim = num_kv_heads, block_size, head_dim
        self._heads = torch.arange(num_kv_heads, device=device)
        self._tokens = self.data.view(num_layers, 2, -1, head_dim)  # one row a (block, head, offset)
        self._chunks = self.data.view(num_layers, 2, -1, block_size * head_dim)  # one row a (block, head)
        self._scratch = self._chunks.new_empty(2, 0, block_size * head_dim)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def token_rows(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Where tokens at [T] `offsets` of [T] `blocks` are written: [T * kv heads]."""
        rows = (blocks[:, None] * self.num_kv_heads + self._heads) * self.block_size + offsets[:, None]
        return rows.flatten()

    def chunk_rows(self, table: Tensor) -> Tensor:
        """Where the blocks of a [B, M] table are read: [B * kv heads * M]."""
        return (table[:, None, :] * self.num_kv_heads + self._heads[:, None]).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v [T, kv heads, head_dim] at `token_rows`."""
        keys, values = self._tokens[layer]
        keys.index_copy_(0, rows, k.reshape(-1, self.head_dim))
        values.index_copy_(0, rows, v.reshape(-1, self.head_dim))

    def read(self, layer: int, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `chunk_rows`, each [batch, kv heads, M * block_size, head_dim], until the next read."""
        keys, values = self._chunks[layer]
        if len(rows) > self._scratch.shape[1]:
            self._scratch = self._chunks.new_empty(2, 2 * len(rows), keys.shape[1])
        shape = (batch, self.num_kv_heads, -1, self.head_dim)
        # One buffer for all layers and steps: megabytes freshly allocated each time cost more in page faults on a CPU
        # than attention does.
        k, v = (
            torch.index_select(source, 0, rows, out=out[: len(rows)])
            for source, out in zip((keys, values), self._scratch, strict=True)
        )
        return k.view(shape), v.view(shape)

    def read_tokens(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `token_rows`, each [T, kv heads, head_dim]."""
        shape = (-1, self.num_kv_heads, self.head_dim)
        keys, values = (source.index_select(0, rows).view(shape) for source in self._tokens[layer])
        return keys, values

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies whole blocks in all layers: the partly filled last block of a prompt, for each sample of a group."""
        source, destination = (torch.tensor(x, device=self.data.device) for x in (sources, destinations))
        self.data[:, :, destination] = self.data[:, :, source]


class DecodeAttention:
    """One new token a sequence. Everything that depends only on positions is worked out once for all layers.

    Args:
        table: [B, M] int64, blocks of each sequence, M enough for the longest; entries beyond a sequence's end are
            any valid block. position: [B] int64, of the new token.

    Attributes:
        places: [B] blocks, [B] offsets where the new tokens are written.
    """

    def __init__(self, cache: KVCache, table: Tensor, position: Tensor) -> None:
        self.cache = cache
        index = torch.div(position, cache.block_size, rounding_mode="floor")
        block = table.gather(1, index[:, None])[:, 0]
        self.places = block, position - index * cache.block_size
        self._write_rows = cache.token_rows(*self.places)
        self._read_rows = cache.chunk_rows(table)
        places = torch.arange(table.shape[1] * cache.block_size, device=table.device)
        mask = torch.zeros(len(position), len(places), device=table.device)
        self._mask = mask.masked_fill_(places > position[:, None], -torch.inf)[:, None, None, :]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, query heads, d], k and v [B, kv heads, d] to [B, query heads, d]."""
        cache = self.cache
        cache.write(layer, self._write_rows, k, v)
        keys, values = cache.read(layer, self._read_rows, len(q))
        # The query heads that share a KV head stand where a prefill has its query positions: no KV is repeated.
        # Plain products: on a CPU scaled_dot_product_attention does not spread one query position over the cores.
        grouped = q.reshape(len(q), cache.num_kv_heads, -1, cache.head_dim)
        scores = (grouped @ keys.transpose(-1, -2)).float()  # [B, kv heads, query heads of one, tokens]
        weights = scores.mul_(cache.head_dim**-0.5).add_(self._mask).softmax(-1)
        return (weights.to(values.dtype) @ values).view(q.shape)


class PrefillAttention:
    """Several prompts packed one after another, each attending to itself and to what the cache has before it.

    Where some sequence has a context, all keys and values are read back from the cache, packed in the same order. On
    CUDA in half precision one variable-length flash kernel serves them all, else sequences take turns.

    Args:
        blocks: blocks of each sequence, its context included.
        contexts: tokens of each sequence that are in the cache already.
        lengths: tokens of each sequence in the packed batch, T in all.

    Attributes:
        places: [T] blocks, [T] offsets where the tokens are written.
    """

    def __init__(
        self,
        cache: KVCache,
        blocks: Sequence[Sequence[int]],
        contexts: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self.cache, device = cache, cache.data.device
        self.lengths, self.totals = list(lengths), [c + n for c, n in zip(contexts, lengths, strict=True)]
        self.places = self._places(blocks, contexts, self.totals)
        self._write_rows = cache.token_rows(*self.places)
        self._read_rows = None
        if any(contexts):
            self._read_rows = cache.token_rows(*self._places(blocks, [0] * len(blocks), self.totals))
        self._starts: tuple[Tensor, Tensor] | None = None
        if cache.data.is_cuda and cache.data.dtype != torch.float32:
            self._starts = _starts(self.lengths, device), _starts(self.totals, device)
        else:
            self._masks = [_mask(c, n, device) for c, n in zip(contexts, lengths, strict=True)]

    def _places(
        self, blocks: Sequence[Sequence[int]], begins: Sequence[int], ends: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Blocks and offsets of the tokens begin..end-1 of each sequence."""
        size, device = self.cache.block_size, self.cache.data.device
        spans = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
        block = np.concatenate([np.asarray(b, np.int64)[s // size] for b, s in zip(blocks, spans, strict=True)])
        offset = np.concatenate(spans) % size
        return torch.from_numpy(block).to(device), torch.from_numpy(offset).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, query heads, d], k and v [T, kv heads, d] to [T, query heads, d]."""
        # All writes come before any read: a context may be another sequence's prompt of this same batch.
        self.cache.write(layer, self._write_rows, k, v)
        if self._read_rows is not None:
            k, v = self.cache.read_tokens(layer, self._read_rows)
        if self._starts is not None:
            return varlen_attention(q, k, v, *self._starts, max(self.lengths), max(self.totals))
        queries = torch.split(q.transpose(0, 1), self.lengths, dim=1)
        keys, values = (torch.split(x.transpose(0, 1), self.totals, dim=1) for x in (k, v))
        parts = [
            scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )[0]
            for query, key, value, mask in zip(queries, keys, values, self._masks, strict=True)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1)


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)


def _mask(context: int, length: int, device: torch.device) -> Tensor | None:
    """[length, context + length] bool, what each new token sees; None without a context, where causal says it all."""
    if not context:
        return None
    places = torch.arange(context + length, device=device)
    return places <= places[context:, None]
