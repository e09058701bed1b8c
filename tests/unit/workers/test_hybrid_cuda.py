"""A hybrid worker on a GPU whose phases sleep: what one does that does not, in less memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from asystem.config import Config, PlacementKind, Sleep
from asystem.data.batch import Batch, BatchRow
from asystem.memory import can_map
from asystem.spmd import store
from asystem.types import FinishedRollout, RolloutRequest
from asystem.workers import HybridWorker

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a CUDA device, 8.0 up"
)

TASK = """
def train(): return [{"prompt": "ab" * 8, "answer": "x"}, {"prompt": "cde" * 5, "answer": "y"}]
def evaluation(): return []
def reward(row, response): return 0.5
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "task.py").write_text(TASK)
    config = Config(recipe_dir=str(tmp_path), device="cuda", steps=8)
    model = config.model
    model.num_layers, model.hidden_size, model.intermediate_size, model.head_dim = 2, 256, 512, 64
    config.data.task, config.data.max_prompt_tokens = "task.py", 32
    config.rollout.max_new_tokens, config.rollout.slice_steps = 16, 5
    config.generation.kv_tokens, config.generation.max_running = 4096, 16
    config.training.lr, config.tracking.rollouts = 1e-3, False
    config.placement.kind = PlacementKind.hybrid
    return config


def two_steps(config: Config, folder: Path, sleep: Sleep) -> tuple[HybridWorker, list[list[list[int]]], list[float]]:
    """Two batches, an unfinished rollout in flight over the first update; tokens and mismatch of each."""
    config.placement.sleep = sleep
    worker, loop = HybridWorker(config, folder), asyncio.new_event_loop()
    loop.run_until_complete(worker.setup())
    tokens, gaps = [], []
    for step in range(2):
        requests = [RolloutRequest(8 * step + i, step, i % 2) for i in range(8)]
        finished: list[FinishedRollout] = []
        while len(finished) < 7:
            finished += loop.run_until_complete(worker.decode(requests, None)).finished
            requests = []
        finished.sort(key=lambda f: f.rollout)
        rows = [
            BatchRow(
                f.ref, f.row, f.rollout, f.group, f.prompt, f.prompt_length, f.length, 1.0, (-1.0) ** f.rollout, None
            )
            for f in finished
        ]
        stats = loop.run_until_complete(worker.update(Batch(rows, step, sum(r.length for r in rows), len(rows))))
        loop.run_until_complete(worker.load_weights(loop.run_until_complete(worker.export_weights()), step + 1))
        tokens.append([store.get(f.ref)[f.row].tokens.tolist() for f in finished])
        gaps.append(stats.to_dict()["mismatch/logprob_diff_mean"])
    return worker, tokens, gaps


@pytest.mark.parametrize("lora", [0, 8])
def test_asleep_and_awake_sample_and_learn_alike(config: Config, tmp_path: Path, lora: int) -> None:
    config.training.lora.rank = lora
    _, want, gaps = two_steps(config, tmp_path, Sleep.never)
    worker, got, gaps_asleep = two_steps(config, tmp_path, Sleep.always)
    assert got[0] == want[0], "the first batch, before any training"
    assert gaps_asleep == pytest.approx(gaps, abs=0.02) and max(gaps_asleep) < 0.05
    memory = worker.memory
    assert memory is not None and memory.held()["states"] == 0 and memory.held()["kv"] > 0, "generation is under way"
    before = torch.cuda.mem_get_info()[0]
    worker.begin_training()
    assert memory.held()["kv"] == 0 and memory.held()["states"] > 0
    torch.cuda.empty_cache()
    if can_map():
        pool = worker.engine.cache.num_bytes
        assert torch.cuda.mem_get_info()[0] >= before + pool - memory.held()["states"] - (64 << 20)
