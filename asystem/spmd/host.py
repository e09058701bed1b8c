"""What runs on a rank: it holds one worker, runs its methods one after another, and times each of them."""

from __future__ import annotations

import os
import pickle
import resource
import socket
import sys
import time
import traceback
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from asystem.errors import AsystemError
from asystem.spmd.process_group import form_process_group
from asystem.spmd.remote import Worker, remote_method


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A worker group as asked for.

    Attributes:
        replica_ranks: so many ranks in a row act as one worker: they get equal calls, and the first one answers.
        cpus, gpus: what each rank takes of its node.
        threads: torch threads of each rank.
        environment: variables of each rank's process, where nobody has set them.
        patience_seconds: after which forming a process group, and a collective whose peers do not come, fail.
    """

    worker_type: type[Worker]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    ranks: int
    collective: bool
    replica_ranks: int
    cpus: float
    gpus: float
    threads: int
    environment: dict[str, str]
    patience_seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call has no value.

    Attributes:
        error: the exception; None when it cannot travel, or when the process died.
    """

    reason: str
    trace: str = ""
    error: BaseException | None = None

    def portable(self) -> Failure:
        """Without an exception that another process could not read: only our own are sure to be importable there."""
        if not isinstance(self.error, AsystemError):
            return replace(self, error=None)
        try:
            pickle.loads(pickle.dumps(self.error))
        except Exception:
            return replace(self, error=None)
        return self


@dataclass(frozen=True, slots=True)
class Reply:
    """A rank's answer to one call.

    Attributes:
        start, end: in wall-clock seconds, 0 when the process died in it. peak_bytes: see `CallRecord`.
    """

    value: Any = None
    failure: Failure | None = None
    start: float = 0.0
    end: float = 0.0
    peak_bytes: int = 0


NODE_VARIABLE = "ASYSTEM_NODE"  # set in the processes of a bootstrapped cluster: the rank of their node
ADDRESS_VARIABLE = "ASYSTEM_ADDRESS"  # set in the processes of ranks: the address of their node, for those of others


def host_name() -> str:
    """This machine, with the rank of its node where there are several."""
    node = os.environ.get(NODE_VARIABLE)
    return socket.gethostname() if node is None else f"{socket.gethostname()} (node {node})"


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a rank runs. ``stderr`` is the file that its error output goes to, if any."""

    host: str = field(default_factory=host_name)
    pid: int = field(default_factory=os.getpid)
    stderr: str = ""


class Host:
    """Holds the worker of one rank."""

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self.worker: Worker

    async def start(self, address: str | None) -> Reply:
        """Makes the worker, and runs its `Worker.setup`. ``address`` is where the ranks of the group meet."""
        return await _timed(self._start(address))

    async def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reply:
        """Runs one remote method. Exceptions become part of the reply."""
        return await _timed(self._call(method, args, kwargs))

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await remote_method(type(self.worker), method).function(self.worker, *args, **kwargs)

    async def _start(self, address: str | None) -> None:
        spec = self.spec
        self.worker = spec.worker_type.__new__(spec.worker_type)
        self.worker.rank, self.worker.world_size, self.worker.name = self.rank, spec.ranks, spec.name
        self.worker.__init__(*spec.args, **spec.kwargs)  # type: ignore[misc]
        if address is not None:
            form_process_group(self.rank, spec.ranks, address, spec.patience_seconds)
        await self.worker.setup()


async def _timed(call: Coroutine[Any, Any, Any]) -> Reply:
    start = time.time()
    try:
        return Reply(await call, None, start, time.time(), peak_bytes())
    except Exception as error:
        # The first two frames are those of this file.
        frames = error.__traceback__ and error.__traceback__.tb_next and error.__traceback__.tb_next.tb_next
        trace = "".join(traceback.format_exception(type(error), error, frames)[-8:]).rstrip()
        return Reply(None, Failure(_one_line(error), trace, error), start, time.time())


def peak_bytes() -> int:
    """The most memory that this process has held: tensors on its GPU, or without one the process in RAM."""
    torch: Any = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
