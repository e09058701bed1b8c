"""The mixture of experts against all experts computed for all tokens; its shapes and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asystem.config import ExpertsConfig, LoraConfig, ModelConfig
from asystem.errors import ModelError
from asystem.models import (
    Decoder,
    ModelSpec,
    MoESpec,
    add_lora,
    init_weights,
    spec_from_config,
    spec_from_hf,
)
from asystem.models.moe import MoE

SPECS = {
    "softmax": MoESpec(6, 2, 5),
    "not-normalised": MoESpec(5, 3, 4, normalize=False),
    "groups": MoESpec(8, 2, 4, score="sigmoid", groups=4, top_groups=2, has_bias=True, scaling=2.0),
    "one-group-of-two": MoESpec(8, 3, 4, score="sigmoid", groups=2, top_groups=1, has_bias=True),
}


def make_moe(kind: str) -> MoE:
    moe = MoE(7, SPECS[kind], None)
    init_weights(moe, 0, std=0.5)
    if moe.router.bias is not None:
        with torch.no_grad():
            moe.router.bias += torch.linspace(-0.4, 0.4, len(moe.router.bias))
    return moe


def slow(moe: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, weighted with 0 where it was not chosen."""
    spec, router = moe.router.moe, moe.router
    scores = F.linear(x, router.weight)
    scores = scores.softmax(-1) if spec.score == "softmax" else scores.sigmoid()
    out = []
    for token, row in zip(x, scores, strict=True):
        biased = row.detach() + (0 if router.bias is None else router.bias.detach())
        groups = biased.view(spec.groups, -1)
        sums = [float(group.sort().values[-2:].sum()) for group in groups] if spec.groups > 1 else [0.0]
        best = sorted(range(spec.groups), key=lambda g: -sums[g])[: spec.top_groups]
        members = [e for e in range(spec.num_experts) if e // groups.shape[1] in best]
        chosen = sorted(members, key=lambda e: -float(biased[e]))[: spec.top_k]
        total = sum(row[e] for e in chosen) if spec.normalize else 1.0
        parts = []
        for e in chosen:
            gate, up = (moe.experts.gate_up[e] @ token).chunk(2)
            parts.append(row[e] / total * spec.scaling * (moe.experts.down[e] @ (F.silu(gate) * up)))
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_values_and_gradients(kind: str, tokens: int) -> None:
    moe = make_moe(kind)
    x = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    up = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(2))
    inputs = [x, moe.router.weight, moe.experts.gate_up, moe.experts.down]
    ours, theirs = moe(x), slow(moe, x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for got, want in zip(torch.autograd.grad(ours, inputs, up), torch.autograd.grad(theirs, inputs, up), strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    moe = make_moe("one-group-of-two")
    x = torch.randn(4, 7)
    assert moe.router.bias is not None
    with torch.no_grad():
        moe.router.bias.zero_()[[4, 5, 7]] = 10.0
    weights, chosen = moe.router(x)
    scores = F.linear(x, moe.router.weight).sigmoid()[:, [4, 5, 7]]
    order = chosen.argsort()
    assert chosen.gather(1, order).tolist() == [[4, 5, 7]] * 4
    torch.testing.assert_close(weights.gather(1, order), scores / scores.sum(-1, keepdim=True))
    assert torch.autograd.grad(weights.sum(), [moe.router.bias], allow_unused=True) == (None,)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "bailing_moe_v2"])
def test_counts_of_a_recipe_s_model(family: str) -> None:
    experts = ExpertsConfig(count=4, per_token=2, intermediate_size=8)
    if family == "bailing_moe_v2":
        experts = ExpertsConfig(4, 2, 8, first_dense_layers=1, shared=2, groups=2, top_groups=1, scaling=2.5)
    spec = spec_from_config(
        ModelConfig(
            family=family, vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4,
            num_kv_heads=2, head_dim=4, experts=experts,
        )
    )  # fmt: skip
    with torch.device("meta"):
        model = Decoder(spec)
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    attention, expert = 2 * 16 * (16 + 8), 3 * 16 * 8
    mixed = attention + 2 * expert + 16 * 4
    ling = attention + 3 * 16 * 24 + 2 * (mixed + 2 * expert)
    assert spec.active_matrix_weights == (ling if family == "bailing_moe_v2" else 3 * mixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 6, "groups": 4}, "6 experts cannot lie in 4 equal groups"),
        ({"groups": 2, "top_groups": 3}, "3 of 2 groups"),
        ({"per_token": 5, "groups": 2, "top_groups": 1}, "cannot choose 5 of 4"),
        ({"first_dense_layers": 2}, "none of 2 layers has experts"),
        ({"count": 0}, "num_experts is 0"),
    ],
)
def test_refused_mixtures(change: dict[str, Any], message: str) -> None:
    experts = ExpertsConfig(**({"count": 8, "per_token": 2} | change))
    with pytest.raises(ModelError, match=message):
        spec_from_config(ModelConfig(family="bailing_moe_v2", num_layers=2, experts=experts))


def test_what_folders_of_a_family_cannot_say_is_refused() -> None:
    with pytest.raises(ModelError, match="qwen3_moe has neither shared experts"):
        spec_from_config(ModelConfig(family="qwen3_moe", experts=ExpertsConfig(count=4, shared=1)))
    with pytest.raises(ModelError, match="olmoe cannot have experts in all layers but"):
        spec_from_config(ModelConfig(family="olmoe", experts=ExpertsConfig(count=4, first_dense_layers=1)))
    olmoe = {"model_type": "olmoe", "clip_qkv": 8.0, "num_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ModelError, match=r"clip_qkv=8\.0"):
        spec_from_hf(olmoe)


def test_adapters_stand_beside_attention_and_shared_experts_alone() -> None:
    moe = MoESpec(4, 2, 8, 8, (0,), score="sigmoid", has_bias=True)
    model = Decoder(ModelSpec("bailing_moe_v2", 11, 16, 24, 2, 4, 2, 4, rotary_factor=0.5, qk_norm=True, moe=moe))
    add_lora(model, LoraConfig(rank=2, targets=["query_key_value", "up_proj"]))
    adapted = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    ours = ("layers.0.attn.qkv_proj", "layers.0.mlp.gate_up_proj")
    assert adapted == {*ours, "layers.1.attn.qkv_proj", "layers.1.mlp.shared.gate_up_proj"}
    with pytest.raises(ModelError, match='names "gate", which'):
        add_lora(Decoder(model.spec), LoraConfig(rank=2, targets=["gate"]))
