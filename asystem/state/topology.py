"""Which transport carries the weights: by where the ranks are, or as the configuration says where that can work."""

from __future__ import annotations

import os

from asystem.config import Config, RuntimeKind, Transport
from asystem.errors import ConfigError


def choose_transport(config: Config, *, gpus: float, one_host: bool) -> Transport:
    """The transport of a run in split placement.

    Args:
        gpus: that each rank of training and generation owns; below 1 they share one, 0 = the ranks compute on CPUs.
        one_host: whether all ranks run on one machine.

    Raises:
        ConfigError: the configured one cannot work here.
    """
    wanted, alone = config.weights.transport, config.runtime.kind is RuntimeKind.inline
    if alone:
        return wanted  # auto: a buffer of this process, on the device of the weights
    if wanted is Transport.auto:
        return _fastest(gpus, one_host)
    reason = _refusal(wanted, gpus, one_host)
    if reason:
        raise ConfigError(f"weights.transport={wanted.value} {reason}, or auto")
    return wanted


def _fastest(gpus: float, one_host: bool) -> Transport:
    if gpus:
        return Transport.ipc if gpus < 1 else Transport.nccl
    return Transport.shared_memory if one_host and _has_shared_memory() else Transport.store


def _refusal(wanted: Transport, gpus: float, one_host: bool) -> str:
    """Why it cannot work and what can; "" = it can."""
    if wanted is Transport.shared_memory and not (one_host and _has_shared_memory()):
        return f"needs all ranks on one Linux host: use {'nccl' if gpus else 'store'}"
    if wanted is Transport.ipc and not gpus:
        return "shares GPU memory, and ranks own no GPU here: use shared_memory"
    if wanted is Transport.ipc and not one_host:
        return "maps GPU memory of one host, and ranks are on several: use nccl"
    if wanted is Transport.nccl and 0 < gpus < 1:
        return "wants a GPU for each rank, and two ranks share one here: use ipc"
    return ""


def _has_shared_memory() -> bool:
    return hasattr(os, "memfd_create")
