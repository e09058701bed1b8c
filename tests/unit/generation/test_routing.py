"""Routing that rollouts bring along, against the choices of one forward over prompt and response."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from asystem.config import Config, GenerationConfig, ModelConfig, TrainingConfig
from asystem.errors import ConfigError
from asystem.generation import Engine, EngineRequest
from asystem.generation.memory import plan_memory
from asystem.models import Decoder, ModelSpec, MoESpec, PackedAttention, init_weights
from asystem.models.moe import Router, record_routing
from asystem.types import SamplingParams, Trajectory
from asystem.workers.build import check_model

VOCAB, STOP = 41, 3


def make_model(seed: int = 0) -> Decoder:
    moe = MoESpec(6, 2, 12, 12, (0,), score="sigmoid", groups=3, top_groups=2, has_bias=True)
    shape = {"rotary_factor": 0.5, "qk_norm": True, "moe": moe}
    model = Decoder(ModelSpec("bailing_moe_v2", VOCAB, 24, 40, 3, 4, 2, 8, **shape))  # type: ignore[arg-type]
    init_weights(model, seed, std=0.3)
    return model


MODEL = make_model()


def make_engine(model: Decoder = MODEL, **config: Any) -> Engine:
    options = {"max_running": 16, "block_size": 4, "return_routing": True} | config
    return Engine(model, GenerationConfig(**options), stop_ids=[STOP], seed=5, max_length=30)


def requests() -> list[EngineRequest]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, VOCAB, n).astype(np.int32) for n in (1, 4, 7, 13)]
    return [
        EngineRequest(100 * g + i, g, g, tokens, SamplingParams(12))
        for g, tokens in enumerate(prompts)
        for i in range(3)
    ]


def drain(engine: Engine, **budget: Any) -> list[Trajectory]:
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.decode(**budget).finished
    return finished


@torch.no_grad()
def expected(model: Decoder, t: Trajectory) -> npt.NDArray[np.int64]:
    tokens = torch.from_numpy(np.concatenate([t.prompt_tokens, t.tokens])).long()[:-1]
    with record_routing(module for module in model.modules() if isinstance(module, Router)) as chosen:
        model(tokens, torch.arange(len(tokens)), PackedAttention(torch.tensor([0, len(tokens)]).int(), len(tokens)))
    return torch.stack(chosen, 1).sort(-1).values.numpy()


def assert_routing(model: Decoder, t: Trajectory) -> None:
    assert t.routing is not None and t.routing.dtype == np.uint8
    assert np.sort(t.routing, -1).tolist() == expected(model, t).tolist(), f"rollout {t.rollout}"


@pytest.mark.parametrize(
    "config",
    [
        {},  # groups share their prompt's blocks, and each copies the last one
        {"kv_tokens": 32, "block_size": 2},  # preemption
        {"prefill_tokens": 5, "max_running": 5},  # prompts in chunks
    ],
)
def test_each_token_s_experts_are_those_of_a_full_forward(config: dict[str, Any]) -> None:
    engine = make_engine(**config)
    engine.submit(requests())
    finished = drain(engine, max_steps=5)
    assert len(finished) == 12 and len({t.routing.tobytes() for t in finished if t.routing is not None}) == 12
    for t in finished:
        assert_routing(MODEL, t)


def test_exported_rollouts_bring_the_choices_of_the_second_engine() -> None:
    first, second = make_engine(), make_engine(block_size=8)
    first.submit(requests())
    finished = first.decode(max_steps=4).finished
    second.restore(first.export())
    finished += drain(second)
    assert len(finished) == 12
    for t in finished:
        assert_routing(MODEL, t)


def test_kept_keys_and_values_keep_their_choices_under_new_weights() -> None:
    model, other = make_model(), make_model(seed=1)
    engine = make_engine(copy.deepcopy(model))
    (request,) = requests()[9:10]
    engine.submit([request])
    early = engine.decode(max_steps=4)
    assert not early.finished
    engine.model.load_state_dict(other.state_dict())
    engine.weights_updated(1)
    (t,) = drain(engine)
    old = len(t.prompt_tokens) + int((t.versions == 0).sum()) - 1  # the newest token was not computed yet
    assert t.routing is not None and len(t.routing) == len(t.prompt_tokens) + len(t.tokens) - 1 > old
    assert np.sort(t.routing[:old], -1).tolist() == expected(model, t)[:old].tolist()
    assert np.sort(t.routing, -1).tolist() != expected(model, t).tolist()


def test_nothing_is_kept_unless_asked_for() -> None:
    engine = make_engine(return_routing=False)
    engine.submit(requests())
    assert all(t.routing is None for t in drain(engine))
    assert engine.routing is None


def test_the_plan_counts_it() -> None:
    plans = [
        plan_memory(MODEL.spec, GenerationConfig(max_running=2, block_size=4, return_routing=on), max_length=8,
                    dtype=torch.float32, device="cpu")
        for on in (False, True)
    ]  # fmt: skip
    assert plans[1].kv - plans[0].kv == 16 * 2 * 2  # tokens, layers with experts, choices


def test_a_dense_model_has_none_to_return() -> None:
    config = Config(model=ModelConfig(), generation=GenerationConfig(return_routing=True))
    with pytest.raises(ConfigError, match="return_routing=true needs a model with experts; qwen3 has none"):
        check_model(config)
    config.algorithm.routing_replay = True
    with pytest.raises(ConfigError, match="routing_replay=true needs a model with experts; qwen3 has none"):
        check_model(config)
    with pytest.raises(ConfigError, match=r"training\.balance_coefficient=0\.01 needs a model with experts"):
        check_model(Config(training=TrainingConfig(balance_coefficient=0.01)))
    with pytest.raises(ConfigError, match=r"expert_bias_rate=0\.1 needs experts with biases"):
        check_model(Config(training=TrainingConfig(expert_bias_rate=0.1)))
