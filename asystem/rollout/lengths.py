"""Response lengths of studies, in place of those that a model with random weights would never give."""

from __future__ import annotations

import math
import random


def drawn_length(median: float, sigma: float, longest: int, *, seed: int, rollout: int) -> int:
    """Tokens of a rollout, log-normal and at most ``longest``: a function of seed and rollout alone."""
    length = random.Random(f"{seed}/{rollout}").lognormvariate(math.log(median), sigma)
    return max(1, min(longest, round(length)))
