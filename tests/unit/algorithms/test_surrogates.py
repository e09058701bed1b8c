"""Surrogates against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from asystem.algorithms.surrogates import SURROGATES
from asystem.config import AlgorithmConfig

CLIPS = AlgorithmConfig(clip_low=0.2, clip_high=0.3)

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
    surrogate, clipped = SURROGATES["ppo"](logprobs, old, advantages, torch.tensor([0]), CLIPS)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([value], abs=1e-5)
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([slope], abs=1e-5)
    assert clipped.tolist() == [is_clipped]


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_would_overflow_has_a_finite_gradient(name: str, advantage: float) -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    old, advantages = torch.tensor([-300.0]), torch.tensor([advantage])
    surrogate, _ = SURROGATES[name](logprobs, old, advantages, torch.tensor([0]), CLIPS)
    surrogate.sum().backward()
    assert math.isfinite(float(surrogate.detach()))
    assert logprobs.grad is not None and math.isfinite(logprobs.grad.item())


def test_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    cfg = AlgorithmConfig(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    logprobs = torch.tensor([math.log(0.5), math.log(0.2)], requires_grad=True)  # ratios 5 and 2
    old, advantages = torch.full((2,), math.log(0.1)), torch.tensor([-1.0, -1.0])
    surrogate, clipped = SURROGATES["ppo"](logprobs, old, advantages, torch.tensor([0, 0]), cfg)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([-3.0, -2.0], abs=1e-5)
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.0, -2.0], abs=1e-5)
    assert clipped.tolist() == [True, False]


def test_gspo_has_one_ratio_a_response() -> None:
    # Response 0: ratios 2 and 0.5, geometric mean 1, though PPO would clip both. Response 1: 1.5, clipped at 1.3.
    logprobs = torch.tensor([math.log(0.2), math.log(0.05), math.log(0.15)], requires_grad=True)
    old, advantages = torch.full((3,), math.log(0.1)), torch.ones(3)
    surrogate, clipped = SURROGATES["gspo"](logprobs, old, advantages, torch.tensor([0, 0, 1]), CLIPS)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([1.0, 1.0, 1.3], abs=1e-5)
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-5)
    assert clipped.tolist() == [False, False, True]


def test_cispo_cuts_no_gradient_off() -> None:
    logprobs = torch.tensor([math.log(0.2), math.log(0.05), math.log(0.1)], requires_grad=True)  # ratios 2, 0.5, 1
    old, advantages = torch.full((3,), math.log(0.1)), torch.tensor([1.0, 1.0, -2.0])
    surrogate, clipped = SURROGATES["cispo"](logprobs, old, advantages, torch.tensor([0, 0, 0]), CLIPS)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([1.3 * math.log(0.2), 0.8 * math.log(0.05), -2 * math.log(0.1)])
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([1.3, 0.8, -2.0], abs=1e-5)
    assert clipped.tolist() == [True, True, False]
