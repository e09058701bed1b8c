"""What computes: the model over the KV cache, then the sampler, on the rows of the running batch.

`Runner` is the seam between deciding (scheduler, engine) and computing. `EagerRunner` is plain PyTorch on any device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from asystem.generation.kv_cache import DecodeAttention, KVCache, PrefillAttention
from asystem.generation.routing import RoutingCache
from asystem.generation.rows import Rows
from asystem.generation.sampler import sample, uniform
from asystem.generation.scheduler import Prefill
from asystem.models.decoder import Decoder

DRAWN_LOGITS = 1 << 23  # that the eager sampler takes in one go


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the host knows of the running batch.

    Attributes:
        num_rows: rows in use.
        longest: tokens of the longest sequence after the last of the steps asked for.
        truncated: some row samples with top-k or top-p.
        version: stamped on each token.
    """

    num_rows: int
    longest: int
    truncated: bool
    version: int


class Runner(Protocol):
    """Computes prefills and decode steps.

    Attributes:
        run_ahead: decode steps that `decode` may be asked for in one call; the blocks for all of them are in the tables
            before it. With more than 1, rows must stand still once they are `done` (`drawn`, `last_token`, `position`
            and the responses unchanged; a row may write its newest token's keys and values again).
    """

    run_ahead: int

    def prefill(self, prefills: Sequence[Prefill], context: StepContext) -> None:
        """Computes tokens, and draws the next one of their sequences, which hold the last rows in this order."""
        ...

    def decode(self, steps: int, context: StepContext) -> None:
        """Draws `steps` tokens for each row."""
        ...

    def moved(self) -> None:
        """The KV pool and the weights may lie elsewhere from now on."""


class EagerRunner:
    """Plain PyTorch, one step a call."""

    run_ahead = 1

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        rows: Rows,
        stop_ids: Collection[int],
        *,
        exact_head: bool = False,
        routing: RoutingCache | None = None,
    ) -> None:
        self.model, self.cache, self.rows, self._exact_head = model, cache, rows, exact_head
        self._routing = routing
        self._stops = torch.zeros(rows.vocab_size, dtype=torch.bool, device=rows.device)
        self._stops[list(stop_ids)] = True

    def moved(self) -> None:
        """Nothing: no address is kept."""

    def prefill(self, prefills: Sequence[Prefill], context: StepContext) -> None:
        device = self.rows.device
        lengths = [len(p.tokens) for p in prefills]
        tokens = torch.from_numpy(np.concatenate([p.tokens for p in prefills]).astype(np.int64)).to(device)
        spans = [np.arange(p.context, p.context + n) for p, n in zip(prefills, lengths, strict=True)]
        positions = torch.from_numpy(np.concatenate(spans)).to(device)
        attend = PrefillAttention(self.cache, [p.blocks for p in prefills], [p.context for p in prefills], lengths)
        with self._kept(*attend.places):
            hidden = self.model(tokens, positions, attend)
        # Each sequence of a prefill draws from the logits of the one last token.
        last = np.repeat(np.cumsum(lengths) - 1, [len(p.sequences) for p in prefills])
        hidden = hidden[torch.from_numpy(last).to(device)]
        sources = [source for p in prefills for source, _ in p.copies]
        if sources:
            destinations = [destination for p in prefills for _, destination in p.copies]
            self.cache.copy_blocks(sources, destinations)
            if self._routing is not None:
                self._routing.copy_blocks(sources, destinations)
        self._draw(context.num_rows - len(last), hidden, context)

    def decode(self, steps: int, context: StepContext) -> None:
        assert steps == 1, f"the eager runner makes 1 step a call, not {steps}"
        rows, used = self.rows, slice(0, context.num_rows)
        num_blocks = -(-context.longest // self.cache.block_size)
        attend = DecodeAttention(self.cache, rows.table[used, :num_blocks], rows.position[used])
        with self._kept(*attend.places):
            hidden = self.model(rows.last_token[used], rows.position[used], attend)
        self._draw(0, hidden, context)

    def _kept(self, blocks: Tensor, offsets: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._routing is None else self._routing.keep(blocks, offsets)

    def _draw(self, first: int, hidden: Tensor, context: StepContext) -> None:
        """Draws a token for each row from `first` on, some rows at a time: sampling holds 30 bytes a logit."""
        rows, most = self.rows, max(1, DRAWN_LOGITS // self.rows.vocab_size)
        for begin in range(0, len(hidden), most):
            part = hidden[begin : begin + most]
            used = slice(first + begin, first + begin + len(part))
            u = uniform(rows.key[used], rows.drawn[used])
            truncation = (rows.top_k[used], rows.top_p[used]) if context.truncated else None
            logits = head_logits(self.model, part, self._exact_head).float()
            tokens, logprobs = sample(logits, rows.temperature[used], u, truncation)
            rows.record(used, tokens, logprobs, self._stops, context.version)


def head_logits(model: Decoder, hidden: Tensor, exact: bool) -> Tensor:
    """Logits [N, V] of hidden states [N, D]: rounded to the model's dtype, or as they were summed up, in float32."""
    weight = model.head_weight()
    if not exact or hidden.dtype is torch.float32:
        return torch.nn.functional.linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(hidden.float(), weight.float())
