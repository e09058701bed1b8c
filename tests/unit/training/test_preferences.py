"""DPO in packed micro-batches: against each answer alone, in any cutting, and what it does to the answers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from training_helpers import VOCAB, make_engine, make_model, weights

from asystem.config import DpoConfig, DpoLoss
from asystem.data.packing import Sample, pack_groups, pack_one
from asystem.training import PreferenceLoss, TrainEngine, sequence_sums


def make_pairs(count: int = 4) -> list[list[Sample]]:
    """Pairs that share a prompt, with answers of several lengths, of which some tokens are context."""
    draw = random.Random(0)

    def answer(prompt: list[int], number: int) -> Sample:
        tokens = [draw.randrange(VOCAB) for _ in range(draw.randint(2, 6))]
        trained = [True, *(draw.random() < 0.8 for _ in tokens[1:])]
        return Sample(prompt, tokens, 0.0, rollout=number, trained=trained)

    prompts = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 4))] for _ in range(count)]
    return [[answer(prompt, 7 * number) for _ in range(2)] for number, prompt in enumerate(prompts)]


def sums_alone(engine: TrainEngine, pairs: list[list[Sample]]) -> dict[int, tuple[float, float]]:
    """Each answer in a micro-batch of its own."""
    sums = {}
    for pair in pairs:
        chosen, rejected = (float(engine.logprobs([pack_one([sample])])[0].sum()) for sample in pair)
        sums[pair[0].rollout] = (chosen, rejected)
    return sums


def test_sums_of_packed_pairs_are_those_of_each_answer_alone() -> None:
    engine, pairs = make_engine(), make_pairs()
    (packed,) = pack_groups(pairs, budget=1000)
    found = sequence_sums(packed, engine.logprobs([packed])[0])
    expected = sums_alone(engine, pairs)
    torch.testing.assert_close(found, torch.tensor([expected[number] for number in packed.rollouts[::2]]))


def test_the_loss_and_metrics_by_hand() -> None:
    pairs = make_pairs(2)
    start, now = sums_alone(make_engine(), pairs), sums_alone(make_engine(make_model(seed=5)), pairs)
    engine = make_engine(make_model(seed=5))
    cfg = DpoConfig(beta=0.5)
    (packed,) = pack_groups(pairs, budget=1000)
    stats = engine.step([packed], PreferenceLoss(cfg, start, num_pairs=2)).to_dict()
    h = [(now[n][0] - start[n][0]) - (now[n][1] - start[n][1]) for n in (0, 7)]
    assert stats["train/loss"] == pytest.approx(sum(math.log(1 + math.exp(-0.5 * x)) for x in h) / 2, rel=1e-4)
    assert stats["dpo/margin"] == pytest.approx(0.5 * sum(h) / 2, rel=1e-4)
    assert stats["dpo/accuracy"] == sum(x > 0 for x in h) / 2
    assert stats["dpo/chosen_logprob"] == pytest.approx((now[0][0] + now[7][0]) / 2, rel=1e-5)
    rejected = 0.5 * sum(now[n][1] - start[n][1] for n in (0, 7)) / 2
    assert stats["dpo/rejected_reward"] == pytest.approx(rejected, rel=1e-4, abs=1e-5)


def test_ipo_averages_over_the_trained_tokens_of_each_answer() -> None:
    pairs = make_pairs(1)
    start, now = sums_alone(make_engine(), pairs), sums_alone(make_engine(make_model(seed=5)), pairs)
    (packed,) = pack_groups(pairs, budget=1000)
    loss_fn = PreferenceLoss(DpoConfig(loss=DpoLoss.ipo, beta=0.2), start, num_pairs=1)
    stats = make_engine(make_model(seed=5)).step([packed], loss_fn).to_dict()
    counts = [sum(sample.trained) for sample in pairs[0]]  # type: ignore[arg-type]
    h = (now[0][0] - start[0][0]) / counts[0] - (now[0][1] - start[0][1]) / counts[1]
    assert stats["train/loss"] == pytest.approx((h - 2.5) ** 2, rel=1e-4)


def test_before_the_first_step_every_pair_is_a_tie() -> None:
    engine, pairs = make_engine(), make_pairs()
    stats = engine.step(
        pack_groups(pairs, budget=12), PreferenceLoss(DpoConfig(), sums_alone(engine, pairs), num_pairs=4)
    ).to_dict()
    assert stats["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert stats["dpo/accuracy"] == 0.5
    assert stats["dpo/margin"] == pytest.approx(0, abs=1e-5)


def test_micro_batches_of_pairs_add_up_to_one_batch() -> None:
    pairs = make_pairs(5)
    reference = sums_alone(make_engine(), pairs)
    whole, cut = make_engine(), make_engine()
    loss_fn = PreferenceLoss(DpoConfig(beta=0.5), reference, num_pairs=5)
    one, many = pack_groups(pairs, budget=1000), pack_groups(pairs, budget=15)
    assert len(one) == 1 and len(many) > 2
    for _ in range(3):
        assert cut.step(many, loss_fn).to_dict() == pytest.approx(whole.step(one, loss_fn).to_dict(), abs=1e-4)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(cut.model)[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("loss", list(DpoLoss))
def test_training_turns_the_order_of_answers(loss: DpoLoss) -> None:
    engine, pairs = make_engine(lr=3e-3), make_pairs()
    reference = sums_alone(engine, pairs)
    loss_fn = PreferenceLoss(DpoConfig(loss=loss), reference, num_pairs=4)
    for _ in range(20):
        stats = engine.step(pack_groups(pairs, budget=1000), loss_fn).to_dict()
    assert stats["dpo/accuracy"] == 1.0 and stats["dpo/margin"] > 0.05
    after = sums_alone(engine, pairs)
    assert all(after[n][0] - after[n][1] > reference[n][0] - reference[n][1] for n in reference)
