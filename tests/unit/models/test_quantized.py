"""8-bit weights: how far they are off, that every way in gives the same ones, and that updates keep their places."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from asystem.models import (
    Decoder,
    ModelSpec,
    MoESpec,
    PackedAttention,
    QuantizedLinear,
    Shard,
    init_weights,
    load_model,
    quantize,
    save_model,
)
from asystem.models.moe import MoE
from asystem.models.quantized import QuantizedExperts, quantize_rows
from asystem.state import Inbox, Outbox

SPEC = ModelSpec("qwen2", 53, 64, 96, 2, num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True)
KINDS = [torch.int8, torch.float8_e4m3fn]


EXPERTS = ModelSpec(
    "qwen3_moe", 53, 64, 96, 2, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, moe=MoESpec(6, 2, 48)
)


def random_model(seed: int = 0, spec: ModelSpec = SPEC) -> Decoder:
    model = Decoder(spec)
    init_weights(model, seed, std=0.15)
    return model


def logprobs(model: Decoder) -> torch.Tensor:
    tokens = torch.randint(0, SPEC.vocab_size, (40,), generator=torch.Generator().manual_seed(3))
    attend = PackedAttention(torch.tensor([0, 25, 40], dtype=torch.int32), 25)
    with torch.no_grad():
        hidden = model(tokens, torch.cat([torch.arange(25), torch.arange(15)]), attend)
        return model.logits(hidden).log_softmax(-1)


def test_a_number_is_off_by_half_a_step_at_most() -> None:
    rows = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    rows[7], rows[9, 1:] = 0.0, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        source = rows.to(dtype).float()
        numbers, scale = quantize_rows(rows.to(dtype), torch.int8)
        assert (source - numbers.float() * scale[:, None]).abs().le(0.5001 * scale[:, None]).all()
        assert numbers[7].eq(0).all() and numbers[9, 0].abs() == 127
        numbers, scale = quantize_rows(rows.to(dtype), torch.float8_e4m3fn)
        off = (source - numbers.float() * scale[:, None]).abs()
        assert off.le((source.abs() / 16).clamp(min=2.0**-10 * scale[:, None]) * 1.0001).all()
        assert torch.equal(scale, scale.bfloat16().float())


def test_int8_is_off_by_a_third_of_fp8() -> None:
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    off = []
    for kind in KINDS:
        numbers, scale = quantize_rows(rows, kind)
        off.append(float((rows - numbers.float() * scale[:, None]).std()))
    assert off == pytest.approx([0.0076, 0.0264], rel=0.1)


@pytest.mark.parametrize(("kind", "bound"), [(torch.int8, 0.025), (torch.float8_e4m3fn, 0.1)])
def test_log_probabilities_stay_near_those_of_the_full_model(kind: torch.dtype, bound: float) -> None:
    model = random_model()
    want, got = logprobs(model), logprobs(quantize(copy.deepcopy(model), kind))
    error = (got - want).abs().mean() / want.std()
    assert bound / 10 < error < bound


@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_what_their_widened_matrices_do(kind: torch.dtype) -> None:
    full = random_model(spec=EXPERTS)
    kept = quantize(copy.deepcopy(full), kind)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for layer, coarse in zip(full.layers, kept.layers, strict=True):
            assert isinstance(layer.mlp, MoE) and isinstance(coarse.mlp, MoE)
            experts = coarse.mlp.experts
            assert isinstance(experts, QuantizedExperts) and experts.gate_up.dtype is experts.down.dtype is kind
            for name in ("gate_up", "down"):
                exact = layer.mlp.experts.get_parameter(name)
                scale = experts.get_parameter(f"{name}_channel_scale")[..., None]
                widened = experts.get_parameter(name).float() * scale
                assert 0 < (exact - widened).norm() / exact.norm() < (0.01 if kind is torch.int8 else 0.04)
                exact.copy_(widened)
            torch.testing.assert_close(coarse.mlp(x), layer.mlp(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_and_published_weights_give_the_same_numbers_in_place(
    kind: torch.dtype, spec: ModelSpec, tmp_path: Path
) -> None:
    source, target = random_model(1, spec), quantize(random_model(2, spec), kind)
    want = quantize(copy.deepcopy(source), kind)
    places = {name: p.data_ptr() for name, p in target.named_parameters()}
    payload = Outbox(source).write()
    Inbox(target).read([payload])
    save_model(source, spec, tmp_path)
    loaded = load_model(tmp_path, quantized=kind)
    for name, p in want.named_parameters():
        assert torch.equal(target.get_parameter(name).float(), p.float()), name
        assert torch.equal(loaded.get_parameter(name).float(), p.float()), name
    assert {name: p.data_ptr() for name, p in target.named_parameters()} == places
    quantized = [m for m in want.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == (8 if spec is SPEC else 4) and {m.weight.dtype for m in quantized} == {kind}
    assert want.embed.weight.dtype is torch.float32


@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["dense", "experts"])
def test_a_rank_quantises_its_part(spec: ModelSpec, tmp_path: Path) -> None:
    source = random_model(1, spec)
    save_model(source, spec, tmp_path)
    payload = Outbox(source).write()
    for rank in range(2):
        want = quantize(Shard(rank, 2).cut(source), torch.int8)
        sent = quantize(Shard(rank, 2).cut(random_model(2, spec)), torch.int8)
        Inbox(sent).read([payload])
        loaded = load_model(tmp_path, part=Shard(rank, 2), quantized=torch.int8)
        for name, p in want.named_parameters():
            assert torch.equal(sent.get_parameter(name), p) and torch.equal(loaded.get_parameter(name), p), name


def test_a_large_matrix_is_quantised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(10, 37)
    want = QuantizedLinear(linear, torch.int8)
    monkeypatch.setattr("asystem.models.quantized._AT_ONCE", 85)
    got = QuantizedLinear(linear, torch.int8)
    assert torch.equal(got.weight, want.weight) and torch.equal(got.channel_scale, want.channel_scale)
    x = torch.randn(3, 10)
    with torch.no_grad():
        torch.testing.assert_close(got(x), linear(x), atol=0.02, rtol=0)
