"""A process group that spans ranks of two worker groups: they meet at a store, then send to each other.

Each wait ends by a deadline with an error that names who was waited for, and leaves this process and its device in
order: one that has work to lose must not go down with a peer. gloo carries CPU tensors, NCCL those of GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asystem.errors import PublicationError
from asystem.spmd.host import ADDRESS_VARIABLE

_POLL = 0.0005  # seconds between two looks at the store
_NEVER = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A tensor on its way to or from a peer (its rank in the exchange)."""

    peer: int
    tensor: Tensor
    is_sent: bool


def open_meeting(rank: int, ranks: int) -> tuple[str, Any]:
    """The address of a store that the first of a group's ranks serves, and there the store itself, which must live as
    long as the exchange. All ranks of the group call it in step."""
    host = os.environ.get(ADDRESS_VARIABLE, "127.0.0.1")
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None  # type: ignore[attr-defined]
    told: list[Any] = [f"{host}:{store.port}" if store is not None else None]
    if ranks > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0], store


class Exchange:
    """One rank's end.

    Args:
        address: of the store; ``store`` itself where it is served.
        names: of all ranks, as errors call them; this one is number ``rank``.
        seconds: in which all that follows a `begin` must be done.
    """

    def __init__(
        self, address: str, rank: int, names: Sequence[str], device: torch.device, seconds: float, store: Any = None
    ) -> None:
        self.rank, self.names, self.device, self.seconds = rank, names, device, seconds
        self._group: Any = None
        self.begin()
        host, port = address.rsplit(":", 1)
        with self._blaming(0):
            limit = timedelta(seconds=seconds)
            self._store = store or dist.TCPStore(host, int(port), is_master=False, timeout=limit)  # type: ignore[attr-defined]

    def begin(self) -> None:
        """Starts the clock."""
        self._end = time.monotonic() + self.seconds

    def gather(self, key: str, value: bytes = b"") -> list[bytes]:
        """What each rank has to say about a key. Returns when all have come.

        Raises:
            PublicationError: one did not in time, or has failed.
        """
        keys = [f"{key}/{rank}" for rank in range(len(self.names))]
        with self._blaming(0):
            self._store.set(keys[self.rank], value)  # type: ignore[arg-type]
            self._until(lambda: self._store.check(keys), lambda: f"{self._missing(keys)} ({key})")
            return [bytes(self._store.get(each)) for each in keys]

    def forget(self, key: str) -> None:
        """Drops what this rank had to say."""
        with suppress(RuntimeError):
            self._store.delete_key(f"{key}/{self.rank}")

    def connect(self) -> None:
        """Forms the process group, once all ranks have met.

        Raises:
            PublicationError: it cannot be formed.
        """
        store = dist.PrefixStore("group", self._store)  # type: ignore[attr-defined]
        group = dist.ProcessGroup(store, self.rank, len(self.names))
        try:
            if self.device.type == "cuda":
                kind, backend = dist.ProcessGroup.BackendType.NCCL, self._nccl(store)
            else:
                kind, backend = dist.ProcessGroup.BackendType.GLOO, self._gloo(store)
            group._set_default_backend(kind)
            group._register_backend(torch.device(self.device.type), kind, backend)
            self._group = group
            if self.device.type == "cuda":  # all ranks at once make the communicator, which sending alone could not
                group.allreduce([torch.zeros(1, device=self.device)]).wait()
                self._await_device(lambda: "the others")
        except RuntimeError as error:
            raise PublicationError(
                f"{self.names[self.rank]} could not connect to its peers: {first_line(error)}"
            ) from error

    def post(self, transfers: Sequence[Transfer]) -> Callable[[], None]:
        """Begins transfers; on a GPU after what its current stream has to do. Peers do theirs in the same order.

        Returns:
            what waits for them: on return a GPU's stream goes on with what has come.
        """
        if not transfers:
            return lambda: None
        if self.device.type == "cuda":
            self._group._start_coalescing(self.device)
            for transfer in transfers:
                self._start(transfer)
            works = [(self._group._end_coalescing(self.device), [transfer.peer for transfer in transfers])]
        else:
            works = [(self._start(transfer), [transfer.peer]) for transfer in transfers]
        return lambda: self._finish(works)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank gives up, and lets go of what hangs."""
        group, self._group = self._group, None
        with suppress(Exception):
            self._store.set("failed", f"{self.names[self.rank]}: {first_line(error)}")
        with suppress(Exception):
            group.abort()

    def _start(self, transfer: Transfer) -> Any:
        act = self._group.send if transfer.is_sent else self._group.recv
        return act([transfer.tensor], transfer.peer, 0)

    def _finish(self, works: Sequence[tuple[Any, list[int]]]) -> None:
        for work, peers in works:
            with self._blaming(*peers):
                if self.device.type == "cuda":
                    work.wait()  # the stream does; below this thread
                    self._await_device(lambda peers=peers: self._named(peers))  # type: ignore[misc]
                else:
                    work.wait(timedelta(seconds=max(self._end - time.monotonic(), 0.001)))

    def _await_device(self, missing: Callable[[], str]) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._until(event.query, missing, pause=0.00002)

    def _until(self, condition: Callable[[], bool], missing: Callable[[], str], pause: float = _POLL) -> None:
        looked = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - looked > 0.2:
                looked = now
                self._check_failed()
            if now > self._end:
                raise PublicationError(
                    f"{self.names[self.rank]} waited {self.seconds:g} s for {missing()}; raise "
                    "runtime.deadline_seconds if that is to be expected"
                )
            time.sleep(pause)

    def _check_failed(self) -> None:
        if self._store.check(["failed"]):
            raise PublicationError(f"weights were not published: {self._store.get('failed').decode()}")

    @contextmanager
    def _blaming(self, *peers: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's, of a connection that broke or timed out
            with suppress(RuntimeError, AttributeError):
                self._check_failed()
            raise PublicationError(f"{self.names[self.rank]} lost {self._named(peers)}: {first_line(error)}") from error

    def _missing(self, keys: Sequence[str]) -> str:
        return self._named([rank for rank, key in enumerate(keys) if not self._store.check([key])])

    def _named(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.names[rank] for rank in ranks)

    def _gloo(self, store: Any) -> Any:
        return dist.ProcessGroupGloo(store, self.rank, len(self.names), timedelta(seconds=self.seconds))

    def _nccl(self, store: Any) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER  # the deadline is kept here: torch's own watchdog would end the process
        name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read once, by the group's constructor
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            return dist.ProcessGroupNCCL(store, self.rank, len(self.names), options)
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
