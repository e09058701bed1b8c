"""GAE and the clipped value loss against hand-worked numbers."""

from __future__ import annotations

import pytest
import torch

from asystem.algorithms import gae, value_loss
from asystem.config import AlgorithmConfig


def test_gae() -> None:
    values = torch.tensor([0.5, 0.25, 1.0, 0.0, 0.5])
    sequence = torch.tensor([0, 0, 0, 1, 1])
    rewards = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0])  # of the responses
    advantages, returns = gae(values, rewards, sequence, AlgorithmConfig(gamma=0.5, gae_lambda=0.5))
    # d = 0.5·0.25 - 0.5 = -0.375; 0.5·1 - 0.25 = 0.25; 2 - 1 = 1        A = d + 0.25 A'
    # d = 0.5·0.5 - 0 = 0.25; -1 - 0.5 = -1.5
    assert advantages.tolist() == pytest.approx([-0.25, 0.5, 1.0, -0.125, -1.5])
    assert returns.tolist() == pytest.approx([0.25, 0.75, 2.0, -0.125, -1.0])


def test_with_lambda_1_a_return_is_the_reward_and_with_0_the_next_value() -> None:
    values, rewards = torch.linspace(-1, 1, 37), torch.full((37,), 3.0)
    sequence = torch.zeros(37, dtype=torch.int64)
    _, returns = gae(values, rewards, sequence, AlgorithmConfig(gae_lambda=1.0))
    torch.testing.assert_close(returns, rewards)
    _, returns = gae(values, rewards, sequence, AlgorithmConfig(gae_lambda=0.0))
    torch.testing.assert_close(returns, torch.cat([values[1:], rewards[:1]]))


def test_the_value_loss_is_that_of_the_worse_of_both() -> None:
    values = torch.tensor([9.0, 0.1, 0.9, 0.5, 0.9], requires_grad=True)
    loss, stats = value_loss(
        values,
        old_values=torch.tensor([0.0, 0.0, 0.5, 0.0, 0.5]),
        returns=torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]),
        token_weights=torch.tensor([1.0, 0.5, 0.25, 1.0, 0.0]),
        rows=torch.arange(1, 5),
        cfg=AlgorithmConfig(value_coefficient=0.1, value_clip=0.2),
    )
    # Within the clip: 0.9² = 0.81. Towards the return beyond it: 0.7 counts, 0.3² = 0.09, without a gradient.
    # Away from the return beyond it: 0.5² = 0.25 against 0.2², with one. The last is masked by its weight.
    assert loss.item() == pytest.approx(0.05 * (0.5 * 0.81 + 0.25 * 0.09 + 0.25))
    loss.backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 0.05 * 0.5 * -1.8, 0.0, 0.05 * 1.0, 0.0])
    assert stats.to_dict()["value/loss"] == pytest.approx(0.5 * (0.81 + 0.09 + 0.25 + 0.81) / 4)
    assert stats.to_dict()["value/clip_fraction"] == 0.25


def test_without_a_clip_it_is_the_squared_error() -> None:
    loss, _ = value_loss(
        torch.tensor([3.0]),
        old_values=torch.tensor([0.0]),
        returns=torch.tensor([1.0]),
        token_weights=torch.tensor([1.0]),
        rows=torch.arange(1),
        cfg=AlgorithmConfig(value_coefficient=1.0, value_clip=None),
    )
    assert float(loss) == pytest.approx(2.0)
