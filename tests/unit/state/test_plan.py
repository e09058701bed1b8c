"""The plan over random cuts of both sides: every number arrives, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asystem.errors import ModelError
from asystem.models import Box, Piece
from asystem.state import Layout, plan_moves

Draw = Any


def _cut(piece: Piece, dim: int, parts: int) -> list[Piece]:
    """As torch.chunk cuts; a part that holds nothing has a box without numbers."""
    size = piece.box.shape[dim]
    each = -(-size // parts)
    found = []
    for part in range(parts):
        low, high = min(size, part * each), min(size, (part + 1) * each)
        start, stop = list(piece.box.start), list(piece.box.stop)
        start[dim], stop[dim] = piece.box.start[dim] + low, piece.box.start[dim] + high
        found.append(Piece(Box(tuple(start), tuple(stop)), (0,) * len(start)))
    return found


@st.composite
def side(draw: Draw, shape: tuple[int, ...]) -> list[list[Piece]]:
    """The pieces of each rank of a mesh [replicas, EP or TP, FSDP] of 1 to 8 ranks; each cuts some dimension."""
    mesh = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 3), (1, 2, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1)])
    )
    inner, outer = draw(st.permutations(range(len(shape))))[:2]
    ranks = []
    for _ in range(mesh[0]):
        for part in _cut(Piece.whole(shape), outer, mesh[1]):
            ranks += [[piece] for piece in _cut(part, inner, mesh[2])]
    return ranks


def _fused(rank: int, ranks: int) -> list[Piece]:
    """A fused matrix [12, 5] of parts of 8 and 4 rows, each of which tensor parallelism cuts for itself."""
    pieces, at = [], 0
    for first, rows in ((0, 8), (8, 4)):
        low = first + rank * rows // ranks
        pieces.append(Piece(Box((low, 0), (low + rows // ranks, 5)), (at, 0)))
        at += rows // ranks
    return pieces


def _local(pieces: list[Piece], whole: torch.Tensor | None) -> torch.Tensor:
    shape = [max(piece.at[dim] + piece.box.shape[dim] for piece in pieces) for dim in range(len(pieces[0].at))]
    local = torch.full(shape, -1)
    for piece in pieces if whole is not None else ():
        piece.part(piece.box, local).copy_(piece.box.of(whole, (0,) * whole.ndim))
    return local


def _check(shape: tuple[int, ...], senders: list[list[Piece]], receivers: list[list[Piece]]) -> list[int]:
    """Carries the plan out; returns the numbers that each sender sent."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    sides = [[{"w": Layout(shape, pieces)} for pieces in ranks] for ranks in (senders, receivers)]
    moves = plan_moves(*sides)
    have, got = [_local(pieces, whole) for pieces in senders], [_local(pieces, None) for pieces in receivers]
    sent = [0] * len(senders)
    for move in moves:
        sent[move.sender] += move.box.size
        move.target.part(move.box, got[move.receiver]).copy_(move.source.part(move.box, have[move.sender]))
    for pieces, local in zip(receivers, got, strict=True):
        assert torch.equal(local, _local(pieces, whole))
    assert sum(sent) == sum(piece.box.size for pieces in receivers for piece in pieces), "each number once"
    return sent


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_number_arrives_once(data: Draw) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    _check(shape, data.draw(side(shape)), data.draw(side(shape)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 3, 5])
def test_fused_matrices_are_cut_part_by_part(ranks: int, shards: int) -> None:
    senders = [[piece] for piece in _cut(Piece.whole((12, 5)), 0, shards)]
    _check((12, 5), senders, [_fused(rank, ranks) for rank in range(ranks)])


def test_replicas_of_training_share_the_sending() -> None:
    whole = Piece.whole((6, 4))
    layouts = [{name: Layout((6, 4), [whole]) for name in "abcdef"} for _ in range(3)]
    load = [0, 0, 0]
    for move in plan_moves(layouts, layouts[:1]):
        load[move.sender] += move.box.size
    assert load == [48, 48, 48]


def test_what_nobody_holds_is_named() -> None:
    half, whole = Piece(Box((0, 0), (3, 4)), (0, 0)), Piece.whole((6, 4))
    with pytest.raises(ModelError, match=r"no rank of training holds w\[3:6, 0:4\]"):
        plan_moves([{"w": Layout((6, 4), [half])}], [{"w": Layout((6, 4), [whole])}])


def test_a_box_without_another_falls_into_blocks_that_do_not_meet() -> None:
    box, hole = Box((0, 0, 0), (4, 5, 6)), Box((1, 2, 0), (3, 9, 4))
    counts = torch.zeros(4, 5, 6, dtype=torch.int64)
    for left in box.minus(hole):
        left.of(counts, (0, 0, 0)).add_(1)
    common = box.meet(hole)
    assert common == Box((1, 2, 0), (3, 5, 4))
    common.of(counts, (0, 0, 0)).add_(1)
    assert bool((counts == 1).all())
    assert list(box.minus(Box((4, 0, 0), (5, 5, 6)))) == [box]
