"""The receiving end of a stream of weights (`state.stream`): one rank of generation."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from asystem.errors import PublicationError
from asystem.models import Decoder, plain_parameters, weight_pieces, writing
from asystem.spmd.exchange import Exchange, Transfer
from asystem.state.checksum import Ledger, lazy_checksums
from asystem.state.parcels import Step
from asystem.state.payload import copy_all
from asystem.state.plan import Holdings, Layout, Move
from asystem.state.stream import Announced, Schedule, StreamPlan, Terms, meet, pipeline


class StreamInbox:
    """A rank of generation's end: weights go into a model's parameters, in place, as with `Inbox`."""

    def __init__(self, model: Decoder, rank: int, terms: Terms) -> None:
        self.model, self.rank, self.terms = model, rank, terms
        self._held = {name: Layout(*held) for name, held in weight_pieces(model).items()}
        self._exchange: Exchange | None = None
        self._plan: StreamPlan | None = None
        self._plain = plain_parameters(model)
        self._schedule = Schedule(terms, rank, is_sender=False)
        self._views: tuple[list[Step], list[int], list[list[Tensor | None]]] = [], [], []

    @torch.no_grad()
    def read(self, payloads: Sequence[Announced]) -> None:
        """Receives what the model holds from all ranks of training, and verifies it where checksums come along.

        Raises:
            ModelError: names or shapes differ, or a block is missing; nothing is changed then.
            PublicationError: a parameter is not what was sent, or a rank did not come or was lost.
        """
        try:
            exchange, plan = self._meet(payloads[0])
            todo = self._schedule.steps(plan, payloads[0].number)
            views = self._views_of(todo)
            with ExitStack() as stack:
                arriving = _Arriving(self.model, self._held, self._plain, payloads[0].verified, stack)

                def post(index: int) -> Callable[[], None]:
                    step = todo[index]
                    return exchange.post([Transfer(p, f, False) for p, f in zip(step.peers, step.flats, strict=True)])

                pipeline(len(todo), post, lambda index: arriving.unpack(todo[index], views[index]))
            arriving.check()
        except Exception as error:
            if self._exchange is not None:
                self._exchange.fail(error)
            raise

    def _views_of(self, todo: list[Step]) -> list[list[Tensor | None]]:
        """By step, what each block is written into; None where that comes about as it is written."""
        places = [parameter.data_ptr() for parameter in self._plain.values()]
        if todo is not self._views[0] or places != self._views[1]:
            plain = {name: parameter.detach() for name, parameter in self._plain.items()}
            views = [[_view(move, plain.get(move.name)) for move, _ in step.moves] for step in todo]
            self._views = todo, places, views
        return self._views[2]

    def _meet(self, announced: Announced) -> tuple[Exchange, StreamPlan]:
        if self._exchange is None or self._plan is None:
            self._exchange = self.terms.exchange(announced.address, self.terms.senders + self.rank)
            self._plan = StreamPlan(self._exchange.gather("holdings", pickle.dumps(self._held)), self.terms)
            self._exchange.connect()
        else:
            meet(self._exchange, announced.number)
        return self._exchange, self._plan


class _Arriving:
    """Parameters that are being written: each is done when all that the model holds of it has come."""

    def __init__(
        self, model: Decoder, held: Holdings, plain: Collection[str], verified: bool, stack: ExitStack
    ) -> None:
        self.model, self.held, self.plain, self.verified, self.stack = model, held, plain, verified, stack
        self.ledger = Ledger()
        self._open: dict[str, tuple[ExitStack, Tensor]] = {}
        self._left: dict[str, int] = {}
        self._sent: dict[str, list[Tensor]] = {}

    def unpack(self, step: Step, views: Sequence[Tensor | None]) -> None:
        """Writes the blocks of a step where they belong."""
        pairs, watched = [], []
        for (move, block), view in zip(step.moves, views, strict=True):
            if view is None or self.verified:
                parameter = self._parameter(move.name, block.dtype)
                watched.append((move, block, parameter))
                view = _view(move, parameter) if view is None else view
            assert view is not None, "a parameter that is open can be written"
            pairs.append((view, block))
        copy_all(pairs)
        if self.verified:
            sums = torch.split(torch.cat(step.sums), 1)  # copies: the bucket is needed again
            for (move, block, parameter), sent in zip(watched, sums, strict=True):
                self._note(move, block, parameter, sent)
        for move, _, parameter in watched:
            self._left[move.name] -= move.box.size
            if not self._left[move.name]:
                self._close(move.name, parameter)

    def check(self) -> None:
        """Compares checksums, and waits for the device.

        Raises:
            PublicationError: a parameter is not what was sent.
        """
        assert not self._open, f"parts of {sorted(self._open)} have not come"
        for name in self.ledger.wrong():
            raise PublicationError(
                f"{name} is not what training sent: it changed on its way, or was written wrongly in generation"
            )
        if next(self.model.parameters()).is_cuda:
            torch.cuda.current_stream().synchronize()

    def _parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._open:
            inner = self.stack.enter_context(ExitStack())
            self._open[name] = inner, inner.enter_context(writing(self.model, name, dtype))
            self._left[name] = sum(piece.box.size for piece in self.held[name].pieces)
        return self._open[name][1]

    def _note(self, move: Move, block: Tensor, parameter: Tensor, sent: Tensor) -> None:
        if parameter.dtype is block.dtype:  # the parameter is looked at when it is whole
            self._sent.setdefault(move.name, []).append(sent)
        else:
            shape = self.held[move.name].shape
            self.ledger.add(move.name, [lazy_checksums([(block, move.box, shape)])], [sent])

    def _close(self, name: str, parameter: Tensor) -> None:
        held = self.held[name]
        if name in self._sent:
            parts = [(p.part(p.box, parameter), p.box, held.shape) for p in held.pieces]
            # What stands as it was written is looked at in the end, all at once.
            self.ledger.add(name, parts if name in self.plain else [lazy_checksums(parts)], self._sent.pop(name))
        self._open.pop(name)[0].close()


def _view(move: Move, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else move.target.part(move.box, parameter)
