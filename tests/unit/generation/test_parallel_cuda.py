"""Replicas cut over two GPUs, joined by NCCL within captured steps: the tokens of one GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder, ModelSpec, MoESpec, Shard, init_weights
from asystem.types import SamplingParams, Trajectory

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

DENSE = ModelSpec("qwen3", 5003, 96, 160, 3, num_heads=8, num_kv_heads=2, head_dim=32, qk_norm=True)
EXPERTS = replace(DENSE, family="qwen3_moe", moe=MoESpec(8, 2, 64))
CASES = [
    (DENSE, torch.float32, True),
    (DENSE, torch.float32, False),
    (DENSE, torch.bfloat16, True),
    (EXPERTS, torch.float32, True),
    (EXPERTS, torch.bfloat16, True),
]


def generate(part: Shard | None, spec: ModelSpec, dtype: torch.dtype, graphs: bool) -> list[Trajectory]:
    model = Decoder(spec)
    init_weights(model, seed=0, std=0.1)
    model = (model if part is None else part.cut(model)).to("cuda", dtype)
    engine = Engine(model, GenerationConfig(max_running=32, graphs=graphs), stop_ids=[5], seed=1, max_length=128)
    rng = np.random.default_rng(0)
    params = [SamplingParams(40, 0.0), SamplingParams(40), SamplingParams(40, 0.7)]
    for group, length in enumerate((1, 16, 31, 70)):
        tokens = rng.integers(6, 5003, length).astype(np.int32)
        engine.submit(EngineRequest(10 * group + i, group, 0, tokens, p) for i, p in enumerate(params))
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.decode(max_tokens=150).finished
    return sorted(finished, key=lambda trajectory: trajectory.rollout)


def _rank(rank: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=2)
    group = dist.new_group([0, 1])
    torch.save([generate(Shard(rank, 2, group), *case) for case in CASES], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_gpus_draw_the_tokens_of_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for case, first, second in zip(CASES, *ranks, strict=True):
        for one, other, alone in zip(first, second, generate(None, *case), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist(), case
            assert one.logprobs.tobytes() == other.logprobs.tobytes(), case
            if case[1] == torch.float32:
                assert one.tokens.tolist() == alone.tokens.tolist(), case
                np.testing.assert_allclose(one.logprobs, alone.logprobs, atol=1e-4)
