"""The kernel of checksums, on a GPU or in Triton's interpreter, against sums on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from asystem.models import Box
from asystem.state.checksum import MODULUS, _weighed, checksum
from asystem.state.kernels import WeightedSums

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
        parts.append((len(parts), rows.to(DEVICE), weights[0].to(DEVICE), weights[1].to(DEVICE)))
    whole = parts[1][1].repeat(1, 2)  # rows that do not follow each other in memory
    parts.append((len(want), whole[:, 1024:], *parts[1][2:]))
    parts.append((0, *parts[2][1:]))  # a sum of two blocks
    want.append(want[1])
    want[0] += want[2]
    sums = WeightedSums(parts, len(want), torch.device(DEVICE))
    assert [value % MODULUS for value in sums.take().tolist()] == [value % MODULUS for value in want]
    parts[3][1][1, 7] += 5  # what stands is read again
    want[3] += 5 * int(parts[3][2][1]) * int(parts[3][3][7])
    assert [value % MODULUS for value in sums.take().tolist()] == [value % MODULUS for value in want]


def test_views_of_blocks_are_read_where_they_lie() -> None:
    torch.manual_seed(0)
    stack, matrix = torch.randn(3, 40, 24).bfloat16(), torch.randn(40, 24)
    middle = Box((0, 10, 8), (3, 20, 24))
    blocks = [
        (stack, Box.whole((3, 40, 24)), (3, 40, 24)),
        (middle.of(stack, (0, 0, 0)), middle, (3, 40, 24)),
        (stack.transpose(1, 2), Box.whole((3, 24, 40)), (3, 24, 40)),
        (matrix.T, Box.whole((24, 40)), (24, 40)),
        (matrix[:, 3], Box.whole((40,)), (40,)),
        (matrix[:0], Box((5, 0), (5, 24)), (40, 24)),
    ]
    on_device = {tensor: tensor.to(DEVICE) for tensor in (stack, matrix)}
    there = [on_device[stack], middle.of(on_device[stack], (0, 0, 0)), on_device[stack].transpose(1, 2)]
    there += [on_device[matrix].T, on_device[matrix][:, 3], on_device[matrix][:0]]
    rows = [(i, *found) for i, b in enumerate(there) for found in _weighed(b, *blocks[i][1:])]
    sums = WeightedSums(rows, len(blocks), torch.device(DEVICE)).take().tolist()
    wanted = [checksum(block.clone(memory_format=torch.contiguous_format), *rest) for block, *rest in blocks]
    assert [value % MODULUS for value in sums] == wanted
