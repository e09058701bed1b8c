"""`Stats` stands on floor 0 (`asystem.stats`), because the algorithms report through it too."""

from asystem.stats import Stats, merge

__all__ = ["Stats", "merge"]
