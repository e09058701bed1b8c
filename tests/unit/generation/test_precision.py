"""Engines with 8-bit weights and with an exact head, in plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.runner import EagerRunner, head_logits
from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights, quantize
from asystem.types import SamplingParams

SPEC = ModelSpec("qwen3", 41, 24, 40, 2, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True)


def random_model(dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(SPEC)
    init_weights(model, 0, std=0.3)
    return model.to(dtype)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_an_engine_decodes_with_8_bit_weights(kind: torch.dtype) -> None:
    model = quantize(random_model(), kind)
    engine = Engine(model, GenerationConfig(max_running=8, block_size=4), stop_ids=[3], seed=1, max_length=30)
    assert type(engine.runner) is EagerRunner and engine.cache.data.dtype is torch.float32
    assert engine.plan()["weights"] < 0.8 * sum(p.nbytes for p in random_model().parameters())
    prompt = np.array([4, 9, 17], np.int32)
    engine.submit(EngineRequest(i, 0, 0, prompt, SamplingParams(20, float(i))) for i in range(3))
    for t in engine.decode().finished:
        tokens = torch.from_numpy(np.concatenate([prompt, t.tokens])).long()
        attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
        with torch.no_grad():
            logits = model.logits(model(tokens, torch.arange(len(tokens)), attend)[2:-1]) / max(t.rollout, 1)
        want = logits.log_softmax(-1).gather(-1, tokens[3:, None])[:, 0]
        np.testing.assert_allclose(t.logprobs, want, atol=1e-5)
        if t.rollout == 0:
            assert tokens[3:].tolist() == logits.argmax(-1).tolist()


def test_an_exact_head_rounds_no_logits() -> None:
    model, hidden = random_model(torch.bfloat16), torch.randn(6, 24).bfloat16()
    want = hidden.double() @ model.head_weight().double().T
    exact, rounded = head_logits(model, hidden, True), head_logits(model, hidden, False)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (exact.double() - want).abs().max() < 1e-5 < 1e-3 < (rounded.double() - want).abs().max()


def test_the_engine_takes_log_probabilities_from_the_exact_head() -> None:
    model = random_model(torch.bfloat16)
    logprobs = []
    for head in ("auto", "float32"):
        config = GenerationConfig(max_running=8, block_size=4, head_dtype=head)
        engine = Engine(model, config, stop_ids=[], seed=1, max_length=30)
        hidden: list[torch.Tensor] = []
        norm = model.norm.register_forward_hook(lambda _, __, out, hidden=hidden: hidden.append(out))
        engine.submit([EngineRequest(0, 0, 0, np.array([4, 9, 17], np.int32), SamplingParams(4))])
        (t,) = engine.decode().finished
        norm.remove()
        states = torch.stack([h[-1] for h in hidden])
        exact = linear(states.float(), model.head_weight().float()).log_softmax(-1)
        want = exact.detach().gather(-1, torch.from_numpy(t.tokens).long()[:, None])[:, 0]
        logprobs.append(float((torch.from_numpy(t.logprobs) - want).abs().max()))
    assert logprobs[1] < 1e-5 < 1e-3 < logprobs[0]
