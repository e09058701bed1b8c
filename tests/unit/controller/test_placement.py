"""How many GPUs a rank owns, and which device it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pytest
import torch

from asystem.config import Config, PlacementKind, RuntimeConfig, RuntimeKind, Transport
from asystem.controller.run import gpus_of_a_rank, spawn_groups
from asystem.errors import ConfigError
from asystem.spmd.host import GroupSpec
from asystem.spmd.runtime import OnCall, Rank
from asystem.workers.build import pick_device


@pytest.mark.parametrize(
    ("device", "kind", "ranks", "num_gpus", "each"),
    [
        ("auto", PlacementKind.split, (1, 1), 8, 1.0),
        ("cuda", PlacementKind.split, (1, 1), 1, 0.5),
        ("auto", PlacementKind.hybrid, (1, 1), 1, 1.0),
        ("auto", PlacementKind.split, (2, 1), 1, 1.0),  # refused when the groups start: NCCL wants a GPU for each rank
        ("cpu", PlacementKind.split, (1, 1), 1, 0.0),
    ],
)
def test_gpus_of_a_rank(device: str, kind: PlacementKind, ranks: tuple[int, int], num_gpus: float, each: float) -> None:
    config = Config(device=device)
    config.placement.kind, (config.training.ranks, config.generation.ranks) = kind, ranks
    assert gpus_of_a_rank(config, num_gpus) == each


def test_ranks_that_see_all_gpus_take_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in ("2", "5"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        pick_device(Config())
    monkeypatch.delenv("LOCAL_RANK")
    pick_device(Config(device="cuda"))
    assert taken == [torch.device("cuda", index) for index in (2, 1, 0)]
    assert pick_device(Config(device="cpu")) == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Config()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda, and PyTorch sees no GPU here"):
        pick_device(Config(device="cuda"))


class _Asked:
    """A runtime that notes what groups are asked for, and starts none."""

    one_host = True
    on_call: OnCall | None = None

    def __init__(self, num_gpus: float) -> None:
        self.num_gpus, self.config = num_gpus, RuntimeConfig()
        self.specs: dict[str, GroupSpec] = {}

    def start_group(self, spec: GroupSpec) -> Sequence[Rank]:
        self.specs[spec.name] = spec
        return []

    def close(self) -> None: ...

    def __enter__(self) -> _Asked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@pytest.mark.parametrize(
    ("changes", "num_gpus", "users", "grows"),
    [
        ({}, 2, None, True),
        ({"transport": Transport.store}, 2, None, True),
        ({"transport": Transport.ipc}, 2, None, False),
        ({}, 1, None, False),  # two ranks share it, by CUDA IPC
        ({"kind": PlacementKind.hybrid}, 1, None, False),
        ({"runtime": RuntimeKind.inline}, 0, None, False),
        ({"device": "cpu"}, 2, None, False),
        ({}, 2, "PYTORCH_CUDA_ALLOC_CONF", False),
        ({}, 2, "PYTORCH_ALLOC_CONF", False),
    ],
)
def test_who_trains_in_segments_that_grow(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, object],
    num_gpus: int,
    users: str | None,
    grows: bool,
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if users is not None:
        monkeypatch.setenv(users, "max_split_size_mb:512")
    config = Config(device=str(changes.get("device", "auto")))
    config.placement.kind = PlacementKind(changes.get("kind", PlacementKind.split))
    config.runtime.kind = RuntimeKind(changes.get("runtime", RuntimeKind.ray))
    config.weights.transport = Transport(changes.get("transport", Transport.auto))
    runtime = _Asked(num_gpus)
    spawn_groups(config, runtime, tmp_path)
    expected = {"trainers": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}} if grows else {}
    assert {name: spec.environment for name, spec in runtime.specs.items() if spec.environment} == expected
