"""Memory that a worker writes again and again, and that others read in place."""

from __future__ import annotations

import mmap
import os
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from asystem.errors import ConfigError


class Buffer:
    """So many bytes of a process's own memory; a copy travels when it is handed to another."""

    def __init__(self, nbytes: int) -> None:
        self.array: npt.NDArray[np.uint8] = np.zeros(nbytes, dtype=np.uint8)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


class SharedBuffer(Buffer):
    """Memory without a name that the other processes of this host map when it is handed to them; they only read.

    It is theirs as long as its maker lives, and the kernel takes it back with the last process that has it: nothing is
    left behind after a crash, and no name can clash. Linux only (memfd).
    """

    def __init__(self, nbytes: int) -> None:
        self._file = os.memfd_create("asystem")
        os.ftruncate(self._file, nbytes)
        self.array = np.frombuffer(mmap.mmap(self._file, nbytes), dtype=np.uint8) if nbytes else np.zeros(0, np.uint8)

    def __del__(self) -> None:
        os.close(self._file)  # maps of it live on

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped, (os.getpid(), self._file, os.fstat(self._file).st_ino, self.nbytes)


class _Mapped(Buffer):
    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array


@lru_cache(maxsize=16)  # mapping costs a page fault for every 4 KiB
def _mapped(pid: int, file: int, inode: int, nbytes: int) -> Buffer:
    """Another process's buffer; ``inode`` tells a later one under the same number apart."""
    if not nbytes:
        return Buffer(0)
    try:
        with open(f"/proc/{pid}/fd/{file}", "rb") as opened:
            if os.fstat(opened.fileno()).st_ino != inode:
                raise FileNotFoundError("it was freed")
            return _Mapped(np.frombuffer(mmap.mmap(opened.fileno(), nbytes, access=mmap.ACCESS_READ), dtype=np.uint8))
    except OSError as error:
        raise ConfigError(
            f"memory of process {pid} cannot be read here ({error}); where the processes of a host do not see each "
            "other, set runtime.shared_memory=false"
        ) from error
