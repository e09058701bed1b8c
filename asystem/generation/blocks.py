"""The pool of KV blocks: who holds which, by reference count. Pure Python integers; `kv_cache` has the tensors."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out block numbers; a block that several sequences share is free when the last one lets go.

    >>> pool = BlockPool(num_blocks=4, block_size=16)
    >>> pool.allocate(2)
    [0, 1]
    >>> pool.share([0]); pool.release([0, 1]); pool.num_free
    3
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one maybe in part."""
        return -(-num_tokens // self.block_size)

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each held once by the caller, who has looked at `num_free` before."""
        assert count <= len(self._free), f"{count} KV blocks asked, {len(self._free)} of {self.num_blocks} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these blocks."""
        for block in blocks:
            assert self._references[block] > 0, f"KV block {block} is free and cannot be shared"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each of these blocks; the last one frees it."""
        for block in blocks:
            assert self._references[block] > 0, f"KV block {block} is released more often than it was held"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
