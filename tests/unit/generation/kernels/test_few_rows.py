"""A layer's attention for very few rows in one launch, against its oracles in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from test_kernel_oracles import assert_close, dtypes, paged

from asystem.generation.kernels import reference
from asystem.generation.kernels.few import FewRows


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(
    ("head", "rotated", "group", "kv_heads", "norm", "most"),
    [
        (64, 64, 1, 2, True, 64),
        (64, 32, 2, 2, True, 200),
        (80, 80, 3, 1, False, 300),
        (96, 96, 8, 2, True, 700),
        (128, 64, 2, 8, False, 130),
        (16, 16, 2, 2, True, 200),
    ],
)
def test_one_launch_is_rotary_write_and_attention(
    dtype: torch.dtype, head: int, rotated: int, group: int, kv_heads: int, norm: bool, most: int, device: torch.device
) -> None:
    lengths = [n for n in (1, 0, 129, most) if n <= most]
    num_heads = group * kv_heads
    cache = paged(lengths, kv_heads, head, 16, dtype, device)
    qkv = torch.randn(len(lengths), (num_heads + 2 * kv_heads) * head, device=device).to(dtype)
    weights = [torch.rand(head, device=device).to(dtype) + 0.5 if norm else None for _ in range(2)]
    angles = torch.rand(most, 1, rotated // 2, device=device) * 6
    turn = (*weights, 1e-6, angles.cos(), angles.sin(), cache.lengths, cache.table)
    x, keys, values = qkv.clone(), cache.keys.clone(), cache.values.clone()
    reference.rotary_write(x, *turn, keys, values, num_heads)
    want = reference.decode_attention(x, keys, values, cache.table, cache.lengths, num_heads)
    few = FewRows(num_heads, kv_heads, most, device)
    real = cache.lengths > 0
    for _ in range(2):  # counts of arrived parts are back at 0
        ours = cache.keys.clone(), cache.values.clone()
        got = few.attend(qkv, *turn, *ours)
        assert_close(got[real], want[real])
        for written, expected in zip(ours, (keys, values), strict=True):
            assert_close(written, expected)
