"""Packing: hand-worked alignment, and invariants."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asystem.data.packing import NO_LABEL, PackedBatch, Sample, pack, pack_groups, pack_one, plan_bins
from asystem.errors import DataError


def test_everything_stands_where_its_token_is_the_label() -> None:
    packed = pack_one(
        [
            Sample([11, 12, 13], [21, 22], 0.5, 1.5, [-0.1, -0.2], [3, 4], rollout=70),
            Sample([14], [23, 24, 25], 0.25, -1.0, [-0.3, -0.4, -0.5], [5, 5, 5], rollout=71),
        ]
    )
    assert packed.tokens.tolist() == [11, 12, 13, 21, 22, 14, 23, 24, 25]
    assert packed.labels.tolist() == [12, 13, 21, 22, NO_LABEL, 23, 24, 25, NO_LABEL]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert packed.mask.tolist() == [False, False, True, True, False, True, True, True, False]
    assert packed.label_rows.tolist() == [2, 3, 5, 6, 7]
    assert packed.cu_seqlens.tolist() == [0, 5, 9]
    assert packed.cu_seqlens.dtype == torch.int32 and packed.max_seqlen == 5
    assert packed.infer_logprobs.tolist() == pytest.approx([0, 0, -0.1, -0.2, 0, -0.3, -0.4, -0.5, 0])
    assert packed.advantages.tolist() == [0, 0, 1.5, 1.5, 0, -1, -1, -1, 0]
    assert packed.token_weights.tolist() == [0, 0, 0.5, 0.5, 0, 0.25, 0.25, 0.25, 0]
    assert packed.versions.tolist() == [-1, -1, 3, 4, -1, 5, 5, 5, -1]
    assert packed.sequence.tolist() == [0] * 5 + [1] * 4
    assert packed.rollouts == [70, 71]


def test_what_fits_in_two_is_balanced_and_the_larger_goes_first() -> None:
    # 7 + 5 + 3 and 4 would fit as well
    samples = [Sample([0], [0] * (n - 1), 1.0, rollout=n) for n in (3, 4, 5, 7)]
    assert [batch.rollouts for batch in pack(samples, budget=15)] == [[7, 3], [5, 4]]


def test_a_long_sequence_has_a_micro_batch_of_its_own() -> None:
    samples = [Sample([0], [0] * (n - 1), 1.0, rollout=n) for n in (5, 50, 4)]
    assert [batch.rollouts for batch in pack(samples, budget=10)] == [[50], [5, 4]]


def test_nothing_to_pack() -> None:
    assert pack([], budget=10) == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample([1], [], 1.0, rollout=5), "rollout 5 has 1 prompt and 0 response tokens"),
        (Sample([], [1], 1.0, rollout=6), "rollout 6 has 0 prompt and 1 response tokens"),
        (Sample([1], [2, 3], 1.0, infer_logprobs=[0.0], rollout=7), r"rollout 7: infer_logprobs \(1,\) for 2"),
    ],
)
def test_bad_samples_are_named(sample: Sample, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack([sample], budget=10)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(4, 40))
def test_bins_hold_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = plan_bins(lengths, budget)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    for rows in bins:
        assert sum(lengths[row] for row in rows) <= budget or len(rows) == 1
    # First-fit-decreasing never leaves two bins that would fit into one.
    loads = sorted(sum(lengths[row] for row in rows) for rows in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > budget


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=12), st.integers(5, 40))
def test_packing_loses_and_mixes_nothing(shapes: list[tuple[int, int]], budget: int) -> None:
    rng = np.random.default_rng(len(shapes))
    samples = [
        Sample(rng.integers(0, 99, p), rng.integers(0, 99, r), 1.0, infer_logprobs=rng.normal(size=r), rollout=i)
        for i, (p, r) in enumerate(shapes)
    ]
    batches = pack(samples, budget)
    sizes = [len(batch.tokens) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert Counter(rollout for batch in batches for rollout in batch.rollouts) == Counter(range(len(shapes)))
    for batch in batches:
        for index, rollout in enumerate(batch.rollouts):
            _assert_same(batch, index, samples[rollout])


def _assert_same(batch: PackedBatch, index: int, sample: Sample) -> None:
    start, end = batch.cu_seqlens[index : index + 2].tolist()
    whole = np.concatenate([np.asarray(sample.prompt_tokens), np.asarray(sample.tokens)])
    assert batch.tokens[start:end].tolist() == whole.tolist()
    rows = torch.arange(start, end)[batch.mask[start:end]]
    assert batch.labels[rows].tolist() == np.asarray(sample.tokens).tolist()
    assert batch.infer_logprobs[rows].tolist() == pytest.approx(np.asarray(sample.infer_logprobs).tolist(), rel=1e-6)
    assert set(batch.sequence[start:end].tolist()) == {index}


def test_context_after_the_prompt_is_no_label() -> None:
    packed = pack_one(
        [
            Sample([1, 2], [3, 4, 5, 6], 0.5, advantage=2.0, trained=[True, False, False, True]),
            Sample([7], [8, 9], 0.25, infer_logprobs=[-1.0, -2.0], trained=[False, True]),
        ]
    )
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert packed.mask.tolist() == [False, True, False, False, True, False, False, True, False]
    assert packed.label_rows.tolist() == [1, 4, 7]
    assert packed.token_weights.tolist() == [0, 0.5, 0, 0, 0.5, 0, 0, 0.25, 0]
    assert packed.infer_logprobs.tolist() == [0, 0, 0, 0, 0, 0, 0, -2.0, 0]
    with pytest.raises(DataError, match=r"rollout 5: trained \(1,\) for 2 response tokens"):
        pack([Sample([1], [2, 3], 1.0, rollout=5, trained=[True])], budget=10)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=12), st.integers(4, 30))
def test_groups_stay_together_in_their_order(shapes: list[list[int]], budget: int) -> None:
    groups = [
        [Sample([0], [0] * n, 1.0, rollout=10 * g + i) for i, n in enumerate(lengths)]
        for g, lengths in enumerate(shapes)
    ]
    batches = pack_groups(groups, budget)
    assert all(len(batch.tokens) <= budget or len({r // 10 for r in batch.rollouts}) == 1 for batch in batches)
    found = [number for batch in batches for number in batch.rollouts]
    starts = {group: found.index(10 * group) for group in range(len(shapes))}
    for group, start in starts.items():
        assert found[start : start + len(shapes[group])] == [10 * group + i for i in range(len(shapes[group]))]
    assert len(found) == sum(map(len, shapes))
