"""What the controller hands to the trainers: references, lengths and advantages, no token arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

from asystem.types import Ref, Trajectory


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One rollout to train on: its trajectory is ``ref``'s list at ``row``.

    A rollout with an ``error`` has no reward; its advantage is 0 and it counts nowhere in the loss.
    """

    ref: Ref[list[Trajectory]]
    row: int
    rollout: int
    group: int
    prompt: int
    prompt_length: int
    length: int  # response tokens
    reward: float
    advantage: float
    error: str | None


@dataclass
class Batch:
    """The rollouts of one step. The counts are those of the whole batch, also in a part of it.

    Attributes:
        version: weights that train on it. num_tokens: response tokens. num_rollouts: rollouts; both without failed ones.
    """

    rows: list[BatchRow]
    version: int
    num_tokens: int
    num_rollouts: int

    def split(self, parts: int) -> list[Batch]:
        """Cuts into parts balanced by tokens, longest rollout first; a part is empty when rollouts are too few."""
        shares: list[list[BatchRow]] = [[] for _ in range(parts)]
        tokens = [0] * parts
        for row in sorted(self.rows, key=lambda row: (-row.prompt_length - row.length, row.rollout)):
            lightest = tokens.index(min(tokens))
            shares[lightest].append(row)
            tokens[lightest] += row.prompt_length + row.length
        return [replace(self, rows=sorted(share, key=lambda row: row.rollout)) for share in shares]

    def minibatches(self, count: int) -> list[Batch]:
        """Cuts into ``count`` batches, whole groups each, every one with counts of its own."""
        if count == 1:
            return [self]
        groups = list(dict.fromkeys(row.group for row in self.rows))
        cuts = [set(groups[i::count]) for i in range(count)]
        return [batch_of([row for row in self.rows if row.group in cut], self.version) for cut in cuts if cut]


def batch_of(rows: list[BatchRow], version: int) -> Batch:
    """A batch of these rows, counted."""
    good = [row for row in rows if row.error is None]
    return Batch(rows, version, num_tokens=sum(row.length for row in good), num_rollouts=len(good))
