"""How kernels follow one another on the device."""

from __future__ import annotations

import os
from functools import cache

import torch


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while its predecessor ends (programmatic dependent launch, compute capability 9.0).

    Each kernel launched so waits for its predecessor before it reads anything that a kernel of the step has written.
    """
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
