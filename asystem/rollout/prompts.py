"""The order in which prompts are asked: every row once an epoch, shuffled anew each epoch from the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator


class PromptOrder(Iterator[int]):
    """Rows 0 … num_prompts - 1, epoch after epoch. ``position`` is all the state there is.

    Args:
        num_prompts: rows of the dataset.
        seed: of the shuffles; epoch e is shuffled by (seed, e), so that any position can be found again.
        epochs: None repeats for ever.
    """

    def __init__(self, num_prompts: int, *, seed: int, shuffle: bool = True, epochs: int | None = None) -> None:
        assert num_prompts > 0, "a dataset without prompts"
        self.num_prompts, self.seed, self.shuffle, self.epochs = num_prompts, seed, shuffle, epochs
        self.position = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __next__(self) -> int:
        epoch, index = divmod(self.position, self.num_prompts)
        if self.epochs is not None and epoch >= self.epochs:
            raise StopIteration
        if self._order[0] != epoch:
            rows = list(range(self.num_prompts))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(rows)
            self._order = (epoch, rows)
        self.position += 1
        return self._order[1][index]
