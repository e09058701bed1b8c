"""AState's plan: which block of which parameter goes from whom to whom.

Both sides say which blocks of each parameter they hold, and where in their own tensors (`models.pieces`). Every number
that a receiver holds is sent to it once, by the one of those that hold it that has the least to send so far. The plan
depends on shapes alone, so it is made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asystem.errors import ModelError, nearest
from asystem.models import Box, Piece


@dataclass(frozen=True, slots=True)
class Layout:
    """What one rank holds of a parameter of this whole shape."""

    shape: tuple[int, ...]
    pieces: Sequence[Piece]


Holdings = Mapping[str, Layout]
"""What one rank holds, by parameter."""


@dataclass(frozen=True, slots=True)
class Move:
    """A block of a parameter, from a piece of the sender's to a piece of the receiver's."""

    name: str
    sender: int
    receiver: int
    box: Box
    source: Piece
    target: Piece


def plan_moves(senders: Sequence[Holdings], receivers: Sequence[Holdings]) -> list[Move]:
    """The moves that fill all that the receivers hold.

    Raises:
        ModelError: a parameter that only one side has, of two shapes, or of which no sender holds a part.
    """
    shapes = {name: layout.shape for holdings in senders for name, layout in holdings.items()}
    load = [0] * len(senders)
    moves: list[Move] = []
    for receiver, wanted in enumerate(receivers):
        _check(shapes, wanted)
        for name, layout in wanted.items():
            for target in layout.pieces:
                moves += _fill(name, receiver, target, senders, load)
    return moves


def _fill(name: str, receiver: int, target: Piece, senders: Sequence[Holdings], load: list[int]) -> list[Move]:
    """Takes each sender's part of what is still missing, the least busy sender's first."""
    moves, missing = [], [target.box] if target.box.size else []
    for sender in sorted(range(len(senders)), key=load.__getitem__):
        layout = senders[sender].get(name)
        for source in layout.pieces if layout is not None else ():
            found = [common for box in missing if (common := box.meet(source.box)) is not None]
            moves += [Move(name, sender, receiver, box, source, target) for box in found]
            load[sender] += sum(box.size for box in found)
            missing = [left for box in missing for left in box.minus(source.box)]
        if not missing:
            return moves
    ranges = ", ".join(f"{a}:{b}" for a, b in zip(missing[0].start, missing[0].stop, strict=True))
    raise ModelError(f"no rank of training holds {name}[{ranges}], which generation needs")


def _check(shapes: Mapping[str, tuple[int, ...]], wanted: Holdings) -> None:
    for name in shapes.keys() - wanted.keys():
        raise ModelError(f"weights were sent for {name}, which the receiving model has not{nearest(name, wanted)}")
    for name, layout in wanted.items():
        if name not in shapes:
            raise ModelError(f"the receiving model has {name}, for which no weights were sent{nearest(name, shapes)}")
        if shapes[name] != layout.shape:
            raise ModelError(f"{name} was sent as {shapes[name]}, the receiving model's is {layout.shape}")
