"""The value head: it trains with the decoder, starts as a baseline of 0, and is saved with the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_helpers import make_engine, make_samples

from asystem.algorithms import value_loss
from asystem.config import AlgorithmConfig, LoraConfig
from asystem.data.packing import PackedBatch, pack
from asystem.stats import Stats
from asystem.training import TrainEngine, supervised_loss, with_token_advantages

LENGTHS = [4, 1, 9, 6]
CFG = AlgorithmConfig(advantage="gae", value_clip=None, value_coefficient=1.0)


def batch(budget: int = 100) -> list[PackedBatch]:
    """Rewards are 1, 0, 1, and one that is unknown and has no weight."""
    samples = [replace(s, advantage=float(i % 2 == 0)) for i, s in enumerate(make_samples(LENGTHS))]
    return pack([*samples[:3], replace(samples[3], token_weight=0.0, advantage=7.0)], budget)


def critic(packed: PackedBatch, logprobs: Tensor, entropy: Tensor, values: Tensor) -> tuple[Tensor, Stats]:
    assert packed.old_values is not None and packed.returns is not None
    return value_loss(
        values,
        old_values=packed.old_values,
        returns=packed.returns,
        token_weights=packed.token_weights,
        rows=packed.label_rows,
        cfg=CFG,
    )


def learned(engine: TrainEngine, budget: int = 100) -> list[float]:
    """Explained variance before each of its steps."""
    found = []
    for _ in range(30):
        micro, stats = with_token_advantages(engine, batch(budget), CFG)
        found.append(stats.to_dict()["value/explained_variance"])
        engine.step(micro, critic)
    return found


def test_at_first_advantages_are_the_normalised_rewards() -> None:
    (packed,), stats = with_token_advantages(make_engine(value_head=True), batch(), CFG)
    # Tokens: 4 and 9 of reward 1, one of 0. Mean 13/14, variance 14/13 · 13/14 · 1/14 = 1/14.
    known = packed.advantages[packed.mask & (packed.token_weights > 0)]
    assert sorted(set(known.tolist())) == pytest.approx([-13 / 14 * 14**0.5, 1 / 14 * 14**0.5], rel=1e-5)
    assert packed.old_values is not None and not packed.old_values.any()
    assert not packed.advantages[~packed.mask].any()
    assert stats.to_dict() == pytest.approx({"value/return_mean": 13 / 14, "value/explained_variance": 0.0})


def test_values_come_to_tell_the_rewards_apart_in_any_cutting() -> None:
    whole, cut = make_engine(value_head=True), make_engine(value_head=True)
    explained = learned(whole)
    assert explained[0] == 0 and explained[-1] > 0.9
    assert learned(cut, budget=12) == pytest.approx(explained, abs=1e-3)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2)])
def test_it_trains_by_values_alone_and_is_saved(tmp_path: Path, lora: LoraConfig) -> None:
    engine = make_engine(value_head=True, lora=lora)
    engine.step(batch(), supervised_loss)
    assert engine.policy.value_head is not None and not engine.policy.value_head.any()
    learned(engine)
    assert engine.policy.value_head.any()
    engine.save(tmp_path / "step-000001")
    resumed = make_engine(value_head=True, lora=lora)
    resumed.load(tmp_path / "step-000001")
    for ours, theirs in zip(engine.scores(batch()), resumed.scores(batch()), strict=True):
        assert torch.equal(ours[2], theirs[2]) and ours[2].any()
