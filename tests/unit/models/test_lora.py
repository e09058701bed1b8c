"""Adapters over fused matrices: against the merged model, what is frozen, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asystem.config import LORA_TARGETS, LoraConfig
from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, PackedAttention, add_lora, decoding_copy, init_weights, merge
from asystem.models.lora import LoraLinear, refresh_copy

SPEC = ModelSpec("qwen2", 23, 16, 24, 2, 4, 2, 4, qkv_bias=True, tie_embeddings=True)
TARGETS = {"all": LORA_TARGETS, "some": ("q_proj", "v_proj", "up_proj"), "one": ("down_proj",)}


def adapted(targets: tuple[str, ...] = LORA_TARGETS, dropout: float = 0.0, seed: int = 1) -> Decoder:
    """A model whose adapters do something."""
    model = Decoder(SPEC)
    init_weights(model, 0, std=0.2)
    add_lora(model, LoraConfig(rank=3, alpha=6.0, dropout=dropout, targets=list(targets)), seed=seed)
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_B.data.normal_(0.0, 0.3, generator=generator)
    return model


def logits(model: Decoder) -> Tensor:
    tokens = torch.arange(9) * 5 % 23
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    return model.logits(model(tokens, positions, PackedAttention(cu_seqlens, 5)))


def plain(state: dict[str, Tensor] | None = None) -> Decoder:
    model = Decoder(SPEC)
    init_weights(model, 0, std=0.2)
    if state is not None:
        model.load_state_dict(state)
    return model


@torch.no_grad()
def test_new_adapters_change_nothing() -> None:
    model = plain()
    before = logits(model)
    add_lora(model, LoraConfig(rank=3))
    assert torch.equal(logits(model), before)


@torch.no_grad()
@pytest.mark.parametrize("targets", TARGETS)
def test_merging_keeps_the_logits(targets: str) -> None:
    model = adapted(TARGETS[targets])
    assert not torch.allclose(logits(model), logits(plain()), atol=0.05)
    torch.testing.assert_close(logits(plain(merge(model))), logits(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_fused_matrix_is_its_parts_each_with_its_own_adapter() -> None:
    layer = adapted(("q_proj", "v_proj")).layers[0].attn.qkv_proj
    merged, base = layer.merged(), layer.base.weight
    (q, a_q, b_q), (v, a_v, b_v) = layer.adapters()
    assert (q.name, v.name) == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    torch.testing.assert_close(merged[:16] - base[:16], 2.0 * b_q @ a_q)  # alpha / rank = 2
    assert torch.equal(merged[16:24], base[16:24])  # k
    torch.testing.assert_close(merged[24:] - base[24:], 2.0 * b_v @ a_v)


def test_only_adapters_have_gradients() -> None:
    model = adapted()
    logits(model).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        is_adapter = name.endswith(("lora_A", "lora_B"))
        assert parameter.requires_grad == is_adapter == (parameter.grad is not None), name
        assert not is_adapter or parameter.grad is None or parameter.grad.any(), name


@torch.no_grad()
def test_dropout_is_for_training_alone() -> None:
    model, same = adapted(dropout=0.5), adapted()
    assert not torch.equal(logits(model), logits(same))
    assert torch.equal(logits(model.eval()), logits(same))


@torch.no_grad()
def test_adapters_are_drawn_by_seed_and_name() -> None:
    def first(seed: int, layer: int) -> Tensor:
        a: Tensor = adapted(seed=seed).layers[layer].mlp.down_proj.lora_A
        return a

    assert torch.equal(first(1, 0), first(1, 0))
    assert not torch.equal(first(1, 0), first(2, 0)) and not torch.equal(first(1, 0), first(1, 1))
    assert first(1, 0).abs().max() <= 24**-0.5


@torch.no_grad()
def test_a_decoding_copy_shares_what_has_no_adapter_and_follows_updates() -> None:
    model = adapted(("o_proj",))
    copy = decoding_copy(model, torch.float32)
    assert copy.embed.weight is model.embed.weight
    assert copy.layers[0].mlp.down_proj.weight is model.layers[0].mlp.down_proj.weight
    address = copy.layers[0].attn.o_proj.weight.data_ptr()
    model.layers[0].attn.o_proj.lora_B.add_(1.0)
    assert not torch.allclose(logits(copy), logits(model), atol=1e-3)
    refresh_copy(copy, model)
    torch.testing.assert_close(logits(copy), logits(model), atol=1e-5, rtol=1e-5)
    assert copy.layers[0].attn.o_proj.weight.data_ptr() == address


def test_a_misspelt_target_is_refused() -> None:
    with pytest.raises(ModelError, match=r'names "q_prj", which the model has not \(did you mean "q_proj"\?\)'):
        adapted(("q_prj",))
