"""How many GPUs a rank owns, and which device it takes."""

from __future__ import annotations

import pytest
import torch

from asystem.config import Config, PlacementKind
from asystem.controller.run import gpus_of_a_rank
from asystem.errors import ConfigError
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
