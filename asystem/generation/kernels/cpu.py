"""A whole decode step on a CPU in one call: `cpu.c`, compiled when first used.

Plain PyTorch spends most of a small model's step on launching some thirty operations a layer and on copying keys and
values together. This needs a C compiler (`cc`) and the SGEMM that PyTorch's library exports; without them the engine
decodes in PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
MOST_HEAD = 512
# -ffast-math lets the compiler use vector exponentials; linking without it leaves denormals of the process alone.
_COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
_LINK = ("-shared", "-fopenmp")


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class Layer(ctypes.Structure):
    """`Layer` of cpu.c."""

    _fields_ = _pointers(
        "attn_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "mlp_norm", "gate_up", "down", "keys", "values"
    )


class Step(ctypes.Structure):
    """`Step` of cpu.c."""

    _fields_ = [
        *_pointers("sgemm", "layers", "embedding", "norm", "head_weight", "cosine", "sine"),
        *_integers("num_layers", "size", "inner", "q_heads", "kv_heads", "head", "half", "vocab", "block_size"),
        *_integers("rows", "longest", "version", "stopped", "full", "table_stride", "stride"),
        *_pointers("drawn", "done", "last_token", "position", "key", "limit", "heeds_stop", "table", "temperature"),
        *_pointers("stops", "tokens", "logprobs", "versions", "lengths"),
        *_pointers("x", "normed", "qkv", "attended", "gate_up", "gated", "logits"),
        ("eps", ctypes.c_float),
    ]


class KernelMissing(Exception):
    """There is no compiler or no SGEMM, or compiling failed; says why."""


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie, for a field of the structures."""
    return None if tensor is None else tensor.data_ptr()


def decode(step: Step) -> None:
    """One token for each row: see `decode` in cpu.c."""
    _library().decode(ctypes.byref(step))


@lru_cache(1)
def sgemm() -> int:
    """The address of SGEMM in PyTorch's own library, so that both share its threads.

    Raises:
        KernelMissing: it exports none.
    """
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        found = getattr(ctypes.CDLL(str(library)), "sgemm_", None)
        if found is not None:
            return int(ctypes.cast(found, ctypes.c_void_p).value or 0)
    raise KernelMissing("this build of PyTorch exports no SGEMM")


@lru_cache(1)
def is_available() -> bool:
    """Whether `decode` can be called here; compiles it if need be, and warns once where it cannot."""
    try:
        _library()
        sgemm()
    except KernelMissing as error:
        logging.getLogger("asystem").warning("decoding on the CPU in plain PyTorch, which is slower: %s", error)
        return False
    return True


@lru_cache(1)
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise KernelMissing("no C compiler was found (Debian: apt install gcc)")
    target = _cache() / f"cpu-{_fingerprint(compiler)}.so"
    try:
        if not target.exists():
            _build(compiler, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise KernelMissing(str(error)) from None


def _build(compiler: str, target: Path) -> None:
    """Compiles beside the target and renames, so that no process loads a half-written library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        parts = [str(Path(folder) / name) for name in ("cpu.o", "cpu.so")]
        for command in ([*_COMPILE, str(SOURCE), "-o", parts[0]], [*_LINK, parts[0], "-o", parts[1], "-lm"]):
            done = subprocess.run([*compiler.split(), *command], capture_output=True, text=True, check=False)
            if done.returncode:
                first = next(iter(done.stderr.strip().splitlines()), f"status {done.returncode}")
                raise KernelMissing(f"{compiler} failed on {SOURCE.name}: {first}")
        os.replace(parts[1], target)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "asystem"


def _fingerprint(compiler: str) -> str:
    """Of the source, the flags and the machine: a home folder may be shared by machines with other instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [SOURCE.read_text(), compiler, *_COMPILE, *_LINK, platform.machine(), features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
