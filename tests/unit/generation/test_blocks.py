from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asystem.generation.blocks import BlockPool


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_more_than_is_free_is_refused_with_the_numbers() -> None:
    pool = BlockPool(3, 16)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="2 KV blocks asked, 1 of 3 free"):
        pool.allocate(2)


def test_double_release_and_sharing_of_a_free_block_are_bugs() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="free and cannot be shared"):
        pool.share(blocks)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_a_block_is_free_exactly_when_nobody_holds_it(actions: list[tuple[str, int]]) -> None:
    pool, holders = BlockPool(8, 4), []
    for action, n in actions:
        if action == "allocate" and n <= pool.num_free:
            holders.append(pool.allocate(n))
        elif action == "share" and holders:
            holders.append(list(holders[n % len(holders)]))
            pool.share(holders[-1])
        elif action == "release" and holders:
            pool.release(holders.pop(n % len(holders)))
        held = Counter(block for blocks in holders for block in blocks)
        assert [pool.references(block) for block in range(8)] == [held[block] for block in range(8)]
        assert pool.num_used == len(held)
    for blocks in holders:
        pool.release(blocks)
    assert sorted(pool.allocate(8)) == list(range(8))
