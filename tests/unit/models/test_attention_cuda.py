"""Attention of long packed sequences on a GPU, against the CPU's in float32. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from asystem.models.attention import EQUAL, LONG, PackedAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "lengths", [[1500], [300, 40, LONG, 7, 20, LONG + 1000], [LONG - 1, 5], [30, 30, *[130] * EQUAL, 5], [LONG] * 2]
)
@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(4, 2, 128), (6, 6, 64), (8, 1, 80)])
def test_long_and_short_sequences_in_one_batch(lengths: list[int], heads: int, kv_heads: int, head: int) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    shapes = [(starts[-1], count, head) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(*shape, generator=generator) for shape in shapes)
    found, expected = [], []
    for device, dtype, out in (("cpu", torch.float32, expected), ("cuda", torch.bfloat16, found)):
        inputs = [x.to(torch.bfloat16).to(device, dtype).requires_grad_() for x in (q, k, v)]
        bounds = torch.tensor(starts, dtype=torch.int32, device=device)
        result = PackedAttention(bounds, max(lengths), starts)(0, *inputs)
        result.backward(grad.to(device, dtype))
        out += [result.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs if x.grad is not None)]
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()
