"""Which transport a run gets, and which it is refused."""

from __future__ import annotations

import pytest

from asystem.config import Config, RuntimeKind, Transport
from asystem.errors import ConfigError
from asystem.state import choose_transport


def config(transport: str = "auto", kind: RuntimeKind = RuntimeKind.ray) -> Config:
    found = Config()
    found.weights.transport, found.runtime.kind = Transport(transport), kind
    return found


@pytest.mark.parametrize(
    ("gpus", "one_host", "chosen"),
    [
        (0.0, True, "shared_memory"),
        (0.0, False, "store"),
        (0.5, True, "ipc"),
        (1.0, True, "nccl"),
        (1.0, False, "nccl"),
    ],
)
def test_auto_goes_by_where_the_ranks_are(gpus: float, one_host: bool, chosen: str) -> None:
    assert choose_transport(config(), gpus=gpus, one_host=one_host) is Transport(chosen)


def test_within_one_process_nothing_is_shared() -> None:
    assert choose_transport(config(kind=RuntimeKind.inline), gpus=0.0, one_host=True) is Transport.auto


@pytest.mark.parametrize(
    ("transport", "gpus", "one_host", "message"),
    [
        ("shared_memory", 0.0, False, "needs all ranks on one Linux host: use store, or auto"),
        ("shared_memory", 1.0, False, "needs all ranks on one Linux host: use nccl, or auto"),
        ("ipc", 0.0, True, "shares GPU memory, and ranks own no GPU here: use shared_memory, or auto"),
        ("ipc", 1.0, False, "maps GPU memory of one host, and ranks are on several: use nccl, or auto"),
        ("nccl", 0.5, True, "wants a GPU for each rank, and two ranks share one here: use ipc, or auto"),
    ],
)
def test_what_cannot_work_is_refused(transport: str, gpus: float, one_host: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^weights.transport={transport} {message}$"):
        choose_transport(config(transport), gpus=gpus, one_host=one_host)


@pytest.mark.parametrize("transport", ["store", "nccl"])
def test_any_ranks_can_use_the_store_and_a_process_group(transport: str) -> None:
    for one_host in (True, False):
        assert choose_transport(config(transport), gpus=0.0, one_host=one_host) is Transport(transport)
