"""Worker groups: many ranks behind the type of one worker.

    group.update(batch) ──cut──▶ rank 0 ▶ [update] ──┐
                         └─────▶ rank 1 ▶ [update] ──┴─gathered──▶ the awaited value

A call is handed to its ranks at once, in the line that makes it, and each rank runs its calls in that order. The first
rank that fails, dies or overruns its deadline ends the group: the others are killed, so that none is left in a
collective, and this and every later call raises the same error.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, cast

from asystem.errors import AsystemError, ConfigError, WorkerError, WorkerTimeout
from asystem.spmd.dispatch import cut, gather
from asystem.spmd.host import Failure, GroupSpec, Reply
from asystem.spmd.remote import Collect, Dispatch, Mode, Worker, remote_method, remote_methods
from asystem.spmd.runtime import Rank, Runtime
from asystem.types import CallRecord

W = TypeVar("W", bound=Worker)
START = "setup"  # the name under which starting a rank is timed and reported
PEER_GRACE = 2.0  # seconds in which the first cause of a failure in a collective may still show
LATE_START_GRACE = 5.0  # seconds for a start that nobody awaited before its deadline had passed


def spawn(
    worker_type: type[W],
    *args: Any,
    name: str,
    ranks: int,
    runtime: Runtime,
    collective: bool | None = None,
    replica_ranks: int = 1,
    cpus: float | None = None,
    gpus: float | None = None,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> W:
    """Starts a group of workers and returns it, typed as one of them. It does not wait: the first call does.

    Args:
        args, kwargs: for the worker's ``__init__`` on every rank.
        collective: whether the ranks form a torch.distributed process group; null = as the worker type says.
        replica_ranks: ranks that act as one worker, say with a part of a model each: they get equal calls, and the
            first one's answer counts (but for `Collect.GATHER`).
        cpus: logical CPUs that each rank reserves; null = next to none, as ranks may share cores.
        gpus: GPUs that each rank owns; null = as the worker type says.
        environment: variables for the processes of the ranks, where nobody has set them.

    Raises:
        ConfigError: there is no room for the group.
    """
    if ranks < 1:
        raise ConfigError(f"{name} has {ranks} ranks: give it at least 1")
    if ranks % replica_ranks:
        raise ConfigError(f"{name} has {ranks} ranks, and replicas of {replica_ranks}: make it a multiple of that")
    config = runtime.config
    spec = GroupSpec(
        worker_type=worker_type,
        args=args,
        kwargs=kwargs,
        name=name,
        ranks=ranks,
        collective=(worker_type.collective if collective is None else collective) and ranks > 1,
        replica_ranks=replica_ranks,
        cpus=0.001 if cpus is None else cpus,
        gpus=worker_type.gpus if gpus is None else gpus,
        threads=config.threads_per_rank,
        environment=environment or {},
        patience_seconds=max(config.start_seconds, config.deadline_seconds),
    )
    group = Group(spec, runtime.start_group(spec), runtime)
    return cast(W, WorkerGroup(group, range(ranks)))


def replicas(group: W) -> list[W]:
    """One view of one replica each, typed as the worker, to talk to each at its own pace."""
    view: object = group
    if not isinstance(view, WorkerGroup):
        return [group]  # a bare worker is its own only replica
    ranks, size = view.ranks_, view.group_.spec.replica_ranks
    return [cast(W, WorkerGroup(view.group_, ranks[first : first + size])) for first in range(0, len(ranks), size)]


class WorkerGroup:
    """Has the remote methods of its worker type; calls go to the ranks of this view."""

    def __init__(self, group: Group, ranks: Sequence[int]) -> None:
        self.group_, self.ranks_ = group, list(ranks)
        for name, mode in remote_methods(group.spec.worker_type).items():
            setattr(self, name, functools.partial(group.call, name, mode, self.ranks_))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return remote_method(self.group_.spec.worker_type, name)  # raises, with the nearest name

    def __repr__(self) -> str:
        spec = self.group_.spec
        return f"<{spec.name}: {spec.worker_type.__name__} on ranks {self.ranks_} of {spec.ranks}>"


class Group:
    """What all views of a group share: its ranks, what each has to do, and how it failed, if it has."""

    def __init__(self, spec: GroupSpec, ranks: Sequence[Rank], runtime: Runtime) -> None:
        self.spec, self.ranks, self.runtime = spec, ranks, runtime
        self.failure: AsystemError | None = None
        self._spawned = time.monotonic()
        self._starting: dict[asyncio.Future[Reply], int] | None = None
        self._waiting = [0] * len(ranks)  # calls that each rank has not answered
        self._routed = [0] * len(ranks)  # calls that each rank was chosen for
        self._answered = [0.0] * len(ranks)  # when each rank last answered, monotonic seconds

    def call(
        self, name: str, mode: Mode, ranks: Sequence[int], /, *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, Any]:
        """Hands a call to the ranks, and returns the coroutine that waits for them."""
        if not _in_event_loop():  # as in asyncio.run(group.update(batch)): handed over when the coroutine starts
            return self._later(name, mode, ranks, *args, **kwargs)
        if self.failure is not None:
            raise self.failure
        self._begin_to_start()
        size = self.spec.replica_ranks
        if mode.dispatch is Dispatch.ROUTE:
            first = min(ranks[::size], key=lambda rank: (self._waiting[rank], self._routed[rank]))
            ranks = range(first, first + size)
            self._routed[first] += 1
        shares = [share for share in self._shares(name, mode, len(ranks) // size, args, kwargs) for _ in range(size)]
        pending = {self._submit(rank, name, *share): rank for rank, share in zip(ranks, shares, strict=True)}
        return self._finish(name, mode, pending)

    def _begin_to_start(self) -> None:
        """Asks the ranks for word of their start: once, or again when the event loop that asked has ended."""
        loop = asyncio.get_running_loop()
        if self._starting is None or any(not word.done() and word.get_loop() is not loop for word in self._starting):
            self._starting = {self._submit(rank, START, (), {}): rank for rank in range(len(self.ranks))}

    async def _later(self, name: str, mode: Mode, ranks: Sequence[int], /, *args: Any, **kwargs: Any) -> Any:
        return await self.call(name, mode, ranks, *args, **kwargs)

    def _shares(
        self, name: str, mode: Mode, parts: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        if mode.dispatch not in (Dispatch.SPLIT, Dispatch.SHARE) or parts == 1:
            return [(args, kwargs)] * parts
        if not args and mode.first not in kwargs:
            raise TypeError(f"{self.spec.name}.{name}: {mode.first!r}, which is cut over the ranks, is missing")
        whole = args[0] if args else kwargs[mode.first]
        try:
            even = mode.dispatch is Dispatch.SPLIT and self.spec.collective and self.spec.replica_ranks == 1
            cuts = cut(whole, parts, even=even)
        except (ConfigError, TypeError) as error:
            raise type(error)(f"{self.spec.name}.{name}: {error}") from None
        return [((part, *args[1:]), kwargs) if args else ((), kwargs | {mode.first: part}) for part in cuts]

    def _submit(self, rank: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Reply]:
        self._waiting[rank] += 1
        handle, made = self.ranks[rank], time.time()
        future = handle.started() if name == START else handle.call(name, args, kwargs)
        future.add_done_callback(functools.partial(self._record, rank, name, made))
        return future

    def _record(self, rank: int, name: str, made: float, future: asyncio.Future[Reply]) -> None:
        self._waiting[rank] -= 1
        self._answered[rank] = time.monotonic()
        if future.cancelled() or self.runtime.on_call is None or not (reply := future.result()).end:
            return
        host, queued = self.ranks[rank].where.host, max(0.0, reply.start - made)
        times = reply.start, reply.end
        self.runtime.on_call(CallRecord(self.spec.name, rank, name, *times, host, queued, reply.peak_bytes))

    async def _finish(self, name: str, mode: Mode, pending: dict[asyncio.Future[Reply], int]) -> Any:
        assert self._starting is not None, "the group is started by its first call"
        config = self.runtime.config
        spare = max(self._spawned + config.start_seconds - time.monotonic(), LATE_START_GRACE)
        await self._answers(START, self._starting, spare, config.start_seconds)
        await self._answers(name, pending, config.deadline_seconds, config.deadline_seconds)
        answers = [future.result().value for future in pending]
        step = 1 if mode.collect is Collect.GATHER else self.spec.replica_ranks
        return gather(answers[::step], mode.collect)

    async def _answers(
        self, name: str, pending: dict[asyncio.Future[Reply], int], seconds: float, limit: float
    ) -> None:
        """Waits for all ranks; a rank's clock starts when it has answered the call before this one."""
        waiting, began = {future for future in pending if not future.done()}, time.monotonic()
        while waiting and not any(map(_has_failed, pending)):
            since = min(max(began, self._answered[pending[future]]) for future in waiting)
            left = since + seconds - time.monotonic()
            done, waiting = await asyncio.wait(waiting, timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
            if not done and left <= 0:
                raise self._fail(self._overdue(name, sorted(pending[future] for future in waiting), limit))
        if any(map(_has_failed, pending)):
            raise self._fail(await self._first_failure(name, pending))

    async def _first_failure(self, name: str, pending: dict[asyncio.Future[Reply], int]) -> AsystemError:
        """Whom to blame: peers of a rank that died see a broken connection, maybe before its death is known."""
        waiting = [future for future in pending if not future.done()]
        if self.spec.collective and waiting and self.failure is None:
            await asyncio.wait(waiting, timeout=PEER_GRACE)
        failed = [future for future in pending if _has_failed(future)]
        first = min(failed, key=lambda future: 0.0 if future.cancelled() else future.result().end)
        if first.cancelled():
            return WorkerError(self.spec.name, pending[first], self._host(pending[first]), name, "it was cancelled")
        failure = first.result().failure
        assert failure is not None, "only failed calls are looked at"
        return self._error(name, pending[first], failure)

    def _error(self, name: str, rank: int, failure: Failure) -> AsystemError:
        """An error of ours is raised as it is, with a note where it came from; others become a `WorkerError`."""
        place = WorkerError(self.spec.name, rank, self._host(rank), name, failure.reason)
        error = failure.error if isinstance(failure.error, AsystemError) else place
        if error is not failure.error:
            error.__cause__ = failure.error
        else:
            error.add_note(f"raised in {self.spec.name} rank {rank} on {self._host(rank)}: {name}")
        for note in (failure.trace, "" if failure.trace else self.ranks[rank].last_words(hanging=False)):
            if note:
                error.add_note(note)
        return error

    def _overdue(self, name: str, late: list[int], limit: float) -> WorkerTimeout:
        phase = "starting" if name == START else "the call"
        others = f" (ranks {', '.join(map(str, late))} of {self.spec.ranks} have not answered)"
        reason = f"{phase} took longer than {limit:g} s{others if len(late) > 1 else ''}; "
        reason += f"raise runtime.{'start' if name == START else 'deadline'}_seconds if that is to be expected"
        error = WorkerTimeout(self.spec.name, late[0], self._host(late[0]), name, reason)
        for rank in late:
            if words := self.ranks[rank].last_words(hanging=True):
                error.add_note(f"{self.spec.name} rank {rank} stands at:\n{words}")
        return error

    def _fail(self, error: AsystemError) -> AsystemError:
        if self.failure is None:
            self.failure = error
            for rank in self.ranks:
                rank.kill()
        return self.failure

    def _host(self, rank: int) -> str:
        return self.ranks[rank].where.host


def _has_failed(future: asyncio.Future[Reply]) -> bool:
    return future.done() and (future.cancelled() or future.result().failure is not None)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
