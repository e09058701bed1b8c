"""The engine in one process: cutting into micro-batches, bad gradients, precision, learning."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import make_engine, make_model, make_samples, weights

from asystem.algorithms import choose, policy_loss
from asystem.config import AlgorithmConfig, Schedule
from asystem.data.packing import PackedBatch, pack, pack_one
from asystem.errors import TrainingError
from asystem.models import MoESpec
from asystem.stats import Stats
from asystem.training import supervised_loss

SHORT = [replace(s, prompt_tokens=[3]) for s in make_samples([4, 2, 9, 6])]  # one prompt token each


def _rl_loss(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
    return policy_loss(
        logprobs,
        infer_logprobs=packed.infer_logprobs,
        advantages=packed.advantages,
        token_weights=packed.token_weights,
        rows=packed.label_rows,
        sequence=packed.sequence,
        algorithm=choose(AlgorithmConfig(icepop_alpha=0.01, icepop_beta=100.0), "."),
        entropy=entropy,
    )


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"moe": MoESpec(6, 2, 8)}])
def test_packed_equals_one_at_a_time_in_values_gradients_and_updates(changes: dict[str, Any]) -> None:
    draw = random.Random(0)
    samples = [replace(s, trained=[draw.random() < 0.6 for _ in range(s.length - 1)]) for s in SHORT]
    packed, alone = (make_engine(make_model(**changes)) for _ in range(2))
    samples.sort(key=lambda sample: -sample.length)  # as they are packed
    batch, single = pack(samples, budget=100), [pack_one([sample]) for sample in samples]
    assert len(batch) == 1 and len(batch[0].label_rows) < sum(s.length - 1 for s in samples)
    for _ in range(3):
        expected = torch.cat(alone.logprobs(single))
        found = packed.logprobs(batch)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        one, many = packed.step(batch, supervised_loss).to_dict(), alone.step(single, supervised_loss).to_dict()
        assert one == pytest.approx(many, abs=1e-5)
    for name, value in weights(packed.model).items():
        torch.testing.assert_close(value, weights(alone.model)[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("loss_fn", [supervised_loss, _rl_loss])
@pytest.mark.parametrize("budget", [1, 14, 20])
def test_micro_batches_add_up_to_one_batch(loss_fn: object, budget: int) -> None:
    samples = make_samples([4, 1, 9, 6, 3])
    whole, cut = make_engine(), make_engine()
    for _ in range(3):
        one = whole.step([pack_one(samples)], loss_fn).to_dict()  # type: ignore[arg-type]
        many = cut.step(pack(samples, budget), loss_fn).to_dict()  # type: ignore[arg-type]
        assert many == pytest.approx(one, abs=1e-5)
    after = weights(cut.model)
    for name, expected in weights(whole.model).items():
        torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=0, msg=name)
    assert len(pack(samples, budget)) > 1


def test_the_loss_is_the_mean_cross_entropy_and_falls() -> None:
    samples = make_samples([4, 1, 9])
    engine = make_engine()
    packed = pack_one(samples)
    before = engine.logprobs([packed])[0][packed.mask]
    losses = [engine.step([packed], supervised_loss).to_dict()["train/loss"] for _ in range(30)]
    assert losses[0] == pytest.approx(-float(before.mean()), abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def test_a_positive_advantage_makes_its_tokens_likelier() -> None:
    good, bad = (replace(s, advantage=a) for s, a in zip(make_samples([5, 5]), (1.0, -1.0), strict=True))
    engine, packed = make_engine(lr=1e-3), pack_one([good, bad])
    before = engine.logprobs([packed])[0]
    engine.step([packed], _rl_loss)
    change = (engine.logprobs([packed])[0] - before)[packed.mask].split(5)
    assert float(change[0].mean()) > 0 > float(change[1].mean())


def test_the_gradient_is_clipped_by_its_global_norm() -> None:
    samples = make_samples([4, 6])

    # SGD-like AdamW: with a huge eps the step is lr * g / eps, so that its norm shows the clipped gradient's.
    def moved(clip_norm: float) -> tuple[float, float]:
        engine = make_engine(lr=1.0, eps=1e6, weight_decay=0.0, clip_norm=clip_norm)
        before = weights(engine.model)
        stats = engine.step([pack_one(samples)], supervised_loss).to_dict()
        change = [1e6 * (before[name] - value).double() for name, value in weights(engine.model).items()]
        return float(torch.stack([c.norm() for c in change]).norm()), stats["train/grad_norm"]

    free, norm = moved(0.0)
    assert free == pytest.approx(norm, rel=0.1)
    clipped, reported = moved(0.5 * norm)
    assert reported == pytest.approx(norm, rel=1e-4)
    assert clipped == pytest.approx(0.5 * norm, rel=0.1)


def test_norms_and_biases_do_not_decay() -> None:
    engine = make_engine(lr=0.1, weight_decay=1.0, model=make_model(qkv_bias=True))
    before = weights(engine.model)
    engine.step([pack_one(make_samples([4]))], lambda packed, logprobs, entropy: (logprobs.sum() * 0.0, Stats()))
    after = weights(engine.model)
    for name, value in before.items():
        factor = 0.9 if value.ndim == 2 else 1.0  # 1 - lr * weight_decay, the gradient being 0
        torch.testing.assert_close(after[name], factor * value, msg=name)


def _nan_loss(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
    return logprobs.sum() * math.nan, Stats()


def test_a_bad_gradient_is_skipped_and_counted() -> None:
    engine, packed = make_engine(max_bad_steps=3), pack_one(make_samples([4, 6]))
    engine.step([packed], supervised_loss)
    before = weights(engine.model)
    stats = (engine.step([packed], _nan_loss) + engine.step([packed], _nan_loss)).to_dict()
    assert stats["train/skipped"] == 2 and math.isnan(stats["train/loss"])
    assert all(torch.equal(value, before[name]) for name, value in weights(engine.model).items())
    good = engine.step([packed], supervised_loss).to_dict()
    assert good["train/skipped"] == 0 and math.isfinite(good["train/grad_norm"])
    assert any(not torch.equal(value, before[name]) for name, value in weights(engine.model).items())


def test_bad_gradients_in_a_row_end_training_and_name_the_rollouts() -> None:
    engine, packed = make_engine(max_bad_steps=2), pack_one(make_samples([4, 6]))
    for loss_fn in (_nan_loss, supervised_loss, _nan_loss):
        engine.step([packed], loss_fn)
    with pytest.raises(TrainingError, match=r"2 steps in a row .* rollouts 100, 101\."):
        engine.step([packed], _nan_loss)


def test_a_skipped_step_is_logged_with_the_rollouts_whose_loss_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, warnings = make_engine(), []
    monkeypatch.setattr(logging.getLogger("asystem"), "warning", lambda text, *args: warnings.append(text % args))
    batches = [pack_one([sample]) for sample in make_samples([4, 6, 5])]

    def second_is_bad(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
        return (_nan_loss if packed.rollouts == [101] else supervised_loss)(packed, logprobs, entropy)

    engine.step(batches, second_is_bad)
    assert "skipped optimizer step 0: NaN or infinite gradient, 1 in a row; loss of rollouts 101 was not" in warnings[0]

    def bad_gradient(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
        return (logprobs.sum() * 0.0).sqrt(), Stats()  # 0, with a gradient of 0 / 0

    engine.step(batches, bad_gradient)
    assert "step 1: NaN or infinite gradient, 2 in a row; loss of rollouts 100, 101, 102 was finite" in warnings[1]


def test_phases_restart_schedule_and_moments() -> None:
    engine, packed = make_engine(), pack_one(make_samples([4]))
    engine.start_phase(1.0, Schedule.linear, warmup_steps=0, total_steps=4)
    rates = [engine.step([packed], supervised_loss).to_dict()["train/lr"] for _ in range(2)]
    engine.start_phase(0.5, Schedule.constant, warmup_steps=2, total_steps=4)
    assert not any(t.any() for name, t in engine.optimizer.tensors().items() if name.startswith("optimizer."))
    rates += [engine.step([packed], supervised_loss).to_dict()["train/lr"] for _ in range(2)]
    assert rates == [1.0, 0.75, 0.25, 0.5]


def test_no_micro_batches_change_nothing() -> None:
    engine = make_engine()
    before = weights(engine.model)
    assert engine.step([], supervised_loss).to_dict() == {}
    assert engine.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(engine.model).items())


def test_half_precision_trains_float32_masters_and_writes_into_the_model_in_place() -> None:
    model = make_model()
    exact = weights(model)
    engine = make_engine(model, dtype=torch.bfloat16, lr=1e-5, weight_decay=0.0)
    held = dict(model.named_parameters())
    places = {name: p.data_ptr() for name, p in held.items()}
    for name, master in engine.optimizer.masters.items():
        assert torch.equal(master.detach(), exact[name]), name  # from before the rounding
    packed = pack_one(make_samples([4, 6]))
    for _ in range(4):
        engine.step([packed], supervised_loss)
    moved = 0
    for name, master in engine.optimizer.masters.items():
        assert held[name].dtype is torch.bfloat16 and held[name].data_ptr() == places[name]
        assert torch.equal(held[name], master.to(torch.bfloat16)), name
        moved += int((master != exact[name]).sum())
    # Steps of 1e-5 are far below bfloat16's spacing at 0.2 (1e-3): only the masters can add them up.
    assert moved > 0.9 * sum(value.numel() for value in exact.values())


def test_half_precision_gradients_add_up_in_float32() -> None:
    samples = make_samples([4, 1, 9, 6, 3])
    full, half = make_engine(), make_engine(dtype=torch.bfloat16)
    expected = full.step(pack(samples, 10), supervised_loss).to_dict()
    found = half.step(pack(samples, 10), supervised_loss).to_dict()
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=0.02)
    assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=0.05)


def test_the_reference_stays_where_it_was_kept() -> None:
    engine, micro = make_engine(), pack(make_samples([4, 1, 9]), 30)
    before = engine.logprobs(micro)[0]
    engine.keep_reference()
    kept = weights(engine.model)
    for _ in range(3):
        engine.step(micro, supervised_loss)
    assert any(not torch.equal(value, kept[name]) for name, value in weights(engine.model).items())
    torch.testing.assert_close(engine.logprobs(micro, reference=True)[0], before, atol=1e-6, rtol=0)
    assert not torch.equal(engine.logprobs(micro)[0], before)
    assert not any(p.requires_grad for p in engine.reference.parameters())  # type: ignore[union-attr]


def test_a_float32_head_is_the_policy_s_and_the_reference_s() -> None:
    micro = pack(make_samples([4, 1, 9]), 30)
    exact, rounded = (make_engine(dtype=torch.bfloat16, head_dtype=head) for head in ("float32", "auto"))
    exact.keep_reference()
    (found,), (reference,), (other,) = (
        exact.logprobs(micro),
        exact.logprobs(micro, reference=True),
        rounded.logprobs(micro),
    )
    assert torch.equal(found, reference)
    assert 1e-4 < (found - other).abs().max() < 0.05


def test_the_entropy_has_a_gradient_where_it_is_asked_for() -> None:
    def entropy_loss(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
        return -entropy.sum(), Stats()

    engine, micro = make_engine(entropy_gradient=True), pack(make_samples([4, 1, 9]), 30)
    entropies = []
    for _ in range(5):
        with torch.no_grad():
            entropies.append(float(engine.policy(micro[0])[1].sum()))
        engine.step(micro, entropy_loss)
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0]
