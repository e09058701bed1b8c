"""The C3PO++ rollout pool (Ring-1T report, §2.3.3 and Algorithm 1): Ω, σ, and what becomes of each group.

    prompts ──ask──▶ IN FLIGHT ──finish (all G samples)──▶ COMPLETE ──close_window──▶ a batch
       ▲                │ close_window: age += 1
       └── asked again ─┴─ age > σ: purged

A group (GRPO's G samples of one prompt) is asked, carried, purged and trained as a whole, so its tokens are never older
than σ windows. A purged prompt goes back to the head of the queue: no prompt is lost, and none is trained twice.

Example with Ω = 4, G = 2, σ = 1: groups 0 and 1 are in flight. Window 0 ends, group 0 is complete: it trains, group 1
has age 1 and is carried. Window 1 ends, group 1 still lacks a sample: age 2 > σ, it is purged, and its prompt is asked
again as group 3.

Liveness: while a prompt that was purged n times is in flight, nothing else is asked beyond Ω / 2^n rollouts. Windows
then last for more decode steps, and after log2(Ω / G) purges the prompt ends up with whole windows to itself;
`Config.check` holds that a group fits into σ + 1 of them. Hence every prompt is trained in the end, however unlucky its
lengths, and a pool whose σ is short for its lengths settles at the Ω that it can finish.

Replicas share Ω by their speed. Each asks before every slice of decoding, so of two that both have work, the one that
asks twice as often is twice as fast. Only the order of calls counts, no clock: a replay asks the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil

from asystem.types import FinishedRollout, RolloutRequest


@dataclass(slots=True)
class Group:
    """The samples of one prompt, from being asked to being trained."""

    id: int
    prompt: int
    rollouts: list[int]
    replica: int
    purges: int = 0  # how often this prompt was purged before
    age: int = 0  # windows it outlived
    finished: list[FinishedRollout] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.finished) == len(self.rollouts)

    @property
    def unfinished(self) -> list[int]:
        done = {rollout.rollout for rollout in self.finished}
        return [rollout for rollout in self.rollouts if rollout not in done]

    @property
    def first_version(self) -> int:
        """The oldest weights that sampled a token of this group."""
        return min(rollout.first_version for rollout in self.finished)


@dataclass(slots=True)
class Window:
    """What one window hands over: complete groups in the order in which they completed, and what is given up."""

    index: int
    groups: list[Group]
    purged: list[Group]
    carried: int  # unfinished rollouts that go on in the next window
    count: int = 1  # windows that this one stands for

    def join(self, later: Window) -> Window:
        """Both as one, where a batch needs more than the first brought."""
        groups, purged = self.groups + later.groups, self.purged + later.purged
        return Window(later.index, groups, purged, later.carried, self.count + later.count)

    def to_drop(self) -> dict[int, list[int]]:
        """Unfinished rollouts that each replica is to forget."""
        drop: dict[int, list[int]] = {}
        for group in self.purged:
            drop.setdefault(group.replica, []).extend(group.unfinished)
        return drop


class Pool:
    """Decides what to ask of which replica and what a closed window yields.

    Args:
        prompts: dataset rows; may end, then nothing new is asked and what is in flight is finished.
        group_size: G. capacity: Ω, rollouts in flight over all replicas. retention: σ.
        replicas: generation replicas; each takes at most its `share` of Ω.
        refill: ask for more as rollouts finish (Φ finite); otherwise a window asks for Ω rollouts and no more.
    """

    def __init__(
        self,
        prompts: Iterable[int],
        *,
        group_size: int,
        capacity: int,
        retention: int,
        replicas: int = 1,
        refill: bool = True,
    ) -> None:
        assert capacity >= group_size >= 1, f"capacity {capacity} below one group of {group_size}"
        self.group_size, self.capacity, self.retention = group_size, capacity, retention
        self.in_flight: dict[int, Group] = {}
        self.num_in_flight = [0] * replicas
        self._slices = [0] * replicas  # begun while all replicas had work, since speeds were last worked out
        self._speed = [1 / replicas] * replicas  # of all slices, recent windows counting more
        self.prompts: Iterator[int] = iter(prompts)
        self._again: deque[tuple[int, int]] = deque()  # (prompt, purges)
        self._complete: list[Group] = []
        self.refill = refill
        self._asked = 0  # rollouts, in this window
        self._next_rollout = self._next_group = self._windows = 0

    def ask(self, replica: int) -> list[RolloutRequest]:
        """New groups for this replica, as far as Ω and its share of it have room. Called before each slice."""
        self._slices[replica] += all(self.num_in_flight)
        requests: list[RolloutRequest] = []
        while (
            (sum(self.num_in_flight) if self.refill else self._asked) + self.group_size <= self.limit
            and self.num_in_flight[replica] + self.group_size <= self.share(replica)
            and (prompt := self._next_prompt()) is not None
        ):
            group = self._new_group(*prompt, replica)
            requests += [RolloutRequest(rollout, group.id, group.prompt) for rollout in group.rollouts]
        return requests

    @property
    def limit(self) -> int:
        """Rollouts that may be in flight now: Ω, halved as often as the unluckiest prompt in flight was purged."""
        purges = max((group.purges for group in self.in_flight.values()), default=0)
        return max(self.group_size, self.capacity >> purges)

    def share(self, replica: int) -> int:
        """Rollouts that a replica may have in flight: its part of Ω by speed, in whole groups, at least one."""
        groups = self.capacity // self.group_size
        return max(1, ceil(groups * self._speed[replica] - 1e-9)) * self.group_size

    def finish(self, rollouts: Iterable[FinishedRollout]) -> None:
        """Takes finished rollouts; those of a group that was purged meanwhile are ignored."""
        for rollout in rollouts:
            group = self.in_flight.get(rollout.group)
            if group is None:
                continue
            group.finished.append(rollout)
            self.num_in_flight[group.replica] -= 1
            if group.complete:
                del self.in_flight[group.id]
                self._complete.append(group)

    def close_window(self) -> Window:
        """Hands over the complete groups, ages the others, purges those older than σ and queues their prompts."""
        for group in self.in_flight.values():
            group.age += 1
        purged = [group for group in self.in_flight.values() if group.age > self.retention]
        for group in reversed(purged):  # so that the oldest is asked first
            self.num_in_flight[group.replica] -= len(group.unfinished)
            del self.in_flight[group.id]
            self._again.appendleft((group.prompt, group.purges + 1))
        window = Window(self._windows, self._complete, purged, carried=sum(self.num_in_flight))
        self._complete = []
        self._asked = 0
        if all(self._slices):
            total = sum(self._slices)
            self._speed = [(old + new / total) / 2 for old, new in zip(self._speed, self._slices, strict=True)]
            self._slices = [0] * len(self._slices)
        self._windows += 1
        return window

    def _next_prompt(self) -> tuple[int, int] | None:
        """The prompt to ask next and how often it was purged: the unluckiest first, then new ones."""
        if self._again:
            prompt = max(self._again, key=lambda waiting: waiting[1])  # of several the first
            self._again.remove(prompt)
            return prompt
        prompt_row = next(self.prompts, None)
        return None if prompt_row is None else (prompt_row, 0)

    def _new_group(self, prompt: int, purges: int, replica: int) -> Group:
        rollouts = list(range(self._next_rollout, self._next_rollout + self.group_size))
        group = Group(self._next_group, prompt, rollouts, replica, purges)
        self._next_rollout += self.group_size
        self._asked += self.group_size
        self._next_group += 1
        self.in_flight[group.id] = group
        self.num_in_flight[replica] += self.group_size
        return group
