"""How kernels follow one another on the device."""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while its predecessor ends (programmatic dependent launch, compute capability 9.0).

    Each kernel launched so waits for its predecessor before it reads anything that a kernel of the step has written.
    """
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def prefetch(start, num_bytes, program, programs):
    """Asks for this program's share of ``num_bytes`` from ``start`` on to come into the L2 cache; waits for nothing.

    For programs of 128 threads on compute capability 9.0; ``num_bytes`` is a multiple of 16, and 0 asks for nothing.
    """
    if num_bytes >= 128:
        share = tl.cdiv(tl.cdiv(num_bytes, programs * 128), 128) * 128  # of a thread
        at = (program * 128 + tl.arange(0, 128)).to(tl.int64) * share
        tl.inline_asm_elementwise(
            "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [start.to(tl.pointer_type(tl.uint8)) + tl.minimum(at, num_bytes - share), (at * 0 + share).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
