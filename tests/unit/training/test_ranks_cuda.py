"""Training over two GPUs, joined by NCCL and with compiled blocks, against one GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from asystem.config import Recompute, TrainingConfig
from asystem.data.packing import Sample, pack
from asystem.models import Decoder, ModelSpec, MoESpec, init_weights
from asystem.state import Inbox, Outbox
from asystem.stats import merge
from asystem.training import TrainEngine, supervised_loss

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

DENSE = ModelSpec("qwen3", 503, 64, 96, 2, num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True, tie_embeddings=True)
EXPERTS = replace(DENSE, family="qwen3_moe", moe=MoESpec(8, 2, 64))
CASES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "fsdp": (DENSE, {}),
    "tensor": (DENSE, {"tensor_parallel": 2}),
    "tensor, experts": (EXPERTS, {"tensor_parallel": 2, "recompute": Recompute.selective}),
    "experts spread": (EXPERTS, {"expert_parallel": 2}),
}
# Losses and weights may differ by so much after three steps of 1e-3.
BOUNDS = {torch.float32: (1e-4, 2e-4), torch.bfloat16: (2e-2, 6e-3)}


def train(name: str, dtype: torch.dtype, world: int) -> dict[str, Any]:
    spec, choices = CASES[name]
    model = Decoder(spec)
    init_weights(model, seed=0, std=0.1)
    cfg = TrainingConfig(lr=1e-3, eps=1e-4, **(choices if world > 1 else {}))
    engine = TrainEngine(model, cfg, device="cuda", dtype=dtype, world_size=world, total_steps=10)
    rng, lengths = np.random.default_rng(0), [40, 9, 33, 70, 5, 64]
    samples = [Sample(rng.integers(0, 503, 7), rng.integers(0, 503, n), 1 / sum(lengths)) for n in lengths]
    micro = pack(samples[engine.ranks.data_rank :: engine.ranks.data], budget=128)
    stats = [engine.step(micro, supervised_loss) for _ in range(3)]
    payload = Outbox(engine.model, torch.float32, rank=engine.rank).write()
    return {"stats": stats if engine.ranks.is_first else None, "payload": payload}


def _rank(rank: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=2)
    results = {}
    for case in [(name, dtype) for dtype in BOUNDS for name in CASES]:
        results[case] = train(*case, 2)
        torch.compiler.reset()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for case in ranks[0]:
        alone, found = train(*case, 1), [rank[case] for rank in ranks]
        torch.compiler.reset()
        loss_bound, weight_bound = BOUNDS[case[1]]
        for step, stats in enumerate(alone["stats"]):
            merged = merge(each["stats"][step] for each in found if each["stats"]).to_dict()
            assert merged["train/loss"] == pytest.approx(stats.to_dict()["train/loss"], abs=loss_bound), case
        ours, theirs = Decoder(CASES[case[0]][0]), Decoder(CASES[case[0]][0])
        Inbox(ours).read([each["payload"] for each in found])
        Inbox(theirs).read([alone["payload"]])
        for name, p in theirs.named_parameters():
            assert float((ours.get_parameter(name) - p).abs().max()) < weight_bound, (case, name)
