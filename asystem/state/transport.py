"""AState through host memory: every rank of training writes what it holds, each rank of generation reads what it needs.

Nothing is gathered: a rank's part of the weights is written once into its own buffer, and copied from there into the
parameters of each replica. Buffers are shared memory where all ranks are on one host, and travel through Ray's store
where not. A tied head is the embedding and goes once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from asystem.errors import ModelError, PublicationError
from asystem.models import Box, Decoder, Piece, PlainWeight, plain_weights, weight_pieces, writing
from asystem.spmd import Buffer, store
from asystem.state.checksum import MODULUS, checksum
from asystem.state.plan import Layout, Move, plan_moves

ALIGNMENT = 64  # bytes; a block starts where any dtype may be read


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block of a parameter lies in a buffer, row-major from ``offset`` (bytes) on."""

    name: str
    shape: tuple[int, ...]  # of the whole
    box: Box
    dtype: str  # float32, bfloat16, ...
    offset: int

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.offset + prod(self.box.shape) * _dtype(self.dtype).itemsize

    def of(self, flat: Tensor) -> Tensor:
        """The block as a view into a buffer [bytes] uint8."""
        return flat[self.offset : self.end].view(_dtype(self.dtype)).view(self.box.shape)


@dataclass(frozen=True, slots=True)
class WeightPayload:
    """One rank's part of a model's weights.

    Attributes:
        checksums: of the blocks as they were in the sender's parameters, in the order of ``places``; () = not taken.
        sender: its rank in training.
    """

    places: tuple[Place, ...]
    buffer: Buffer
    checksums: tuple[int, ...] = ()
    sender: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the buffer, padding included."""
        return self.buffer.nbytes

    def parts(self) -> list[WeightPayload]:
        """The same in parts that have one block of a parameter at most; a rank that shares layers sends several."""
        turns: list[list[int]] = []
        seen: Counter[str] = Counter()
        for index, place in enumerate(self.places):
            if seen[place.name] == len(turns):
                turns.append([])
            turns[seen[place.name]].append(index)
            seen[place.name] += 1
        return [
            replace(
                self,
                places=tuple(self.places[index] for index in turn),
                checksums=tuple(self.checksums[index] for index in turn if self.checksums),
            )
            for turn in turns
        ]

    def blocks(self) -> list[Tensor]:
        """Views into the buffer, which may be read-only: do not write to them.

        Raises:
            ModelError: the buffer is short.
        """
        for place in self.places:
            if place.end > self.num_bytes:
                raise ModelError(f"{place.name} ends at byte {place.end}, but the buffer sent has {self.num_bytes}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.buffer.array)
        return [place.of(flat) for place in self.places]


class Outbox:
    """A rank's buffer, in which each publication replaces the one before; it must have been read by then.

    Args:
        model: its parameters; a rank of several has its part of each.
        dtype: on the wire; None = as the parameters are.
        verify_every: publications of which the first brings checksums; 0 = none does.
        rank: of training.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, verify_every: int = 1, rank: int = 0
    ) -> None:
        self.model, self.dtype, self.verify_every, self.rank = model, dtype, verify_every, rank
        self._places: tuple[Place, ...] = ()
        self._buffer: Buffer | None = None
        self._published = 0

    @torch.no_grad()
    def write(self) -> WeightPayload:
        """Copies what this rank holds, adapters merged into the matrices that they stand beside: with adapters, whose
        shards are gathered, all ranks call it in step."""
        weights = plain_weights(self.model)
        verify = self.verify_every > 0 and self._published % self.verify_every == 0
        checksums = []
        for index, weight in enumerate(weights):
            box, block = weight.local()
            block = block.to(self.dtype or weight.dtype)
            if self._buffer is None:
                self._plan(weights)
            place = self._places[index]
            place.of(self._flat).copy_(block)
            if verify:
                checksums.append(checksum(block, box, place.shape))
        self._published += 1
        assert self._buffer is not None, "a model has parameters"
        return WeightPayload(self._places, self._buffer, tuple(checksums), self.rank)

    def _plan(self, weights: Sequence[PlainWeight]) -> None:
        places: list[Place] = []
        for weight in weights:
            wire = str(self.dtype or weight.dtype).removeprefix("torch.")
            offset = -(-places[-1].end // ALIGNMENT) * ALIGNMENT if places else 0
            places.append(Place(weight.name, weight.shape, weight.box, wire, offset))
        self._places = tuple(places)
        self._buffer = store.allocate(places[-1].end)
        self._flat = torch.from_numpy(self._buffer.array)


class Inbox:
    """Takes published weights over into a model's parameters, in place, in their dtype and on their device; of a model
    that is cut over ranks, into this rank's part."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._held = {name: Layout(*held) for name, held in weight_pieces(model).items()}
        self._sent: list[tuple[Place, ...]] = []
        self._moves: dict[str, list[Move]] = {}

    @torch.no_grad()
    def read(self, payloads: Sequence[WeightPayload]) -> None:
        """Copies what the model holds out of all ranks' payloads, and verifies it where checksums came along.

        Raises:
            ModelError: names or shapes differ, a block is missing, or a buffer is short; nothing is changed then.
            PublicationError: a parameter is not what was sent.
        """
        payloads = [part for payload in payloads for part in payload.parts()]
        self._plan([payload.places for payload in payloads])
        arrived = Arrived(payloads)
        for name, moves in self._moves.items():
            with writing(self.model, name, arrived.block(moves[0]).dtype) as parameter:
                for move in moves:
                    move.target.part(move.box, parameter).copy_(arrived.block(move))
                if arrived.has_checksums:
                    arrived.verify(name, self._held[name], parameter)

    def _plan(self, sent: list[tuple[Place, ...]]) -> None:
        if sent == self._sent:
            return
        senders = [{p.name: Layout(p.shape, [Piece(p.box, (0,) * len(p.shape))]) for p in places} for places in sent]
        moves = plan_moves(senders, [self._held])
        self._moves = {name: [] for name in self._held}
        for move in moves:
            self._moves[move.name].append(move)
        self._sent = sent


class Arrived:
    """What all ranks of training have sent."""

    def __init__(self, payloads: Sequence[WeightPayload]) -> None:
        self._blocks: list[dict[str, tuple[Place, Tensor, int | None]]] = []
        for payload in payloads:
            checksums = payload.checksums or (None,) * len(payload.places)
            rows = zip(payload.places, payload.blocks(), checksums, strict=True)
            self._blocks.append({row[0].name: row for row in rows})
        self._ranks = [payload.sender for payload in payloads]
        self.has_checksums = all(payload.checksums for payload in payloads)

    def block(self, move: Move) -> Tensor:
        """The numbers that a move brings."""
        _, block, _ = self._blocks[move.sender][move.name]
        return move.source.part(move.box, block)

    def verify(self, name: str, held: Layout, parameter: Tensor) -> None:
        """Compares what is held of a parameter with what its senders had, whatever moves brought it.

        Raises:
            PublicationError: naming it.
        """
        actual = sum(checksum(piece.part(piece.box, parameter), piece.box, held.shape) for piece in held.pieces)
        if (actual - self._expected(name, held, parameter.dtype)) % MODULUS == 0:
            return
        for sender in range(len(self._blocks)):  # was it broken on the way, or written wrongly?
            self._check_transit(name, sender)
        raise PublicationError(f"{name} is not what was sent: it was written wrongly in generation")

    def _expected(self, name: str, held: Layout, dtype: torch.dtype) -> int:
        total, missing = 0, [piece.box for piece in held.pieces]
        for sender, blocks in enumerate(self._blocks):
            if name not in blocks:
                continue
            place, block, sent = blocks[name]
            for box in [common for box in missing if (common := box.meet(place.box)) is not None]:
                if box == place.box and block.dtype is dtype and sent is not None:
                    total += sent
                else:
                    self._check_transit(name, sender)
                    total += checksum(box.of(block, place.box.start).to(dtype), box, held.shape)
            missing = [left for box in missing for left in box.minus(place.box)]
        return total

    def _check_transit(self, name: str, sender: int) -> None:
        place, block, sent = self._blocks[sender].get(name, (None, None, None))
        if place is not None and block is not None and checksum(block, place.box, place.shape) != sent:
            raise PublicationError(f"{name} changed on its way from rank {self._ranks[sender]} of training")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f'weights were sent in the unknown dtype "{name}"')
    return found
