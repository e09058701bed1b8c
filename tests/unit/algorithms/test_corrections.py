"""Mismatch corrections against hand-worked numbers, outside the band and NaN included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from asystem.algorithms import correction_weights
from asystem.config import AlgorithmConfig, Correction


def _weights(ratios: list[float], cfg: AlgorithmConfig) -> list[float]:
    """The weights of tokens with these p_train / p_infer, the training engine giving each probability 0.3."""
    train = torch.full((len(ratios),), math.log(0.3))
    infer = torch.tensor([math.log(0.3 / k) for k in ratios])
    weights: list[float] = correction_weights(train, infer, cfg).tolist()
    return weights


def test_icepop_keeps_the_ratio_inside_the_band_and_masks_both_sides() -> None:
    cfg = AlgorithmConfig(correction=Correction.icepop, icepop_alpha=0.5, icepop_beta=5.0)
    assert _weights([0.49, 0.51, 1.0, 2.5, 4.99, 5.01, 1e6], cfg) == pytest.approx(
        [0, 0.51, 1, 2.5, 4.99, 0, 0], abs=1e-5
    )


def test_icepop_includes_its_bounds() -> None:
    cfg = AlgorithmConfig(correction=Correction.icepop, icepop_alpha=0.5, icepop_beta=4.0)
    log_k = torch.tensor([math.log(0.5), math.log(4.0)])
    assert correction_weights(log_k, torch.zeros(2), cfg).tolist() == pytest.approx([0.5, 4.0])


def test_icepop_without_a_lower_bound() -> None:
    cfg = AlgorithmConfig(correction=Correction.icepop, icepop_alpha=0.0, icepop_beta=2.0)
    assert _weights([1e-3, 1.0, 3.0], cfg) == pytest.approx([1e-3, 1.0, 0.0], abs=1e-6)


def test_tis_caps_from_above_only() -> None:
    cfg = AlgorithmConfig(correction=Correction.tis, tis_cap=2.0)
    assert _weights([0.01, 1.0, 1.9, 2.1, 1e6], cfg) == pytest.approx([0.01, 1.0, 1.9, 2.0, 2.0], abs=1e-5)


def test_none_weighs_all_alike() -> None:
    assert _weights([0.01, 1.0, 1e6], AlgorithmConfig(correction=Correction.none)) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("correction", list(Correction))
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
def test_what_is_not_finite_gets_weight_zero(correction: Correction, train: float, infer: float) -> None:
    cfg = AlgorithmConfig(correction=correction)
    weights = correction_weights(torch.tensor([train, -1.0]), torch.tensor([infer, -1.0]), cfg)
    assert weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("correction", list(Correction))
def test_a_ratio_that_overflows_stays_finite(correction: Correction) -> None:
    # exp(200) is infinite in float32
    weights = correction_weights(torch.tensor([-1.0]), torch.tensor([-201.0]), AlgorithmConfig(correction=correction))
    expected = {Correction.none: 1.0, Correction.tis: 2.0, Correction.icepop: 0.0}
    assert weights.tolist() == pytest.approx([expected[correction]])


def test_weights_have_no_gradient() -> None:
    train = torch.tensor([-1.0], requires_grad=True)
    weights: Tensor = correction_weights(train, torch.tensor([-1.1]), AlgorithmConfig())
    assert not weights.requires_grad
