"""The sending end of a stream of weights (`state.stream`): one rank of training."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from asystem.errors import PublicationError
from asystem.models import Piece, PlainWeight, plain_weights
from asystem.spmd.exchange import Exchange, Transfer, open_meeting
from asystem.state.checksum import lazy_checksums
from asystem.state.parcels import Step
from asystem.state.payload import Pair, copy_all, turns
from asystem.state.plan import Layout, Move
from asystem.state.stream import Announced, Offer, Schedule, StreamPlan, Terms, meet, pipeline

_Parts = Sequence[Sequence[PlainWeight]]
_Sources = Sequence[dict[str, Tensor]]
_GRACE = 5.0  # seconds in which a thread that has overrun its deadline says so itself


class StreamOutbox:
    """A rank of training's end.

    Args: as of `Outbox`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, verify_every: int, rank: int, terms: Terms) -> None:
        self.model, self.dtype, self.verify_every, self.rank, self.terms = model, dtype, verify_every, rank, terms
        self._published = 0
        self._address = ""
        self._store: Any = None
        self._exchange: Exchange | None = None
        self._plan: StreamPlan | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._merged: dict[str, Tensor] = {}
        self._schedule = Schedule(terms, rank, is_sender=True)
        self._pairs: tuple[list[Step], list[int], list[list[Pair]]] = [], [], []

    @torch.no_grad()
    def write(self) -> Announced:
        """Begins to send what this rank holds. All ranks of training call it in step.

        Raises:
            PublicationError: the publication before did not end.
        """
        self.settle()
        if not self._address:
            self._address, self._store = open_meeting(self.rank, self.terms.senders)
        number, weights = self._published, plain_weights(self.model)
        parts = [[weights[index] for index in turn] for turn in turns([weight.name for weight in weights])]
        sources = [{w.name: self._source(w) for w in part if number == 0 or not w.frozen} for part in parts]
        if self.terms.device.type == "cuda":
            torch.cuda.current_stream(self.terms.device).synchronize()  # the thread has a stream of its own
        verify = self.verify_every > 0 and number % self.verify_every == 0
        self._thread = threading.Thread(
            target=self._send, args=(number, parts, sources, verify), name="weights", daemon=True
        )
        self._thread.start()
        self._published += 1
        blocks = [block for part in sources for block in part.values()]
        nbytes = sum(block.numel() * (self.dtype or block.dtype).itemsize for block in blocks)
        return Announced(self._address, number, nbytes, verify)

    def settle(self) -> None:
        """Waits until what was begun is sent.

        Raises:
            PublicationError: it was not.
        """
        if self._thread is not None:
            self._thread.join(self.terms.seconds + _GRACE)
            if self._thread.is_alive():
                raise PublicationError(
                    f"trainers rank {self.rank} has not sent the weights in {self.terms.seconds:g} s"
                )
        if self._error is not None:
            raise PublicationError(str(self._error)) from self._error

    def _source(self, weight: PlainWeight) -> Tensor:
        """What is sent: the parameter itself, or a merged matrix, which is kept from publication to publication."""
        block = weight.local()[1]
        if not weight.is_merged:
            return block
        if weight.name not in self._merged:
            self._merged[weight.name] = torch.empty_like(block, dtype=self.dtype or weight.dtype)
        return self._merged[weight.name].copy_(block)

    def _send(self, number: int, parts: _Parts, sources: _Sources, verify: bool) -> None:
        try:
            with torch.no_grad(), _on_stream(self.terms.device):
                exchange, plan = self._meet(number, parts)
                todo = self._schedule.steps(plan, number)
                pairs = self._pairs_of(todo, plan, sources)
                shapes = plan.shapes if verify else None

                def post(index: int) -> Callable[[], None]:
                    step = todo[index]
                    _pack(step, pairs[index], shapes)
                    peers = [self.terms.senders + receiver for receiver in step.peers]
                    return exchange.post([Transfer(p, f, True) for p, f in zip(peers, step.flats, strict=True)])

                pipeline(len(todo), post, lambda index: None)
        except BaseException as error:
            self._error = error
            if self._exchange is not None:
                self._exchange.fail(error)

    def _pairs_of(self, todo: list[Step], plan: StreamPlan, sources: _Sources) -> list[list[Pair]]:
        """By step, blocks and what they are copied from; made anew only where parameters have moved."""
        places = [source.data_ptr() for part in sources for source in part.values()]
        if todo is not self._pairs[0] or places != self._pairs[1]:

            def read(move: Move) -> Tensor:
                return move.source.part(move.box, sources[plan.parts[move.sender][1]][move.name])

            self._pairs = todo, places, [[(block, read(move)) for move, block in step.moves] for step in todo]
        return self._pairs[2]

    def _meet(self, number: int, parts: _Parts) -> tuple[Exchange, StreamPlan]:
        if self._exchange is None or self._plan is None:
            self._exchange = self.terms.exchange(self._address, self.rank, self._store)
            self._plan = StreamPlan(self._exchange.gather("holdings", pickle.dumps(self._offer(parts))), self.terms)
            self._exchange.connect()
        else:
            meet(self._exchange, number)
        return self._exchange, self._plan

    def _offer(self, parts: _Parts) -> Offer:
        held = [{w.name: Layout(w.shape, [Piece(w.box, (0,) * len(w.shape))]) for w in part} for part in parts]
        weights = [weight for part in parts for weight in part]
        dtypes = {w.name: str(self.dtype or w.dtype).removeprefix("torch.") for w in weights}
        return Offer(held, dtypes, {w.name for w in weights if w.frozen})


def _pack(step: Step, pairs: Sequence[Pair], shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    """Copies blocks into a bucket; with ``shapes``, of whole parameters, their checksums too."""
    if shapes is not None:  # of the numbers before they are copied
        moves = zip(step.moves, pairs, strict=True)
        parts = [(source.to(block.dtype), move.box, shapes[move.name]) for (move, _), (block, source) in moves]
        sums = torch.split(lazy_checksums(parts), list(map(len, step.sums)))
        for place, found in zip(step.sums, sums, strict=True):
            place.copy_(found)
    copy_all(pairs)


def _on_stream(device: torch.device) -> Any:
    """A thread begins on the first GPU's default stream, wherever the others of its process are."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
