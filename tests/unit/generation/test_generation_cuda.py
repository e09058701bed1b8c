"""The eager engine on a GPU against the same engine on the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights
from asystem.types import SamplingParams, Trajectory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SPEC = ModelSpec("qwen3", 301, 64, 96, 2, num_heads=8, num_kv_heads=2, head_dim=32, qk_norm=True)


def generate(model: Decoder, kv_tokens: int | None = None) -> dict[int, Trajectory]:
    config = GenerationConfig(max_running=32, kv_tokens=kv_tokens)
    engine = Engine(model, config, stop_ids=[5], seed=1, max_length=128)
    rng = np.random.default_rng(0)
    params = [SamplingParams(40, 0.0), SamplingParams(40), SamplingParams(40, 0.7, top_k=20, top_p=0.9)]
    for group, length in enumerate((1, 16, 31, 70)):
        tokens = rng.integers(6, 301, length).astype(np.int32)
        engine.submit(EngineRequest(10 * group + i, group, 0, tokens, p) for i, p in enumerate(params))
    finished = engine.decode(max_steps=7).finished
    engine.restore(engine.export())
    finished += engine.decode().finished
    assert engine.scheduler.pool.num_used == 0
    return {t.rollout: t for t in finished}


@pytest.mark.parametrize("kv_tokens", [None, 160])
def test_float32_draws_the_tokens_of_the_cpu(kv_tokens: int | None) -> None:
    model = Decoder(SPEC)
    init_weights(model, seed=0, std=0.1)
    want, got = generate(model), generate(copy.deepcopy(model).cuda(), kv_tokens)
    assert got.keys() == want.keys() and len(want) == 12
    for rollout, trajectory in want.items():
        assert got[rollout].tokens.tolist() == trajectory.tokens.tolist()
        np.testing.assert_allclose(got[rollout].logprobs, trajectory.logprobs, atol=1e-4)


def test_bfloat16_log_probabilities_agree_with_a_full_forward() -> None:
    model = Decoder(SPEC)
    init_weights(model, seed=0, std=0.05)
    model = model.to("cuda", torch.bfloat16)
    for rollout, trajectory in generate(model).items():
        if rollout % 10 == 2:  # truncated: another distribution than the model's own
            continue
        prompt, response = trajectory.prompt_tokens, trajectory.tokens
        tokens = torch.from_numpy(np.concatenate([prompt, response])).long().cuda()
        attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32, device="cuda"), len(tokens))
        with torch.no_grad():
            logits = model.logits(model(tokens, torch.arange(len(tokens), device="cuda"), attend)[len(prompt) - 1 : -1])
        want = logits.log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0].cpu().numpy()
        np.testing.assert_allclose(trajectory.logprobs, want, atol=2e-2)
