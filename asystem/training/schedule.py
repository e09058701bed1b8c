"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from asystem.config import Schedule


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then constant, or falling to 0 at ``total_steps`` in a line or half a cosine.

    Attributes:
        peak: after the warm-up. warmup_steps, total_steps: optimizer steps.
    """

    peak: float
    schedule: Schedule
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """Of the step with that number, from 0. The first warm-up step already learns: peak / warmup_steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule is Schedule.constant:
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.peak * (1 - done if self.schedule is Schedule.linear else (1 + math.cos(math.pi * done)) / 2)
