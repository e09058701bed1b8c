"""Replicas whose model is cut over gloo ranks: the tokens are those of one rank."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from asystem.config import Config, GenerationConfig, RuntimeKind
from asystem.controller.run import spawn_groups
from asystem.generation import Engine, EngineRequest
from asystem.generation.runner import EagerRunner
from asystem.models import Decoder, ModelSpec, MoESpec, Shard, init_weights
from asystem.spmd import Runtime, make_runtime, replicas, store
from asystem.types import DecodeReport, FinishedRollout, RolloutRequest, SamplingParams, Trajectory

MOE = MoESpec(6, 2, 8, 8, (0,), score="sigmoid", groups=3, top_groups=2, has_bias=True)
SPECS = [
    ModelSpec("qwen3", 61, 24, 40, 2, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True),
    ModelSpec("bailing_moe_v2", 61, 24, 40, 2, 4, 2, 8, rotary_factor=0.5, qk_norm=True, moe=MOE),
]
TASK = """
def train(): return [{"prompt": "ab", "answer": "x"}, {"prompt": "cde", "answer": "y"}, {"prompt": "f", "answer": ""}]
def evaluation(): return [{"prompt": c, "answer": ""} for c in ("q", "rs", "tuv")]
def demonstrations(): return [{"prompt": "ab", "response": "xx"}]
def reward(row, response): return 0.0
"""


def generate(spec: ModelSpec, part: Shard | None) -> list[Trajectory]:
    """Groups of greedy, sampled and truncated rollouts, in a pool so small that some are preempted, cut into slices."""
    model = Decoder(spec)
    init_weights(model, 0, std=0.3)
    config = GenerationConfig(max_running=12, block_size=4, kv_tokens=96)
    engine = Engine(model if part is None else part.cut(model), config, stop_ids=[5], seed=1, max_length=40)
    assert part is None or type(engine.runner) is EagerRunner
    rng = np.random.default_rng(0)
    params = [SamplingParams(20, 0.0), SamplingParams(20), SamplingParams(20, 0.8, top_k=20, top_p=0.9)]
    for group, length in enumerate((1, 7, 12, 19)):
        tokens = rng.integers(6, 61, length).astype(np.int32)
        engine.submit(EngineRequest(10 * group + i, group, 0, tokens, p) for i, p in enumerate(params))
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.decode(max_tokens=17).finished
    return sorted(finished, key=lambda trajectory: trajectory.rollout)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save([generate(spec, Shard(rank, 2)) for spec in SPECS], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_draw_the_tokens_of_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for spec, first, second in zip(SPECS, *ranks, strict=True):
        assert len({t.finish for t in first}) == 2, "some end with the stop token, some at their limit"
        for one, other, alone in zip(first, second, generate(spec, None), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() == alone.tokens.tolist()
            assert one.logprobs.tobytes() == other.logprobs.tobytes(), "the ranks' sums differ"
            np.testing.assert_allclose(one.logprobs, alone.logprobs, atol=1e-5)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "task.py").write_text(TASK)
    config = Config(recipe_dir=str(tmp_path), device="cpu", steps=1)
    config.model.num_layers, config.model.hidden_size, config.model.intermediate_size = 1, 32, 64
    config.model.head_dim = 8
    config.data.task, config.data.max_prompt_tokens = "task.py", 8
    config.rollout.max_new_tokens, config.rollout.slice_steps = 6, 3
    config.training.warmup.steps, config.training.warmup.lr = 4, 1e-2
    return config


def rollouts(config: Config, folder: Path) -> dict[int, list[int]]:
    """Rollouts under the first weights, and under published ones; negative numbers are held-out prompts."""

    async def go(runtime: Runtime) -> list[FinishedRollout]:
        trainers, generators, _ = spawn_groups(config, runtime, folder)
        each = replicas(generators)
        assert len(each) == config.generation.ranks // config.generation.tensor_parallel
        finished = await generators.evaluate([0, 1, 2])
        assert [rollout.prompt for rollout in finished] == [0, 1, 2]
        for version in (1, 2):
            await trainers.warm_up(2)
            await generators.load_weights(await trainers.export_weights(), version)
            asks = [RolloutRequest(10 * version + i, 10 * version + i, i % 3) for i in range(6)]
            reports: list[DecodeReport] = []
            for index, replica in enumerate(each):
                reports.append(await replica.decode(asks[index :: len(each)], None))
                while reports[-1].unfinished:
                    reports.append(await replica.decode([], None))
            assert all(report.version == version for report in reports)
            finished += [rollout for report in reports for rollout in report.finished]
        return finished

    with make_runtime(config.runtime, config.placement) as runtime:
        finished = asyncio.run(go(runtime))
        trajectories = store.get_many([rollout.ref for rollout in finished])
    return {
        rollout.rollout: each[rollout.row].tokens.tolist() for rollout, each in zip(finished, trajectories, strict=True)
    }


def test_replicas_of_two_ranks_answer_as_one_process(cluster: None, config: Config, tmp_path: Path) -> None:
    config.runtime.kind = RuntimeKind.inline
    want = rollouts(config, tmp_path)
    assert len(want) == 15
    config.runtime.kind = RuntimeKind.ray
    config.generation.ranks, config.generation.tensor_parallel = 4, 2
    assert rollouts(config, tmp_path) == want
