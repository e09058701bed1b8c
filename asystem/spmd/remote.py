"""The vocabulary of workers: how a method's call is dispatched over the ranks and how the answers are collected."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, overload

from asystem.errors import nearest

P = ParamSpec("P")
T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Coroutine[Any, Any, Any]])


class Dispatch(Enum):
    """What each rank gets of a call's arguments."""

    BROADCAST = "broadcast"  # every rank gets all of them
    SPLIT = "split"  # the first argument is cut over the ranks, the others go to all
    SHARE = "share"  # as SPLIT, for calls that meet in no collective: shares may differ by one, or be empty
    ROUTE = "route"  # one rank gets the call: the least busy


class Collect(Enum):
    """What the caller gets of the ranks' answers. Every rank is waited for, whichever it is; of ranks that act as one
    worker (`spawn`'s replica_ranks) the first one's answer counts, but for `GATHER`."""

    ALL = "all"  # the list of answers, by rank
    FIRST = "first"  # the answer of the first rank
    CONCAT = "concat"  # lists, tuples, arrays or tensors joined in the order of ranks
    GATHER = "gather"  # as CONCAT, of every rank
    SUM = "sum"  # answers added with +; dicts of numbers key by key


@dataclass(frozen=True, slots=True)
class Mode:
    """How one remote method is called: what `remote` leaves on the method."""

    dispatch: Dispatch
    collect: Collect
    function: Callable[..., Coroutine[Any, Any, Any]]  # as it was written
    first: str  # name of the argument that SPLIT and SHARE cut


@overload
def remote(
    dispatch: Dispatch, collect: Literal[Collect.ALL]
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, list[T]]]]: ...


@overload
def remote(
    dispatch: Dispatch, collect: Literal[Collect.FIRST, Collect.CONCAT, Collect.GATHER, Collect.SUM] = ...
) -> Callable[[Method], Method]: ...


def remote(dispatch: Dispatch, collect: Collect = Collect.FIRST) -> Callable[[Any], Any]:
    """Marks an ``async def`` method of a `Worker` as callable through its group.

    The type of the method stays what it is, since a group has the type of its worker; only `Collect.ALL` makes a list
    of it. A worker that stands alone, outside of any group, answers as a group of one rank.
    """

    def mark(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function.__qualname__} is remote and must be `async def`")
        parameters = list(inspect.signature(function).parameters)[1:]
        if dispatch in (Dispatch.SPLIT, Dispatch.SHARE) and not parameters:
            raise TypeError(f"{function.__qualname__} is {dispatch.name} and must have an argument to cut")
        marked = _answering_a_list(function) if collect is Collect.ALL else function
        marked.__remote__ = Mode(dispatch, collect, function, parameters[0] if parameters else "")  # type: ignore[attr-defined]
        return marked

    return mark


def _answering_a_list(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    @functools.wraps(function)
    async def alone(*args: Any, **kwargs: Any) -> list[Any]:
        return [await function(*args, **kwargs)]

    return alone


class Worker:
    """Base of the programs that run on ranks: ``__init__``, then the process group where asked for, then `setup`.

    Attributes:
        rank, world_size, name: this rank, the number of ranks in the group, the group's name; set before ``__init__``.
        collective: whether the ranks of a group form a torch.distributed process group.
        gpus: devices that each rank owns where the cluster has any; fractions share one.
    """

    collective: ClassVar[bool] = False
    gpus: ClassVar[float] = 0.0

    rank: int = 0
    world_size: int = 1
    name: str = "worker"

    async def setup(self) -> None:
        """Runs on every rank before any call: loads models and data. The process group stands by then."""


def remote_methods(worker_type: type) -> dict[str, Mode]:
    """The remote methods of a worker type, inherited ones too."""
    members = ((name, getattr(worker_type, name)) for name in dir(worker_type))
    return {name: member.__remote__ for name, member in members if hasattr(member, "__remote__")}


def remote_method(worker_type: type, name: str) -> Mode:
    """The mode of one remote method.

    Raises:
        AttributeError: there is none of this name, with the nearest one.
    """
    modes = remote_methods(worker_type)
    if name not in modes:
        raise AttributeError(f"{worker_type.__name__} has no remote method {name!r}{nearest(name, modes)}")
    return modes[name]
