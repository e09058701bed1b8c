"""Drawing tokens, and the log-probability of what was drawn.

Randomness is counter-based: the uniform number behind a token is a pure function of (engine seed, rollout, index of
the token in the response). A rollout's tokens therefore do not depend on which others run beside it, and survive
preemption, export to another engine with the same seed, and resumption.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea, Flood 2014): increment and the two multipliers of its finalizer
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    """The int64 with the same 64 bits, as torch has no unsigned arithmetic."""
    return x - (1 << 64) if x >> 63 else x


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def stream_key(seed: int, rollout: int) -> int:
    """The key (int64) of a rollout's stream of uniform numbers."""
    return _signed(_mix((_mix((seed + _GOLDEN) & _MASK) + (rollout + 1) * _GOLDEN) & _MASK))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """One number in (0, 1) a row, strictly inside.

    Args:
        keys: [N] int64, from `stream_key`. counters: [N] int64, index of the token in the response.

    Returns:
        [N] float64: SplitMix64's output number `counters`, its upper 50 bits and a half. With so many, u * x < x
        holds after rounding too.
    """
    x = keys + (counters + 1) * _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    x = x ^ _shift(x, 31)
    return (_shift(x, 14).double() + 0.5) * 2.0**-50


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Sets to -inf what top-k, and then top-p over the rest, leave out; the likeliest token always stays.

    Args:
        logits: [N, V] float32, after temperature. top_k: [N] int64, at least 1. top_p: [N] float32; 1 keeps all.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    beyond_k = rank >= top_k[:, None]
    probs = ordered.masked_fill(beyond_k, -torch.inf).softmax(-1)
    before = probs.cumsum(-1) - probs  # mass of the likelier tokens
    # Rounding may bring `before` to 1 ahead of the last token: a top_p of 1 must not cut there.
    beyond_p = (before >= top_p[:, None]) & (top_p < 1)[:, None] & (rank > 0)
    dropped = torch.zeros_like(beyond_k).scatter_(-1, order, beyond_k | beyond_p)
    return logits.masked_fill(dropped, -torch.inf)


def sample(
    logits: Tensor, temperature: Tensor, u: Tensor, truncation: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution.

    Args:
        logits: [N, V] float32. temperature: [N] float32, 0 = greedy. u: [N] float64 in (0, 1), see `uniform`.
        truncation: (top_k [N] int64, top_p [N] float32), see `truncate`; None = no row is truncated.

    Returns:
        tokens [N] int64 and their log-probabilities [N] float32 under the distribution sampled from: after
        temperature and truncation, renormalised. A greedy row reports temperature 1 without truncation.
    """
    greedy = temperature == 0
    logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    if truncation is not None:
        logits = truncate(logits, *truncation)
    logprobs = logits.log_softmax(-1)
    # float64: in float32 the tail of a large vocabulary is below the rounding of its own cumulative sum.
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    target = u * cumulative[:, -1]  # the sum is not exactly 1
    # The first token whose cumulative mass exceeds the target has mass of its own: never a zero-probability one.
    drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    drawn = drawn.clamp_(max=logits.shape[-1] - 1)  # NaN logits of a diverged model: the trainer stops the run
    tokens = torch.where(greedy, logits.argmax(-1), drawn)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
