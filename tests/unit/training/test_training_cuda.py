"""The engine on a GPU in bfloat16, and FSDP2 over NCCL. Skipped where there is no GPU (or only one)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_helpers import make_model, make_samples

from asystem.config import TrainingConfig
from asystem.data.packing import pack
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.state import Inbox, Outbox
from asystem.stats import merge
from asystem.training import TrainEngine, supervised_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = [40, 3, 90, 61, 17]


def _engine(device: str, dtype: torch.dtype, world_size: int = 1, seed: int = 0) -> TrainEngine:
    model = Decoder(ModelSpec("qwen3", 23, 64, 96, 2, 4, 2, 64, qk_norm=True, tie_embeddings=True))
    init_weights(model, seed, std=0.1)
    cfg = TrainingConfig(lr=1e-2, eps=1e-4)
    return TrainEngine(model, cfg, device=device, dtype=dtype, world_size=world_size, total_steps=10)


@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_float32_equals_the_cpu() -> None:
    micro = pack(make_samples(LENGTHS), budget=100)
    here, there = _engine("cuda", torch.float32), _engine("cpu", torch.float32)
    for _ in range(3):
        found, expected = here.step(micro, supervised_loss).to_dict(), there.step(micro, supervised_loss).to_dict()
        assert found == pytest.approx(expected, abs=1e-4)


def test_bfloat16_follows_float32_and_resumes_bit_equal(tmp_path: Path) -> None:
    micro = pack(make_samples(LENGTHS), budget=100)
    half, full = _engine("cuda", torch.bfloat16), _engine("cpu", torch.float32)
    losses = []
    for _ in range(20):
        losses.append(half.step(micro, supervised_loss).to_dict()["train/loss"])
        expected = full.step(micro, supervised_loss).to_dict()["train/loss"]
        if expected > 0.2 * losses[0]:  # later on, paths of low loss part
            assert losses[-1] == pytest.approx(expected, rel=0.05)
    assert losses[-1] < 0.8 * losses[0]
    half.save(tmp_path / "step-000020")
    resumed = _engine("cuda", torch.bfloat16, seed=9)
    resumed.load(tmp_path / "step-000020")
    for name, master in half.optimizer.masters.items():
        assert torch.equal(resumed.optimizer.masters[name], master), name
        assert torch.equal(resumed.optimizer.params[name], half.optimizer.params[name]), name


def test_weights_travel_to_a_bfloat16_model_on_the_gpu() -> None:
    source, target = make_model(1), make_model(2).to("cuda", torch.bfloat16)
    Inbox(target).read([Outbox(source, torch.bfloat16).write()])
    for name, p in target.named_parameters():
        assert torch.equal(p.cpu(), source.get_parameter(name).to(torch.bfloat16)), name


def _rank(rank: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = _engine(f"cuda:{rank}", dtype, world_size=2)
        rows = [[0, 1, 2, 3], [4]][rank]
        samples = make_samples(LENGTHS)
        micro = pack([samples[row] for row in rows], budget=100)
        results[str(dtype)] = [engine.step(micro, supervised_loss) for _ in range(5)]
        engine.save(folder / str(dtype))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_over_nccl_equal_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    micro = pack(make_samples(LENGTHS), budget=1000)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        alone = _engine("cuda", dtype)
        for step in range(5):
            expected = alone.step(micro, supervised_loss).to_dict()
            found = merge(rank[str(dtype)][step] for rank in ranks).to_dict()
            assert found == pytest.approx(expected, rel=tolerance)
        alone.load(tmp_path / str(dtype))  # FSDP2's shards into one process
        assert alone.steps == 5
