from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asystem.generation.sampler import sample, stream_key, truncate, uniform

MASK = (1 << 64) - 1


def splitmix(key: int, counter: int) -> float:
    """SplitMix64 in Python's own integers."""
    x = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return (((x ^ (x >> 31)) >> 14) + 0.5) / 2**50


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 100_000))
def test_uniform_is_splitmix64(key: int, counter: int) -> None:
    got = uniform(torch.tensor([key]), torch.tensor([counter])).item()
    assert got == splitmix(key, counter)
    assert 0 < got < 1


def test_streams_of_neighbouring_rollouts_seeds_and_positions_are_uncorrelated() -> None:
    keys = torch.tensor([[stream_key(seed, rollout) for rollout in range(-50, 50)] for seed in range(40)])
    u = uniform(keys[..., None].expand(-1, -1, 40), torch.arange(40).expand(40, 100, 40)).flatten(1)
    assert len(set(keys.flatten().tolist())) == 4000
    grid = u.view(40, 100, 40) - 0.5
    deviation = 1 / (12 * math.sqrt(grid.numel()))  # of the mean product of two independent uniform numbers
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[..., 1:], grid[..., :-1])):
        assert abs((a * b).mean().item()) < 4 * deviation
    assert abs(grid.mean().item()) < 4 * math.sqrt(1 / 12 / grid.numel())


def expected(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The distribution by the definition, token by token."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    mass, kept, total = 0.0, [], sum(weights[i] for i in order)
    for i in order:
        if mass / total >= top_p:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 12, 1.0), (0.6, 12, 1.0), (1.3, 5, 1.0), (1.0, 12, 0.8), (0.9, 7, 0.7)]
)
def test_chi_square_and_log_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    n, logits = 40_000, torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    u = uniform(torch.tensor([stream_key(0, rollout) for rollout in range(n)]), torch.zeros(n, dtype=torch.int64))
    truncation = None if top_k == 12 and top_p == 1 else (torch.full((n,), top_k), torch.full((n,), top_p))
    tokens, logprobs = sample(logits.expand(n, -1), torch.full((n,), temperature), u, truncation)
    probs = expected(logits.tolist(), temperature, top_k, top_p)
    counts = tokens.bincount(minlength=12).tolist()
    assert all(count == 0 for count, p in zip(counts, probs, strict=True) if p == 0)
    assert torch.allclose(logprobs.exp(), torch.tensor(probs)[tokens], atol=1e-6)
    kept = [(count, n * p) for count, p in zip(counts, probs, strict=True) if p > 0]
    statistic = sum((count - mean) ** 2 / mean for count, mean in kept)
    freedom = len(kept) - 1
    assert freedom >= 2
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_no_token_without_probability_is_drawn_at_either_end() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -200.0, -math.inf]]).expand(2, -1)
    ends = torch.tensor([2.0**-51, 1 - 2.0**-51], dtype=torch.float64)
    tokens, logprobs = sample(logits, torch.ones(2), ends)
    assert tokens.tolist() == [1, 3]
    assert logprobs.tolist() == pytest.approx([-1.3132617, -0.3132617], abs=1e-6)


@given(st.integers(2, 3000), st.floats(0.1, 3.0))
def test_the_last_token_is_reached_though_the_sum_is_not_one(size: int, spread: float) -> None:
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size)) * spread
    top = torch.tensor([1 - 2.0**-51], dtype=torch.float64)
    tokens, logprobs = sample(logits, torch.ones(1), top)
    assert tokens.item() < size
    assert torch.isfinite(logprobs).all()


def test_greedy_rows_report_the_untruncated_distribution_beside_sampled_ones() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    truncation = (torch.tensor([3, 1]), torch.tensor([1.0, 1.0]))
    tokens, logprobs = sample(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.01, 0.01]).double(), truncation)
    assert tokens.tolist() == [1, 1]
    assert logprobs.tolist() == pytest.approx([-0.40760595, 0.0], abs=1e-6)


def test_top_p_keeps_the_likeliest_and_one_keeps_all() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 90.0, 1.0]])
    tight = truncate(logits, torch.tensor([3, 3]), torch.tensor([1e-6, 1.0]))
    assert torch.isfinite(tight).tolist() == [[False, True, False], [True, True, True]]


def test_ties_at_the_border_keep_exactly_k() -> None:
    kept = truncate(torch.tensor([[2.0, 1.0, 1.0, 1.0]]), torch.tensor([2]), torch.tensor([1.0]))
    assert torch.isfinite(kept).sum() == 2
