"""Who runs: admission by free KV blocks, growth of the running sequences, preemption. Pure Python and numpy.

Sequences are admitted in the order of arrival. When blocks run out, the newest gives its blocks back and waits; it is
prefilled later over its prompt and all it generated, so nothing is lost and the oldest always gets on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from asystem.generation.blocks import BlockPool
from asystem.generation.sequence import Sequence, State


@dataclass(slots=True)
class Prefill:
    """One computation of a prompt (or of a prompt and a response, after preemption).

    Attributes:
        tokens: the tokens to compute. context: tokens before them that are in the cache already.
        blocks: KV blocks of context and tokens.
        sequences: who draws its next token from it; several when samples of one group start together.
        copies: (source, destination) blocks to copy afterwards: each further sample's own last, partly filled block.
    """

    tokens: npt.NDArray[np.int32]
    context: int
    blocks: list[int]
    sequences: list[Sequence]
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Admission:
    """Who joins the running batch: those that still hold their KV, then those of the prefills, in this order."""

    rejoined: list[Sequence] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    num_tokens: int = 0  # to prefill

    @property
    def sequences(self) -> list[Sequence]:
        return self.rejoined + [s for p in self.prefills for s in p.sequences]


@dataclass(slots=True)
class Growth:
    """Block-table entries to write, and rows that lost their blocks."""

    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)


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
        self._prompts: dict[int, list[int]] = {}  # group -> blocks of its prompt that a later sample can share

    @property
    def unfinished(self) -> list[Sequence]:
        """All sequences, by order."""
        return sorted([*self.waiting, *self.running, *self.paused], key=_age)

    def add(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=_age)

    def admit(self) -> Admission:
        """Takes from the waiting, in order, what fits into rows, blocks and one prefill batch."""
        admission, fresh, taken = Admission(), dict[int, Prefill](), 0
        while taken < len(self.waiting) and len(self.running) + taken < self.max_running:
            sequence = self.waiting[taken]
            if not self._place(sequence, admission, fresh, len(self.running) + taken):
                if self.running or taken or not self._evict(keep=sequence):
                    break
                continue
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

    def _place(self, sequence: Sequence, admission: Admission, fresh: dict[int, Prefill], num_running: int) -> bool:
        """Gives a sequence its blocks, alone or beside its siblings; False where it does not fit yet."""
        if sequence.blocks:
            admission.rejoined.append(sequence)
            return True
        # One block more for each running sequence, or the next steps would preempt what was just admitted.
        free = self.pool.num_free - num_running
        sibling = fresh.get(sequence.request.group) if sequence.fresh else None
        if sibling is not None:
            return self._place_beside(sequence, sibling, free)
        return self._place_alone(sequence, admission, fresh, free)

    def _place_beside(self, sequence: Sequence, sibling: Prefill, free: int) -> bool:
        """Shares a prompt that is prefilled in this same batch: full blocks by reference, the last one by copy."""
        full, rest = divmod(sequence.prompt_length, self.pool.block_size)
        if rest and free < 1:
            return False
        sequence.blocks = sibling.blocks[:full]
        self.pool.share(sequence.blocks)
        if rest:
            sequence.blocks += self.pool.allocate(1)
            sibling.copies.append((sibling.blocks[full], sequence.blocks[full]))
        sibling.sequences.append(sequence)
        return True

    def _place_alone(self, sequence: Sequence, admission: Admission, fresh: dict[int, Prefill], free: int) -> bool:
        """A prefill of its own, behind those blocks of its group's prompt that are in the cache already."""
        group, length, size = sequence.request.group, sequence.length, self.pool.block_size
        shared = self._prompts.get(group, [])
        context = len(shared) * size
        needed = self.pool.blocks_for(length) - len(shared)
        crowded = admission.prefills and admission.num_tokens + length - context > self.prefill_tokens
        if needed > free or crowded:
            return False
        self.pool.share(shared)
        sequence.blocks = [*shared, *self.pool.allocate(needed)]
        # The prompt's last token is left out: a later sample computes at least one token, to draw from.
        if sequence.prompt_length > size:
            self._prompts[group] = sequence.blocks[: (sequence.prompt_length - 1) // size]
        prefill = Prefill(sequence.all_tokens()[context:], context, list(sequence.blocks), [sequence])
        admission.prefills.append(prefill)
        admission.num_tokens += len(prefill.tokens)
        if sequence.fresh:
            fresh[group] = prefill
        return True

    def reserve(self, steps: int) -> Growth:
        """Makes room in the tables of all running sequences for their next `steps` tokens.

        A step writes the keys and values of the newest token, so it needs room for `lengths` tokens; a row that ends
        before the last step has room for its own newest token still. Where blocks run out, idle sequences lose theirs
        first, then the newest running ones, whose rows are then to `leave`.
        """
        growth, num_rows = Growth(), len(self.running)
        needed = self.lengths[:num_rows] + (steps - 1)
        for row in np.flatnonzero(needed > self._room[:num_rows]).tolist():
            sequence = self.running[row]
            target = self.pool.blocks_for(min(int(needed[row]), int(self._ends[row])))
            while sequence.state is State.RUNNING and len(sequence.blocks) < target:
                if self.pool.num_free == 0:
                    if not self._evict():
                        self._preempt(growth)
                    continue
                growth.rows.append(row)
                growth.places.append(len(sequence.blocks))
                growth.blocks += self.pool.allocate(1)
                sequence.blocks.append(growth.blocks[-1])
            self._room[row] = len(sequence.blocks) * self.pool.block_size
        return growth

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

    def _preempt(self, growth: Growth) -> None:
        running = [row for row, sequence in enumerate(self.running) if sequence.state is State.RUNNING]
        row = max(running, key=lambda row: self.running[row].order)
        self.running[row].state = State.WAITING
        self.free(self.running[row])
        growth.preempted.append(row)

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
        """Gives a sequence's blocks back."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        shared = self._prompts.get(sequence.request.group)
        if shared is not None and not all(self.pool.references(block) for block in shared):
            del self._prompts[sequence.request.group]

    def forget_prompts(self) -> None:
        """Later samples compute their prompt anew, as after a change of weights."""
        self._prompts.clear()

    def remove(self, sequences: list[Sequence]) -> None:
        """Forgets sequences that do not run, and frees their blocks."""
        gone = set(map(id, sequences))
        for sequence in sequences:
            self.free(sequence)
        self.waiting = [s for s in self.waiting if id(s) not in gone]
        self.paused = [s for s in self.paused if id(s) not in gone]
