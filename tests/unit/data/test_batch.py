"""Cutting a batch over ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asystem.data.batch import Batch, BatchRow
from asystem.types import Ref


def _batch(lengths: list[int]) -> Batch:
    rows = [BatchRow(Ref(None), i, i, i // 4, i // 4, 2, length, 0.0, 0.0) for i, length in enumerate(lengths)]
    return Batch(rows, version=3, num_tokens=sum(lengths), num_rollouts=len(lengths))


def test_parts_are_balanced_by_tokens_and_keep_global_counts() -> None:
    # with two prompt tokens each: 12, 7, 6, 5; longest first to the emptiest part: 12 | 7, then 7 + 6, then 12 + 5
    left, right = _batch([10, 5, 4, 3]).split(2)
    assert [row.rollout for row in left.rows] == [0, 3]
    assert [row.rollout for row in right.rows] == [1, 2]
    assert (left.num_tokens, left.num_rollouts, left.version) == (22, 4, 3)


def test_fewer_rows_than_parts_leave_some_empty() -> None:
    assert sorted(len(part.rows) for part in _batch([4, 4]).split(3)) == [0, 1, 1]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_each_row_goes_to_one_part(lengths: list[int], parts: int) -> None:
    batch = _batch(lengths)
    split = batch.split(parts)
    assert len(split) == parts
    assert sorted(row.rollout for part in split for row in part.rows) == list(range(len(lengths)))
    loads = [sum(row.prompt_length + row.length for row in part.rows) for part in split]
    longest = max((length + 2 for length in lengths), default=0)
    assert max(loads) - min(loads) <= longest
    if len(lengths) >= parts:
        assert all(part.rows for part in split)
