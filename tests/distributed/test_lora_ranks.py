"""Adapters under FSDP2: two gloo ranks against one process, from training to exported weights and PEFT's folder."""

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

from asystem.config import LoraConfig, Recompute, TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.state import Inbox, Outbox
from asystem.stats import merge
from asystem.training import TrainEngine, supervised_loss

WORLD, VOCAB = 2, 23
SHARES = [[0, 2, 4], [1, 3]]
SPEC = ModelSpec("qwen3", VOCAB, 16, 24, 2, 4, 2, 4, qk_norm=True, qkv_bias=True, tie_embeddings=True)


def _engine(world_size: int, recompute: Recompute) -> TrainEngine:
    model = Decoder(SPEC)
    init_weights(model, 0, std=0.2)
    cfg = TrainingConfig(lr=1e-2, eps=1e-3, recompute=recompute, lora=LoraConfig(rank=3, alpha=6.0))
    return TrainEngine(model, cfg, device="cpu", world_size=world_size, total_steps=10)


def _micro(rows: list[int]) -> list[PackedBatch]:
    rng, lengths = np.random.default_rng(0), [4, 1, 9, 6, 3]
    samples = [Sample(rng.integers(0, VOCAB, 2), rng.integers(0, VOCAB, n), 1 / sum(lengths)) for n in lengths]
    return pack([samples[row] for row in rows], budget=12)


def _train(engine: TrainEngine, rows: list[int], folder: Path) -> dict[str, Any]:
    stats = [engine.step(_micro(rows), supervised_loss) for _ in range(3)]
    engine.save(folder / "checkpoint")
    engine.save_adapter(folder / "adapter", "some/base")
    stats.append(engine.step(_micro(rows), supervised_loss))
    return {"stats": stats, "payload": Outbox(engine.model).write()}


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results = {
        kind.name: _train(_engine(WORLD, kind), SHARES[rank], folder / kind.name)
        for kind in (Recompute.none, Recompute.full)
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora-ranks")
    mp.spawn(_rank, (path,), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize("kind", ["none", "full"])
def test_two_ranks_equal_one_process(folder: Path, tmp_path: Path, kind: str) -> None:
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False)[kind] for rank in range(WORLD)]
    alone = _engine(1, Recompute.none)
    expected = _train(alone, [0, 1, 2, 3, 4], tmp_path)
    for step, stats in enumerate(expected["stats"]):
        found = merge(rank["stats"][step] for rank in ranks).to_dict()
        assert found == pytest.approx(stats.to_dict(), rel=1e-5, abs=1e-5)
    sent, wanted = Decoder(SPEC), Decoder(SPEC)
    Inbox(sent).read([rank["payload"] for rank in ranks])
    Inbox(wanted).read([expected["payload"]])
    for name, tensor in sent.named_parameters():
        torch.testing.assert_close(tensor, wanted.get_parameter(name), atol=1e-5, rtol=0, msg=name)
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(folder / kind / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, adapters[name], atol=1e-5, rtol=0, msg=name)
    alone.load(folder / kind / "checkpoint")  # of two ranks, by one
    again = alone.step(_micro([0, 1, 2, 3, 4]), supervised_loss).to_dict()
    assert again == pytest.approx(expected["stats"][3].to_dict(), rel=1e-5, abs=1e-5)
