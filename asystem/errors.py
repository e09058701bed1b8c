"""Every error that a user can meet. Each message carries the numbers and the remedy.

AsystemError
├── ConfigError        a recipe, key or value that cannot work; raised before anything starts
├── DataError          a dataset, task or tokenizer that cannot be read, with its file and line
├── ModelError         a model folder or checkpoint that is incomplete or of another shape
├── CapacityError       a plan that does not fit: what was needed, what there is, what would fit
├── StarvationError    rollouts that no window can ever finish
├── RewardError        more rewards failed than ``reward.max_error_share`` allows
├── TrainingError      gradients that stay NaN or infinite
├── ReplayError        a repeated run came out otherwise
├── PublicationError   weights that arrived in generation are not those of training
└── WorkerError        a rank failed, died or overran its deadline; names group, rank, host and method
    └── WorkerTimeout
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AsystemError(Exception):
    """Base of all errors that are shown to a user as one line."""


class ConfigError(AsystemError, ValueError):
    """A configuration that cannot work."""


class DataError(AsystemError, ValueError):
    """A dataset, task file or tokenizer that cannot be used."""


class ModelError(AsystemError, ValueError):
    """A model folder or checkpoint that cannot be used."""


class CapacityError(AsystemError):
    """Something does not fit in memory: the message says what would."""


class StarvationError(AsystemError):
    """Rollouts that cannot finish within their retention, whatever else is held back."""


class RewardError(AsystemError):
    """Too large a share of rewards failed."""


class TrainingError(AsystemError):
    """Training cannot go on."""


class ReplayError(AsystemError):
    """A repeated run differs from the recorded one."""


class PublicationError(AsystemError):
    """Published weights did not arrive as they were sent."""


class WorkerError(AsystemError):
    """A rank of a worker group failed.

    Attributes:
        group, rank, host, method: who failed, where, and in which call.
    """

    def __init__(self, group: str, rank: int, host: str, method: str, reason: str) -> None:
        super().__init__(f"{group} rank {rank} on {host}: {method}: {reason}")
        self.group, self.rank, self.host, self.method, self.reason = group, rank, host, method, reason

    def __reduce__(self) -> tuple[type[WorkerError], tuple[str, int, str, str, str]]:
        return type(self), (self.group, self.rank, self.host, self.method, self.reason)


class WorkerTimeout(WorkerError):
    """A rank did not answer within its deadline."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `` (did you mean "x"?)``, or the known names when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f' (did you mean "{close[0]}"?)'
    return f" (known: {', '.join(names)})" if names else ""
