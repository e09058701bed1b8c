"""Where data waits between workers: `put` in one, `get` in another, with a small `Ref` travelling in between.

In one process the handle is the object itself. Under Ray it names an object in shared memory: numpy arrays are read
there without a copy, and are read-only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from asystem.types import Ref

T = TypeVar("T")


class Backend(Protocol):
    """What holds the objects. A runtime installs its own on the controller and on every rank."""

    def put(self, value: Any) -> Any: ...

    def get_many(self, handles: Sequence[Any]) -> list[Any]: ...


class InProcess:
    """The handle is the object itself."""

    def put(self, value: Any) -> Any:
        return value

    def get_many(self, handles: Sequence[Any]) -> list[Any]:
        return list(handles)


_backend: Backend = InProcess()


def use(backend: Backend) -> Backend:
    """Makes ``backend`` the store of this process, and returns the one before."""
    global _backend
    previous, _backend = _backend, backend
    return previous


def put(value: T) -> Ref[T]:
    """Hands an object to the store. Whoever has the `Ref` can read it, as long as the worker that put it lives."""
    return Ref(_backend.put(value), num_bytes(value))


def get(ref: Ref[T]) -> T:
    """The object behind a `Ref`; treat it as read-only."""
    return get_many([ref])[0]


def get_many(refs: Sequence[Ref[T]]) -> list[T]:
    """The objects behind several `Ref`s, in order; one that is named several times is read once."""
    handles = {id(ref.handle): ref.handle for ref in refs}
    values = dict(zip(handles, _backend.get_many(list(handles.values())), strict=True))
    return [values[id(ref.handle)] for ref in refs]


def num_bytes(value: Any) -> int:
    """Bytes of the arrays and tensors inside lists, dicts and dataclasses; what is small beside them is not counted."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(num_bytes, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(num_bytes(getattr(value, field.name)) for field in dataclasses.fields(value))
    return 0
