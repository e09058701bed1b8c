"""Which prompts are worth asking again: chances by what their groups scored at the last visits.

A recipe's own is one function in its folder (`data.curriculum: "task.py:mine"`) with the arguments and result of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

Chance = Callable[[Sequence[float]], float]
"""The mean rewards of the last `data.curriculum_visits` groups of a prompt, oldest first -> its chance, 0 to 1, of
being asked in its turn.

Not called before there were so many visits: until then a prompt is asked in each of its turns.
"""

LEAST = 0.1  # so that nothing is given up for ever: a prompt may become hard, or solvable, again


def unsolved(visits: Sequence[float]) -> float:
    """All but prompts that every sample solved at each of the last visits."""
    return float(min(visits) < 1)


def pass_rate(visits: Sequence[float]) -> float:
    """The nearer to being solved by half of the samples, the likelier: 4 p (1 - p), at least `LEAST`.

    p is the mean of the visits, within 0 and 1. For rewards of 0 and 1 it is, up to a factor, the variance of a group's
    rewards, and so of what GRPO learns from.
    """
    p = min(1.0, max(0.0, fmean(visits)))
    return max(LEAST, 4 * p * (1 - p))


CURRICULA: Mapping[str, Chance] = {"unsolved": unsolved, "pass_rate": pass_rate}
