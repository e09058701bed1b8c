"""DPO's losses against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from asystem.algorithms import preference_losses
from asystem.config import DpoConfig, DpoLoss


def losses(values: list[float], **changes: object) -> list[float]:
    result: list[float] = preference_losses(torch.tensor(values), DpoConfig(**changes)).tolist()  # type: ignore[arg-type]
    return result


def test_sigmoid() -> None:
    # β h = 0, 1, -2: log 2, log(1 + e^-1), log(1 + e^2)
    assert losses([0.0, 2.0, -4.0], beta=0.5) == pytest.approx([0.693147, 0.313262, 2.126928], abs=1e-6)


def test_label_smoothing_mixes_in_the_reversed_preference() -> None:
    # 0.9 log(1 + e^-1) + 0.1 log(1 + e)
    assert losses([2.0], beta=0.5, label_smoothing=0.1) == pytest.approx([0.413262], abs=1e-6)


def test_ipo_aims_at_a_margin() -> None:
    # 1 / (2 * 0.25) = 2
    assert losses([0.0, 2.0, 5.0], loss=DpoLoss.ipo, beta=0.25) == pytest.approx([4.0, 0.0, 9.0])


def test_the_gradient_pushes_less_the_surer_the_order() -> None:
    h = torch.tensor([0.0, 2.0, 100.0], requires_grad=True)
    preference_losses(h, DpoConfig(beta=0.5)).sum().backward()  # type: ignore[no-untyped-call]
    assert h.grad is not None
    # -β σ(-β h)
    expected = [-0.25, -0.5 / (1 + math.e), -0.5 / (1 + math.exp(50))]
    assert h.grad.tolist() == pytest.approx(expected, abs=1e-6)
