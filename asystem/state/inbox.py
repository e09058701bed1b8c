"""AState through buffers, the receiving side: a rank of generation copies what it holds out of all ranks' buffers.

Buffers that stay mapped (shared memory, CUDA IPC) are looked into once: later publications are copies between views
that stand ready. They run on the stream that decodes, since decoding waits for them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from asystem.errors import PublicationError
from asystem.models import Decoder, plain_parameters, weight_pieces, writing
from asystem.state.checksum import Ledger, Part, lazy_checksum, lazy_checksums
from asystem.state.payload import Pair, Place, WeightPayload, copy_all
from asystem.state.plan import Layout, Move, plan_moves


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
        self._views: tuple[tuple[int, ...], list[Pair]] = (), []

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
        copy_all(self._pairs(arrived))
        ledger = Ledger()
        for name, moves in self._moves.items():
            if name in self._plain and not arrived.has_checksums:
                continue
            with writing(self.model, name, arrived.block(moves[0]).dtype) as parameter:
                if name not in self._plain:
                    copy_all(_pairs_of(moves, parameter, arrived))
                if arrived.has_checksums:
                    arrived.compare(name, self._held[name], parameter, ledger, lasting=name in self._plain)
        for name in ledger.wrong():
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
        self._sent, self._views = sent, ((), [])

    def _pairs(self, arrived: Arrived) -> list[Pair]:
        """What is copied into parameters as they are; made anew only where a buffer or a parameter has moved."""
        parameters = [parameter for name, parameter in self._plain.items() if name in self._moves]
        places = (*arrived.addresses(), *(parameter.data_ptr() for parameter in parameters))
        if places == self._views[0]:
            return self._views[1]
        names = [name for name in self._moves if name in self._plain]
        pairs = [pair for n in names for pair in _pairs_of(self._moves[n], self._plain[n].detach(), arrived)]
        self._views = (places, pairs) if arrived.is_lasting else ((), [])  # views keep what they look into
        return pairs


class Arrived:
    """What all ranks of training have sent."""

    def __init__(self, parts: Sequence[WeightPayload]) -> None:
        self._parts = parts
        self._found: list[dict[str, tuple[Place, Tensor, int | None]]] | None = None
        self.has_checksums = all(part.checksums for part in parts)
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
        actual = parts if lasting else lazy_checksums(parts)
        ledger.add(name, actual, list(self._expected(name, held, parameter.dtype, ledger)))

    def blame(self, name: str) -> None:
        """Was it broken on the way, or written wrongly?

        Raises:
            PublicationError: the former.
        """
        transit = Ledger()
        for sender, blocks in enumerate(self._blocks()):
            if name in blocks:
                self._enter_transit(sender, name, transit, f"{self._parts[sender].sender}")
        for rank in transit.wrong():
            raise PublicationError(f"{name} changed on its way from rank {rank} of training")

    def _expected(self, name: str, held: Layout, dtype: torch.dtype, ledger: Ledger) -> Iterator[int | Tensor | Part]:
        missing = [piece.box for piece in held.pieces]
        for sender, blocks in enumerate(self._blocks()):
            if name not in blocks:
                continue
            place, block, sent = blocks[name]
            for box in [common for box in missing if (common := box.meet(place.box)) is not None]:
                if box == place.box and block.dtype is dtype and sent is not None:
                    yield sent
                else:
                    self._enter_transit(sender, name, ledger, name)
                    part = box.of(block, place.box.start), box, held.shape
                    yield part if block.dtype is dtype else lazy_checksum(part[0].to(dtype), *part[1:])
            missing = [left for box in missing for left in box.minus(place.box)]

    def _enter_transit(self, sender: int, name: str, ledger: Ledger, entry: str) -> None:
        place, block, sent = self._blocks()[sender][name]
        assert sent is not None, "only what came with checksums is verified"
        ledger.add(entry, [(block, place.box, place.shape)], [sent])

    def _blocks(self) -> list[dict[str, tuple[Place, Tensor, int | None]]]:
        """By sender and parameter: its place, the block, and the checksum where one came."""
        if self._found is None:
            self._found = []
            for part in self._parts:
                checksums = part.checksums or (None,) * len(part.places)
                rows = zip(part.places, part.blocks(), checksums, strict=True)
                self._found.append({row[0].name: row for row in rows})
        return self._found


def _pairs_of(moves: Sequence[Move], parameter: Tensor, arrived: Arrived) -> list[Pair]:
    return [(move.target.part(move.box, parameter), arrived.block(move)) for move in moves]
