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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from asystem.spmd.exchange import Exchange
from asystem.state.parcels import Round, Step, cut, rounds, steps
from asystem.state.payload import dtype_named
from asystem.state.plan import Holdings, Move, plan_moves


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
class Offer:
    """What a rank of training has: where its blocks lie, and how they are sent.

    Attributes:
        parts: with one block of a parameter at most each: a rank that shares layers with others has several.
    """

    parts: Sequence[Holdings]
    dtypes: dict[str, str]
    frozen: set[str] = field(default_factory=set)


class StreamPlan:
    """Made once by all ranks alike, of what all of them hold."""

    def __init__(self, said: Sequence[bytes], terms: Terms) -> None:
        offers: list[Offer] = [pickle.loads(each) for each in said[: terms.senders]]
        # The rank of training and the number of its part, by a move's sender.
        self._parts = [(rank, number) for rank, offer in enumerate(offers) for number in range(len(offer.parts))]
        holdings = [offers[rank].parts[number] for rank, number in self._parts]
        self.moves = plan_moves(holdings, [pickle.loads(e) for e in said[terms.senders :]])
        self.dtypes = {name: dtype_named(dtype) for name, dtype in offers[0].dtypes.items()}
        self.shapes = {name: layout.shape for part in holdings for name, layout in part.items()}
        self.frozen = offers[0].frozen
        self._limit = max(4096, terms.bucket_bytes // max(terms.senders, terms.receivers))

    def rank_of(self, move: Move) -> int:
        """Of training, that sends it."""
        return self._parts[move.sender][0]

    def source_of(self, move: Move) -> tuple[int, str]:
        """Part and parameter that it comes out of, on that rank."""
        return self._parts[move.sender][1], move.name

    def rounds(self, has_all: bool, mine: Mine, peer: Peer) -> list[Round]:
        """One rank's parcels in a publication of all, or of what is not frozen."""
        chosen: dict[int, list[Move]] = {}
        for move in self.moves:
            if mine(self, move) and (has_all or move.name not in self.frozen):
                chosen.setdefault(peer(self, move), []).append(move)
        return rounds({key: cut(moves, self.dtypes, self._limit) for key, moves in chosen.items()})


Mine = Callable[[StreamPlan, Move], bool]  # whether a rank takes part in a move
Peer = Callable[[StreamPlan, Move], int]  # and with whom


class Schedule:
    """One rank's steps; made anew only when, after the first publication, what is frozen is no longer among them."""

    def __init__(self, terms: Terms, mine: Mine, peer: Peer) -> None:
        self._terms, self._mine, self._peer = terms, mine, peer
        self._has_all: bool | None = None
        self._steps: list[Step] = []

    def steps(self, plan: StreamPlan, number: int) -> list[Step]:
        """Of a publication: the same list where nothing has changed."""
        has_all = number == 0 or not plan.frozen
        if has_all is not self._has_all:
            self._steps = steps(plan.rounds(has_all, self._mine, self._peer), self._terms.device)
            self._has_all = has_all
        return self._steps


def pipeline(count: int, post: Callable[[int], Callable[[], None]], finish: Callable[[int], None]) -> None:
    """Each round is begun before the one before it is waited for."""
    waiting: Callable[[], None] | None = None
    for index in range(count + 1):
        posted = post(index) if index < count else None
        if waiting is not None:
            waiting()
            finish(index - 1)
        waiting = posted


def meet(exchange: Exchange, number: int) -> None:
    """All ranks are here, none of which has to be waited for with a device."""
    exchange.begin()
    exchange.gather(_key(number))
    exchange.forget(_key(number - 1))


def _key(number: int) -> str:
    return f"publication {number} from trainers to generators"
