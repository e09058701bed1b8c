"""Memory that a worker writes again and again, and that others read in place: the host's, or a GPU's.

Its content counts when it is read, not when it was handed over.
"""

from __future__ import annotations

import mmap
import os
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from asystem.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Buffer:
    """So many bytes of a process's own memory; a copy travels when it is handed to another.

    Attributes:
        lasting: whether others who are handed it again find it where it was.
    """

    lasting = False

    def __init__(self, nbytes: int) -> None:
        self.array: npt.NDArray[np.uint8] = np.zeros(nbytes, dtype=np.uint8)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def flat(self) -> Tensor:
        """All of it, [bytes] uint8; do not write to what another process has made."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.array)


class SharedBuffer(Buffer):
    """Memory without a name that the other processes of this host map when it is handed to them; they only read.

    It is theirs as long as its maker lives, and the kernel takes it back with the last process that has it: nothing is
    left behind after a crash, and no name can clash. Linux only (memfd).

    Args:
        lasting: it will be handed over again, so that who has mapped it keeps the map.
    """

    def __init__(self, nbytes: int, *, lasting: bool = True) -> None:
        self.lasting = lasting
        self._file = os.memfd_create("asystem")
        os.ftruncate(self._file, nbytes)
        self.array = np.frombuffer(mmap.mmap(self._file, nbytes), dtype=np.uint8) if nbytes else np.zeros(0, np.uint8)

    def __del__(self) -> None:
        os.close(self._file)  # maps of it live on

    def __reduce__(self) -> tuple[Any, ...]:
        what = os.getpid(), self._file, os.fstat(self._file).st_ino, self.nbytes
        return _kept if self.lasting else _mapped, what


class _Mapped(Buffer):
    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array


@lru_cache(maxsize=16)  # mapping costs a page fault for every 4 KiB
def _kept(pid: int, file: int, inode: int, nbytes: int) -> Buffer:
    buffer = _mapped(pid, file, inode, nbytes)
    buffer.lasting = True
    return buffer


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
            "other, set weights.transport=store"
        ) from error


class DeviceBuffer:
    """Memory of a GPU that the other processes of this host map (CUDA IPC) when it is handed to them; they only read.

    Whoever maps it computes on the same GPU, or on another that reaches this one's memory, and need not see this one.
    Its maker keeps it for as long as others may read it, and waits for its own work on it before it hands it over.

    Args: as of `SharedBuffer`.
    """

    def __init__(self, nbytes: int, device: torch.device, *, lasting: bool = True) -> None:
        import torch

        self.lasting = lasting
        self._tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle: tuple[Any, ...] | None = None

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes

    def flat(self) -> Tensor:
        """All of it, [bytes] uint8; do not write to what another process has made."""
        return self._tensor

    def __reduce__(self) -> tuple[Any, ...]:
        if self._handle is None:  # once: each sharing takes counters and an event
            try:
                self._handle = tuple(self._tensor.untyped_storage()._share_cuda_()[1:])  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise ConfigError(
                    f"memory of this GPU cannot be shared ({_first_line(error)}): set weights.transport=shared_memory"
                ) from error
        return _kept_device if self.lasting else _mapped_device, (os.getpid(), self._handle)


@lru_cache(maxsize=16)  # mapping takes a while
def _kept_device(pid: int, handle: tuple[Any, ...]) -> DeviceBuffer:
    buffer = _mapped_device(pid, handle)
    buffer.lasting = True
    return buffer


def _mapped_device(pid: int, handle: tuple[Any, ...]) -> DeviceBuffer:
    """Another process's buffer. Its number of the GPU says nothing here, where others may be visible: ours counts."""
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    *memory, _ = handle  # the last says that an event is to be waited for: the maker has waited already
    device = torch.cuda.current_device()
    try:
        storage = torch.UntypedStorage._new_shared_cuda(device, *memory, False)
    except RuntimeError as error:
        raise ConfigError(
            f"GPU memory of process {pid} cannot be mapped here ({_first_line(error)}): between GPUs that do not reach "
            "each other's memory set weights.transport=nccl, else shared_memory"
        ) from error
    buffer = DeviceBuffer.__new__(DeviceBuffer)
    buffer._handle, buffer.lasting = None, False
    buffer._tensor = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", device)).set_(storage)
    return buffer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
