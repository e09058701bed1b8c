"""The clipped surrogate against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from asystem.algorithms import clipped_surrogate

# ratio, advantage -> surrogate with clips 0.2 below and 0.3 above, d surrogate / d logprob, clipped
CASES = [
    (1.0, 2.0, 2.0, 2.0, False),
    (1.2, 1.0, 1.2, 1.2, False),
    (1.5, 1.0, 1.3, 0.0, True),  # better already: no further
    (1.5, -1.0, -1.5, -1.5, False),  # wrong way: pulled back in full
    (0.5, 1.0, 0.5, 0.5, False),
    (0.5, -1.0, -0.8, 0.0, True),
    (0.9, -2.0, -1.8, -1.8, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "slope", "is_clipped"), CASES)
def test_hand_worked(ratio: float, advantage: float, value: float, slope: float, is_clipped: bool) -> None:
    logprobs = torch.tensor([math.log(0.1 * ratio)], requires_grad=True)
    old, advantages = torch.tensor([math.log(0.1)]), torch.tensor([advantage])
    surrogate, clipped = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.3)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([value], abs=1e-5)
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([slope], abs=1e-5)
    assert clipped.tolist() == [is_clipped]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_would_overflow_has_a_finite_gradient(advantage: float) -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    surrogate, _ = clipped_surrogate(
        logprobs, torch.tensor([-300.0]), torch.tensor([advantage]), clip_low=0.2, clip_high=0.2
    )
    surrogate.sum().backward()
    assert math.isfinite(float(surrogate.detach()))
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0]
