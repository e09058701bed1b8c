"""AState through buffers, the receiving side: a rank of generation copies what it holds out of all ranks' buffers.

Buffers that stay mapped (shared memory, CUDA IPC) are looked into once: later publications are copies between views
that stand ready, and so are the sums that are compared. They run on the stream that decodes, since decoding waits for
them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from asystem.errors import PublicationError
from asystem.models import Decoder, plain_parameters, weight_pieces, writing
from asystem.state.checksum import Ledger, Part, Sent, lazy_checksums
from asystem.state.payload import Pair, Place, WeightPayload, copy_all
from asystem.state.plan import Layout, Move, plan_moves


@dataclass
class _Ready:
    """What stands ready as long as neither buffers nor parameters move.

    Attributes:
        places: of both.
        pairs: of the parameters that are written as they are sent.
        ledger: of those that need not be converted for it; None = no checksums have come yet.
        others: names of all other parameters.
    """

    places: tuple[int, ...] = ()
    pairs: list[Pair] = field(default_factory=list)
    ledger: Ledger | None = None
    others: list[str] = field(default_factory=list)


class Inbox:
    """Takes published weights over into a model's parameters, in place, in their dtype and on their device; of a model
    that is cut over ranks, into this rank's part."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._held = {name: Layout(*held) for name, held in weight_pieces(model).items()}
        self._plain = plain_parameters(model)
        self._frozen: set[str] = set()  # parameters that came with the first publication, and never again
        self._sent: list[tuple[Place, ...]] = []
        self._moves: dict[str, list[Move]] = {}
        self._ready = _Ready()

    @torch.no_grad()
    def read(self, payloads: Sequence[WeightPayload]) -> None:
        """Copies what the model holds out of all ranks' payloads, and verifies it where checksums came along.

        Raises:
            ModelError: names or shapes differ, a block is missing, or a buffer is short; nothing is changed then.
            PublicationError: a parameter is not what was sent.
        """
        parts = [part for payload in payloads for part in payload.parts()]
        self._plan(parts)
        arrived = Arrived(parts)
        ready = self._prepared(arrived)
        copy_all(ready.pairs)
        ledger = Ledger()
        for name in ready.others:
            moves, is_plain = self._moves[name], name in self._plain
            if is_plain and not arrived.has_checksums:
                continue
            with writing(self.model, name, arrived.block(moves[0]).dtype) as parameter:
                if not is_plain:
                    copy_all(_pairs_of(moves, parameter, arrived))
                if arrived.has_checksums:
                    arrived.compare(name, self._held[name], parameter, ledger, lasting=is_plain)
        if arrived.has_checksums:
            if ready.ledger is None:
                ready.ledger = self._ledger(ready, arrived)
            for name in chain(ready.ledger.wrong(arrived.checksums), ledger.wrong(arrived.checksums)):
                arrived.blame(name)
                raise PublicationError(f"{name} is not what was sent: it was written wrongly in generation")
        if next(self.model.parameters()).is_cuda:
            torch.cuda.current_stream().synchronize()  # the sender may write again when this returns
        self._frozen |= {place.name for payload in payloads if payload.frozen for place in payload.frozen.places}

    def _plan(self, parts: Sequence[WeightPayload]) -> None:
        sent = [part.places for part in parts]
        if sent == self._sent:
            return
        names = {place.name for places in sent for place in places}
        wanted = {name: held for name, held in self._held.items() if name in names or name not in self._frozen}
        moves = plan_moves([part.holdings() for part in parts], [wanted])
        self._moves = {name: [] for name in wanted}
        for move in moves:
            self._moves[move.name].append(move)
        self._sent, self._ready = sent, _Ready()

    def _prepared(self, arrived: Arrived) -> _Ready:
        """Made anew only where a buffer or a parameter has moved."""
        plain = {name: parameter for name, parameter in self._plain.items() if name in self._moves}
        places = (*arrived.addresses(), *(parameter.data_ptr() for parameter in plain.values()))
        if places == self._ready.places:
            return self._ready
        ready = _Ready(places)
        for name, moves in self._moves.items():
            pairs = _pairs_of(moves, plain[name].detach(), arrived) if name in plain else []
            ready.pairs += pairs
            if name not in plain or any(target.dtype is not source.dtype for target, source in pairs):
                ready.others.append(name)
        self._ready = ready if arrived.is_lasting else _Ready()  # views keep what they look into
        return ready

    def _ledger(self, ready: _Ready, arrived: Arrived) -> Ledger:
        ledger, others = Ledger(), set(ready.others)
        for name in [name for name in self._moves if name not in others]:
            arrived.compare(name, self._held[name], self._plain[name].detach(), ledger, lasting=True)
        return ledger


class Arrived:
    """What all ranks of training have sent."""

    def __init__(self, parts: Sequence[WeightPayload]) -> None:
        self._parts = parts
        self._found: list[dict[str, tuple[Place, Tensor, int]]] | None = None
        self.checksums = [part.checksums for part in parts]
        self.has_checksums = all(self.checksums)
        self.is_lasting = all(part.buffer.lasting and part.frozen is None for part in parts)

    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie here."""
        return tuple(part.buffer.flat().data_ptr() for part in self._parts)

    def block(self, move: Move) -> Tensor:
        """The numbers that a move brings."""
        return move.source.part(move.box, self._blocks()[move.sender][move.name][1])

    def compare(self, name: str, held: Layout, parameter: Tensor, ledger: Ledger, *, lasting: bool) -> None:
        """Enters what is held of a parameter, and what its senders had of that, whatever moves brought it.

        Args:
            lasting: the parameter stands until the ledger is read.
        """
        parts = [(piece.part(piece.box, parameter), piece.box, held.shape) for piece in held.pieces]
        expected: list[Tensor | Part] = []
        sent: list[Sent] = []
        missing = [piece.box for piece in held.pieces]
        for sender, blocks in enumerate(self._blocks()):
            if name not in blocks:
                continue
            place, block, number = blocks[name]
            for box in [common for box in missing if (common := box.meet(place.box)) is not None]:
                if box == place.box and block.dtype is parameter.dtype:
                    sent.append((sender, number))
                else:
                    self._enter_transit(sender, name, ledger, name)
                    part = box.of(block, place.box.start).to(parameter.dtype), box, held.shape
                    expected.append(part if block.dtype is parameter.dtype else lazy_checksums([part]))
            missing = [left for box in missing for left in box.minus(place.box)]
        ledger.add(name, parts if lasting else [lazy_checksums(parts)], expected, sent)

    def blame(self, name: str) -> None:
        """Was it broken on the way, or written wrongly?

        Raises:
            PublicationError: the former.
        """
        transit = Ledger()
        for sender, blocks in enumerate(self._blocks()):
            if name in blocks:
                self._enter_transit(sender, name, transit, f"{self._parts[sender].sender}")
        for rank in transit.wrong(self.checksums):
            raise PublicationError(f"{name} changed on its way from rank {rank} of training")

    def _enter_transit(self, sender: int, name: str, ledger: Ledger, entry: str) -> None:
        place, block, number = self._blocks()[sender][name]
        ledger.add(entry, [(block, place.box, place.shape)], sent=[(sender, number)])

    def _blocks(self) -> list[dict[str, tuple[Place, Tensor, int]]]:
        """By sender and parameter: its place, the block, and the number of both."""
        if self._found is None:
            self._found = []
            for part in self._parts:
                rows = zip(part.places, part.blocks(), range(len(part.places)), strict=True)
                self._found.append({row[0].name: row for row in rows})
        return self._found


def _pairs_of(moves: Sequence[Move], parameter: Tensor, arrived: Arrived) -> list[Pair]:
    return [(move.target.part(move.box, parameter), arrived.block(move)) for move in moves]
