"""What surrounds a Ray cluster: the environment it reads on import, its temporary folder, its nodes. No Ray here."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from asystem.errors import ConfigError

NODE_RESOURCE = "asystem_node_"  # + the node's rank: the custom resource by which bootstrapped nodes are told apart
_LONGEST_TEMP_DIR = 36  # Ray appends up to 70 characters, and a Unix socket's path ends at 107


def prepare_environment() -> None:
    """Sets what Ray reads when it is imported.

    A cluster of our own takes a token that only this process and its children know, so that no other user of the
    machine can run code in it. For a cluster that is there already (RAY_ADDRESS), the user's settings stand.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its default from 2.60 on, without its warning
    if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & os.environ.keys() and "ray" not in sys.modules:
        os.environ.update(token_environment(secrets.token_hex(32)))


def token_environment(token: str) -> dict[str, str]:
    """The variables with which Ray processes recognise each other; equal on all nodes of a cluster."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def new_temp_dir() -> Path:
    """A temporary folder for one cluster, so that several on a machine stay apart, with a path that is not too long."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="asystem-", dir=parent if len(parent) <= _LONGEST_TEMP_DIR - 17 else "/tmp"))


def remove_temp_dir(path: Path) -> None:
    """Removes it with all logs; Ray's processes that are still ending may write to it for a moment longer."""
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)


def end_on_sigterm() -> None:
    """Makes SIGTERM, which Slurm, torchrun and containers send, end the run as Ctrl-C does: with everything closed.

    Ray replaces the handler by one that prints a stack and aborts, so this is called after `ray.init` too.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell
        sys.exit(128 + signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


def identity(resources: Mapping[str, float]) -> str | None:
    """The resource that only this node has: ours if it was bootstrapped by us, else Ray's own, by address."""
    ours = [name for name in resources if name.startswith(NODE_RESOURCE)]
    rays = [name for name in resources if name.startswith("node:") and not name.startswith("node:__")]
    return next(iter(sorted(ours) + sorted(rays)), None)


def choose_node(total_gpus: Mapping[str, float], groups: Mapping[str, Sequence[float]], gpus: float) -> str | None:
    """The node for the next group when groups are spread: the one with the fewest groups where the GPUs suffice.

    Args:
        total_gpus: by node. groups: by node, the GPUs that each group takes there. gpus: that the next one needs.
    """
    fitting = [node for node, total in total_gpus.items() if total - sum(groups.get(node, ())) >= gpus]
    return min(fitting, key=lambda node: (len(groups.get(node, ())), node), default=None)


def gpus_per_rank(name: str, ranks: int, wanted: float, total: float, taken: float) -> float:
    """What each rank of a group gets: the GPUs it asks for, or none where the cluster has none.

    Raises:
        ConfigError: the others have left too few.
    """
    if not total:
        return 0.0
    if ranks * wanted > total - taken + 1e-6:
        raise ConfigError(
            f"{name} needs {ranks * wanted:g} GPUs ({ranks} ranks of {wanted:g}), and {total - taken:g} of {total:g} "
            "are free: use fewer ranks, or placement=hybrid, where training and generation share each GPU"
        )
    return wanted
