"""Ranks as processes of this machine that share one import of torch: what Ray gives, without the start of a cluster."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

from asystem.config import PlacementConfig, RuntimeConfig
from asystem.spmd.host import GroupSpec, Host, Reply, Whereabouts
from asystem.spmd.process_group import open_rendezvous
from asystem.spmd.runtime import OnCall

_host: Host  # of this rank


def _start(spec: GroupSpec, rank: int, address: str) -> Reply:
    global _host
    torch.set_num_threads(1)
    _host = Host(spec, rank)
    return _portable(asyncio.run(_host.start(address)))


def _call(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reply:
    return _portable(asyncio.run(_host.run(method, args, kwargs)))


def _portable(reply: Reply) -> Reply:
    return reply if reply.failure is None else Reply(None, reply.failure.portable(), reply.start, reply.end)


class LocalRank:
    """A pool of one process, which runs what it is given in order."""

    def __init__(self, spec: GroupSpec, rank: int, pool: ProcessPoolExecutor, address: str) -> None:
        self.where, self._pool = Whereabouts(), pool
        self._start = pool.submit(_start, spec, rank, address)

    def started(self) -> asyncio.Future[Reply]:
        return asyncio.wrap_future(self._start)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Reply]:
        return asyncio.wrap_future(self._pool.submit(_call, method, args, kwargs))

    def kill(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def last_words(self, *, hanging: bool) -> str:
        return ""


class LocalRuntime(ExitStack):
    """In the place of `make_runtime`'s."""

    def __init__(self, config: RuntimeConfig, placement: PlacementConfig, *, on_call: OnCall | None = None) -> None:
        super().__init__()
        self.config, self.on_call = config, on_call

    def start_group(self, spec: GroupSpec) -> list[LocalRank]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["asystem.workers"])
        pools = [self.enter_context(ProcessPoolExecutor(1, context)) for _ in range(spec.ranks)]
        address: Callable[[], str] = pools[0].submit(open_rendezvous, "127.0.0.1", spec.ranks).result
        return [LocalRank(spec, rank, pool, address()) for rank, pool in enumerate(pools)]
