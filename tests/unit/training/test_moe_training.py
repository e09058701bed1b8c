"""Training through a mixture of experts, and its weights on their way to generation, checkpoints and folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import VOCAB, make_samples, weights

from asystem.algorithms import choose, policy_loss
from asystem.config import AlgorithmConfig, GenerationConfig, Recompute, TrainingConfig
from asystem.data.packing import PackedBatch, pack_one
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder, ModelSpec, MoESpec, Router, init_weights
from asystem.models.moe import record_routing
from asystem.state import Inbox, Outbox
from asystem.stats import Stats
from asystem.training import TrainEngine, supervised_loss
from asystem.training.optimizer import MasterOptimizer
from asystem.types import SamplingParams

LING = MoESpec(6, 2, 8, 8, (0,), score="sigmoid", groups=3, top_groups=2, has_bias=True, scaling=2.0)


def make_model(seed: int = 0) -> Decoder:
    model = Decoder(ModelSpec("bailing_moe_v2", VOCAB, 16, 24, 2, 4, 2, 4, rotary_factor=0.5, qk_norm=True, moe=LING))
    init_weights(model, seed, std=0.2)
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.router.bias").copy_(torch.linspace(-0.1, 0.1, 6))
    return model


def make_engine(recompute: Recompute = Recompute.none, rate: float = 0.0, **options: Any) -> TrainEngine:
    cfg = TrainingConfig(lr=1e-2, eps=1e-4, recompute=recompute, expert_bias_rate=rate)
    return TrainEngine(make_model(), cfg, device="cpu", total_steps=100, **options)


def rl_loss(packed: PackedBatch, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, Stats]:
    return policy_loss(
        logprobs, infer_logprobs=packed.infer_logprobs, advantages=packed.advantages,
        token_weights=packed.token_weights, rows=packed.label_rows, sequence=packed.sequence,
        algorithm=choose(AlgorithmConfig(icepop_alpha=0.01, icepop_beta=100.0), "."), entropy=entropy,
    )  # fmt: skip


@pytest.mark.parametrize("loss_fn", [supervised_loss, rl_loss])
def test_a_step_changes_everything_but_the_bias(loss_fn: object) -> None:
    engine = make_engine()
    before = weights(engine.model)
    stats = engine.step([pack_one(make_samples([9, 7, 8]))], loss_fn).to_dict()  # type: ignore[arg-type]
    assert stats["train/skipped"] == 0 and stats["train/grad_norm"] > 0
    same = {name for name, value in weights(engine.model).items() if torch.equal(value, before[name])}
    assert same == {"layers.1.mlp.router.bias"}
    changed = weights(engine.model)["layers.1.mlp.experts.down"] != before["layers.1.mlp.experts.down"]
    assert changed.flatten(1).any(1).all()  # each expert


def test_computing_again_changes_no_bit() -> None:
    engines = [make_engine(recompute) for recompute in Recompute]
    batch = [pack_one(make_samples([4, 6]))]
    for _ in range(2):
        assert len({str(engine.step(batch, supervised_loss).to_dict()) for engine in engines}) == 1


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_move_towards_equal_load(recompute: Recompute, dtype: torch.dtype) -> None:
    engine, samples = make_engine(recompute, 0.125, dtype=dtype), make_samples([9, 7, 8, 5])
    bias = engine.model.get_parameter("layers.1.mlp.router.bias")
    for _ in range(2):
        before, routers = bias.detach().clone(), [m for m in engine.model.modules() if isinstance(m, Router)]
        with record_routing(routers) as chosen:
            engine.logprobs([pack_one(samples)])
        load = torch.bincount(chosen[0].flatten(), minlength=6).double()
        engine.step([pack_one(samples[:2]), pack_one(samples[2:])], supervised_loss)
        assert load.std() > 1
        torch.testing.assert_close(bias - before, (0.125 * (load.mean() - load).sign()).to(dtype), atol=5e-3, rtol=0)


class _ConstantInBias(torch.autograd.Function):
    """As compiled blocks: the backward pass knows of the bias, and gives it no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def test_a_parameter_that_is_given_no_gradient_stays() -> None:
    params = {name: torch.nn.Parameter(torch.ones(3)) for name in ("x", "bias")}
    optimizer = MasterOptimizer(params, {}, TrainingConfig())
    _ConstantInBias.apply(params["x"], params["bias"]).sum().backward()
    assert optimizer.step(0.5, 0.0) == pytest.approx(3**0.5)
    assert (params["x"] < 1).all() and (params["bias"] == 1).all()


def test_a_skipped_step_leaves_biases_where_they_are() -> None:
    engine = make_engine(rate=0.1)
    before = weights(engine.model)
    engine.step([pack_one(make_samples([9]))], lambda *args: (supervised_loss(*args)[0] * torch.nan, Stats()))
    for name, value in weights(engine.model).items():
        assert torch.equal(value, before[name]), name


def test_published_weights_and_checkpoints_arrive_whole(tmp_path: Path) -> None:
    engine = make_engine()
    engine.step([pack_one(make_samples([9, 7, 8]))], supervised_loss)
    receiver = make_model(seed=5)
    generation = Engine(receiver, GenerationConfig(max_running=4), stop_ids=[], seed=0, max_length=20)
    Inbox(receiver).read([Outbox(engine.model).write()])
    generation.weights_updated(1)
    resumed = TrainEngine(make_model(seed=7), engine.cfg, device="cpu", total_steps=100)
    engine.save(tmp_path / "step")
    resumed.load(tmp_path / "step")
    for name, value in weights(engine.model).items():
        assert torch.equal(weights(receiver)[name], value), name
        assert torch.equal(weights(resumed.model)[name], value), name
    # What generation drew has the log-probabilities that training gives it.
    samples = make_samples([12, 12])
    generation.submit(
        EngineRequest(i, i, 0, sample.prompt_tokens, SamplingParams(12)) for i, sample in enumerate(samples)
    )
    drawn = sorted(generation.decode().finished, key=lambda t: t.rollout)
    packed = pack_one([replace(sample, tokens=t.tokens) for sample, t in zip(samples, drawn, strict=True)])
    found = engine.logprobs([packed])[0][packed.mask]
    want = torch.cat([torch.from_numpy(t.logprobs) for t in drawn])
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
