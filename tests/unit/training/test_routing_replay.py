"""Training with the experts that generation chose: log-probabilities, choices, gradients and what is counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import VOCAB, weights

from asystem.config import GenerationConfig, Recompute, TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack, pack_one
from asystem.errors import DataError
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder, ModelSpec, MoESpec, Router, init_weights
from asystem.models.moe import record_routing
from asystem.training import TrainEngine, supervised_loss
from asystem.training.policy import Policy
from asystem.types import SamplingParams, Trajectory

SHAPES = {
    "softmax": ("qwen3_moe", MoESpec(6, 2, 8, dense_layers=(1,))),
    "sigmoid": (
        "bailing_moe_v2",
        MoESpec(6, 2, 8, 8, (0,), score="sigmoid", groups=3, top_groups=2, has_bias=True, scaling=2.0),
    ),
}


def make_model(kind: str) -> Decoder:
    family, moe = SHAPES[kind]
    model = Decoder(ModelSpec(family, VOCAB, 16, 24, 3, 4, 2, 4, qk_norm=True, moe=moe))
    init_weights(model, 0, std=0.3)
    return model


def rollouts(model: Decoder) -> list[Trajectory]:
    engine = Engine(model, GenerationConfig(max_running=4, return_routing=True), stop_ids=[], seed=3, max_length=40)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (1, 6, 3, 4)]
    engine.submit(EngineRequest(i, i, 0, tokens, SamplingParams(5 + 4 * i)) for i, tokens in enumerate(prompts))
    return sorted(engine.decode().finished, key=lambda t: t.rollout)


def samples(found: list[Trajectory], *, replayed: bool) -> list[Sample]:
    weight = 1 / sum(len(t.tokens) for t in found)
    return [
        Sample(t.prompt_tokens, t.tokens, weight, rollout=t.rollout, routing=t.routing if replayed else None)
        for t in found
    ]


def make_engine(model: Decoder, **config: Any) -> TrainEngine:
    return TrainEngine(model, TrainingConfig(lr=1e-2, eps=1e-4, **config), device="cpu", total_steps=9)


def routers(model: Decoder) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def disturbed(model: Decoder) -> Decoder:
    """The same model, whose routers would choose other experts: biases choose, and do not weigh."""
    other = copy.deepcopy(model)
    for router in routers(other):
        bias = torch.linspace(-0.5, 0.5, router.moe.num_experts)
        router.bias = torch.nn.Parameter(bias if router.bias is None else router.bias.detach() + bias)
    return other


@pytest.mark.parametrize("kind", SHAPES)
def test_replayed_log_probabilities_are_generation_s(kind: str) -> None:
    model = make_model(kind)
    found = rollouts(model)
    engine = make_engine(disturbed(model))
    want = np.concatenate([t.logprobs for t in found])
    gaps = {}
    for replayed in (True, False):
        (packed,) = pack(samples(found, replayed=replayed), 200)
        order = np.concatenate([found[i].logprobs for i in packed.rollouts])
        assert sorted(order) == sorted(want)
        gaps[replayed] = np.abs(engine.logprobs([packed])[0][packed.mask].numpy() - order).max()
    assert gaps[True] < 1e-4 and gaps[False] > 1e-2


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("recompute", Recompute)
def test_an_update_is_that_of_a_model_whose_own_choice_it_was(kind: str, recompute: Recompute) -> None:
    model = make_model(kind)
    found = rollouts(model)
    other, same = make_engine(disturbed(model), recompute=recompute), make_engine(model)
    before = weights(model)
    batch = [pack_one(part) for part in (samples(found, replayed=True)[:1], samples(found, replayed=True)[1:])]
    plain = [replace(packed, routing=None) for packed in batch]
    one, two = other.step(batch, supervised_loss).to_dict(), same.step(plain, supervised_loss).to_dict()
    assert one["train/loss"] == pytest.approx(two["train/loss"], abs=1e-6)
    for name, value in weights(same.model).items():
        if not name.endswith("router.bias"):
            torch.testing.assert_close(weights(other.model)[name], value, atol=1e-5, rtol=0, msg=name)
        if name.endswith("router.weight"):
            assert not torch.equal(value, before[name]), name
    assert "routing/replaced_fraction" not in two
    assert one["routing/replaced_fraction"] == pytest.approx(_replaced(disturbed(make_model(kind)), batch), abs=1e-6)


@torch.no_grad()
def _replaced(model: Decoder, batch: list[PackedBatch]) -> float:
    """By hand: choices given that are not among the router's own, computed from the input that it had."""
    inputs: dict[Router, torch.Tensor] = {}

    def keep(router: Router, args: tuple[torch.Tensor, ...]) -> None:
        inputs.setdefault(router, args[0])

    for router in routers(model):
        router.register_forward_pre_hook(keep)
    changed = total = 0
    for packed in batch:
        inputs.clear()
        Policy(model)(packed)
        assert packed.routing is not None
        for layer, (router, x) in enumerate(list(inputs.items())):
            own = router(x)[1].tolist()
            for mine, given in zip(own, packed.routing[:, layer].tolist(), strict=True):
                if given[0] >= 0:
                    changed += len(set(given) - set(mine))
                    total += len(given)
    assert 0 < changed < total
    return changed / total


@pytest.mark.parametrize("kind", SHAPES)
def test_experts_are_exactly_those_given(kind: str) -> None:
    model = make_model(kind)
    found = rollouts(model)
    engine = make_engine(disturbed(model))
    packed = pack_one([*samples(found[:2], replayed=True), *samples(found[2:3], replayed=False)])
    assert packed.routing is not None and packed.routing.dtype is torch.int16
    ends = packed.cu_seqlens.tolist()
    chosen = _chosen(engine, packed)
    for t, start, end in zip(found[:2], ends, ends[1:], strict=False):
        assert np.array_equal(chosen[start : end - 1], t.routing)  # in their order, but for the last token
    # A last token, and a sequence that brings none, have the model's own.
    own = _chosen(engine, replace(packed, routing=None))
    assert packed.routing[ends[1] - 1].tolist() == packed.routing[ends[2]].tolist() == [[-1, -1]] * 2
    alone = _chosen(engine, pack_one(samples(found[2:3], replayed=False)))
    assert np.array_equal(chosen[ends[2] :], own[ends[2] :]) and np.array_equal(chosen[ends[2] :], alone)


def _chosen(engine: TrainEngine, packed: PackedBatch) -> np.ndarray[Any, Any]:
    with record_routing(routers(engine.model)) as chosen:
        engine.logprobs([packed])
    return torch.stack(chosen, 1).numpy()


def test_a_reference_chooses_its_own_experts() -> None:
    model = make_model("sigmoid")
    found = rollouts(model)
    engine = make_engine(disturbed(model))
    engine.keep_reference()
    (packed,) = pack(samples(found, replayed=True), 200)
    own = engine.logprobs([replace(packed, routing=None)])[0]
    torch.testing.assert_close(engine.logprobs([packed], reference=True)[0], own, atol=1e-6, rtol=0)
    assert (engine.logprobs([packed])[0] - own).abs().max() > 1e-2


def test_experts_of_a_wrong_number_of_tokens_are_named() -> None:
    (sample,) = samples(rollouts(make_model("softmax"))[:1], replayed=True)
    assert sample.routing is not None
    with pytest.raises(DataError, match="rollout 0: experts of 4 tokens, not of 5"):
        pack([replace(sample, routing=sample.routing[1:])], 99)
