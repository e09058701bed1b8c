"""Prefills with context in the cache, on a GPU in bf16, against the CPU in float32."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.kv_cache import KVCache, PrefillAttention
from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights
from asystem.types import SamplingParams, Trajectory

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a CUDA device, 8.0 up"
)

SPEC = ModelSpec("qwen3", 301, 64, 96, 2, num_heads=8, num_kv_heads=2, head_dim=64, qk_norm=True)


@pytest.mark.parametrize("head", [64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 4])
def test_attention_with_context(head: int, group: int) -> None:
    contexts, lengths, kv_heads, size = [0, 5, 16, 700, 33, 2000], [9, 1, 17, 300, 64, 1], 2, 16
    generator = torch.Generator().manual_seed(head + group)
    num_blocks = [-(-(c + n) // size) for c, n in zip(contexts, lengths, strict=True)]
    order = torch.randperm(sum(num_blocks), generator=generator).tolist()
    blocks = [[order.pop() for _ in range(n)] for n in num_blocks]
    shape = (1, 2, sum(num_blocks), kv_heads, size, head)
    data = torch.randn(shape, generator=generator).bfloat16()
    q, k, v = (
        torch.randn(sum(lengths), heads, head, generator=generator).bfloat16()
        for heads in (group * kv_heads, kv_heads, kv_heads)
    )

    def attend(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cache = KVCache(1, sum(num_blocks), kv_heads, size, head, dtype, torch.device(device))
        cache.data.copy_(data)
        attention = PrefillAttention(cache, blocks, contexts, lengths)
        return attention(0, *(x.to(device, dtype) for x in (q, k, v))).float().cpu(), cache.data.float().cpu()

    (got, held), (want, expected) = attend("cuda", torch.bfloat16), attend("cpu", torch.float32)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert torch.equal(held, expected)


def generate(model: Decoder, params: list[SamplingParams], **config: int) -> dict[int, Trajectory]:
    engine = Engine(model, GenerationConfig(max_running=8, **config), stop_ids=[5], seed=1, max_length=400)
    rng, finished = np.random.default_rng(0), []
    base = rng.integers(6, 301, 300).astype(np.int32)
    for group, length in enumerate((1, 40, 300, 33, 170)):  # they share beginnings
        engine.submit(EngineRequest(10 * group + i, group, 0, base[:length], p) for i, p in enumerate(params))
        finished += engine.decode(max_steps=3).finished
    engine.restore(engine.export())
    finished += engine.decode().finished
    return {t.rollout: t for t in finished}


@pytest.mark.parametrize("prefill_tokens", [7, 64])
def test_chunks_draw_the_tokens_of_the_cpu(prefill_tokens: int) -> None:
    model = Decoder(SPEC)
    init_weights(model, seed=0, std=0.1)
    params = [SamplingParams(40, 0.0), SamplingParams(40)]
    want = generate(model, params)
    got = generate(copy.deepcopy(model).cuda(), params, prefill_tokens=prefill_tokens)
    assert got.keys() == want.keys() and len(want) == 10
    for rollout, trajectory in want.items():
        assert got[rollout].tokens.tolist() == trajectory.tokens.tolist()


def test_chunks_in_bfloat16_agree_with_a_full_forward() -> None:
    model = Decoder(SPEC)
    init_weights(model, seed=0, std=0.05)
    model = model.to("cuda", torch.bfloat16)
    for trajectory in generate(model, [SamplingParams(40)] * 2, prefill_tokens=64).values():
        prompt, response = trajectory.prompt_tokens, trajectory.tokens
        tokens = torch.from_numpy(np.concatenate([prompt, response])).long().cuda()
        attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32, device="cuda"), len(tokens))
        with torch.no_grad():
            logits = model.logits(model(tokens, torch.arange(len(tokens), device="cuda"), attend)[len(prompt) - 1 : -1])
        want = logits.log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0].cpu().numpy()
        np.testing.assert_allclose(trajectory.logprobs, want, atol=2e-2)
