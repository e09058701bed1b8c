"""Greedy outputs against transformers' `generate`. Alone in its file: importing transformers takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder, ModelSpec, MoESpec, init_weights, save_model
from asystem.types import Finish, SamplingParams

transformers = pytest.importorskip("transformers")

VOCAB, STOP = 53, 5


@pytest.mark.parametrize(
    ("kv_tokens", "graphs", "experts"), [(None, True, 0), (80, True, 0), (80, False, 0), (80, True, 6)]
)
def test_greedy_equals_generate(tmp_path: Path, kv_tokens: int | None, graphs: bool, experts: int) -> None:
    family, moe = ("qwen3_moe", MoESpec(experts, 2, 24)) if experts else ("qwen3", None)
    spec = ModelSpec(family, VOCAB, 32, 48, 3, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, moe=moe)
    model = Decoder(spec)
    init_weights(model, seed=2, std=0.3)
    save_model(model, spec, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(6, VOCAB, n).astype(np.int32) for n in (1, 3, 7, 16, 17, 33)]
    engine = Engine(
        model,
        GenerationConfig(max_running=10, kv_tokens=kv_tokens, graphs=graphs),
        stop_ids=[STOP],
        seed=0,
        max_length=64,
    )
    engine.submit(
        EngineRequest(3 * group + i, group, group, tokens, SamplingParams(30, temperature=0.0))
        for group, tokens in enumerate(prompts)
        for i in range(3)
    )
    finished = engine.decode().finished
    assert len(finished) == 18
    for group, tokens in enumerate(prompts):
        prompt = torch.from_numpy(tokens).long()[None]
        want = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False,
            eos_token_id=STOP, pad_token_id=0,
        )  # fmt: skip
        samples = [t.tokens.tolist() for t in finished if t.group == group]
        assert samples == [want[0, prompt.shape[1] :].tolist()] * 3
    assert {t.finish for t in finished} == {Finish.STOP, Finish.LENGTH}
