"""Packed attention against softmax written out, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from asystem.models import PackedAttention
from asystem.models.attention import EQUAL, LONG, _are_worth_it, _by_length, _runs


def written_out(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    outs, start = [], 0
    group = q.shape[1] // k.shape[1]
    for length in lengths:
        rows = slice(start, start + length)
        for position in range(length):
            past = slice(start, start + position + 1)
            keys, values = k[past].repeat_interleave(group, 1), v[past].repeat_interleave(group, 1)
            weights = torch.einsum("hd,thd->ht", q[rows][position], keys) / math.sqrt(q.shape[-1])
            outs.append(torch.einsum("ht,thd->hd", weights.softmax(-1), values))
        start += length
    return torch.stack(outs)


def inputs(lengths: list[int], heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    shapes = [(sum(lengths), h, 8) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 40, 2, 13, 12, 30, 3], [3, 0, 9, 0]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_forward_and_gradients(lengths: list[int], heads: int, kv_heads: int) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ours, theirs = inputs(lengths, heads, kv_heads), inputs(lengths, heads, kv_heads)
    out = PackedAttention(bounds, max(lengths))(0, *ours)
    expected = written_out(*theirs, lengths)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * toward).sum().backward()
    (expected * toward).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_no_tokens() -> None:
    q = torch.zeros(0, 2, 4)
    assert PackedAttention(torch.zeros(1, dtype=torch.int32), 0)(0, q, q, q).shape == (0, 2, 4)


def test_buckets_waste_little_on_padding() -> None:
    lengths = [2000, 16, 15, 1500, 12, 700, 16, 9, 1]
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    buckets = _by_length(spans)
    assert sorted(span for bucket in buckets for span in bucket) == spans
    squares = sum(len(bucket) * max(end - begin for begin, end in bucket) ** 2 for bucket in buckets)
    assert squares <= 1.8 * sum(length**2 for length in lengths)
    assert len(_by_length([(i * 20, i * 20 + 20 - i % 9) for i in range(64)])) == 1  # short ones share one call


def test_runs_of_sequences_that_go_to_one_kernel_together() -> None:
    lengths = [300, 40, LONG, LONG, 7, *[20] * EQUAL, 20 + LONG, 3, 3]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    found = [(run.first, run.last, run.is_dense) for run in _runs(starts)]
    assert found == [(0, 2, False), (2, 4, True), (4, 5, False), (5, 13, True), (13, 14, True), (14, 16, False)]
    assert [run.start for run in _runs(starts)] == [starts[first] for first, _, _ in found]
    assert _runs(starts)[-1].stop == sum(lengths)
    assert _runs([0]) == []


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([640] * 24, True),
        ([16_000], True),
        ([700, 30], False),
        ([LONG, *[400] * 30], False),  # 4 million of the 29 that joining 14,048 tokens costs
        ([10_000, *[400] * 10], True),
        ([*[640] * 24, 10], False),
    ],
)
def test_runs_of_few_large_squares_are_not_worth_it(lengths: list[int], expected: bool) -> None:
    assert _are_worth_it(_runs([0, *torch.tensor(lengths).cumsum(0).tolist()])) is expected
