"""What a runtime offers to worker groups, and how one is chosen.

`inline` keeps every rank in this process; `ray` gives each its own. Groups see only the two protocols below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from asystem.config import PlacementConfig, RuntimeConfig, RuntimeKind
from asystem.spmd.host import GroupSpec, Reply, Whereabouts
from asystem.types import CallRecord

OnCall = Callable[[CallRecord], None]


class Rank(Protocol):
    """One rank, as the controller sees it. Calls run in the order in which they are made."""

    @property
    def where(self) -> Whereabouts: ...

    def started(self) -> asyncio.Future[Reply]:
        """Answers when the worker stands and `Worker.setup` is through."""

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Reply]:
        """Hands the call over before it returns; the future always ends in a `Reply`, that of a dead rank too."""

    def kill(self) -> None:
        """Ends the rank whatever it does."""

    def last_words(self, *, hanging: bool) -> str:
        """The tail of the rank's error output; of one that hangs, where it stands. Empty when that cannot be had."""


class Runtime(Protocol):
    """Starts ranks. A context manager: leaving it ends them all.

    Attributes:
        num_gpus: what there is for ranks to own; 0 where they own none.
        one_host: whether all ranks run on one machine.
    """

    config: RuntimeConfig
    num_gpus: float
    one_host: bool
    on_call: OnCall | None

    def start_group(self, spec: GroupSpec) -> Sequence[Rank]:
        """Begins to start the ranks of a group, and does not wait for them.

        Raises:
            ConfigError: this runtime, or the cluster, has no room for it.
        """

    def close(self) -> None:
        """Ends every rank, and what the runtime has started for them."""

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_runtime(config: RuntimeConfig, placement: PlacementConfig, *, on_call: OnCall | None = None) -> Runtime:
    """The configured runtime, started. Use it in a ``with`` statement, or `Runtime.close` it.

    Args:
        on_call: gets a record of every remote call of every rank, in the controller's event loop.
    """
    if config.kind is RuntimeKind.inline:
        from asystem.spmd.runtimes.inline import InlineRuntime

        return InlineRuntime(config, on_call)
    from asystem.spmd.runtimes.cluster import prepare_environment

    prepare_environment()  # Ray reads it when it is imported
    from asystem.spmd.runtimes.ray import RayRuntime

    return RayRuntime(config, placement, on_call)
