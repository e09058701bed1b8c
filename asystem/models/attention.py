"""Causal attention within packed sequences: the trainer's `Attend`.

On CUDA in half precision it is one variable-length flash kernel; on Hopper and later, long sequences, and several of
one length beside each other, go to cuDNN, which takes little more than half of that kernel's time (an H100, 16 heads of
128, forward and backward: 7.0 ms instead of 12.6 for 16,384 tokens, 0.71 instead of 1.13 for 25 times 640), unless most
of the work is in others. Elsewhere sequences of similar length are gathered into padded batches for
scaled_dot_product_attention: one call for many short sequences, no quadratic waste for uneven ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Sequences share a padded batch while the shortest is at least this share of the longest, or short by few tokens.
_MIN_FILL = 0.75
_MAX_PADDING = 8

LONG = 2048  # tokens from which on a sequence alone is cuDNN's
EQUAL = 8  # sequences of one length that are, however short
# Squares of lengths a token of all from which on these pay beside others, for q, k and v are split then and what comes
# of them joined. On an H200, 16 heads, a layer: 21 ns a square against 28 us a thousand tokens, and calls for the host.
_WORTH = 2048
_PLAN = 256  # cuDNN plans each length anew, for a tenth of a second: that of a sequence alone is rounded up


class PackedAttention:
    """Attends within each of N sequences that lie one after another on the token axis.

    Args:
        cu_seqlens: [N + 1] int32, where each sequence starts, and the total; on the device of q, k and v.
        max_seqlen: tokens of the longest sequence, or an upper bound.
        starts: ``cu_seqlens`` on the host, where they are known; without them a long sequence is like any other.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, starts: Sequence[int] | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self._starts = starts
        # On CUDA only float32 needs them.
        self._buckets = None if cu_seqlens.is_cuda else self._make_buckets(cu_seqlens.device)
        runs = _runs(starts) if starts is not None and cu_seqlens.is_cuda else []
        self._runs: list[tuple[_Run, Tensor]] | None = None  # each with its sequences' starts within it, for all layers
        if _are_worth_it(runs):
            self._runs = [(run, cu_seqlens[run.first : run.last + 1] - run.start) for run in runs]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, d], k and v [T, Hk, d] -> [T, Hq, d]."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            if self._runs is not None and _cudnn_is_quicker(q.device, q.shape[-1]):
                if len(self._runs) == 1:
                    return _attend_run(*self._runs[0], q, k, v)
                # Split, not sliced: a slice's gradient is all of q, zero but for the slice, and one more sum.
                sizes = [run.stop - run.start for run, _ in self._runs]
                pieces = zip(self._runs, *(torch.split(x, sizes) for x in (q, k, v)), strict=True)
                return torch.cat([_attend_run(*run, *piece) for run, *piece in pieces])
            starts, longest = self.cu_seqlens, self.max_seqlen
            return varlen_attention(q, k, v, starts, starts, longest, longest)
        if self._buckets is None:
            self._buckets = self._make_buckets(q.device)
        return self._buckets.attend(q, k, v)

    def _make_buckets(self, device: torch.device) -> _Buckets:
        """Reads the lengths off the device only where the host does not know them."""
        return _Buckets(self.cu_seqlens.tolist() if self._starts is None else self._starts, device)


class _Run(NamedTuple):
    """Tokens start..stop, sequences first..last: dense ones are of one length."""

    start: int
    stop: int
    first: int
    last: int
    is_dense: bool


def _runs(starts: Sequence[int]) -> list[_Run]:
    runs: list[_Run] = []
    lengths = [stop - start for start, stop in pairwise(starts)]
    first = 0
    for length, equal in groupby(lengths):
        last = first + len(list(equal))
        is_dense = length >= LONG or (last - first >= EQUAL and length > 0)
        if runs and not is_dense and not runs[-1].is_dense:
            runs[-1] = runs[-1]._replace(stop=starts[last], last=last)
        else:
            runs.append(_Run(starts[first], starts[last], first, last, is_dense))
        first = last
    return runs


def _are_worth_it(runs: Sequence[_Run]) -> bool:
    """Whether cuDNN for the dense ones of these pays."""
    squares = sum((run.stop - run.start) ** 2 // (run.last - run.first) for run in runs if run.is_dense)
    return squares > 0 and (len(runs) == 1 or squares >= _WORTH * runs[-1].stop)


def _attend_run(run: _Run, starts: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k and v are those of the run."""
    if run.is_dense:
        return dense_attention(q, k, v, run.last - run.first)
    return varlen_attention(q, k, v, starts, starts, LONG, LONG)


@cache
def _cudnn_is_quicker(device: torch.device, head_dim: int) -> bool:
    return head_dim <= 128 and head_dim % 8 == 0 and torch.cuda.get_device_capability(device) >= (9, 0)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Causal attention of ``count`` sequences of S tokens each by cuDNN, on CUDA in half precision.

    What one alone is padded with stands at its end, where no real token looks.

    Args:
        q: [count * S, Hq, d]. k, v: [count * S, Hk, d].
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    length = len(q) // count
    padding = -length % _PLAN if count == 1 else 0
    batched = (x.reshape(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    q, k, v = (F.pad(x, (0, 0, 0, padding)) if padding else x for x in batched)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)[:, :length].flatten(0, 1)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> Tensor:
    """Causal attention of N packed sequences in one flash kernel, on CUDA in half precision.

    A sequence may have fewer queries than keys: then its queries are the last of its tokens.

    Args:
        q: [Tq, Hq, d]. k, v: [Tk, Hk, d].
        cu_queries, cu_keys: [N + 1] int32, where each sequence starts in q and in k, and the totals.
        max_queries, max_keys: those of the longest sequence, or upper bounds.
    """
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 groups heads unasked; later versions want to be asked. (-1, 0): all of the past, none of the future.
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if q.shape[1] != k.shape[1] and _varlen_has_gqa_option():
        options["enable_gqa"] = True
    out = varlen_attn(q, k, v, cu_queries, cu_keys, max_queries, max_keys, **options)
    assert isinstance(out, Tensor), "varlen_attn returns a tuple only when auxiliary outputs are asked for"
    return out


@cache
def _varlen_has_gqa_option() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class _Buckets:
    """Padded batches of sequences of similar length, as row numbers of the packed axis."""

    def __init__(self, cu_seqlens: Sequence[int], device: torch.device) -> None:
        self.rows: list[Tensor] = []  # per bucket [n, S]: which packed row stands there; padding repeats the first
        spans = list(pairwise(cu_seqlens))
        position = torch.empty(cu_seqlens[-1], dtype=torch.int64)
        offset = 0
        for bucket in _by_length(spans):
            starts = torch.tensor([start for start, _ in bucket])
            lengths = torch.tensor([end - start for start, end in bucket])
            column = torch.arange(int(lengths.max()))
            real = column < lengths[:, None]
            rows = starts[:, None] + column * real
            position[rows[real]] = offset + real.flatten().nonzero().squeeze(1)
            offset += real.numel()
            self.rows.append(rows.to(device))
        # [T]: where in the concatenated padded batches each packed row's result stands.
        self.position = position.to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Padding stands at the end, so that the causal mask alone keeps it from the real tokens."""
        if not self.rows:
            return torch.zeros_like(q)
        grouped = q.shape[1] != k.shape[1]
        outs = []
        for rows in self.rows:
            qb, kb, vb = (_take(x, rows).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(qb, kb, vb, is_causal=True, enable_gqa=grouped)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, self.position)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, H, d], rows [n, S] -> [n, S, H, d]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])


def _by_length(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Sequences, longest first, cut into buckets that waste little on padding; empty sequences are left out."""
    buckets: list[list[tuple[int, int]]] = []
    longest = 0
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        length = end - start
        if length == 0:
            break
        if buckets and (length >= _MIN_FILL * longest or longest - length <= _MAX_PADDING):
            buckets[-1].append((start, end))
        else:
            buckets.append([(start, end)])
            longest = length
    return buckets
