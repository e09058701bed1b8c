"""Products with 8-bit weights against the same products in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from asystem.generation.kernels import reference
from asystem.generation.kernels.linear import linear, norm_linear
from asystem.generation.kernels.tiled import is_tiled, tiled_linear
from asystem.models.quantized import quantize_rows

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


def matrix(n: int, size: int, kind: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers and scales; rows of very different sizes, so that a lost or misplaced scale shows."""
    if kind is not torch.int8 and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    weight = torch.randn(n, size, generator=torch.Generator().manual_seed(n)) * size**-0.5
    numbers, scale = quantize_rows(weight * torch.linspace(0.1, 3.0, n)[:, None], kind)
    return numbers.to(device), scale.to(device)


def want(x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ numbers.float().double().T * scale.double()
    return (out if bias is None else out + bias.double()).to(x.dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "size", "n"), [(5, 96, 64), (64, 200, 40), (70, 384, 130)])
def test_tiles(kind: torch.dtype, dtype: torch.dtype, batch: int, size: int, n: int, device: torch.device) -> None:
    numbers, scale = matrix(n, size, kind, device)
    x, bias = (torch.randn(shape, device=device, dtype=dtype) for shape in ((batch, size), (n,)))
    assert is_tiled(x)
    assert_close(tiled_linear(x, numbers, scale), want(x, numbers, scale))
    assert_close(tiled_linear(x, numbers, scale, bias), want(x, numbers, scale, bias))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "size", "n"), [(1, 96, 64), (2, 5000, 36), (4, 1024, 200)])
def test_few_rows(kind: torch.dtype, dtype: torch.dtype, batch: int, size: int, n: int, device: torch.device) -> None:
    numbers, scale = matrix(n, size, kind, device)
    x, bias = (torch.randn(shape, device=device, dtype=dtype) for shape in ((batch, size), (n,)))
    assert_close(linear(x, numbers, bias, scale), want(x, numbers, scale, bias))
    assert_close(linear(x, numbers, None, scale, swiglu=True), reference.swiglu(want(x, numbers, scale)))
    if size <= 1024:
        y, gain, total = torch.randn_like(x), torch.rand(size, device=device, dtype=dtype) + 0.5, x.clone()
        hidden = reference.add_rms_norm(total, y, gain, 1e-6)
        got, got_total = norm_linear(x, y, gain, 1e-6, numbers, bias, scale)
        assert_close(got, want(hidden, numbers, scale, bias))
        assert_close(got_total, total)
        gated = norm_linear(x, y, gain, 1e-6, numbers, None, scale, swiglu=True)[0]
        assert_close(gated, reference.swiglu(want(hidden, numbers, scale)))
