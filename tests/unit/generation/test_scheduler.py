from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asystem.generation.blocks import BlockPool
from asystem.generation.scheduler import Scheduler
from asystem.generation.sequence import EngineRequest, Sequence, State
from asystem.types import SamplingParams


def sequence(order: int, group: int, prompt: int, new: int = 8) -> Sequence:
    tokens = np.full(prompt, group, np.int32)
    return Sequence(EngineRequest(order, group, group, tokens, SamplingParams(new)), order)


def put_back(scheduler: Scheduler, row: int, response: int) -> Sequence:
    """A row leaves with a response of so many tokens and waits with its blocks, as the engine does it."""
    s = scheduler.running[row]
    scheduler.lengths[row] = s.prompt_length + response
    scheduler.reserve(1)
    scheduler.leave([row])
    s.tokens = np.full(response, 99, np.int32)
    s.computed = s.length - 1
    scheduler.add(s)
    return s


def test_a_group_prefills_its_prompt_once_and_copies_only_the_last_block() -> None:
    scheduler = Scheduler(BlockPool(32, 4), max_running=8, prefill_tokens=100)
    for i in range(4):
        scheduler.add(sequence(i, group=0, prompt=10))
    admission = scheduler.admit()
    assert admission.num_tokens == 10
    assert [len(p.sequences) for p in admission.prefills] == [4]
    blocks = [s.blocks for s in scheduler.running]
    assert all(b[:2] == blocks[0][:2] for b in blocks)
    assert len({b[2] for b in blocks}) == 4
    assert admission.prefills[0].copies == [(blocks[0][2], b[2]) for b in blocks[1:]]
    assert scheduler.pool.num_used == 2 + 4


def test_who_starts_later_computes_only_what_the_cache_lacks() -> None:
    for prompt, context in ((10, 8), (8, 4), (3, 0)):
        scheduler = Scheduler(BlockPool(32, 4), max_running=8, prefill_tokens=100)
        scheduler.add(sequence(0, group=0, prompt=prompt))
        scheduler.admit()
        scheduler.add(sequence(1, group=0, prompt=prompt))
        (prefill,) = scheduler.admit().prefills
        assert (prefill.context, len(prefill.tokens)) == (context, prompt - context)
        assert scheduler.running[1].blocks[: context // 4] == scheduler.running[0].blocks[: context // 4]
        scheduler.outdate()  # the weights changed
        scheduler.add(sequence(2, group=0, prompt=prompt))
        assert scheduler.admit().prefills[0].context == 0


def test_blocks_that_nobody_holds_serve_the_same_prompt_until_others_need_them() -> None:
    scheduler = Scheduler(BlockPool(6, 4), max_running=8, prefill_tokens=100)

    def visit(order: int, group: int) -> int:
        """Context that a sequence of 10 tokens finds; it leaves at once."""
        scheduler.add(s := sequence(order, group, prompt=10))
        (prefill,) = scheduler.admit().prefills
        scheduler.leave([0])
        scheduler.free(s)
        return prefill.context

    # The third group takes what was used the longest ago: of group 1 the end first.
    assert [visit(i, group) for i, group in enumerate((0, 1, 0, 2, 1))] == [0, 0, 8, 0, 4]
    scheduler.outdate()
    assert visit(5, group=1) == 0


def test_what_a_preempted_sequence_computed_is_found_again() -> None:
    scheduler = Scheduler(BlockPool(32, 4), max_running=8, prefill_tokens=100)
    scheduler.add(sequence(0, group=0, prompt=6))
    scheduler.admit()
    scheduler.free(put_back(scheduler, 0, response=9))
    (prefill,) = scheduler.admit().prefills
    assert (prefill.context, prefill.tokens.tolist()) == (12, [99, 99, 99])


def test_old_weights_leave_nothing_to_share_whenever_their_blocks_come_back() -> None:
    scheduler = Scheduler(BlockPool(32, 4), max_running=8, prefill_tokens=100)
    scheduler.add(sequence(0, group=0, prompt=10))
    scheduler.admit()
    scheduler.outdate()
    s = put_back(scheduler, 0, response=1)
    assert scheduler.admit().ready == [s]  # it goes on with what it has
    scheduler.free(put_back(scheduler, 0, response=2))
    assert scheduler.admit().prefills[0].context == 0
    scheduler.free(put_back(scheduler, 0, response=4))
    assert scheduler.admit().prefills[0].context == 12


def test_prompts_are_cut_and_those_behind_wait_for_the_last_chunk() -> None:
    scheduler = Scheduler(BlockPool(64, 4), max_running=8, prefill_tokens=10)
    for i, (group, prompt) in enumerate(((0, 6), (1, 5), (2, 25), (2, 25), (3, 2))):
        scheduler.add(sequence(i, group, prompt))
    seen = []
    for _ in range(6):
        admission = scheduler.admit()
        seen.append(([(p.context, len(p.tokens), len(p.sequences)) for p in admission.prefills], admission.cut))
    assert seen == [
        ([(0, 6, 1), (0, 4, 0)], True),
        ([(0, 10, 0)], True),  # one token of group 1 was left: a decode step computes it
        ([(10, 10, 0)], True),
        ([(20, 5, 2), (0, 2, 1)], False),
        ([], False),
        ([], False),
    ]
    assert [s.request.rollout for s in scheduler.running] == [0, 1, 2, 3, 4]


def test_a_batch_reads_little_context_beside_what_it_computes() -> None:
    scheduler = Scheduler(BlockPool(64, 4), max_running=8, prefill_tokens=10)
    scheduler.add(sequence(0, group=0, prompt=31))
    while scheduler.waiting:
        scheduler.admit()
    for i in range(1, 4):
        scheduler.add(s := sequence(i, group=0, prompt=31 + i, new=1))
        s.request.prompt_tokens[31:] = 50 + i
    # Contexts of 28 tokens: two of them would be more than READS * 10 tokens to gather.
    assert [[p.context for p in scheduler.admit().prefills] for _ in range(4)] == [[28], [28], [28], []]


def test_the_newest_is_preempted_and_comes_back_in_its_place() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_running=8, prefill_tokens=100)
    first, second, third = (sequence(i, group=i, prompt=n) for i, n in enumerate((8, 4, 4)))
    for s in (first, second, third):
        scheduler.add(s)
    assert scheduler.admit().sequences == [first, second]  # the third would leave no block to grow into
    scheduler.lengths[:2] += 1
    growth = scheduler.reserve(1)
    assert (growth.rows, growth.places, growth.short) == ([0], [2], True)
    assert scheduler.newest == 1
    scheduler.free(put_back(scheduler, 1, response=1))
    assert scheduler.waiting == [second, third]
    assert not scheduler.reserve(1).short


def test_idle_blocks_go_before_running_ones() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_running=8, prefill_tokens=100)
    paused, running = sequence(0, group=0, prompt=4), sequence(1, group=1, prompt=12)
    scheduler.add(paused)
    scheduler.admit()
    scheduler.leave([0])
    scheduler.paused.append(paused)
    scheduler.add(running)
    scheduler.admit()
    scheduler.lengths[0] += 1
    growth = scheduler.reserve(1)
    assert (growth.rows, growth.short, paused.blocks) == ([0], False, [])


def test_leaving_rows_are_filled_from_the_end() -> None:
    scheduler = Scheduler(BlockPool(32, 4), max_running=8, prefill_tokens=100)
    sequences = [sequence(i, group=i, prompt=i + 1) for i in range(6)]
    for s in sequences:
        scheduler.add(s)
    scheduler.admit()
    assert scheduler.leave([1, 4, 2]) == [(3, 1), (5, 2)]
    assert scheduler.running == [sequences[0], sequences[3], sequences[5]]
    assert scheduler.lengths[:3].tolist() == [1, 4, 6]


class Simulation:
    """Drives a scheduler as the engine does, without computing anything."""

    def __init__(self, num_blocks: int, max_running: int) -> None:
        self.scheduler = Scheduler(BlockPool(num_blocks, 4), max_running, prefill_tokens=20)
        self.submitted = 0
        self.finished: list[int] = []
        self.dropped: list[int] = []

    def submit(self, group_size: int, prompt: int, new: int) -> None:
        group = self.submitted
        for _ in range(group_size):
            self.scheduler.add(sequence(self.submitted, group, prompt, new))
            self.submitted += 1

    def step(self, steps: int) -> None:
        scheduler, before = self.scheduler, len(self.scheduler.running)
        admission = scheduler.admit()
        assert admission.num_tokens <= scheduler.prefill_tokens
        if admission.prefills:
            self._grow(range(before + len(admission.ready), len(scheduler.running)), 1)
        elif not admission.ready:
            while scheduler.reserve(steps).short:
                scheduler.free(*self._leave([scheduler.newest], State.WAITING))
            for row, s in enumerate(scheduler.running):
                last = min(int(scheduler.lengths[row]) + steps - 1, s.prompt_length + s.request.params.max_new_tokens)
                assert len(s.blocks) * 4 >= last
            self._grow(range(len(scheduler.running)), steps)
        self.check()

    def _grow(self, rows: range, steps: int) -> None:
        ended = []
        for row in rows:
            s = self.scheduler.running[row]
            longest = s.prompt_length + s.request.params.max_new_tokens
            self.scheduler.lengths[row] = min(self.scheduler.lengths[row] + steps, longest)
            if self.scheduler.lengths[row] == longest:
                ended.append(row)
        for s in self._leave(ended, State.FINISHED):
            self.scheduler.free(s)
            self.finished.append(s.request.rollout)

    def _leave(self, rows: list[int], state: State) -> list[Sequence]:
        left = [self.scheduler.running[row] for row in rows]
        for row, s in zip(rows, left, strict=True):
            s.tokens, s.state = np.zeros(int(self.scheduler.lengths[row]) - s.prompt_length, np.int32), state
            s.computed = s.length - 1 if state is not State.FINISHED else s.computed
        self.scheduler.leave(rows)
        if state is State.WAITING:
            for s in left:
                self.scheduler.add(s)
        return left

    def pause(self) -> None:
        self.scheduler.paused += self._leave(list(range(len(self.scheduler.running))), State.PAUSED)
        self.scheduler.paused += self.scheduler.waiting
        self.scheduler.waiting = []

    def resume(self) -> None:
        paused, self.scheduler.paused = self.scheduler.paused, []
        for s in paused:
            self.scheduler.add(s)

    def drop(self, which: int) -> None:
        unfinished = self.scheduler.unfinished
        if unfinished:
            s = unfinished[which % len(unfinished)]
            if s.state is State.RUNNING:
                self._leave([self.scheduler.running.index(s)], State.WAITING)
            self.scheduler.remove([s])
            self.dropped.append(s.request.rollout)

    def outdate(self, recompute: bool) -> None:
        if recompute:
            self._leave(list(range(len(self.scheduler.running))), State.WAITING)
        self.scheduler.outdate()
        if recompute:
            self.scheduler.free_idle()

    def check(self) -> None:
        """Every block is counted once for each holder, and shared by sequences that begin with the same tokens only."""
        unfinished, pool = self.scheduler.unfinished, self.scheduler.pool
        held = Counter(block for s in unfinished for block in s.blocks)
        assert [pool.references(block) for block in range(pool.num_blocks)] == [
            held[block] for block in range(pool.num_blocks)
        ]
        assert pool.num_free == pool.num_blocks - len(held)
        for block in held:
            holders = [s for s in unfinished if block in s.blocks]
            assert len({s.all_tokens()[: 4 * s.blocks.index(block) + 4].tobytes() for s in holders}) == 1
        assert all(s.blocks for s in self.scheduler.running)


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 4), st.integers(1, 13), st.integers(1, 12)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("pause")),
    st.tuples(st.just("resume")),
    st.tuples(st.just("outdate"), st.booleans()),
    st.tuples(st.just("drop"), st.integers(0, 9)),
)


@settings(max_examples=120, deadline=None)
@given(st.integers(7, 20), st.integers(1, 6), st.lists(ACTIONS, max_size=40))
def test_whatever_happens_blocks_add_up_and_every_rollout_ends(
    num_blocks: int, max_running: int, actions: list[tuple[str, int, int, int]]
) -> None:
    simulation = Simulation(num_blocks, max_running)  # the longest sequence, 25 tokens, needs 7 blocks
    for name, *arguments in actions:
        getattr(simulation, name)(*arguments)
        simulation.check()
    simulation.resume()
    for _ in range(2000):
        if not simulation.scheduler.unfinished:
            break
        simulation.step(1)
    assert sorted(simulation.finished + simulation.dropped) == list(range(simulation.submitted))
    assert simulation.scheduler.pool.num_used == 0
