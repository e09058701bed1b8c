"""Worker groups over a real local Ray: processes, shared memory, gloo, and what happens when they die."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

from asystem.config import PlacementConfig, RuntimeConfig
from asystem.errors import DataError, WorkerError, WorkerTimeout
from asystem.spmd import Collect, Dispatch, Runtime, Worker, make_runtime, remote, replicas, spawn, store
from asystem.types import CallRecord, Ref

DEADLINE = 4.0


@dataclass
class Batch:
    rows: Ref[npt.NDArray[np.float32]]
    scale: int


class Adder(Worker):
    collective = True

    def __init__(self, base: int) -> None:
        self.base, self.log = base, [""]

    async def setup(self) -> None:
        self.offset = self.base + self.rank

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def place(self) -> tuple[str, ...]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "ADDERS", "HOME")
        return (*(os.environ[name] for name in names), str(torch.get_num_threads()), str("MASTER_PORT" in os.environ))

    @remote(Dispatch.SPLIT, Collect.CONCAT)
    async def add(self, values: list[int]) -> list[int]:
        return [value + self.offset for value in values]

    @remote(Dispatch.BROADCAST, Collect.SUM)
    async def total(self) -> dict[str, int]:
        return {"offset": self.offset, f"rank{self.rank}": 1}

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def reduce(self) -> float:
        value = torch.tensor([float(self.offset)])
        dist.all_reduce(value)
        return value.item()

    @remote(Dispatch.BROADCAST)
    async def die(self, rank: int) -> None:
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    @remote(Dispatch.BROADCAST)
    async def hang(self, rank: int) -> None:
        if self.rank == rank:
            time.sleep(600)
        dist.barrier()

    @remote(Dispatch.BROADCAST)
    async def fail(self, error: Exception) -> None:
        if self.rank == 1:
            raise error
        dist.barrier()


class Keeper(Worker):
    def __init__(self) -> None:
        self.log: list[str] = []

    @remote(Dispatch.ROUTE)
    async def whoami(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.rank

    @remote(Dispatch.BROADCAST)
    async def note(self, text: str, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        self.log.append(text)

    @remote(Dispatch.ROUTE)
    async def leave(self) -> None:
        print("no more disk", file=sys.stderr, flush=True)
        os._exit(3)

    @remote(Dispatch.BROADCAST)
    async def journal(self) -> list[str]:
        return self.log

    @remote(Dispatch.ROUTE)
    async def make(self, rows: int) -> Ref[npt.NDArray[np.float32]]:
        return store.put(np.arange(rows, dtype=np.float32))

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def read(self, batch: Batch) -> tuple[float, bool, bool]:
        rows = store.get(batch.rows)
        return float(rows.sum()) * batch.scale, rows.flags.owndata, rows.flags.writeable


@pytest.fixture
def records() -> list[CallRecord]:
    return []


@pytest.fixture
def runtime(cluster: None, records: list[CallRecord]) -> Iterator[Runtime]:
    config = RuntimeConfig(deadline_seconds=DEADLINE, threads_per_rank=2)
    with make_runtime(config, PlacementConfig(), on_call=records.append) as runtime:
        yield runtime


def adders(runtime: Runtime) -> Adder:
    environment = {"ADDERS": "here", "HOME": "kept as it is"}
    return spawn(Adder, 10, name="adders", ranks=2, runtime=runtime, environment=environment)


def test_ranks_form_a_process_group_and_answer_together(runtime: Runtime, records: list[CallRecord]) -> None:
    group = adders(runtime)

    async def calls() -> None:
        assert await group.place() == [
            (rank, "2", rank, "2", "here", os.environ["HOME"], "2", "True") for rank in ("0", "1")
        ]
        assert await group.add([1, 2, 3, 4]) == [11, 12, 14, 15]
        assert await group.total() == {"offset": 21, "rank0": 1, "rank1": 1}
        assert await group.reduce() == [21.0, 21.0]
        with pytest.raises(ValueError, match=r"adders\.add: cannot split 5 items over 2 ranks"):
            await group.add([1, 2, 3, 4, 5])
        assert await group.add([5, 6]) == [15, 17]  # a bad argument does not end the group

    asyncio.run(calls())
    assert {(record.group, record.rank) for record in records} == {("adders", 0), ("adders", 1)}
    assert [record.method for record in records if record.rank == 1] == [
        "setup", "place", "add", "total", "reduce", "add"
    ]  # fmt: skip
    assert all(record.end >= record.start > 1e9 and record.host != "unknown host" for record in records)


def test_a_killed_rank_ends_its_group_and_is_named(runtime: Runtime) -> None:
    group = adders(runtime)

    async def calls() -> None:
        await group.reduce()
        began = time.monotonic()
        with pytest.raises(WorkerError, match=r"^adders rank 1 on \S+: die: its process \(pid \d+\) died") as first:
            await group.die(1)
        assert not isinstance(first.value, WorkerTimeout)
        with pytest.raises(WorkerError) as second:
            await group.reduce()
        assert second.value is first.value
        assert time.monotonic() - began < DEADLINE

    asyncio.run(calls())


def test_a_hanging_rank_is_named_with_where_it_stands(runtime: Runtime) -> None:
    group = adders(runtime)

    async def calls() -> None:
        await group.reduce()
        with pytest.raises(WorkerTimeout, match=r"hang: the call took longer than 4 s \(ranks 0, 1 of 2") as caught:
            await group.hang(1)
        notes = "".join(caught.value.__notes__)
        assert "adders rank 1 stands at:" in notes
        assert "in hang" in notes

    asyncio.run(calls())


def test_an_error_keeps_its_type_and_the_peers_do_not_wait(runtime: Runtime) -> None:
    group = adders(runtime)

    async def calls() -> None:
        await group.reduce()
        began = time.monotonic()
        with pytest.raises(DataError) as caught:
            await group.fail(DataError("tasks.jsonl line 3 is no JSON"))
        assert time.monotonic() - began < DEADLINE
        assert str(caught.value) == "tasks.jsonl line 3 is no JSON"
        notes = "\n".join(caught.value.__notes__)
        assert "raised in adders rank 1 on " in notes
        assert "test_ray_groups.py" in notes

    asyncio.run(calls())


def test_a_failing_group_leaves_the_others_alone_and_says_what_was_wrong(runtime: Runtime) -> None:
    keepers = spawn(Keeper, name="keepers", ranks=1, runtime=runtime)
    others = spawn(Keeper, name="others", ranks=1, runtime=runtime)

    async def calls() -> None:
        with pytest.raises(WorkerError, match=r"others rank 0 on \S+: note: TypeError: .*str"):
            await others.note("a", "b")  # type: ignore[arg-type]
        await keepers.note("still here")
        assert await keepers.journal() == ["still here"]
        with pytest.raises(WorkerError, match=r"keepers rank 0 on \S+: leave: its process \(pid \d+\) died") as caught:
            await keepers.leave()
        assert caught.value.__notes__ == ["no more disk"]

    asyncio.run(calls())


def test_order_routing_and_the_store(runtime: Runtime) -> None:
    group = spawn(Keeper, name="keepers", ranks=2, runtime=runtime)

    async def calls() -> None:
        slow = group.note("decode", 0.3)
        quick = group.note("load_weights")
        await asyncio.gather(quick, slow)
        assert [await view.journal() for view in replicas(group)] == [["decode", "load_weights"]] * 2

        busy = asyncio.create_task(group.whoami(0.3))
        await asyncio.sleep(0)
        assert [await group.whoami(0.0) for _ in range(3)] == [1, 1, 1]
        assert await busy == 0

        rows = 300_000
        ref = await replicas(group)[1].make(rows)
        assert ref.num_bytes == 4 * rows
        total = float(np.arange(rows, dtype=np.float32).sum())
        assert await group.read(Batch(ref, 2)) == [(2 * total, False, False)] * 2  # read in place by both
        assert float(store.get(ref)[-1]) == rows - 1  # by the controller too
        own: Ref[npt.NDArray[np.float32]] = store.put(np.ones(5, np.float32))
        assert await group.read(Batch(own, 3)) == [(15.0, False, False)] * 2

    asyncio.run(calls())
