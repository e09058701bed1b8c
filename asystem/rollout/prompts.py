"""The order in which prompts are asked: every row once an epoch, shuffled anew each epoch from the seed.

With a curriculum, a row whose turn it is is left out by a chance that depends on what it scored before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from asystem.rollout.curriculum import Chance


class PromptOrder(Iterator[int]):
    """Rows 0 … num_prompts - 1, epoch after epoch. ``position`` and ``visits`` are all the state there is.

    Args:
        num_prompts: rows of the dataset.
        seed: of the shuffles; epoch e is shuffled by (seed, e), so that any position can be found again, and what a
            chance decides at a position is drawn by (seed, position).
        epochs: None repeats for ever.
        chance: of a row being asked in its turn; None = each row is.
        memory: visits that ``chance`` looks at; a row with fewer of them is asked.
    """

    def __init__(
        self,
        num_prompts: int,
        *,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
        chance: Chance | None = None,
        memory: int = 2,
    ) -> None:
        assert num_prompts > 0, "a dataset without prompts"
        self.num_prompts, self.seed, self.shuffle, self.epochs = num_prompts, seed, shuffle, epochs
        self.chance, self.memory = chance, memory
        self.position = 0
        self.visits: dict[int, list[float]] = {}  # mean rewards of the last `memory` groups, by row
        self._order: tuple[int, list[int]] = (-1, [])

    def __next__(self) -> int:
        row = self._next_row()
        for _ in range(self.num_prompts):
            if self._is_wanted(row):
                break
            row = self._next_row()
        return row  # after an epoch of refusals whatever comes: training goes on

    def learn(self, row: int, reward: float) -> None:
        """Takes the mean reward of a group of this row. Calls in equal places give equal orders."""
        if self.chance is not None:
            self.visits[row] = [*self.visits.get(row, []), reward][-self.memory :]

    def state(self) -> dict[str, Any]:
        """What `load` takes, of numbers and lists alone."""
        return {"position": self.position, "visits": sorted(self.visits.items())}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where the order stood that gave this state; a state may come out of JSON."""
        self.position = state["position"]
        self.visits = {row: list(rewards) for row, rewards in state["visits"]}

    def _next_row(self) -> int:
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

    def _is_wanted(self, row: int) -> bool:
        visits = self.visits.get(row, [])
        if self.chance is None or len(visits) < self.memory:
            return True
        return random.Random(f"{self.seed}/chance/{self.position}").random() < self.chance(visits)
