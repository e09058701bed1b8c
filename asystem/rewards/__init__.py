"""Verifiers: pure functions of a dataset row and a response, 1 for right and 0 for wrong."""

from asystem.rewards.text import exact_match

__all__ = ["exact_match"]
