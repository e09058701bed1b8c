"""Penalties against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from asystem.algorithms import overlong_penalty
from asystem.algorithms.penalties import kl_to_reference
from asystem.config import KLEstimator


def test_estimators_by_hand() -> None:
    logprobs, reference = torch.tensor([math.log(0.1), math.log(0.4)]), torch.tensor([math.log(0.2), math.log(0.4)])
    ln2 = math.log(2)
    assert kl_to_reference(logprobs, reference, KLEstimator.k1).tolist() == pytest.approx([-ln2, 0.0], abs=1e-6)
    assert kl_to_reference(logprobs, reference, KLEstimator.k2).tolist() == pytest.approx([ln2**2 / 2, 0.0], abs=1e-6)
    assert kl_to_reference(logprobs, reference, KLEstimator.k3).tolist() == pytest.approx([1 - ln2, 0.0], abs=1e-6)


@pytest.mark.parametrize("estimator", [KLEstimator.k1, KLEstimator.k3])
def test_the_mean_over_the_policy_is_the_divergence(estimator: KLEstimator) -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    mean = (p * kl_to_reference(p.log(), q.log(), estimator)).sum()
    assert float(mean) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_the_gradient_of_k2_points_down_the_divergence() -> None:
    # d KL(p || q) / d logits of a softmax is p (log(p / q) - KL); sampling k2's gradient gives the same on average.
    logits, q = torch.tensor([0.3, -0.2, 0.5], requires_grad=True), torch.tensor([0.2, 0.3, 0.5])
    logp = logits.log_softmax(-1)
    sampled = (logp.exp().detach() * kl_to_reference(logp, q.log(), KLEstimator.k2)).sum()
    (found,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_a_far_reference_stays_finite() -> None:
    assert torch.isfinite(kl_to_reference(torch.tensor([-300.0]), torch.tensor([-1.0]), KLEstimator.k3)).all()


def test_the_last_tokens_before_the_limit_cost_ever_more() -> None:
    assert [overlong_penalty(n, limit=100, buffer=20) for n in (1, 80, 90, 100)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(100, limit=100, buffer=0) == 0.0
