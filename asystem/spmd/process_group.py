"""How the ranks of a collective group meet: a key-value store on rank 0, then a torch.distributed process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

_store: Any = None  # the TCPStore that rank 0 serves; it must live as long as the group


def open_rendezvous(host: str, world_size: int) -> str:
    """Serves the store of a group on a free port of this host, and returns its address.

    The port is bound here and stays bound, so that no other program can take it before the ranks come.
    """
    global _store
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    _store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
    return f"{host}:{_store.port}"


def form_process_group(rank: int, world_size: int, address: str, timeout_seconds: float) -> None:
    """Joins the group's ranks: gloo for CPU tensors, NCCL beside it where there is a GPU.

    Sets MASTER_ADDR and MASTER_PORT too, for libraries that read them.
    """
    global _store
    import torch
    from torch.distributed import PrefixStore, TCPStore, init_process_group  # type: ignore[attr-defined]

    host, port = address.rsplit(":", 1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, port
    if rank != 0:
        _store = TCPStore(host, int(port), world_size, is_master=False)
    init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore("group", _store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
