"""GPU memory whose pages come and go while its addresses stay: the driver's virtual memory management, through ctypes.

A range of addresses is reserved once. `map` puts physical pages under it, `unmap` gives them back to the card; CUDA
graphs that were captured over the range are valid again when it is mapped again. PyTorch's allocator knows nothing of
these pages: they count in `torch.cuda.mem_get_info`, not in `memory_allocated` or a process's own limit.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from asystem.errors import CapacityError

_PINNED, _ON_DEVICE, _READ_WRITE, _OUT_OF_MEMORY = 1, 1, 3, 2


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProp(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("requestedHandleTypes", ctypes.c_int),
        ("location", _Location),
        ("win32HandleMetaData", ctypes.c_void_p),
        ("allocFlags", ctypes.c_ubyte * 8),
    )


class _AccessDesc(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class MappedRegion:
    """So many bytes of a CUDA device, mapped at first; its addresses are its own as long as the process lives.

    Attributes:
        tensor: [bytes] uint8, to be touched while mapped.

    Raises:
        CapacityError: there is no room.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.synchronize(self.device)  # makes the context, if there is none
        self._location = _Location(_ON_DEVICE, self.device.index)
        self._prop = _AllocationProp(type=_PINNED, location=self._location)
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._prop), ctypes.c_int(0))
        self.nbytes = -(-nbytes // granularity.value) * granularity.value
        self._pages: ctypes.c_ulonglong | None = None
        self._address = ctypes.c_ulonglong()
        size, none = ctypes.c_size_t(self.nbytes), ctypes.c_ulonglong(0)
        _call("cuMemAddressReserve", ctypes.byref(self._address), size, ctypes.c_size_t(0), none, none)
        self.map()
        self.tensor: Tensor = torch.as_tensor(_Array(self._address.value, nbytes), device=self.device)

    @property
    def is_mapped(self) -> bool:
        return self._pages is not None

    def map(self) -> None:
        """Puts pages under the range; what they hold is undefined.

        Raises:
            CapacityError: there is no room.
        """
        if self._pages is not None:
            return
        torch.cuda.empty_cache()  # what PyTorch keeps unused is not free to the driver
        pages, size, zero = ctypes.c_ulonglong(), ctypes.c_size_t(self.nbytes), ctypes.c_ulonglong(0)
        code = _call("cuMemCreate", ctypes.byref(pages), size, ctypes.byref(self._prop), zero, allow=_OUT_OF_MEMORY)
        if code == _OUT_OF_MEMORY:
            free = torch.cuda.mem_get_info(self.device)[0]
            raise CapacityError(
                f"{self.nbytes / 2**30:.2f} GiB are to be woken on {self.device}, and {free / 2**30:.2f} GiB are free: "
                "lower generation.kv_tokens or training.micro_batch_tokens, or end other programs on the card"
            )
        _call("cuMemMap", self._address, size, ctypes.c_size_t(0), pages, zero)
        access = _AccessDesc(self._location, _READ_WRITE)
        _call("cuMemSetAccess", self._address, size, ctypes.byref(access), ctypes.c_size_t(1))
        self._pages = pages

    def unmap(self) -> None:
        """Gives the pages back when all work queued on the device is done. Touching the range is then a fault."""
        if self._pages is None:
            return
        torch.cuda.synchronize(self.device)
        _call("cuMemUnmap", self._address, ctypes.c_size_t(self.nbytes))
        _call("cuMemRelease", self._pages)
        self._pages = None


class _Array:
    """Bytes that torch makes a tensor of without copying."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2, "strides": None,
        }  # fmt: skip


def can_map() -> bool:
    """Whether this driver has what is needed."""
    if not torch.cuda.is_available():
        return False
    try:
        return hasattr(_driver(), "cuMemAddressReserve")
    except OSError:
        return False


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any, allow: int = 0) -> int:
    code: int = getattr(_driver(), name)(*arguments)
    if code not in (0, allow):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")
    return code
