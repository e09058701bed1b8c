"""Captured decode steps against the eager engine and a fresh full forward, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.captured import CapturedRunner
from asystem.generation.crowds import find_crowds
from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights
from asystem.types import Finish, SamplingParams, Trajectory

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a CUDA device, 8.0 up"
)

GREEDY, SAMPLED = SamplingParams(60, 0.0), SamplingParams(60)
TRUNCATED = SamplingParams(60, 0.8, top_k=20, top_p=0.9)


def model(dtype: torch.dtype = torch.float32, head: int = 32, std: float = 0.1) -> Decoder:
    spec = ModelSpec("qwen3", 5003, 96, 160, 3, num_heads=8, num_kv_heads=2, head_dim=head, qk_norm=True)
    decoder = Decoder(spec)
    init_weights(decoder, seed=0, std=std)
    return decoder.to("cuda", dtype)


def generate(
    decoder: Decoder, params: list[SamplingParams], samples: int, slice_: dict[str, Any] | None = None, **config: Any
) -> dict[int, Trajectory]:
    """Groups of `samples` on prompts of several lengths, decoded in slices."""
    options: dict[str, Any] = {"max_running": 64} | config
    engine = Engine(decoder, GenerationConfig(**options), stop_ids=[5, 9], seed=1, max_length=200)
    rng = np.random.default_rng(0)
    for group, length in enumerate((1, 16, 33, 130)):
        tokens = rng.integers(10, 5003, length).astype(np.int32)
        engine.submit(EngineRequest(100 * group + i, group, 0, tokens, params[i % len(params)]) for i in range(samples))
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.decode(**(slice_ or {})).finished
    assert engine.scheduler.pool.num_used == 0
    return {t.rollout: t for t in finished}


def assert_same(got: dict[int, Trajectory], want: dict[int, Trajectory]) -> None:
    assert got.keys() == want.keys()
    for rollout, t in want.items():
        assert got[rollout].tokens.tolist() == t.tokens.tolist(), f"rollout {rollout}"
        np.testing.assert_allclose(got[rollout].logprobs, t.logprobs, atol=1e-4)
        assert got[rollout].finish == t.finish


@needs_gpu
@pytest.mark.parametrize("samples", [1, 3, 11])
@pytest.mark.parametrize("params", [[GREEDY], [SAMPLED, GREEDY], [GREEDY, SAMPLED, TRUNCATED]])
def test_graphs_draw_what_the_eager_engine_draws(params: list[SamplingParams], samples: int) -> None:
    decoder = model()
    want = generate(decoder, params, samples, graphs=False)
    assert {t.finish for t in want.values()} >= {Finish.LENGTH}
    assert_same(generate(decoder, params, samples), want)
    assert_same(generate(decoder, params, samples, {"max_tokens": 37}, block_size=32), want)


@needs_gpu
def test_a_small_pool_preempts_and_loses_nothing() -> None:
    decoder = model(head=64)
    want = generate(decoder, [GREEDY], 8)
    assert_same(generate(decoder, [GREEDY], 8, kv_tokens=400), want)


@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_log_probabilities_agree_with_a_full_forward(dtype: torch.dtype, tolerance: float) -> None:
    decoder = model(dtype, head=64, std=0.05)
    for t in generate(decoder, [SAMPLED], 8).values():
        tokens = torch.from_numpy(np.concatenate([t.prompt_tokens, t.tokens])).long().cuda()
        attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32, device="cuda"), len(tokens))
        with torch.no_grad():
            hidden = decoder(tokens, torch.arange(len(tokens), device="cuda"), attend)
            logprobs = decoder.logits(hidden[len(t.prompt_tokens) - 1 : -1]).log_softmax(-1)
        want = logprobs.gather(-1, tokens[len(t.prompt_tokens) :, None])[:, 0].cpu().numpy()
        np.testing.assert_allclose(t.logprobs, want, atol=tolerance)


@needs_gpu
def test_graphs_follow_weights() -> None:
    """Changed in place: the same graphs. Moved to other memory: captured anew."""
    decoder = model()
    engine = Engine(decoder, GenerationConfig(max_running=4), stop_ids=[], seed=1, max_length=100)
    runner = engine.runner
    assert isinstance(runner, CapturedRunner)
    prompt = np.arange(10, 30, dtype=np.int32)
    drawn = []
    for version, (moved, factor) in enumerate(((False, 1.0), (False, 1.5), (True, 0.5))):
        if moved:
            decoder.to("cpu").to("cuda")
        with torch.no_grad():
            decoder.norm.weight.mul_(factor)
        engine.weights_updated(version)
        engine.submit([EngineRequest(version, version, 0, prompt, GREEDY)])
        (trajectory,) = engine.decode().finished
        fresh = Engine(decoder, GenerationConfig(max_running=4, graphs=False), stop_ids=[], seed=1, max_length=100)
        fresh.submit([EngineRequest(version, version, 0, prompt, GREEDY)])
        (want,) = fresh.decode().finished
        np.testing.assert_allclose(trajectory.logprobs, want.logprobs, atol=1e-4)
        drawn.append(trajectory.logprobs)
    assert not np.allclose(drawn[0], drawn[1], atol=1e-2)
    assert not np.allclose(drawn[1], drawn[2], atol=1e-2)


def test_crowds_are_rows_with_the_same_leading_blocks() -> None:
    table = np.array([[1, 2, 3, 0], [1, 2, 9, 0], [4, 5, 0, 0], [1, 2, 7, 8], [6, 0, 0, 0], [4, 5, 0, 0]])
    position = np.array([40, 33, 20, 50, 3, 31])
    # Rows 2 and 5 share block 4; block 5 is still written by row 2. Zeros beyond a sequence's end are not shared.
    assert find_crowds(table, position, 16) == [([0, 1, 3], 32), ([2, 5], 16)]


def test_a_large_group_makes_several_crowds() -> None:
    table = np.concatenate([np.ones((17, 1), np.int64), np.arange(17)[:, None] + 2], axis=1)
    found = find_crowds(table, np.full(17, 20), 16)
    assert [(len(rows), shared) for rows, shared in found] == [(8, 16), (8, 16)]


def test_groups_behind_one_system_prompt_read_their_own_prompts_together() -> None:
    """Block 1 is everybody's; then come the prompts of three groups, whose rows stand in any order."""
    groups = np.array([2, 0, 1, 0, 2, 1, 0, 2, 3])
    table = np.concatenate([np.ones((9, 1), np.int64), groups[:, None] + 5, np.arange(9)[:, None] + 20], axis=1)
    found = find_crowds(table, np.full(9, 40), 16)
    assert found == [([1, 3, 6], 32), ([2, 5], 32), ([0, 4, 7], 32)]  # group 3 has one row, which reads alone
    assert find_crowds(table[[0, 1, 2, 8]], np.full(4, 40), 16) == [([0, 1, 2, 3], 16)]
