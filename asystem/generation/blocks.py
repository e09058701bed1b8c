"""The pool of KV blocks: who holds which, and what they hold. Pure Python integers; `kv_cache` has the tensors.

A full block has a name that stands for all tokens up to its end (`sequence.Sequence.names`). Blocks that nobody holds
keep their content, and whoever starts with the same tokens takes them; the least recently used are given away first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out block numbers; a block that several sequences share is free when the last one lets go.

    >>> pool = BlockPool(num_blocks=4, block_size=16)
    >>> pool.allocate(2)
    [0, 1]
    >>> pool.share([0]); pool.release([0, 1]); pool.num_free
    3
    >>> pool.remember([0], [b"name"]); pool.release([0]); pool.find([b"name", b"another"])
    [0]
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # without known content
        self._idle: dict[int, None] = {}  # with it, held by nobody; the least recently used first
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}  # the block of each name

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one maybe in part."""
        return -(-num_tokens // self.block_size)

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks to write to, each held once by the caller, who has looked at `num_free` before."""
        assert count <= self.num_free, f"{count} KV blocks asked, {self.num_free} of {self.num_blocks} free"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        name, self._names[block] = self._names[block], None
        assert name is not None, f"KV block {block} is idle without content"
        del self._blocks[name]
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these blocks, which are held or of known content."""
        for block in blocks:
            known = self._names[block] is not None
            assert known or self._references[block] > 0, f"KV block {block} is free and cannot be shared"
            self._idle.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of a sequence's blocks; the last ones of it are given away before the first."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"KV block {block} is released more often than it was held"
            self._references[block] -= 1
            if self._references[block] == 0 and self._names[block] is not None:
                self._idle[block] = None
            elif self._references[block] == 0:
                self._free.append(block)

    def remember(self, blocks: Iterable[int], names: Iterable[bytes]) -> None:
        """Names the content of full blocks. What another block holds already keeps that one's name."""
        for block, name in zip(blocks, names, strict=True):
            if self._names[block] is None and name not in self._blocks:
                self._names[block] = name
                self._blocks[name] = block

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks that hold what these names stand for, as far as they are known without a gap."""
        found = []
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self) -> None:
        """No content is known any more."""
        self._free += reversed(self._idle)
        self._idle.clear()
        self._blocks.clear()
        self._names = [None] * self.num_blocks
