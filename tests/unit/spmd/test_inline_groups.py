import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asystem.config import PlacementConfig, RuntimeConfig, RuntimeKind
from asystem.errors import AsystemError, ConfigError, RewardError, WorkerError, WorkerTimeout
from asystem.spmd import Collect, Dispatch, Runtime, Worker, make_runtime, remote, replicas, spawn, store
from asystem.types import CallRecord, Ref


class Counter(Worker):
    def __init__(self, base: int, step: int = 1) -> None:
        self.base, self.step, self.log = base, step, [f"made {self.name} {self.rank}/{self.world_size}"]

    async def setup(self) -> None:
        self.log.append("set up")

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def journal(self) -> list[str]:
        return self.log

    @remote(Dispatch.BROADCAST, Collect.SUM)
    async def weigh(self, times: int) -> dict[str, int]:
        return {"weight": times * (self.base + self.rank * self.step)}

    @remote(Dispatch.SPLIT, Collect.CONCAT)
    async def scale(self, values: list[int], factor: int = 10) -> list[int]:
        return [value * factor + self.rank for value in values]

    @remote(Dispatch.SPLIT, Collect.GATHER)
    async def parts(self, values: list[int]) -> list[tuple[int, int]]:
        return [(self.rank, value) for value in values]

    @remote(Dispatch.ROUTE)
    async def whoami(self, seconds: float = 0.0) -> int:
        await asyncio.sleep(seconds)
        return self.rank

    @remote(Dispatch.BROADCAST)
    async def note(self, text: str, seconds: float = 0.0) -> None:
        await asyncio.sleep(seconds)
        self.log.append(text)

    @remote(Dispatch.BROADCAST)
    async def fail(self, error: Exception) -> None:
        if self.rank == self.world_size - 1:
            raise error


class Broken(Worker):
    async def setup(self) -> None:
        raise OSError("no such model")

    @remote(Dispatch.BROADCAST)
    async def ping(self) -> None: ...


@pytest.fixture
def records() -> list[CallRecord]:
    return []


@pytest.fixture
def runtime(records: list[CallRecord]) -> Iterator[Runtime]:
    config = RuntimeConfig(kind=RuntimeKind.inline, deadline_seconds=0.3)
    with make_runtime(config, PlacementConfig(), on_call=records.append) as runtime:
        yield runtime


def counters(runtime: Runtime, ranks: int = 3) -> Counter:
    return spawn(Counter, 100, step=5, name="counters", ranks=ranks, runtime=runtime)


def test_every_rank_is_made_then_set_up_with_its_place(runtime: Runtime) -> None:
    logs = asyncio.run(counters(runtime, 2).journal())
    assert logs == [["made counters 0/2", "set up"], ["made counters 1/2", "set up"]]


def test_the_ranks_of_a_replica_get_equal_calls_and_the_first_answers(runtime: Runtime) -> None:
    group = spawn(Counter, 100, step=5, name="counters", ranks=4, replica_ranks=2, runtime=runtime)

    async def calls() -> None:
        assert await group.scale([1, 2, 3]) == [10, 20, 32]  # cut over two replicas: ranks 0 and 2 answer
        assert await group.weigh(1) == {"weight": 100 + 110}
        assert await group.parts([7, 8]) == [(0, 7), (1, 7), (2, 8), (3, 8)]  # of every rank
        assert await asyncio.gather(*(group.whoami(0.02) for _ in range(3))) == [0, 2, 0]
        first, second = replicas(group)
        assert [await first.whoami(), await second.whoami()] == [0, 2]
        await second.note("second")

    asyncio.run(calls())
    logs = [host._host.worker.log[-1] for host in group.group_.ranks]  # type: ignore[attr-defined]
    assert logs == ["set up", "set up", "second", "second"]
    with pytest.raises(ConfigError, match="counters has 3 ranks, and replicas of 2: make it a multiple"):
        spawn(Counter, 100, name="counters", ranks=3, replica_ranks=2, runtime=runtime)


def test_dispatch_and_collect(runtime: Runtime) -> None:
    group = counters(runtime)

    async def calls() -> None:
        assert await group.weigh(2) == {"weight": 2 * (100 + 105 + 110)}
        assert await group.scale([1, 2, 3, 4]) == [10, 20, 31, 42]
        assert await group.scale(values=[1, 2, 3], factor=100) == [100, 201, 302]
        assert await asyncio.create_task(group.weigh(times=1)) == {"weight": 315}

    asyncio.run(calls())


def test_route_takes_the_least_busy_rank(runtime: Runtime) -> None:
    group = counters(runtime)

    async def calls() -> None:
        slow = asyncio.create_task(group.whoami(0.1))
        quick = [await group.whoami() for _ in range(4)]
        assert quick == [1, 2, 1, 2]
        assert await slow == 0

    asyncio.run(calls())


def test_calls_know_the_memory_of_their_process() -> None:
    records: list[CallRecord] = []
    with make_runtime(RuntimeConfig(kind=RuntimeKind.inline), PlacementConfig(), on_call=records.append) as runtime:
        asyncio.run(spawn(Counter, 1, name="counters", ranks=1, runtime=runtime).journal())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert records[-1].peak_bytes == pytest.approx(1024 * int(status["VmHWM"].split()[0]), rel=0.02)


def test_replicas_speak_to_one_rank_each(runtime: Runtime) -> None:
    views = replicas(counters(runtime))

    async def calls() -> None:
        assert [await view.whoami() for view in views] == [0, 1, 2]
        assert await views[1].scale([1, 2]) == [11, 21]
        assert await views[2].weigh(1) == {"weight": 110}

    asyncio.run(calls())
    alone = Counter(0)
    assert replicas(alone) == [alone]


def test_a_worker_alone_answers_like_a_group_of_one() -> None:
    assert asyncio.run(Counter(7).journal()) == [["made worker 0/1"]]
    assert asyncio.run(Counter(7).scale([1])) == [10]


def test_calls_on_a_rank_run_in_the_order_in_which_they_are_made(runtime: Runtime) -> None:
    group = counters(runtime, 1)

    async def calls() -> list[list[str]]:
        first, second = group.note("first", 0.05), group.note("second")  # handed over here, before any await
        await asyncio.gather(second, first)
        return await group.journal()

    assert asyncio.run(calls())[0][2:] == ["first", "second"]


def test_a_call_waits_its_turn_without_its_deadline_running(runtime: Runtime) -> None:
    group = counters(runtime, 1)

    async def calls() -> None:
        await asyncio.gather(*(group.note(str(index), 0.2) for index in range(3)))  # 0.6 s, deadline 0.3 s

    asyncio.run(calls())


def test_a_failing_rank_ends_the_group_and_is_named(runtime: Runtime) -> None:
    group = counters(runtime)

    async def calls() -> None:
        with pytest.raises(WorkerError, match=r"^counters rank 2 on .+: fail: KeyError: 'lost'\n") as first:
            await group.fail(KeyError("lost"))
        assert isinstance(first.value.__cause__, KeyError)
        assert "test_inline_groups.py" in "".join(first.value.__notes__)
        with pytest.raises(WorkerError) as second:
            await group.weigh(1)
        assert second.value is first.value

    asyncio.run(calls())


def test_an_error_of_ours_keeps_its_type_and_its_message(runtime: Runtime) -> None:
    with pytest.raises(RewardError, match=r"^9 of 10 failed\n") as caught:
        asyncio.run(counters(runtime, 2).fail(RewardError("9 of 10 failed")))
    assert caught.value.__notes__[0].startswith("raised in counters rank 1 on ")
    assert caught.value.__notes__[0].endswith(": fail")


def test_a_rank_that_cannot_start_is_named_by_the_first_call(runtime: Runtime) -> None:
    group = spawn(Broken, name="broken", ranks=1, runtime=runtime)
    with pytest.raises(WorkerError, match=r"broken rank 0 on .+: setup: OSError: no such model"):
        asyncio.run(group.ping())


def test_an_overdue_rank_is_named_with_its_deadline(runtime: Runtime) -> None:
    group = counters(runtime, 2)
    began = time.monotonic()
    with pytest.raises(WorkerTimeout, match=r"rank 0 on .+: note: the call took longer than 0\.3 s \(ranks 0, 1 of 2"):
        asyncio.run(group.note("never", 60))
    assert time.monotonic() - began < 5


def test_every_call_is_timed(runtime: Runtime, records: list[CallRecord]) -> None:
    group = counters(runtime, 2)

    async def calls() -> None:
        await asyncio.gather(group.note("a", 0.05), group.note("b"))

    began = time.time()
    asyncio.run(calls())
    assert [(r.group, r.rank, r.method) for r in records] == [
        ("counters", rank, method) for method in ("setup", "note", "note") for rank in (0, 1)
    ]
    first, second = records[2], records[4]
    assert 0.04 < first.end - first.start < 2
    assert second.queue_seconds > 0.04
    assert began <= first.start <= first.end <= second.start <= second.end <= time.time()


def test_what_cannot_be_called_is_said(runtime: Runtime) -> None:
    group = counters(runtime, 2)
    with pytest.raises(AttributeError, match=r"Counter has no remote method 'wiegh' \(did you mean \"weigh\"\?\)"):
        group.wiegh(1)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"counters\.scale: 'values', which is cut over the ranks, is missing"):
        asyncio.run(group.scale())  # type: ignore[call-arg]
    with pytest.raises(
        WorkerError, match=r"counters rank 0 on .+: weigh: TypeError: .*unexpected keyword argument 'n'"
    ):
        asyncio.run(group.weigh(n=3))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="must be `async def`"):
        remote(Dispatch.ROUTE)(lambda self: None)
    assert repr(group) == "<counters: Counter on ranks [0, 1] of 2>"


def test_groups_that_cannot_be_are_refused(runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match="trainers has 2 ranks that form a process group, and runtime=inline is one"):
        spawn(Counter, 1, name="trainers", ranks=2, runtime=runtime, collective=True)
    with pytest.raises(ConfigError, match="none has 0 ranks: give it at least 1"):
        spawn(Counter, 1, name="none", ranks=0, runtime=runtime)
    assert asyncio.run(spawn(Counter, 1, name="one", ranks=1, runtime=runtime, collective=True).weigh(3)) == {
        "weight": 3
    }


def test_the_store_of_one_process_holds_the_objects_themselves() -> None:
    value = {"weights": [bytearray(8)]}
    ref: Ref[dict[str, list[bytearray]]] = store.put(value)
    assert store.get(ref) is value
    assert store.get_many([ref, store.put(value), ref])[2] is value


def test_the_first_error_reaches_every_waiting_call(runtime: Runtime) -> None:
    group = counters(runtime, 2)

    async def calls() -> list[object]:
        return await asyncio.gather(group.fail(ValueError("bad")), group.note("x", 0.1), return_exceptions=True)

    errors = asyncio.run(calls())
    assert isinstance(errors[0], AsystemError)
    assert errors[1] is errors[0]
