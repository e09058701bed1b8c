"""What the controller hands to the trainers: ids, counts, rewards and references, no arrays."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from asystem.types import Ref, Trajectory


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One rollout to train on. Its arrays are ``ref``'s list at ``row``.

    Attributes:
        prompt_length, length: tokens of the prompt and of the response.
        error: why there is no reward; such a row has advantage 0.
    """

    ref: Ref[list[Trajectory]]
    row: int
    rollout: int
    group: int
    prompt: int
    prompt_length: int
    length: int
    reward: float
    advantage: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one optimizer step's global batch: all of them, or one rank's part.

    Attributes:
        version: of the weights that this batch updates.
        num_tokens, num_rollouts: response tokens and rows of the *global* batch; parts keep them, because losses are
            divided by them.
        dropped: rows that are not trained, for the metrics (`algorithm.drop_equal_groups`); parts have none.
    """

    rows: list[BatchRow]
    version: int
    num_tokens: int
    num_rollouts: int
    dropped: list[BatchRow] = field(default_factory=list)

    def split(self, parts: int) -> list[Batch]:
        """Cuts the rows into parts of nearly equal tokens, prompts included. With fewer rows than parts some are empty;
        their ranks still take part in collectives."""
        shares = balanced([row.prompt_length + row.length for row in self.rows], parts)
        return [replace(self, rows=[self.rows[index] for index in share], dropped=[]) for share in shares]


def balanced(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Which rows each part gets, in order: the costliest first, each to the part with the least so far."""
    loads = [(0, part) for part in range(parts)]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(loads)
        chosen[part].append(index)
        heapq.heappush(loads, (load + costs[index], part))
    return [sorted(part) for part in chosen]
