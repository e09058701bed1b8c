"""Each rank is a Ray actor of its own process; the ranks of a group stand in one placement group.

The actor is synchronous and has one thread, since only then does Ray promise to run calls in the order they are made.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from asystem.config import PlacementConfig, RuntimeConfig
from asystem.spmd import store
from asystem.spmd.host import ADDRESS_VARIABLE, Failure, GroupSpec, Host, Reply, Whereabouts
from asystem.spmd.process_group import open_rendezvous
from asystem.spmd.runtime import OnCall
from asystem.spmd.runtimes.cluster import (
    choose_node,
    end_on_sigterm,
    gpus_per_rank,
    identity,
    new_temp_dir,
    remove_temp_dir,
)

_RAY_OWN = (":job_id:", ":actor_name:", ":task_name:")  # lines by which Ray marks its log files


class SharedMemory:
    """Ray's object store: one copy a node, read in place."""

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def get_many(self, handles: Sequence[Any]) -> list[Any]:
        values: list[Any] = ray.get(list(handles))
        return values


class RankActor:
    """The process of one rank.

    Args:
        environment: what the group's processes are to have, where nobody has set it.
        path, folder: the controller's import path and working folder: a rank imports and reads what the controller can.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        threads: int,
        owns_gpu: bool,
        environment: dict[str, str],
        path: list[str],
        folder: str,
    ) -> None:
        sys.path += [entry for entry in path if entry not in sys.path]
        if os.path.isdir(folder):
            os.chdir(folder)
        self.rank, self.ranks, self.threads = rank, ranks, threads
        # Before torch is imported, which unpickling the worker's type will do. A rank that owns a GPU sees no other.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0" if owns_gpu else str(rank))
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        os.environ.update({name: value for name, value in environment.items() if name not in os.environ})
        os.environ[ADDRESS_VARIABLE] = get_node_ip_address()
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)
        store.use(SharedMemory())
        self.loop = asyncio.new_event_loop()

    def where(self) -> Whereabouts:
        stderr = "/proc/self/fd/2"
        return Whereabouts(stderr=os.readlink(stderr) if os.path.exists(stderr) else "")

    def open_rendezvous(self) -> str:
        return open_rendezvous(get_node_ip_address(), self.ranks)

    def start(self, spec: GroupSpec, address: str | None) -> Reply:
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(self.threads)
        self.host = Host(spec, self.rank)
        return self._run(self.host.start(address))

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reply:
        return self._run(self.host.run(method, args, kwargs))

    def _run(self, call: Any) -> Reply:
        reply: Reply = self.loop.run_until_complete(call)
        return reply if reply.failure is None else Reply(None, reply.failure.portable(), reply.start, reply.end)


class RayRank:
    """One actor, seen from the controller."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._where_ref = actor.where.remote()
        self._known: Whereabouts | None = None
        self._start_ref: Any = None

    @property
    def where(self) -> Whereabouts:
        """Where the actor runs, once that is known; it never waits for it."""
        if self._known is None and ray.wait([self._where_ref], timeout=0)[0]:
            try:
                self._known = ray.get(self._where_ref)
            except ray.exceptions.RayError:
                self._known = Whereabouts(host="unknown host", pid=0)
        return self._known or Whereabouts(host="unknown host", pid=0)

    def begin(self, spec: GroupSpec, address_ref: Any) -> None:
        """Sends the start off; `started` waits for it."""
        self._start_ref = self._actor.start.remote(spec, address_ref)

    def started(self) -> asyncio.Future[Reply]:
        return self._reply(self._start_ref)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Reply]:
        return self._reply(self._actor.call.remote(method, args, kwargs))

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)

    def last_words(self, *, hanging: bool) -> str:
        path = Path(self.where.stderr)
        if not self.where.stderr or not path.is_file():
            return ""  # on another machine
        if not hanging:
            return "\n".join(_read_from(path, path.stat().st_size - 10_000)[-12:])
        written = path.stat().st_size
        with suppress(ProcessLookupError):
            os.kill(self.where.pid, signal.SIGUSR1)  # the actor writes where its main thread stands
            time.sleep(0.2)
        return "\n".join(_read_from(path, written)[:12])

    def _reply(self, ref: Any) -> asyncio.Future[Reply]:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()

        def resolve(answer: Any) -> None:
            if not reply.done():
                error = answer.exception()
                reply.set_result(answer.result() if error is None else Reply(failure=self._death(error)))

        ref.future().add_done_callback(lambda answer: _in_loop(loop, resolve, answer))
        return reply

    def _death(self, error: BaseException) -> Failure:
        if not isinstance(error, ray.exceptions.RayActorError):
            lines = str(error).strip().splitlines() or [""]
            return Failure(f"{type(error).__name__}: {lines[-1][:300]}", str(error)[-3000:])
        pid = f" (pid {self.where.pid})" if self.where.pid else ""
        starved = "running low on memory" in str(error)
        cause = "its node ran out of memory" if starved else "killed, say for want of memory, or crashed"
        return Failure(f"its process{pid} died: {cause}")


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _read_from(path: Path, start: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(start, 0))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return [line for line in lines if not line.startswith(_RAY_OWN)]


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], value: Any) -> None:
    if not loop.is_closed():  # an answer may come after the controller has ended
        loop.call_soon_threadsafe(function, value)


class RayRuntime:
    """Starts actors in a cluster: its own on this machine, the one that RAY_ADDRESS names, or one already joined."""

    def __init__(self, config: RuntimeConfig, placement: PlacementConfig, on_call: OnCall | None = None) -> None:
        self.config, self.placement, self.on_call = config, placement, on_call
        self._ranks: list[RayRank] = []
        self._placement_groups: list[PlacementGroup] = []
        self._gpus_taken = 0.0
        self._groups_on: dict[str, list[float]] = {}  # by node identity: the GPUs of each group there
        self._temp_dir: Path | None = None
        self._owns_connection = not ray.is_initialized()
        if self._owns_connection:
            self._connect()
            end_on_sigterm()
        self.num_gpus: float = ray.cluster_resources().get("GPU", 0.0)
        self.one_host = len(_nodes()) == 1
        self._previous_store = store.use(SharedMemory())

    def start_group(self, spec: GroupSpec) -> list[RayRank]:
        gpus = gpus_per_rank(spec.name, spec.ranks, spec.gpus, self.num_gpus, self._gpus_taken)
        self._gpus_taken += gpus * spec.ranks
        bundle = {"CPU": spec.cpus} | ({"GPU": gpus} if gpus else {}) | self._pin(gpus * spec.ranks)
        group = placement_group([dict(bundle) for _ in range(spec.ranks)], strategy="PACK")
        self._placement_groups.append(group)
        actor_type, path = ray.remote(RankActor), [os.path.abspath(entry) for entry in sys.path]
        ranks = []
        for rank in range(spec.ranks):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {"num_cpus": spec.cpus, "num_gpus": gpus, "scheduling_strategy": where, "max_restarts": 0}
            facts = rank, spec.ranks, spec.threads, gpus > 0, spec.environment, path, os.getcwd()
            actor = actor_type.options(**options).remote(*facts)
            ranks.append((actor, RayRank(actor)))
        address = ranks[0][0].open_rendezvous.remote() if spec.collective else None
        for _, handle in ranks:
            handle.begin(spec, address)
        self._ranks += [handle for _, handle in ranks]
        return [handle for _, handle in ranks]

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
        for group in self._placement_groups:
            remove_placement_group(group)
        self._ranks, self._placement_groups = [], []
        store.use(self._previous_store)
        if self._owns_connection:
            ray.shutdown()
        if self._temp_dir is not None:
            remove_temp_dir(self._temp_dir)

    def __enter__(self) -> RayRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if "RAY_ADDRESS" in os.environ:
            ray.init(address="auto", namespace=_namespace(), **quiet)
            return
        self._temp_dir = new_temp_dir()
        ray.init(
            address="local",
            namespace=_namespace(),
            include_dashboard=False,
            object_store_memory=self.config.object_store_bytes,
            _temp_dir=str(self._temp_dir),
            **quiet,
        )

    def _pin(self, gpus: float) -> dict[str, float]:
        """With `placement.spread`: the resource that keeps the whole group on the emptiest node."""
        if not self.placement.spread:
            return {}
        nodes = [node["Resources"] for node in _nodes()]
        totals = {name: resources.get("GPU", 0.0) for resources in nodes if (name := identity(resources))}
        chosen = choose_node(totals, self._groups_on, gpus)
        if chosen is None:
            return {}
        self._groups_on.setdefault(chosen, []).append(gpus)
        return {chosen: 0.0001}


def _namespace() -> str:
    return f"asystem-{secrets.token_hex(4)}"
