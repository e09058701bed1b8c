"""Normalisers and the whole policy loss against hand-worked numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from asystem.algorithms import choose, policy_loss, token_weights
from asystem.algorithms.corrections import CORRECTIONS
from asystem.config import AlgorithmConfig, Anchor, KLEstimator, Normalizer
from asystem.errors import ConfigError
from asystem.stats import Stats, merge

NAN = math.nan


def test_token_weights_of_each_normalizer() -> None:
    counts: dict[str, Any] = {"num_rollouts": 4, "num_tokens": 20, "token_budget": 50}
    assert token_weights(Normalizer.response, [2, 5], **counts) == [1 / 8, 1 / 20]
    assert token_weights(Normalizer.token, [2, 5], **counts) == [1 / 20, 1 / 20]
    assert token_weights(Normalizer.budget, [2, 5], **counts) == [1 / 50, 1 / 50]
    assert token_weights(Normalizer.constant, [2, 5], max_new_tokens=10, **counts) == [1 / 40, 1 / 40]


def test_minibatches_share_the_denominator() -> None:
    # Two minibatches of one response each: each minibatch's loss is that response's mean, their mean the batch's.
    assert token_weights(Normalizer.response, [2, 5], num_rollouts=2, num_tokens=7, minibatches=2) == [1 / 2, 1 / 5]


def test_budget_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.token_budget"):
        token_weights(Normalizer.budget, [2], num_rollouts=1, num_tokens=2, token_budget=None)


def _loss(
    train: list[float],
    infer: list[float],
    weights: list[float],
    cfg: AlgorithmConfig,
    *,
    advantages: list[float] | None = None,
    mask: list[bool] | None = None,
    old: list[float] | None = None,
    entropy: list[float] | None = None,
    sequence: list[int] | None = None,
    ref: list[float] | None = None,
) -> tuple[float, list[float], Stats]:
    """Value, gradient and stats, from plain numbers."""
    logprobs = torch.tensor(train, requires_grad=True)
    loss, stats = policy_loss(
        logprobs,
        infer_logprobs=torch.tensor(infer),
        advantages=torch.tensor(advantages if advantages is not None else [1.0] * len(train)),
        token_weights=torch.tensor(weights),
        rows=torch.tensor(mask if mask is not None else [True] * len(train)).nonzero().squeeze(1),
        sequence=torch.tensor(sequence or [0] * len(train), dtype=torch.int32),
        algorithm=choose(cfg, "."),
        old_logprobs=None if old is None else torch.tensor(old),
        ref_logprobs=None if ref is None else torch.tensor(ref),
        entropy=None if entropy is None else torch.tensor(entropy),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    return float(loss.detach()), logprobs.grad.tolist(), stats


def test_icepop_masked_tokens_stay_in_the_denominator() -> None:
    # One response of 4 tokens, each weight 1/4; ratios 1, 2, 10 and 0.1, of which the band keeps two.
    # loss = -(1 * 1 + 2 * 1) / 4: divided by 4, not by the 2 tokens that are left.
    infer = [math.log(0.1 / k) for k in (1, 2, 10, 0.1)]
    loss, gradient, stats = _loss([math.log(0.1)] * 4, infer, [0.25] * 4, AlgorithmConfig())
    assert loss == pytest.approx(-0.75, abs=1e-6)
    assert gradient == pytest.approx([-0.25, -0.5, 0.0, 0.0], abs=1e-6)
    assert stats.to_dict()["icepop/masked_fraction"] == 0.5


def test_responses_of_unequal_length_by_normalizer() -> None:
    # Responses of 1 and 3 tokens with advantages 1 and -1, k = 1 and r = 1 everywhere.
    cfg = AlgorithmConfig(correction="none")
    logprobs, advantages = [-1.0] * 4, [1.0, -1.0, -1.0, -1.0]

    def loss(normalizer: Normalizer) -> float:
        one, three = token_weights(normalizer, [1, 3], num_rollouts=2, num_tokens=4, token_budget=8)
        return _loss(logprobs, logprobs, [one, three, three, three], cfg, advantages=advantages)[0]

    assert loss(Normalizer.response) == pytest.approx(0.0, abs=1e-6)  # -(1 - 1) / 2
    assert loss(Normalizer.token) == pytest.approx(0.5)  # -(1 - 3) / 4
    assert loss(Normalizer.budget) == pytest.approx(0.25)  # -(1 - 3) / 8


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_nan_is_counted_and_touches_neither_loss_nor_gradient(correction: str) -> None:
    train, infer = [-1.0, NAN, -1.0, -math.inf], [-1.0, -1.0, NAN, -1.0]
    loss, gradient, stats = _loss(train, infer, [0.25] * 4, AlgorithmConfig(correction=correction), entropy=[2.0] * 4)
    assert loss == pytest.approx(-0.25)
    assert gradient == pytest.approx([-0.25, 0.0, 0.0, 0.0])
    metrics = stats.to_dict()
    assert metrics["mismatch/nan_tokens"] == 3
    assert metrics["mismatch/logprob_diff_mean"] == 0.0
    assert metrics["train/entropy"] == 2.0


def test_tokens_outside_the_mask_do_not_count_at_all() -> None:
    mask = [False, True, False, True]
    train, infer = [0.0, -1.0, NAN, -2.0], [0.0, -1.5, 7.0, -2.0]
    loss, gradient, stats = _loss(train, infer, [9.0, 0.5, 9.0, 0.5], AlgorithmConfig(), mask=mask)
    ratio = math.exp(0.5)
    assert loss == pytest.approx(-(ratio + 1) / 2, abs=1e-6)
    assert gradient == pytest.approx([0.0, -ratio / 2, 0.0, -0.5], abs=1e-6)
    metrics = stats.to_dict()
    assert metrics["mismatch/nan_tokens"] == 0
    assert metrics["mismatch/logprob_diff_mean"] == pytest.approx(0.25)
    assert metrics["mismatch/logprob_diff_max"] == pytest.approx(0.5)


def test_with_old_logprobs_the_correction_stays_and_the_ratio_moves() -> None:
    # k = old / infer = 2 and r = new / old = 1.1: 2 * 1.1; the second token's r = 1.5 is clipped at 1.2.
    old, infer = [math.log(0.2)] * 2, [math.log(0.1)] * 2
    loss, gradient, stats = _loss([math.log(0.22), math.log(0.3)], infer, [0.5] * 2, AlgorithmConfig(), old=old)
    assert loss == pytest.approx(-(2 * 1.1 + 2 * 1.2) / 2, abs=1e-5)
    assert gradient == pytest.approx([-1.1, 0.0], abs=1e-5)
    assert stats.to_dict()["train/clip_fraction"] == 0.5


def test_metrics_are_taken_before_masking_and_merge_over_parts() -> None:
    ratios = [0.01, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 100.0]
    infer = [math.log(0.005 / k) for k in ratios]
    train, weights, entropy = [math.log(0.005)] * 10, [0.1] * 10, [5.0] + [1.0] * 8 + [3.0]
    cfg = AlgorithmConfig()
    loss, _, whole = _loss(train, infer, weights, cfg, entropy=entropy)
    parts = [_loss(train[s], infer[s], weights[s], cfg, entropy=entropy[s]) for s in (slice(0, 3), slice(3, 10))]
    merged = merge(part for _, _, part in parts).to_dict()
    assert sum(value for value, _, _ in parts) == pytest.approx(loss)
    assert merged == pytest.approx(whole.to_dict())
    assert merged["mismatch/ratio_p01"] == pytest.approx(0.01, rel=0.1)
    assert merged["mismatch/ratio_p50"] == pytest.approx(1.0, rel=1e-3)
    assert merged["mismatch/ratio_p99"] == pytest.approx(100.0, rel=0.1)
    assert merged["mismatch/logprob_diff_max"] == pytest.approx(math.log(100), rel=1e-5)
    assert merged["icepop/masked_fraction"] == pytest.approx(0.2)
    assert merged["icepop/masked_entropy"] == pytest.approx(4.0)
    assert merged["train/entropy"] == pytest.approx(1.6)


def test_tis_reports_what_it_capped() -> None:
    infer = [math.log(0.1 / k) for k in (1, 1.5, 3, 9)]
    loss, _, stats = _loss([math.log(0.1)] * 4, infer, [0.25] * 4, AlgorithmConfig(correction="tis"))
    assert loss == pytest.approx(-(1 + 1.5 + 2 + 2) / 4, abs=1e-5)
    assert stats.to_dict()["tis/capped_fraction"] == 0.5


def test_sequence_corrections_mask_whole_responses_and_say_so() -> None:
    # Two responses of two tokens: k = 1, 1 and 2, 3; K = 1 and 6, of which a cap of 5 keeps the first.
    infer = [math.log(0.1 / k) for k in (1, 1, 2, 3)]
    cfg = AlgorithmConfig(correction="mis", mis_cap=5.0)
    loss, gradient, stats = _loss([math.log(0.1)] * 4, infer, [0.25] * 4, cfg, sequence=[0, 0, 1, 1])
    assert loss == pytest.approx(-0.5, abs=1e-6)
    assert gradient == pytest.approx([-0.25, -0.25, 0.0, 0.0], abs=1e-6)
    metrics = stats.to_dict()
    assert metrics["mis/masked_responses"] == 0.5 and metrics["mis/masked_fraction"] == 0.5


def test_the_behavior_anchor_puts_the_mismatch_into_the_ratio() -> None:
    # p = 0.11 and 0.2 against p_infer = 0.1: ratios 1.1 and 2, of which the second is clipped at 1.2.
    cfg = AlgorithmConfig(correction="none", anchor=Anchor.behavior)
    loss, gradient, _ = _loss([math.log(0.11), math.log(0.2)], [math.log(0.1)] * 2, [0.5] * 2, cfg)
    assert loss == pytest.approx(-(1.1 + 1.2) / 2, abs=1e-6)
    assert gradient == pytest.approx([-0.55, 0.0], abs=1e-6)


def test_the_distance_to_the_reference_is_weighed_like_the_tokens() -> None:
    # d = log p_ref - log p = ln 2 and 0; k3 = 2 - ln 2 - 1 and 0, its slope (1 - 2) and 0.
    cfg = AlgorithmConfig(correction="none", kl_coefficient=0.1, kl_estimator=KLEstimator.k3)
    train, ref = [math.log(0.1), math.log(0.3)], [math.log(0.2), math.log(0.3)]
    loss, gradient, stats = _loss(train, train, [0.5] * 2, cfg, advantages=[0.0, 0.0], ref=ref)
    assert loss == pytest.approx(0.1 * 0.5 * (1 - math.log(2)), abs=1e-6)
    assert gradient == pytest.approx([0.1 * 0.5 * -1, 0.0], abs=1e-6)
    assert stats.to_dict()["train/kl_reference"] == pytest.approx((1 - math.log(2)) / 2, abs=1e-6)


def test_a_reference_of_nan_counts_nowhere() -> None:
    cfg = AlgorithmConfig(correction="none", kl_coefficient=0.1)
    loss, gradient, _ = _loss([-1.0, -1.0], [-1.0, -1.0], [0.5] * 2, cfg, advantages=[0.0, 1.0], ref=[NAN, -1.0])
    assert (loss, gradient) == (-0.5, [0.0, -0.5])


def test_the_entropy_bonus_is_weighed_like_the_tokens() -> None:
    cfg = AlgorithmConfig(correction="none", entropy_coefficient=0.01)
    loss, _, _ = _loss([-1.0] * 2, [-1.0] * 2, [0.5] * 2, cfg, advantages=[0.0, 0.0], entropy=[2.0, NAN])
    assert loss == pytest.approx(-0.01 * 0.5 * 2.0)


def test_a_recipe_brings_its_own_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def half(train, infer, finite, sequence, cfg):\n    return (train - infer).exp() / 2\n"
    )
    algorithm = choose(AlgorithmConfig(correction="mine.py:half"), str(tmp_path))
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, stats = policy_loss(
        logprobs, infer_logprobs=torch.tensor([-1.0, -1.0]), advantages=torch.ones(2), token_weights=torch.ones(2),
        rows=torch.arange(2), sequence=torch.zeros(2, dtype=torch.int32), algorithm=algorithm,
    )  # fmt: skip
    assert float(loss.detach()) == -1.0 and stats.to_dict()["correction/masked_fraction"] == 0.0
    with pytest.raises(ConfigError, match=r'has no function hlaf \(did you mean "half"\?\)'):
        choose(AlgorithmConfig(correction="mine.py:hlaf"), str(tmp_path))
    with pytest.raises(ConfigError, match=r'surrogate="pop" is unknown \(did you mean "ppo"\?\)'):
        choose(AlgorithmConfig(surrogate="pop"), str(tmp_path))
