"""Property tests of C3PO++: a toy generation group that decodes one token of each rollout a step."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asystem.rollout import Group, Pool, PromptOrder, TokenBudget, Window
from asystem.types import Finish, FinishedRollout, Ref, RolloutRequest


class ToyReplica:
    """Decodes like the engine: one token a step for each rollout; lengths are drawn anew whenever a prompt is asked."""

    def __init__(self, lengths: random.Random, longest: int) -> None:
        self.lengths, self.longest = lengths, longest
        self.running: dict[int, tuple[RolloutRequest, int, list[int]]] = {}

    def submit(self, requests: list[RolloutRequest]) -> None:
        for request in requests:
            self.running[request.rollout] = (request, self.lengths.randint(1, self.longest), [])

    def decode(
        self, lease: int | None, max_steps: int, version: int, by_completion: bool
    ) -> tuple[list[FinishedRollout], int, int]:
        finished: list[FinishedRollout] = []
        spent = last = 0
        for _ in range(max_steps):
            if not self.running or (lease is not None and spent >= lease):
                break
            last = 0
            for rollout, (request, length, versions) in list(self.running.items()):
                versions.append(version)
                done = len(versions) == length
                last += (length if done else 0) if by_completion else 1
                if done:
                    del self.running[rollout]
                    finished.append(
                        FinishedRollout(
                            rollout,
                            request.group,
                            request.prompt,
                            1,
                            length,
                            versions[0],
                            version,
                            Finish.STOP,
                            Ref(None),
                            0,
                        )
                    )
            spent += last
        return finished, spent, last


def window(
    pool: Pool, replicas: list[ToyReplica], tokens: int | None, version: int, by_completion: bool, slice_steps: int
) -> tuple[TokenBudget, int]:
    """One window over all replicas in turn, as the controller drives it; returns the budget and its last steps."""
    budget = TokenBudget(tokens)
    for index, replica in enumerate(replicas):
        replica.submit(pool.ask(index))
    last = [0] * len(replicas)
    while not budget.exhausted and any(replica.running for replica in replicas):
        busy = [(index, replica) for index, replica in enumerate(replicas) if replica.running]
        leases = [budget.lease(len(replicas)) for _ in busy]  # all out at once: the worst case
        for (index, replica), lease in zip(busy, leases, strict=True):
            if lease == 0:
                continue
            finished, spent, step = replica.decode(lease, slice_steps, version, by_completion)
            last[index] = step
            budget.settle(lease, spent)
            pool.finish(finished)
            replica.submit(pool.ask(index))
    return budget, sum(last)


settings_of_a_run = {
    "group_size": st.integers(1, 4),
    "groups": st.integers(1, 5),
    "retention": st.integers(0, 4),
    "eta": st.integers(0, 3),
    "longest": st.integers(1, 30),
    "slack": st.integers(0, 40),
    "replicas": st.integers(1, 3),
    "slice_steps": st.integers(1, 7),
    "by_completion": st.booleans(),
    "seed": st.integers(0, 10_000),
}


@settings(max_examples=150, deadline=None)
@given(**settings_of_a_run)
def test_a_run_loses_nothing_and_keeps_its_bounds(
    group_size: int,
    groups: int,
    retention: int,
    eta: int,
    longest: int,
    slack: int,
    replicas: int,
    slice_steps: int,
    by_completion: bool,
    seed: int,
) -> None:
    prompts = 12
    tokens = -(-group_size * longest // (retention + 1)) + slack  # the least that Config.check admits, and more
    pool = Pool(
        PromptOrder(prompts, seed=seed, epochs=1),
        group_size=group_size,
        capacity=group_size * groups,
        retention=retention,
        replicas=replicas,
    )
    rng = random.Random(seed)
    toys = [ToyReplica(rng, longest) for _ in range(replicas)]
    version = 0
    waiting: deque[list[Group]] = deque()
    trained: Counter[int] = Counter()
    purged_rollouts: set[int] = set()
    for _ in range(5_000):
        budget, last_step = window(pool, toys, tokens, version, by_completion, slice_steps)
        assert budget.spent - last_step < tokens, "overshot by a whole decode step of the group or more"
        closed = pool.close_window()
        for index, rollouts in closed.to_drop().items():
            for rollout in rollouts:
                purged_rollouts.add(rollout)
                del toys[index].running[rollout]
        assert all(group.age <= retention for group in pool.in_flight.values())
        assert sum(pool.num_in_flight) == sum(len(toy.running) for toy in toys) == closed.carried <= pool.capacity
        if closed.groups:
            waiting.append(closed.groups)
        while len(waiting) > eta or (waiting and not pool.in_flight and not closed.groups):  # train as late as η allows
            for group in waiting.popleft():
                assert group.complete
                assert version - group.first_version <= retention + eta
                assert not purged_rollouts & set(group.rollouts)
                trained[group.prompt] += 1
            version += 1
        if not pool.in_flight and not waiting and sum(trained.values()) == prompts:
            break
    assert trained == Counter(range(prompts)), "a prompt was lost or trained twice"


def test_wait_for_all_is_one_window_of_whole_groups() -> None:
    pool = Pool(PromptOrder(8, seed=0, shuffle=False), group_size=2, capacity=4, retention=0, refill=False)
    budget, _ = window(pool, [ToyReplica(random.Random(0), 9)], None, 0, False, 3)
    closed = pool.close_window()
    assert not budget.exhausted
    assert sorted(group.prompt for group in closed.groups) == [0, 1]
    assert (closed.carried, closed.purged) == (0, [])


def finished(request: RolloutRequest) -> FinishedRollout:
    return FinishedRollout(request.rollout, request.group, request.prompt, 1, 5, 0, 0, Finish.STOP, Ref(None), 0)


class LongTail:
    """One replica whose responses have log-normal lengths; it counts its decode steps."""

    def __init__(self, pool: Pool, longest: int) -> None:
        self.pool, self.longest, self.lengths = pool, longest, random.Random(0)
        self.running: dict[int, tuple[RolloutRequest, int]] = {}
        self.steps = 0

    def window(self, tokens: int) -> Window:
        """One window of so many new tokens."""
        spent = 0
        while spent < tokens:
            for request in self.pool.ask(0):
                length = min(self.longest, round(self.lengths.lognormvariate(3.5, 1.0)) + 1)
                self.running[request.rollout] = (request, self.steps + length)
            self.steps += 1
            spent += len(self.running)
            ended = [rollout for rollout, (_, end) in self.running.items() if end == self.steps]
            self.pool.finish([finished(self.running.pop(rollout)[0]) for rollout in ended])
        closed = self.pool.close_window()
        for rollout in closed.to_drop().get(0, []):
            del self.running[rollout]
        return closed


class Timed:
    """A controller's drives over replicas of unequal speed, by a clock of its own.

    Args:
        pace: seconds of a slice on each replica, whatever its batch, and of each rollout in it beside.
    """

    def __init__(self, pool: Pool, pace: list[tuple[float, float]], slices: int) -> None:
        self.pool, self.pace, self.slices = pool, pace, slices
        self.running: list[dict[int, RolloutRequest]] = [{} for _ in pace]
        self.left: dict[int, int] = {}  # slices of each rollout
        self.asked = [0] * len(pace)

    def window(self, budget: int | None, lengths: random.Random) -> float:
        """One window of so many slices of a rollout, or until all is finished; returns its seconds."""
        clock, spent, busy = 0.0, 0, [(0.0, replica) for replica in range(len(self.pace))]
        while busy:
            busy.sort()
            clock, replica = busy.pop(0)
            mine = self.running[replica]
            if clock > 0:
                spent += len(mine)
                for rollout in mine:
                    self.left[rollout] -= 1
                done = [mine.pop(rollout) for rollout in list(mine) if not self.left[rollout]]
                self.pool.finish(map(finished, done))
            if budget is not None and spent >= budget:
                continue
            for request in self.pool.ask(replica):
                mine[request.rollout] = request
                self.left[request.rollout] = lengths.randint(1, self.slices)
                self.asked[replica] += 1
            fixed, each = self.pace[replica]
            if mine:
                busy.append((clock + fixed + each * len(mine), replica))
        for index, dropped in self.pool.close_window().to_drop().items():
            for rollout in dropped:
                del self.running[index][rollout]
        return clock


@pytest.mark.parametrize("budget", [None, 300])
@pytest.mark.parametrize(("fast", "slow"), [((1.0, 0.0), (3.0, 0.0)), ((0.0, 0.1), (0.0, 0.3))])
def test_a_slow_replica_gets_less(budget: int | None, fast: tuple[float, float], slow: tuple[float, float]) -> None:
    """Slices that last three times as long: of a fixed time, or of a time that grows with the batch."""
    prompts = PromptOrder(50, seed=0)
    pool = Pool(prompts, group_size=4, capacity=64, retention=9, replicas=2, refill=budget is not None)
    run, lengths = Timed(pool, [slow, fast], slices=8), random.Random(0)
    first = run.window(budget, lengths)
    for _ in range(4):
        run.window(budget, lengths)
    run.asked = [0, 0]
    later = [run.window(budget, lengths) for _ in range(20)]
    assert pool.share(0) <= 28 and pool.share(1) >= 40
    assert 0.1 < run.asked[0] / sum(run.asked) < 0.36
    if budget is None and slow[1]:  # the window waits for the slow one, which half of Ω kept busy for longest
        assert sum(later) / 20 < 0.75 * first


@pytest.mark.parametrize("budget", [None, 300])
def test_equal_replicas_keep_equal_shares(budget: int | None) -> None:
    pool = Pool(PromptOrder(50, seed=0), group_size=4, capacity=60, retention=9, replicas=3, refill=budget is not None)
    assert [pool.share(replica) for replica in range(3)] == [20, 20, 20]
    run, lengths = Timed(pool, [(1.0, 0.01)] * 3, slices=8), random.Random(0)
    for _ in range(30):
        run.window(budget, lengths)
        assert all(16 <= pool.share(replica) <= 24 for replica in range(3))


def test_a_group_older_than_sigma_is_purged_and_asked_first() -> None:
    pool = Pool(PromptOrder(10, seed=0, shuffle=False), group_size=2, capacity=4, retention=1)
    first, second, third, fourth = pool.ask(0)
    pool.finish([finished(first), finished(second), finished(third)])
    assert pool.close_window().carried == 1
    assert [request.prompt for request in pool.ask(0)] == [2, 2]  # Ω = 4: one straggler leaves room for one group
    closed = pool.close_window()
    assert closed.to_drop() == {0: [fourth.rollout]}
    assert [len(group.finished) for group in closed.purged] == [1]
    again = pool.ask(0)
    assert [request.prompt for request in again] == [1, 1]
    assert {request.rollout for request in again}.isdisjoint({third.rollout, fourth.rollout})


def test_late_finishers_of_a_purged_group_are_ignored() -> None:
    pool = Pool(PromptOrder(2, seed=0), group_size=1, capacity=1, retention=0)
    (request,) = pool.ask(0)
    pool.close_window()
    pool.finish([finished(request)])
    assert pool.close_window().groups == []
    assert pool.num_in_flight == [0]


def test_each_purge_of_a_prompt_halves_what_is_asked_beside_it() -> None:
    pool = Pool(PromptOrder(99, seed=0, shuffle=False), group_size=1, capacity=8, retention=0)
    seen = []
    for _ in range(5):
        asked = pool.ask(0)
        seen.append([request.prompt for request in asked])
        pool.finish(map(finished, asked[1:]))  # prompt 0 never finishes in time
        assert len(pool.close_window().groups) == len(asked) - 1
    assert seen == [list(range(8)), [0, 8, 9, 10], [0, 11], [0], [0]]
    assert (pool.limit, len(pool.ask(0)), pool.limit) == (8, 1, 1)
    (group,) = pool.in_flight.values()
    pool.finish([finished(RolloutRequest(group.rollouts[0], group.id, 0))])
    assert [request.prompt for request in pool.ask(0)] == list(range(12, 20)), "it is through: Ω is whole again"


def test_a_retention_too_short_for_the_lengths_costs_little_time() -> None:
    """σ = 1 where a window is shorter than half of the groups: decode steps for the same tokens, against σ = 50."""
    steps, trained = {}, {}
    for retention in (1, 50):
        pool = Pool(PromptOrder(1000, seed=0), group_size=8, capacity=128, retention=retention)
        toy = LongTail(pool, longest=512)
        trained[retention] = sum(len(toy.window(8_000).groups) for _ in range(40))
        steps[retention] = toy.steps
    assert steps[1] < 4 * steps[50]  # 8 times where a prompt is asked alone after its second purge
    assert trained[1] > 0.75 * trained[50]


@pytest.mark.parametrize(("spent", "expected"), [(10, 30), (52, 16), (100, 0), (105, 0)])
def test_leases_share_what_is_left(spent: int, expected: int) -> None:
    budget = TokenBudget(100)
    budget.settle(None, spent)
    leases = [budget.lease(3) for _ in range(20)]
    assert leases[0] == expected
    assert spent + sum(lease or 0 for lease in leases) == max(100, spent)


def test_prompt_order_visits_each_row_once_an_epoch_and_repeats_by_seed() -> None:
    order = PromptOrder(5, seed=3)
    rows = [next(order) for _ in range(15)]
    assert [sorted(rows[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert rows[:5] != rows[5:10]
    again = PromptOrder(5, seed=3)
    again.position = 7
    assert next(again) == rows[7]
    assert list(PromptOrder(3, seed=0, shuffle=False, epochs=2)) == [0, 1, 2, 0, 1, 2]
