"""Who runs: admission by free KV blocks, growth of the running sequences, preemption. Pure Python and numpy.

Sequences are admitted in the order of arrival. What the cache holds of a sequence's tokens already is shared, the rest
is computed in prefill batches of bounded size, over several of them if need be. When blocks run out, the newest gives
its blocks back and waits; it is prefilled later over its prompt and all it generated, so nothing is lost and the oldest
always gets on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from asystem.generation.blocks import BlockPool
from asystem.generation.sequence import Sequence, State

# Tokens that a prefill batch reads, context included, for each that it may compute: attention gathers what it reads.
READS = 4


@dataclass(slots=True)
class Prefill:
    """One computation of a prompt (or of a prompt and a response, after preemption), or of a chunk of it.

    Attributes:
        tokens: the tokens to compute. context: tokens before them that are in the cache already.
        blocks: KV blocks of context and tokens.
        sequences: who draws its next token from it: none from a chunk with more to come, several when samples of one
            prompt start together.
        copies: (source, destination) blocks to copy afterwards: each further sample's own last, partly filled block.
    """

    tokens: npt.NDArray[np.int32]
    context: int
    blocks: list[int]
    sequences: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Admission:
    """Who joins the running batch: those that need no prefill, then those of the prefills, in this order."""

    ready: list[Sequence] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    num_tokens: int = 0  # to compute
    num_read: int = 0  # the same with their context
    cut: bool = False  # the batch is full, and more is to be computed
    whole: dict[bytes, Prefill] = field(default_factory=dict)  # by the name of all of their tokens

    @property
    def sequences(self) -> list[Sequence]:
        return self.ready + [s for p in self.prefills for s in p.sequences]


@dataclass(slots=True)
class Growth:
    """Block-table entries to write; `short` = blocks ran out, and the newest row has to leave."""

    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    short: bool = False


def _age(sequence: Sequence) -> int:
    return sequence.order


class Scheduler:
    """Decides over sequences and blocks; `running[i]` stands in row i of the running batch."""

    def __init__(self, pool: BlockPool, max_running: int, prefill_tokens: int) -> None:
        self.pool, self.max_running, self.prefill_tokens = pool, max_running, prefill_tokens
        self.waiting: list[Sequence] = []  # by order
        self.running: list[Sequence] = []
        self.paused: list[Sequence] = []
        self.lengths = np.zeros(max_running, np.int64)  # tokens of each row, the newest included
        self.prompt_lengths = np.zeros(max_running, np.int64)
        self._ends = np.zeros(max_running, np.int64)  # tokens that each row has at most
        self._room = np.zeros(max_running, np.int64)  # tokens that fit into each row's blocks

    @property
    def unfinished(self) -> list[Sequence]:
        """All sequences, by order."""
        return sorted([*self.waiting, *self.running, *self.paused], key=_age)

    def add(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=_age)

    def admit(self) -> Admission:
        """Takes from the waiting, in order, what fits into rows, blocks and one prefill batch."""
        admission, taken = Admission(), 0
        while taken < len(self.waiting) and (place := len(self.running) + taken) < self.max_running:
            sequence = self.waiting[taken]
            if not sequence.blocks and not self._allocate(sequence, admission, place):
                if place or not self._evict(keep=sequence):
                    break
                continue
            if not self._compute(sequence, admission):
                admission.cut = True
                break
            sequence.state = State.RUNNING
            taken += 1
        del self.waiting[:taken]
        for sequence in admission.sequences:
            row = len(self.running)
            self.running.append(sequence)
            self.lengths[row], self.prompt_lengths[row] = sequence.length, sequence.prompt_length
            self._ends[row] = sequence.prompt_length + sequence.request.params.max_new_tokens
            self._room[row] = len(sequence.blocks) * self.pool.block_size
        return admission

    def _allocate(self, sequence: Sequence, admission: Admission, num_running: int) -> bool:
        """Gives a sequence its blocks, those of known content first; False where too few are free."""
        pool, length = self.pool, sequence.length
        names = sequence.names(length, pool.block_size)
        twin = admission.whole.get(names[-1])
        if twin is not None:
            shared = twin.blocks[: length // pool.block_size]
        else:  # one token at least is left to compute, to draw from
            shared = pool.find(names[: (length - 1) // pool.block_size])
        pool.share(shared)
        needed = pool.blocks_for(length) - len(shared)
        # One block more for each running sequence, or the next steps would preempt what was just admitted.
        if needed > pool.num_free - num_running:
            pool.release(shared)
            return False
        sequence.blocks = [*shared, *pool.allocate(needed)]
        sequence.computed = len(shared) * pool.block_size
        if twin is not None:
            sequence.computed = length
            twin.sequences.append(sequence)
            twin.copies += [(twin.blocks[-1], block) for block in sequence.blocks[len(shared) :]]
        return True

    def _compute(self, sequence: Sequence, admission: Admission) -> bool:
        """Adds to the prefill batch what the cache lacks of a sequence; False where a part of it has to wait."""
        missing, start = sequence.length - sequence.computed, sequence.computed
        if missing == 0:  # draws beside its twin
            return True
        if missing == 1:  # what a decode step computes anyway
            admission.ready.append(sequence)
            return True
        count = min(missing, self.prefill_tokens - admission.num_tokens)
        read = admission.num_read + start + count
        if count == 0 or (admission.prefills and read > READS * self.prefill_tokens):
            return False
        prefill = Prefill(sequence.all_tokens()[start : start + count], start, list(sequence.blocks))
        admission.prefills.append(prefill)
        admission.num_tokens, admission.num_read = admission.num_tokens + count, read
        sequence.computed += count
        self._remember(sequence)
        if count < missing:
            return False
        prefill.sequences.append(sequence)
        admission.whole[sequence.names(sequence.length, self.pool.block_size)[-1]] = prefill
        return True

    def _remember(self, sequence: Sequence) -> None:
        if not sequence.outdated:
            full = sequence.computed // self.pool.block_size
            names = sequence.names(full * self.pool.block_size, self.pool.block_size)
            self.pool.remember(sequence.blocks[:full], names)

    def reserve(self, steps: int) -> Growth:
        """Makes room in the tables of all running sequences for their next `steps` tokens.

        A step writes the keys and values of the newest token, so it needs room for `lengths` tokens; a row that ends
        before the last step has room for its own newest token still. Where blocks run out, idle sequences lose theirs
        first; then the growth is `short`, and the `newest` is to leave.
        """
        growth, num_rows = Growth(), len(self.running)
        needed = self.lengths[:num_rows] + (steps - 1)
        for row in np.flatnonzero(needed > self._room[:num_rows]).tolist():
            sequence = self.running[row]
            target = self.pool.blocks_for(min(int(needed[row]), int(self._ends[row])))
            while len(sequence.blocks) < target and not growth.short:
                if self.pool.num_free == 0:
                    growth.short = not self._evict()
                    continue
                growth.rows.append(row)
                growth.places.append(len(sequence.blocks))
                growth.blocks += self.pool.allocate(1)
                sequence.blocks.append(growth.blocks[-1])
            self._room[row] = len(sequence.blocks) * self.pool.block_size
        return growth

    @property
    def newest(self) -> int:
        """Row of the running sequence that came last."""
        return max(range(len(self.running)), key=lambda row: self.running[row].order)

    @property
    def most_steps(self) -> int:
        """Steps after which no running sequence is left, whatever it draws."""
        num_rows = len(self.running)
        return int((self._ends[:num_rows] - self.lengths[:num_rows]).max(initial=0))

    def has_room(self, steps: int) -> bool:
        """Whether `reserve` finds free blocks for all running sequences, whatever their lengths."""
        return self.pool.num_free >= len(self.running) * (self.pool.blocks_for(steps) + 1)

    def _evict(self, keep: Sequence | None = None) -> bool:
        """Takes the blocks of the newest sequence that holds some without running; False where there is none."""
        holders = [s for s in (*self.waiting, *self.paused) if s.blocks and s is not keep]
        if holders:
            self.free(max(holders, key=_age))
        return bool(holders)

    def leave(self, rows: Collection[int]) -> list[tuple[int, int]]:
        """Takes rows out of the running batch.

        Returns:
            (source, destination) of the rows that move into the holes, so that rows 0..n-1 stay in use.
        """
        gone, num_left = set(rows), len(self.running) - len(set(rows))
        movers = [row for row in range(num_left, len(self.running)) if row not in gone]
        moves = list(zip(movers, sorted(row for row in gone if row < num_left), strict=True))
        for source, destination in moves:
            self.running[destination] = self.running[source]
            for column in (self.lengths, self.prompt_lengths, self._ends, self._room):
                column[destination] = column[source]
        del self.running[num_left:]
        return moves

    def free(self, sequence: Sequence) -> None:
        """Gives a sequence's blocks back; what they hold is remembered until they are needed."""
        self._remember(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.outdated = [], 0, False

    def outdate(self) -> None:
        """The weights changed: who starts from now on shares nothing older, and prefills under way begin anew."""
        self.pool.forget()
        for sequence in self.unfinished:
            sequence.outdated = bool(sequence.blocks)
            if sequence.state is not State.RUNNING and sequence.computed < sequence.length - 1:
                self.free(sequence)

    def free_idle(self) -> None:
        """Takes the blocks of all sequences that do not run."""
        for sequence in (*self.waiting, *self.paused):
            self.free(sequence)

    def remove(self, sequences: list[Sequence]) -> None:
        """Forgets sequences that do not run, and frees their blocks."""
        gone = set(map(id, sequences))
        for sequence in sequences:
            self.free(sequence)
        self.waiting = [s for s in self.waiting if id(s) not in gone]
        self.paused = [s for s in self.paused if id(s) not in gone]
