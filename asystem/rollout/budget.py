"""Φ: the tokens that one window may spend, leased to replicas slice by slice.

Two replicas, Φ = 100::

    lease A = 50, lease B = 25          what is leased can not be leased again
    A comes back with 52, B with 25     a replica stops after the decode step that reaches its lease
    lease A = 12, ...                   until nothing is left

A lease is overshot by less than one decode step of its replica, and only leases that are out at the end overshoot Φ, so
a window overshoots Φ by less than one decode step of the whole group.
"""

from __future__ import annotations


class TokenBudget:
    """The budget of one window. ``tokens=None`` never ends the window: it waits for all (the synchronous baseline)."""

    def __init__(self, tokens: int | None) -> None:
        assert tokens is None or tokens > 0, f"a budget of {tokens} tokens"
        self.tokens = tokens
        self.spent = 0
        self._leased = 0

    @property
    def exhausted(self) -> bool:
        """Whether the window is to hand over."""
        return self.tokens is not None and self.spent >= self.tokens

    def lease(self, replicas: int) -> int | None:
        """An equal share of what is neither spent nor leased: 0 when nothing is left, None without a bound."""
        if self.tokens is None:
            return None
        free = max(0, self.tokens - self.spent - self._leased)
        share = -(-free // replicas)
        self._leased += share
        return share

    def settle(self, lease: int | None, spent: int) -> None:
        """Returns a lease with what was really spent under it, which may be less or a little more."""
        self._leased -= lease or 0
        self.spent += spent
