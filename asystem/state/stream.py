"""AState without buffers of the whole: both sides send and receive at the same time, in buckets, over NCCL or gloo.

    export_weights ──returns at once──▶ controller ──▶ load_weights
         └ a thread: pack bucket 1 | send 1, pack 2 | send 2 ...      receive 1 | write 1, receive 2 | ...

Ranks of training and generation meet at a store that training's first rank serves, tell each other what they hold, and
make the same plan of it. At each publication they meet there again before anything is sent: one that does not come is
named, and nothing hangs on a device for its sake. Training's thread reads the parameters themselves, which nothing
changes before the controller has seen all of generation's answers; matrices with adapters are merged before it starts.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from asystem.errors import PublicationError
from asystem.models import Decoder, Piece, PlainWeight, plain_weights, weight_pieces, writing
from asystem.spmd.exchange import Exchange, Transfer, open_meeting
from asystem.state.checksum import Ledger, lazy_checksum
from asystem.state.parcels import Parcel, Round, cut, rounds
from asystem.state.payload import aligned, dtype_named, turns
from asystem.state.plan import Holdings, Layout, Move, plan_moves

_Parts = Sequence[Sequence[PlainWeight]]
_GRACE = 5.0  # seconds in which a thread that has overrun its deadline says so itself


@dataclass(frozen=True, slots=True)
class Terms:
    """What both sides know beforehand.

    Attributes:
        senders, receivers: ranks of training and of generation.
        seconds: for one publication. bucket_bytes: that a rank sends or receives at once.
    """

    senders: int
    receivers: int
    device: torch.device
    seconds: float
    bucket_bytes: int

    def exchange(self, address: str, rank: int, store: Any = None) -> Exchange:
        """The end of one rank; those of generation come after those of training."""
        names = [f"trainers rank {i}" for i in range(self.senders)]
        names += [f"generators rank {i}" for i in range(self.receivers)]
        return Exchange(address, rank, names, self.device, self.seconds, store)


@dataclass(frozen=True, slots=True)
class Announced:
    """That a rank of training sends its part of a publication; ``nbytes`` is what one copy of that part has."""

    address: str
    number: int
    nbytes: int
    verified: bool


@dataclass(slots=True)
class _Offer:
    """What a rank of training has: where its blocks lie, and how they are sent.

    Attributes:
        parts: with one block of a parameter at most each: a rank that shares layers with others has several.
    """

    parts: Sequence[Holdings]
    dtypes: dict[str, str]
    frozen: set[str] = field(default_factory=set)


class _Plan:
    """Made once by all ranks alike, of what all of them hold."""

    def __init__(self, said: Sequence[bytes], terms: Terms) -> None:
        offers: list[_Offer] = [pickle.loads(each) for each in said[: terms.senders]]
        parts = [(rank, number) for rank, offer in enumerate(offers) for number in range(len(offer.parts))]
        holdings = [offers[rank].parts[number] for rank, number in parts]
        self.moves = plan_moves(holdings, [pickle.loads(e) for e in said[terms.senders :]])
        self.parts = parts  # rank of training and number of its part, by a move's sender
        self.dtypes = {name: dtype_named(dtype) for name, dtype in offers[0].dtypes.items()}
        self.shapes = {name: layout.shape for part in holdings for name, layout in part.items()}
        self.frozen = offers[0].frozen
        self._limit = max(4096, terms.bucket_bytes // max(terms.senders, terms.receivers))

    def rank_of(self, move: Move) -> int:
        """Of training, that sends it."""
        return self.parts[move.sender][0]

    def rounds(self, number: int, mine: Callable[[Move], bool], peer: Callable[[Move], int]) -> list[Round]:
        """One rank's parcels in a publication; what is frozen goes with the first."""
        chosen: dict[int, list[Move]] = {}
        for move in self.moves:
            if mine(move) and (number == 0 or move.name not in self.frozen):
                chosen.setdefault(peer(move), []).append(move)
        return rounds({key: cut(moves, self.dtypes, self._limit) for key, moves in chosen.items()})


class _Buckets:
    """Two, which take turns: one travels while the other is packed or unpacked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[Tensor] = []

    def views(self, index: int, parcels: Round) -> list[Tensor]:
        """The bytes of each parcel of a round."""
        views, start = [], 0
        for _, parcel in parcels:
            views.append(self._memory[index % 2][start : start + parcel.nbytes])
            start += aligned(parcel.nbytes)
        return views

    def make(self, all_rounds: Sequence[Round]) -> None:
        """Makes them, unless they are large enough."""
        needed = max((sum(aligned(p.nbytes) for _, p in parcels) for parcels in all_rounds), default=0)
        if not self._memory or len(self._memory[0]) < needed:
            self._memory = [torch.empty(needed, dtype=torch.uint8, device=self._device) for _ in range(2)]


def _pipeline(count: int, post: Callable[[int], Callable[[], None]], finish: Callable[[int], None]) -> None:
    """Each round is begun before the one before it is waited for."""
    waiting: Callable[[], None] | None = None
    for index in range(count + 1):
        posted = post(index) if index < count else None
        if waiting is not None:
            waiting()
            finish(index - 1)
        waiting = posted


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
        self._plan: _Plan | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._merged: dict[str, Tensor] = {}
        self._buckets = _Buckets(terms.device)

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

    def _send(self, number: int, parts: _Parts, sources: Sequence[dict[str, Tensor]], verify: bool) -> None:
        try:
            with torch.no_grad(), _on_stream(self.terms.device):
                exchange, plan = self._meet(number, parts)
                todo = plan.rounds(number, lambda m: plan.rank_of(m) == self.rank, lambda m: m.receiver)
                self._buckets.make(todo)

                def post(index: int) -> Callable[[], None]:
                    views = self._buckets.views(index, todo[index])
                    for (_, parcel), flat in zip(todo[index], views, strict=True):
                        _pack(parcel, flat, lambda m: sources[plan.parts[m.sender][1]], plan.shapes if verify else None)
                    peers = [self.terms.senders + receiver for receiver, _ in todo[index]]
                    return exchange.post([Transfer(p, v, True) for p, v in zip(peers, views, strict=True)])

                _pipeline(len(todo), post, lambda index: None)
        except BaseException as error:
            self._error = error
            if self._exchange is not None:
                self._exchange.fail(error)

    def _meet(self, number: int, parts: _Parts) -> tuple[Exchange, _Plan]:
        if self._exchange is None or self._plan is None:
            self._exchange = self.terms.exchange(self._address, self.rank, self._store)
            self._plan = _Plan(self._exchange.gather("holdings", pickle.dumps(self._offer(parts))), self.terms)
            self._exchange.connect()
        else:
            _meet(self._exchange, number)
        return self._exchange, self._plan

    def _offer(self, parts: _Parts) -> _Offer:
        held = [{w.name: Layout(w.shape, [Piece(w.box, (0,) * len(w.shape))]) for w in part} for part in parts]
        weights = [weight for part in parts for weight in part]
        dtypes = {w.name: str(self.dtype or w.dtype).removeprefix("torch.") for w in weights}
        return _Offer(held, dtypes, {w.name for w in weights if w.frozen})


class StreamInbox:
    """A rank of generation's end: weights go into a model's parameters, in place, as with `Inbox`."""

    def __init__(self, model: Decoder, rank: int, terms: Terms) -> None:
        self.model, self.rank, self.terms = model, rank, terms
        self._held = {name: Layout(*held) for name, held in weight_pieces(model).items()}
        self._exchange: Exchange | None = None
        self._plan: _Plan | None = None
        self._buckets = _Buckets(terms.device)

    @torch.no_grad()
    def read(self, payloads: Sequence[Announced]) -> None:
        """Receives what the model holds from all ranks of training, and verifies it where checksums come along.

        Raises:
            ModelError: names or shapes differ, or a block is missing; nothing is changed then.
            PublicationError: a parameter is not what was sent, or a rank did not come or was lost.
        """
        try:
            exchange, plan = self._meet(payloads[0])
            todo = plan.rounds(payloads[0].number, lambda m: m.receiver == self.rank, plan.rank_of)
            self._buckets.make(todo)
            with ExitStack() as stack:
                arriving = _Arriving(self.model, self._held, payloads[0].verified, stack)

                def post(index: int) -> Callable[[], None]:
                    views = self._buckets.views(index, todo[index])
                    peers = [sender for sender, _ in todo[index]]
                    return exchange.post([Transfer(p, v, False) for p, v in zip(peers, views, strict=True)])

                def unpack(index: int) -> None:
                    views = self._buckets.views(index, todo[index])
                    for (_, parcel), flat in zip(todo[index], views, strict=True):
                        arriving.unpack(parcel, flat)

                _pipeline(len(todo), post, unpack)
            arriving.check()
        except Exception as error:
            if self._exchange is not None:
                self._exchange.fail(error)
            raise

    def _meet(self, announced: Announced) -> tuple[Exchange, _Plan]:
        if self._exchange is None or self._plan is None:
            self._exchange = self.terms.exchange(announced.address, self.terms.senders + self.rank)
            self._plan = _Plan(self._exchange.gather("holdings", pickle.dumps(self._held)), self.terms)
            self._exchange.connect()
        else:
            _meet(self._exchange, announced.number)
        return self._exchange, self._plan


class _Arriving:
    """Parameters that are being written: each is done when all that the model holds of it has come."""

    def __init__(self, model: Decoder, held: Holdings, verified: bool, stack: ExitStack) -> None:
        self.model, self.held, self.verified, self.stack = model, held, verified, stack
        self.ledger = Ledger()
        self._open: dict[str, tuple[ExitStack, Tensor]] = {}
        self._left: dict[str, int] = {}
        self._sent: dict[str, list[Tensor]] = {}

    def unpack(self, parcel: Parcel, flat: Tensor) -> None:
        """Writes the blocks of a parcel where they belong."""
        sums = parcel.checksums(flat).clone().unbind() if self.verified else (None,) * len(parcel.moves)
        for (move, block), sent in zip(parcel.blocks(flat), sums, strict=True):
            parameter = self._parameter(move.name, block.dtype)
            move.target.part(move.box, parameter).copy_(block)
            if sent is not None:
                self._note(move, block, parameter, sent)
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
            self.ledger.add(move.name, [lazy_checksum(block, move.box, shape)], [sent])

    def _close(self, name: str, parameter: Tensor) -> None:
        held = self.held[name]
        if name in self._sent:
            actual = [lazy_checksum(p.part(p.box, parameter), p.box, held.shape) for p in held.pieces]
            self.ledger.add(name, actual, self._sent.pop(name))
        self._open.pop(name)[0].close()


def _pack(
    parcel: Parcel,
    flat: Tensor,
    sources: Callable[[Move], Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """Copies blocks into a bucket; with ``shapes``, of whole parameters, their checksums too."""
    sums = []
    for move, target in parcel.blocks(flat):
        block = move.source.part(move.box, sources(move)[move.name])
        if shapes is not None:  # of the numbers before they are copied
            block = block.to(target.dtype)
            sums.append(lazy_checksum(block, move.box, shapes[move.name]))
        target.copy_(block)
    if sums:
        parcel.checksums(flat).copy_(torch.stack(sums))


def _meet(exchange: Exchange, number: int) -> None:
    """All ranks are here, none of which has to be waited for with a device."""
    exchange.begin()
    exchange.gather(_key(number))
    exchange.forget(_key(number - 1))


def _key(number: int) -> str:
    return f"publication {number} from trainers to generators"


def _on_stream(device: torch.device) -> Any:
    """A thread begins on the first GPU's default stream, wherever the others of its process are."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
