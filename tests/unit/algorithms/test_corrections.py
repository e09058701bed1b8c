"""Mismatch corrections against hand-worked numbers, outside the band and NaN included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from asystem.algorithms import correction_weights
from asystem.algorithms.corrections import CORRECTIONS
from asystem.config import AlgorithmConfig


def _of(train: Tensor, infer: Tensor, cfg: AlgorithmConfig, sequence: list[int] | None = None) -> Tensor:
    numbers = torch.tensor(sequence or [0] * len(train))
    return correction_weights(CORRECTIONS[cfg.correction], train, infer, numbers, cfg)


def _weights(ratios: list[float], cfg: AlgorithmConfig, sequence: list[int] | None = None) -> list[float]:
    """The weights of tokens with these p_train / p_infer, the training engine giving each probability 0.3."""
    train = torch.full((len(ratios),), math.log(0.3))
    infer = torch.tensor([math.log(0.3 / k) for k in ratios])
    weights: list[float] = _of(train, infer, cfg, sequence).tolist()
    return weights


def test_icepop_keeps_the_ratio_inside_the_band_and_masks_both_sides() -> None:
    cfg = AlgorithmConfig(correction="icepop", icepop_alpha=0.5, icepop_beta=5.0)
    assert _weights([0.49, 0.51, 1.0, 2.5, 4.99, 5.01, 1e6], cfg) == pytest.approx(
        [0, 0.51, 1, 2.5, 4.99, 0, 0], abs=1e-5
    )


def test_icepop_includes_its_bounds() -> None:
    cfg = AlgorithmConfig(correction="icepop", icepop_alpha=0.5, icepop_beta=4.0)
    log_k = torch.tensor([math.log(0.5), math.log(4.0)])
    assert _of(log_k, torch.zeros(2), cfg).tolist() == pytest.approx([0.5, 4.0])


def test_icepop_without_a_lower_bound() -> None:
    cfg = AlgorithmConfig(correction="icepop", icepop_alpha=0.0, icepop_beta=2.0)
    assert _weights([1e-3, 1.0, 3.0], cfg) == pytest.approx([1e-3, 1.0, 0.0], abs=1e-6)


def test_tis_caps_from_above_only() -> None:
    cfg = AlgorithmConfig(correction="tis", tis_cap=2.0)
    assert _weights([0.01, 1.0, 1.9, 2.1, 1e6], cfg) == pytest.approx([0.01, 1.0, 1.9, 2.0, 2.0], abs=1e-5)


def test_none_weighs_all_alike() -> None:
    assert _weights([0.01, 1.0, 1e6], AlgorithmConfig(correction="none")) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(
    ("train", "infer"),
    [
        (math.nan, -1.0),
        (-1.0, math.nan),
        (-math.inf, -1.0),
        (-1.0, -math.inf),
        (-math.inf, -math.inf),
        (math.inf, -1.0),
    ],
)
def test_what_is_not_finite_gets_weight_zero(correction: str, train: float, infer: float) -> None:
    cfg = AlgorithmConfig(correction=correction)
    weights = _of(torch.tensor([train, -1.0]), torch.tensor([infer, -1.0]), cfg)
    assert weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_ratio_that_overflows_stays_finite(correction: str) -> None:
    # exp(200) is infinite in float32
    weights = _of(torch.tensor([-1.0]), torch.tensor([-201.0]), AlgorithmConfig(correction=correction))
    expected = {"none": 1.0, "tis": 2.0}
    assert weights.tolist() == pytest.approx([expected.get(correction, 0.0)])


def test_weights_have_no_gradient() -> None:
    train = torch.tensor([-1.0], requires_grad=True)
    weights = _of(train, torch.tensor([-1.1]), AlgorithmConfig())
    assert not weights.requires_grad


def test_kpop_weighs_a_ratio_by_what_it_moves() -> None:
    # The same ratio of 4 moves much where the token is likely and little where it is not:
    # D(0.8 || 0.2) = 0.8 ln 4 + 0.2 ln 0.25 = 0.832; D(0.004 || 0.001) = 0.00255 nats, D the other way round 0.00161.
    cfg = AlgorithmConfig(correction="kpop", kpop_phi=0.1)
    train, infer = torch.tensor([0.8, 0.004, 0.5, 0.5]).log(), torch.tensor([0.2, 0.001, 0.29, 0.28]).log()
    assert _of(train, infer, cfg).tolist() == pytest.approx([0.0, 4.0, 0.5 / 0.29, 0.0], rel=1e-5)
    assert _of(infer, train, cfg).tolist() == pytest.approx([0.0, 0.25, 0.29 / 0.5, 0.0], rel=1e-5)


def test_kpop_of_certain_tokens() -> None:
    cfg = AlgorithmConfig(correction="kpop")
    train, infer = torch.tensor([0.0, 0.0, -1e-7]), torch.tensor([0.0, math.log(0.5), 0.0])
    assert _of(train, infer, cfg).tolist() == [1.0, 0.0, 0.0]  # the last: 1 - p > 0 where inference saw no chance


def test_mis_weighs_or_masks_whole_responses() -> None:
    cfg = AlgorithmConfig(correction="mis", mis_cap=2.0)
    weights = _weights([0.5, 3.0, 2.0, 1.5, 0.1], cfg, [0, 0, 1, 1, 2])
    assert weights == pytest.approx([1.5, 1.5, 0.0, 0.0, 0.1], abs=1e-5)


def test_the_geometric_mean_forgives_length() -> None:
    cfg = AlgorithmConfig(correction="geometric", geometric_band=(0.8, 1.25))
    # means: sqrt(0.5 * 2) = 1, sqrt(1.3 * 1.4) > 1.25, 1.2, 0.7
    weights = _weights([0.5, 2.0, 1.3, 1.4, 1.2, 1.2, 1.2, 0.7], cfg, [0, 0, 1, 1, 2, 2, 2, 3])
    assert weights == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("correction", ["mis", "geometric"])
def test_what_is_not_finite_counts_in_no_response(correction: str) -> None:
    cfg = AlgorithmConfig(correction=correction)
    train, infer = torch.tensor([math.nan, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0])
    assert _of(train, infer, cfg, [0, 0, 1]).tolist() == [0.0, 1.0, 1.0]
