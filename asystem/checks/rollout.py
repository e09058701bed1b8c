"""Windows of rollouts, and that every prompt is through in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asystem.checks.rules import Rule, at_least

if TYPE_CHECKING:
    from asystem.config import Config


def rollout(config: Config) -> Iterator[Rule]:
    rollout, group = config.rollout, config.algorithm.group_size
    yield (
        rollout.max_staleness < 0,
        f"rollout.max_staleness={rollout.max_staleness} (η) is below 0; 0 is lockstep, 1 overlaps one batch",
    )
    yield (
        rollout.token_budget is not None and rollout.token_budget <= 0,
        f"rollout.token_budget={rollout.token_budget} (Φ) must be above 0, or null to wait for all rollouts",
    )
    yield rollout.retention < 0, f"rollout.retention={rollout.retention} (σ) is below 0"
    yield (
        rollout.capacity < group,
        f"rollout.capacity={rollout.capacity} (Ω) is below one group of {group}; set it to a multiple of {group}",
    )
    below = rollout.capacity - rollout.capacity % group
    yield (
        rollout.capacity % group != 0,
        f"rollout.capacity={rollout.capacity} (Ω) is no multiple of algorithm.group_size={group}; "
        f"use {below} or {below + group}",
    )
    yield at_least("rollout.max_new_tokens", rollout.max_new_tokens, 1)
    yield at_least("rollout.slice_steps", rollout.slice_steps, 1)
    yield (
        rollout.temperature <= 0,
        (f"rollout.temperature={rollout.temperature:g}: rollouts are sampled, so it must be above 0"),
    )
    yield not 0 < rollout.top_p <= 1, f"rollout.top_p={rollout.top_p:g} must lie in (0, 1]"
    yield at_least("rollout.top_k", rollout.top_k, 0)
    yield (
        rollout.lengths.median is not None and not rollout.lengths.median > 0,
        f"rollout.lengths.median={rollout.lengths.median} must be above 0, or null to let end tokens end responses",
    )
    yield at_least("rollout.lengths.sigma", rollout.lengths.sigma, 0)
    yield (
        rollout.top_p < 1 or rollout.top_k > 0,
        f"rollout.top_p={rollout.top_p:g}, top_k={rollout.top_k}: training scores tokens under the whole distribution, "
        "so truncated sampling would bias every ratio; use top_p=1 and top_k=0",
    )


def liveness(config: Config) -> Iterator[Rule]:
    """A group must be able to finish within σ + 1 windows, or it would be purged for ever (see `rollout.pool`)."""
    rollout, group = config.rollout, config.algorithm.group_size
    if rollout.token_budget is None:
        return
    needed, granted = group * rollout.max_new_tokens, rollout.token_budget * (rollout.retention + 1)
    yield (
        needed > granted,
        f"a group of {group} × {rollout.max_new_tokens} new tokens cannot finish within "
        f"rollout.retention+1={rollout.retention + 1} windows of rollout.token_budget={rollout.token_budget}: it would "
        f"be purged for ever; raise token_budget to {-(-needed // (rollout.retention + 1))} or retention to "
        f"{-(-needed // rollout.token_budget) - 1}, or lower max_new_tokens",
    )
