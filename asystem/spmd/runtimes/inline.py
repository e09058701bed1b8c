"""All ranks in this process and its event loop: `pdb` works, and runs are deterministic."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from asystem.config import RuntimeConfig
from asystem.errors import ConfigError
from asystem.spmd import store
from asystem.spmd.host import GroupSpec, Host, Reply, Whereabouts
from asystem.spmd.runtime import OnCall


class InlineRank:
    """One rank as a local object."""

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        self.where = Whereabouts()
        self._host = Host(spec, rank)
        self._turn = asyncio.Lock()  # fair: calls run in the order in which they were made
        self._tasks: set[asyncio.Task[Reply]] = set()

    def started(self) -> asyncio.Future[Reply]:
        return self._queue(self._host.start(None))

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Reply]:
        return self._queue(self._host.run(method, args, kwargs))

    def kill(self) -> None:
        for task in self._tasks:
            task.cancel()

    def last_words(self, *, hanging: bool) -> str:
        return ""

    def _queue(self, call: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
        task = asyncio.get_running_loop().create_task(self._run(call))
        self._tasks.add(task)  # the event loop alone does not keep a task alive
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, call: Coroutine[Any, Any, Reply]) -> Reply:
        try:
            async with self._turn:
                return await call
        finally:
            call.close()  # when it was cancelled before its turn


class InlineRuntime:
    """Starts ranks as local objects. They all compute on one device and own nothing."""

    num_gpus = 0.0
    one_host = True

    def __init__(self, config: RuntimeConfig, on_call: OnCall | None = None) -> None:
        self.config, self.on_call = config, on_call
        self._previous_store = store.use(store.InProcess())

    def start_group(self, spec: GroupSpec) -> list[InlineRank]:
        if spec.collective and spec.ranks > 1:
            raise ConfigError(
                f"{spec.name} has {spec.ranks} ranks that form a process group, and runtime=inline is one process: "
                "use runtime=ray, or one rank"
            )
        for name, value in spec.environment.items():
            os.environ.setdefault(name, value)
        return [InlineRank(spec, rank) for rank in range(spec.ranks)]

    def close(self) -> None:
        """Calls that still run end with their event loop."""
        store.use(self._previous_store)

    def __enter__(self) -> InlineRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
