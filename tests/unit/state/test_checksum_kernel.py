"""The kernel of checksums, on a GPU or in Triton's interpreter, against sums on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from asystem.state.checksum import MODULUS
from asystem.state.kernels import weighted_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a CUDA device, or TRITON_INTERPRET=1"
)


def test_many_blocks_at_once() -> None:
    torch.manual_seed(0)
    parts, want = [], []
    for shape, dtype in [
        ((1, 1), torch.int16), ((3, 1024), torch.int16), ((37, 1000), torch.int16), ((5, 2060), torch.int32),
        ((2000, 9), torch.int8), ((0, 4), torch.int16), ((12, 64), torch.int8), ((1, 3000), torch.int16),
    ]:  # fmt: skip
        high = 1 << (8 * dtype.itemsize - 1)
        rows = torch.randint(-high, high, shape).to(dtype)
        weights = [torch.randint(-(1 << 31), 1 << 31, (size,)).to(torch.int32) for size in shape]
        exact = (rows.long() * (weights[0].long()[:, None] * weights[1].long()[None, :] % MODULUS)) % MODULUS
        want.append(int(exact.sum() % MODULUS))
        parts.append((rows.to(DEVICE), weights[0].to(DEVICE), weights[1].to(DEVICE)))
    whole = parts[1][0].repeat(1, 2)  # rows that do not follow each other in memory
    parts.append((whole[:, 1024:], *parts[1][1:]))
    want.append(want[1])
    assert [int(found) % MODULUS for found in weighted_sums(parts)] == want
