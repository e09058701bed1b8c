"""Balance and z-losses: by hand, against transformers, and on their way through a step's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import VOCAB, make_samples, weights

from asystem.config import Recompute, TrainingConfig
from asystem.data.packing import PackedBatch, pack_one
from asystem.models import Decoder, ModelSpec, MoESpec, Routed, Router, init_weights
from asystem.models.moe import record_routing
from asystem.stats import Stats
from asystem.training import TrainEngine
from asystem.training.policy import Policy
from asystem.training.router_losses import balance_loss, z_loss

SPECS = {
    "softmax": ModelSpec("qwen3_moe", VOCAB, 16, 24, 2, 4, 2, 4, moe=MoESpec(6, 2, 8)),
    "sigmoid": ModelSpec(
        "bailing_moe_v2", VOCAB, 16, 24, 2, 4, 2, 4, moe=MoESpec(6, 2, 8, score="sigmoid", has_bias=True)
    ),
}
B, Z = 0.3, 0.2


def test_balance_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    # Shares of the 4 choices: 1/4, 2/4, 1/4. Mean probabilities: 0.3, 0.25, 0.45.
    chosen = torch.tensor([[0, 1], [2, 1]])
    assert float(balance_loss(scores, chosen)) == pytest.approx(3 * (0.3 / 4 + 0.25 / 2 + 0.45 / 4))
    assert float(balance_loss(7 * scores, chosen)) == pytest.approx(float(balance_loss(scores, chosen)))
    even = torch.full((3, 3), 1 / 3)
    assert float(balance_loss(even, torch.tensor([[0, 1], [1, 2], [2, 0]]))) == pytest.approx(1.0)
    alike = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(5, 4)
    assert float(balance_loss(alike, torch.tensor([[0, 1]]).expand(5, 2))) == pytest.approx(4 / 2)


def test_z_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    low, high = 0.6931472, 1.6931472  # log 2, log 2 e
    assert float(z_loss(logits)) == pytest.approx((low**2 + high**2) / 2)


def test_balance_is_transformers_over_top_k() -> None:
    module = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).mul(2).requires_grad_()
    theirs = module.load_balancing_loss_func((logits,), num_experts=8, top_k=3)
    ours = balance_loss(logits.softmax(-1), logits.topk(3).indices)
    assert 3 * ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (want,), (found,) = torch.autograd.grad(theirs, logits), torch.autograd.grad(3 * ours, logits)
    torch.testing.assert_close(found, want, atol=1e-7, rtol=1e-5)


def _model(kind: str) -> Decoder:
    model = Decoder(SPECS[kind])
    init_weights(model, 0, std=0.2)
    return model


def _nothing(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
    return logprobs.sum() * 0.0, Stats()


def _engine(kind: str, **changes: Any) -> TrainEngine:
    """A step moves each parameter by its gradient: AdamW's divisor is its eps, which is as large as the rate."""
    cfg = TrainingConfig(lr=1e6, eps=1e6, weight_decay=0.0, clip_norm=0.0, **changes)
    return TrainEngine(_model(kind), cfg, device="cpu", total_steps=9)


def _expected(kind: str, micro: Sequence[PackedBatch]) -> tuple[dict[str, Tensor], float, float]:
    """Gradients of the losses, written down once more: each micro-batch counts by its tokens, each layer alike."""
    model = _model(kind)
    total = sum(len(packed.tokens) for packed in micro)
    balance, z = torch.zeros(()), torch.zeros(())
    found: list[Routed] = []
    for router in _routers(model):
        router.watch = lambda weights, routed: (found.append(routed), weights)[1]
    for packed in micro:
        found.clear()
        Policy(model)(packed)
        share = len(packed.tokens) / total / len(found)
        balance = balance + share * sum(balance_loss(r.scores, r.chosen) for r in found)
        z = z + share * sum(z_loss(r.logits) for r in found)
    grads = torch.autograd.grad(B * balance + Z * z, list(model.parameters()), allow_unused=True)
    named = zip((name for name, _ in model.named_parameters()), grads, strict=True)
    return {name: grad for name, grad in named if grad is not None}, balance.item(), z.item()


def _routers(model: Decoder) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
@pytest.mark.parametrize("kind", SPECS)
def test_their_gradient_is_that_of_the_micro_batches_by_their_tokens(kind: str, recompute: Recompute) -> None:
    samples = make_samples([9, 4, 1, 7, 12])
    micro = [pack_one(samples[:3]), pack_one(samples[3:])]
    engine = _engine(kind, balance_coefficient=B, router_z_coefficient=Z, recompute=recompute)
    before = weights(engine.model)
    stats = engine.step(micro, _nothing).to_dict()
    grads, balance, z = _expected(kind, micro)
    assert stats["train/balance_loss"] == pytest.approx(balance, rel=1e-5)
    assert stats["train/router_z_loss"] == pytest.approx(z, rel=1e-5)
    assert grads["layers.0.mlp.router.weight"].abs().max() > 1e-3 and "layers.1.mlp.experts.down" not in grads
    for name, after in weights(engine.model).items():
        moved = before[name] - after
        torch.testing.assert_close(moved, grads.get(name, torch.zeros_like(moved)), atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", SPECS)
def test_the_z_loss_does_not_see_how_a_batch_is_cut(kind: str) -> None:
    samples = make_samples([9, 4, 1, 7, 12])
    whole, cut = (_engine(kind, router_z_coefficient=Z) for _ in range(2))
    one = whole.step([pack_one(samples)], _nothing).to_dict()
    many = cut.step([pack_one([sample]) for sample in samples], _nothing).to_dict()
    assert one == pytest.approx(many, rel=1e-5)
    assert "train/balance_loss" not in one
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(cut.model)[name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.selective])
def test_the_most_loaded_expert_is_told_of_the_whole_batch(recompute: Recompute) -> None:
    samples = make_samples([9, 4, 12])
    engine = _engine("softmax", recompute=recompute)
    with record_routing(_routers(engine.model)) as chosen:
        engine.logprobs([pack_one(samples)])
    loads = [torch.bincount(layer.flatten(), minlength=6).double() for layer in chosen]
    stats = engine.step([pack_one([sample]) for sample in samples], _nothing).to_dict()
    assert stats["train/expert_load_max"] == pytest.approx(max(float(load.max() / load.mean()) for load in loads))
    assert "train/router_z_loss" not in stats


def test_repeated_steps_make_the_load_equal() -> None:
    engine = TrainEngine(
        _model("softmax"), TrainingConfig(lr=3e-3, balance_coefficient=1.0), device="cpu", total_steps=99
    )
    batch = [pack_one(make_samples([40, 40], seed=4))]
    found = [engine.step(batch, _nothing).to_dict() for _ in range(40)]
    assert found[-1]["train/balance_loss"] < 1.02 < found[0]["train/balance_loss"]
    assert found[-1]["train/expert_load_max"] < 0.8 * found[0]["train/expert_load_max"]
