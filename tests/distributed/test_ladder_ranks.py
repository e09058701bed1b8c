"""The memory ladder under FSDP2: two gloo ranks against one process, from training to exported weights and folders."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from asystem.config import LoraConfig, Master, Optimizer, Recompute, TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.state import Inbox, Outbox
from asystem.stats import Stats, merge
from asystem.training import TrainEngine, TrainingPlan, supervised_loss
from asystem.training.states import local

WORLD, VOCAB = 2, 23
SHARES = [[0, 2, 4], [1, 3]]
SPEC = ModelSpec("qwen3", VOCAB, 16, 24, 2, 4, 2, 4, qk_norm=True, qkv_bias=True, tie_embeddings=True)
CHOICES: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraConfig(rank=3, alpha=6.0), "recompute": Recompute.full},
    "8 bits": {"optimizer": Optimizer.adamw8bit},
    "stochastic": {"master": Master.bfloat16_stochastic},
}
# An error of 1e-7 in a gradient may move an 8-bit code to its neighbour; shards draw other numbers than the whole, so
# that a weight is off by a bit of bfloat16 a step, and gradients by more.
TOLERANCE = {"8 bits": 2e-3, "stochastic": 2e-2}


def _configured(name: str) -> tuple[TrainingConfig, torch.dtype]:
    cfg = TrainingConfig(**({"lr": 1e-2, "eps": 1e-3} | CHOICES[name]))
    return cfg, torch.float32 if cfg.master is Master.float32 else torch.bfloat16


def _engine(world_size: int, name: str) -> TrainEngine:
    model = Decoder(SPEC)
    init_weights(model, 0, std=0.2)
    cfg, dtype = _configured(name)
    return TrainEngine(model, cfg, device="cpu", dtype=dtype, world_size=world_size, total_steps=10)


def _micro(rows: list[int]) -> list[PackedBatch]:
    rng, lengths = np.random.default_rng(0), [4, 1, 9, 6, 3]
    samples = [Sample(rng.integers(0, VOCAB, 2), rng.integers(0, VOCAB, n), 1 / sum(lengths)) for n in lengths]
    return pack([samples[row] for row in rows], budget=12)


def _train(engine: TrainEngine, rows: list[int], folder: Path) -> dict[str, Any]:
    stats = [engine.step(_micro(rows), supervised_loss) for _ in range(2)]
    engine.save(folder / "checkpoint")
    if engine.cfg.lora.rank > 0:
        engine.save_adapter(folder / "adapter", "some/base")
    stats.append(engine.step(_micro(rows), supervised_loss))
    return {"stats": stats, "payload": Outbox(engine.model).write(), "held": _held(engine)}


def _held(engine: TrainEngine) -> tuple[int, int]:
    """Bytes of this rank's weights and moments."""
    moments = (tensor for name, tensor in engine.optimizer.tensors().items() if ".exp_avg" in name)
    first, second = (sum(local(t).nbytes for t in tensors) for tensors in (engine.model.parameters(), moments))
    return first, second


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results = {name: _train(_engine(WORLD, name), SHARES[rank], folder / name) for name in CHOICES}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora-ranks")
    mp.spawn(_rank, (path,), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize("name", CHOICES)
def test_two_ranks_equal_one_process(folder: Path, tmp_path: Path, name: str) -> None:
    tolerance = TOLERANCE.get(name, 1e-5)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False)[name] for rank in range(WORLD)]
    alone = _engine(1, name)
    expected = _train(alone, [0, 1, 2, 3, 4], tmp_path)
    for step, stats in enumerate(expected["stats"]):
        _check(merge(rank["stats"][step] for rank in ranks), stats, tolerance)
    sent, wanted = Decoder(SPEC), Decoder(SPEC)
    Inbox(sent).read([rank["payload"] for rank in ranks])
    Inbox(wanted).read([expected["payload"]])
    for weight, tensor in sent.named_parameters():
        torch.testing.assert_close(tensor, wanted.get_parameter(weight), atol=tolerance, rtol=0, msg=weight)
    alone.load(folder / name / "checkpoint")  # of two ranks, by one
    _check(alone.step(_micro([0, 1, 2, 3, 4]), supervised_loss), expected["stats"][2], tolerance)


def _check(found: Stats, expected: Stats, tolerance: float) -> None:
    got, wanted = found.to_dict(), expected.to_dict()
    assert got.pop("train/grad_norm") == pytest.approx(wanted.pop("train/grad_norm"), rel=5 * tolerance)
    assert got == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", CHOICES)
def test_ranks_hold_what_is_planned(folder: Path, name: str) -> None:
    cfg, dtype = _configured(name)
    plan = TrainingPlan(SPEC, cfg, dtype=dtype, ranks=WORLD, device="cpu").of(64)
    held = torch.load(folder / "rank0.pt", weights_only=False)[name]["held"]
    assert held == (plan.weights, plan.moments)


@pytest.mark.parametrize("name", [name for name, changes in CHOICES.items() if "lora" in changes])
def test_peft_folders_are_the_same(folder: Path, tmp_path: Path, name: str) -> None:
    _train(_engine(1, name), [0, 1, 2, 3, 4], tmp_path)
    wanted = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = load_file(folder / name / "adapter" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for weight, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[weight], atol=1e-5, rtol=0, msg=weight)
