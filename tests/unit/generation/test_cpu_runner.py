"""The compiled decode step against the one in plain PyTorch: equal tokens, equal log-probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.cpu import CpuRunner, is_supported
from asystem.generation.kernels import cpu
from asystem.generation.runner import EagerRunner
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.types import SamplingParams, Trajectory

if not cpu.is_available():
    pytest.skip("no C compiler here", allow_module_level=True)

VOCAB, STOP = 61, 7
SHAPES = {
    "grouped, QK norm": ModelSpec("qwen3", VOCAB, 24, 40, 2, 4, 2, 32, qk_norm=True, tie_embeddings=True),
    "biases, 7 queries a head": ModelSpec("qwen2", VOCAB, 16, 20, 2, 7, 1, 10, qkv_bias=True),
    "one query a head": ModelSpec("llama", VOCAB, 16, 24, 1, 3, 3, 64),
    "head of 80": ModelSpec("llama", VOCAB, 16, 24, 1, 2, 1, 80, rope_theta=500.0),
    "head of 128": ModelSpec("qwen3", VOCAB, 16, 24, 1, 4, 1, 128, qk_norm=True),
}


def _model(spec: ModelSpec, seed: int = 3) -> Decoder:
    model = Decoder(spec)
    init_weights(model, seed, std=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def _engine(model: Decoder, *, graphs: bool, kv_tokens: int | None = None) -> Engine:
    config = GenerationConfig(max_running=6, block_size=4, graphs=graphs, kv_tokens=kv_tokens)
    engine = Engine(model, config, stop_ids=[STOP], seed=5, max_length=48)
    assert type(engine.runner) is (CpuRunner if graphs else EagerRunner)
    return engine


def _requests(temperature: float, top_k: int = 0) -> list[EngineRequest]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, VOCAB, n).astype(np.int32) for n in (1, 4, 7, 13)]
    return [
        EngineRequest(2 * group + i, group, group, tokens, SamplingParams(30, temperature, top_k=top_k))
        for group, tokens in enumerate(prompts)
        for i in range(2)
    ]


def _assert_equal(found: list[Trajectory], wanted: list[Trajectory]) -> None:
    assert len(found) == len(wanted) == 8
    pairs = zip(*(sorted(trajectories, key=lambda t: t.rollout) for trajectories in (found, wanted)), strict=True)
    for ours, theirs in pairs:
        assert (ours.tokens.tolist(), ours.finish) == (theirs.tokens.tolist(), theirs.finish)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
        assert ours.versions.tolist() == theirs.versions.tolist()


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_are_those_of_plain_pytorch(spec: ModelSpec, temperature: float) -> None:
    model, trajectories = _model(spec), []
    for graphs in (True, False):
        engine = _engine(model, graphs=graphs)
        engine.submit(_requests(temperature))
        trajectories.append(engine.decode().finished)
    _assert_equal(*trajectories)


def test_preemption_and_truncation_change_nothing() -> None:
    model, trajectories = _model(SHAPES["grouped, QK norm"]), []
    for graphs, kv_tokens in ((True, 60), (False, None)):
        engine = _engine(model, graphs=graphs, kv_tokens=kv_tokens)
        requests = _requests(1.0)
        engine.submit(requests[:4])
        engine.submit(r for r in _requests(1.0, top_k=9)[4:])  # these take the eager step while they run
        trajectories.append(engine.decode().finished)
    _assert_equal(*trajectories)


def test_weights_that_changed_or_moved_are_used() -> None:
    model, other = _model(SHAPES["grouped, QK norm"]), _model(SHAPES["grouped, QK norm"], seed=4)
    trajectories = []
    for graphs in (True, False):
        model.load_state_dict(_model(SHAPES["grouped, QK norm"]).state_dict())
        engine = _engine(model, graphs=graphs)
        engine.submit(_requests(1.0))
        first = engine.decode(max_steps=3).finished
        with torch.no_grad():
            for mine, new in zip(model.parameters(), other.parameters(), strict=True):
                mine.data = new.detach().clone()
        engine.weights_updated(1)
        trajectories.append(first + engine.decode().finished)
    _assert_equal(*trajectories)
    assert {version for t in trajectories[0] for version in t.versions.tolist()} == {0, 1}


def test_a_diverged_model_draws_tokens_within_the_vocabulary() -> None:
    model = _model(SHAPES["grouped, QK norm"])
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    engine = _engine(model, graphs=True)
    engine.submit(_requests(1.0))
    finished = engine.decode().finished
    assert len(finished) == 8
    assert all(t.tokens.min() >= 0 and t.tokens.max() < VOCAB and np.isnan(t.logprobs).all() for t in finished)


def test_other_models_decode_in_plain_pytorch() -> None:
    model = _model(SHAPES["one query a head"])
    assert is_supported(model, torch.float32, torch.device("cpu"))
    assert not is_supported(model, torch.bfloat16, torch.device("cpu"))
    model.layers[0].mlp.down_proj = torch.nn.Identity()  # type: ignore[union-attr, assignment]
    assert not is_supported(model, torch.float32, torch.device("cpu"))


def test_without_a_compiler_decoding_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    for function in (cpu.is_available, cpu._library):
        function.cache_clear()
    try:
        assert not is_supported(_model(SHAPES["one query a head"]), torch.float32, torch.device("cpu"))
        monkeypatch.setenv("CC", "cc")
        for function in (cpu.is_available, cpu._library):
            function.cache_clear()
        assert cpu.is_available()
        assert [path.suffix for path in (tmp_path / "asystem").iterdir()] == [".so"]
    finally:
        for function in (cpu.is_available, cpu._library):
            function.cache_clear()
