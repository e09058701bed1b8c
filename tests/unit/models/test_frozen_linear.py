"""Frozen matrices in 8 and 4 bits: bounds of their error, and gradients of the adapters above them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from asystem.config import LoraConfig
from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, PackedAttention, add_lora, init_weights, merge
from asystem.models.frozen import NF4, FrozenLinear, dequantized

GAP = max(b - a for a, b in pairwise(NF4))  # of neighbours, the widest


def linear(width: int = 256, rows: int = 96, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, rows, bias=bias).to(dtype)


@pytest.mark.parametrize(("kind", "bound", "typical"), [("int8", 0.5 / 127, 0.006), ("nf4", GAP / 2, 0.1)])
@pytest.mark.parametrize("width", [256, 96, 40])
def test_each_number_is_within_half_a_step_of_its_block(kind: str, bound: float, typical: float, width: int) -> None:
    torch.manual_seed(1)
    layer = linear(width)
    layer.weight.data.normal_(0.0, 0.02)
    layer.weight.data[0] = 0.0
    layer.weight.data[1] *= 1e4
    frozen = FrozenLinear(layer, kind)
    weight = layer.weight.detach()
    error = (frozen.dense() - weight).view(*frozen.scale.shape, -1).abs()
    largest = weight.view(*frozen.scale.shape, -1).abs().amax(-1, keepdim=True)
    assert (error <= (bound + 1e-6) * largest).all()
    assert not frozen.dense()[0].any()
    assert float(error[2:].square().mean().sqrt() / weight[2:].square().mean().sqrt()) < typical
    bits = frozen.codes.nbytes * 8 / layer.weight.numel()
    assert bits == {"int8": 8, "nf4": 4}[kind]


def test_nf4_takes_the_nearest_value_and_two_a_byte() -> None:
    layer = linear(16, 2)
    layer.weight.data = torch.tensor([NF4, NF4[::-1]])
    frozen = FrozenLinear(layer, "nf4")
    assert torch.equal(frozen.dense(), layer.weight)
    assert frozen.codes.shape == (2, 8) and frozen.codes[0].tolist() == [low | low + 1 << 4 for low in range(0, 16, 2)]
    with pytest.raises(ModelError, match=r"a row has 15: use int8"):
        FrozenLinear(linear(15), "nf4")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_linear_in_the_matrix_it_keeps_and_saves_no_whole_one(kind: str, dtype: torch.dtype) -> None:
    frozen = FrozenLinear(linear(bias=True, dtype=dtype), kind)
    x = torch.randn(5, 256, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = frozen(x)
    torch.testing.assert_close(out, x @ frozen.dense().T + frozen.bias)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ frozen.dense())
    assert {t.data_ptr() for t in saved} == {frozen.codes.data_ptr(), frozen.scale.data_ptr()}
    assert frozen.scale.dtype is dtype and not any(p.requires_grad for p in (frozen.codes, frozen.scale))
    assert torch.equal(frozen.dense(), dequantized(frozen.codes, frozen.scale))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_product_is_an_operator_as_torch_compile_wants_it(kind: str) -> None:
    frozen = FrozenLinear(linear(32, 8), kind)
    x = torch.randn(5, 32, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.asystem.frozen_linear.default, (x, frozen.codes, frozen.scale), test_utils=checks)


def adapted(base: str) -> Decoder:
    model = Decoder(ModelSpec("qwen3", 23, 64, 96, 2, 4, 2, 16, qk_norm=True, tie_embeddings=True))
    init_weights(model, 0, std=0.1)
    add_lora(model, LoraConfig(rank=4, base=base), seed=1)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05
    return model


def gradients(model: Decoder) -> Tensor:
    tokens, positions = torch.arange(12) % 23, torch.arange(12)
    hidden = model(tokens, positions, PackedAttention(torch.tensor([0, 12], dtype=torch.int32), 12))
    nn.functional.cross_entropy(model.logits(hidden), tokens.roll(-1)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("base", "bound"), [("int8", 0.03), ("nf4", 0.3)])
def test_gradients_of_adapters_are_close_to_those_above_the_full_matrices(base: str, bound: float) -> None:
    whole, fewer = gradients(adapted("auto")), gradients(adapted(base))
    assert whole.shape == fewer.shape
    assert float((fewer - whole).norm() / whole.norm()) < bound


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_merged_weights_are_those_that_training_computed_with(base: str) -> None:
    model = adapted(base)
    plain = Decoder(model.spec)
    plain.load_state_dict(merge(model))
    tokens = torch.arange(12) % 23
    attend = PackedAttention(torch.tensor([0, 12], dtype=torch.int32), 12)
    expected = model(tokens, torch.arange(12), attend)
    torch.testing.assert_close(plain(tokens, torch.arange(12), attend), expected, atol=2e-5, rtol=1e-4)
