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


def test_a_later_sample_computes_only_the_tail_of_its_prompt() -> None:
    for prompt, context in ((10, 8), (8, 4), (3, 0)):
        scheduler = Scheduler(BlockPool(32, 4), max_running=8, prefill_tokens=100)
        scheduler.add(sequence(0, group=0, prompt=prompt))
        scheduler.admit()
        scheduler.add(sequence(1, group=0, prompt=prompt))
        (prefill,) = scheduler.admit().prefills
        assert (prefill.context, len(prefill.tokens)) == (context, prompt - context)
        assert scheduler.running[1].blocks[: context // 4] == scheduler.running[0].blocks[: context // 4]
        scheduler.forget_prompts()  # as after a change of weights
        scheduler.add(sequence(2, group=0, prompt=prompt))
        assert scheduler.admit().prefills[0].context == 0


def test_one_prefill_batch_is_limited_but_a_longer_prompt_still_runs_alone() -> None:
    scheduler = Scheduler(BlockPool(64, 4), max_running=8, prefill_tokens=10)
    for i, prompt in enumerate((6, 5, 4, 30)):
        scheduler.add(sequence(i, group=i, prompt=prompt))
    assert [[len(p.tokens) for p in scheduler.admit().prefills] for _ in range(4)] == [[6], [5, 4], [30], []]


def test_the_newest_is_preempted_and_comes_back_in_its_place() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_running=8, prefill_tokens=100)
    first, second, third = (sequence(i, group=i, prompt=n) for i, n in enumerate((8, 4, 4)))
    for s in (first, second, third):
        scheduler.add(s)
    assert scheduler.admit().sequences == [first, second]  # the third would leave no block to grow into
    scheduler.lengths[:2] += 1
    growth = scheduler.reserve(1)
    assert (growth.rows, growth.places, growth.preempted) == ([0], [2], [1])
    assert scheduler.leave([1]) == []
    scheduler.add(second)
    assert scheduler.waiting == [second, third]


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
    assert (growth.rows, growth.preempted, paused.blocks) == ([0], [], [])


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
        if admission.prefills:
            self._grow(range(before + len(admission.rejoined), len(scheduler.running)), 1)
        elif not admission.rejoined:
            growth = scheduler.reserve(steps)
            self._leave(growth.preempted, State.WAITING)
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
                self._leave([self.scheduler.running.index(s)], State.FINISHED)
            self.scheduler.remove([s])
            self.dropped.append(s.request.rollout)

    def check(self) -> None:
        """Every block is counted once for each holder, and is shared within one group only."""
        unfinished, pool = self.scheduler.unfinished, self.scheduler.pool
        held = Counter(block for s in unfinished for block in s.blocks)
        assert [pool.references(block) for block in range(pool.num_blocks)] == [
            held[block] for block in range(pool.num_blocks)
        ]
        for block in held:
            assert len({s.request.group for s in unfinished if block in s.blocks}) == 1
        for prompts in self.scheduler._prompts.values():
            assert all(held[block] for block in prompts)
        assert all(s.blocks for s in self.scheduler.running)


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 4), st.integers(1, 13), st.integers(1, 12)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("pause")),
    st.tuples(st.just("resume")),
    st.tuples(st.just("drop"), st.integers(0, 9)),
)


@settings(max_examples=150, deadline=None)
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
    assert simulation.scheduler._prompts == {}
