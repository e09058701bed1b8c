"""Ling 2.0 against a reference: one token at a time, after the published modeling_bailing_moe_v2.py in plain words.

transformers has no class for it. The reference reads a folder's own names and config.json, and nothing of ours.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, MoESpec, PackedAttention, init_weights, load_model, read_spec, save_model

LENGTHS = [1, 9, 4]
MIXTURE: dict[str, Any] = {"score": "sigmoid", "has_bias": True, "normalize": True}
MIXTURES = {
    "groups": MoESpec(8, 3, 6, 12, (0,), scaling=2.5, groups=4, top_groups=2, **MIXTURE),
    "no-shared": MoESpec(6, 2, 10, 0, (), scaling=1.5, groups=2, top_groups=2, **MIXTURE),
    "one-expert": MoESpec(4, 1, 8, 8, (0, 1), **MIXTURE | {"normalize": False}),
}


def make_model(moe: MoESpec) -> Decoder:
    spec = ModelSpec(
        "bailing_moe_v2", 37, 20, 28, 3, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=600.0, rotary_factor=0.5,
        qk_norm=True, max_positions=64, moe=moe,
    )  # fmt: skip
    model = Decoder(spec)
    init_weights(model, seed=1, std=0.3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that none can be left out unseen
            if name.endswith(("norm.weight", "router.bias")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x / math.sqrt(float((x * x).mean()) + 1e-6))


def rotated(x: Tensor, position: int, config: dict[str, Any]) -> Tensor:
    """The first numbers of a head, number i paired with i + half of them."""
    width = int(config["head_dim"] * config["partial_rotary_factor"])
    half, out = width // 2, x.clone()
    for i in range(half):
        angle = position * config["rope_theta"] ** (-2 * i / width)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def mlp(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    gate, up = weights[f"{name}.gate_proj.weight"] @ x, weights[f"{name}.up_proj.weight"] @ x
    return weights[f"{name}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)


def experts(x: Tensor, weights: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    scores = torch.sigmoid(weights[f"{name}.gate.weight"] @ x)
    biased = (scores + weights[f"{name}.gate.expert_bias"]).tolist()
    size = config["num_experts"] // config["n_group"]
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config["n_group"])]
    groups.sort(key=lambda members: -sum(sorted(biased[e] for e in members)[-2:]))
    allowed = [expert for members in groups[: config["topk_group"]] for expert in members]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[: config["num_experts_per_tok"]]
    total = sum(float(scores[expert]) for expert in chosen) if len(chosen) > 1 else 1.0
    out = torch.zeros_like(x)
    for expert in chosen:
        weight = float(scores[expert]) / total * config["routed_scaling_factor"]
        out += weight * mlp(x, weights, f"{name}.experts.{expert}")
    return out + mlp(x, weights, f"{name}.shared_experts") if config["num_shared_experts"] else out


def reference_logits(tokens: list[int], weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """[T, V] of one sequence."""
    num_heads, kv_heads, d = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    past: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
    logits = []
    for position, token in enumerate(tokens):
        x = weights["model.word_embeddings.weight"][token]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed = norm(x, weights[f"{name}.input_layernorm.weight"])
            heads = (weights[f"{name}.attention.query_key_value.weight"] @ normed).view(-1, d)
            for head in range(kv_heads):
                keys, values = past.setdefault((layer, head), ([], []))
                key = norm(heads[num_heads + head], weights[f"{name}.attention.key_layernorm.weight"])
                keys.append(rotated(key, position, config))
                values.append(heads[num_heads + kv_heads + head])
            attended = []
            for head in range(num_heads):
                keys, values = past[layer, head * kv_heads // num_heads]
                query = norm(heads[head], weights[f"{name}.attention.query_layernorm.weight"])
                query = rotated(query, position, config)
                shares = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(d), 0)
                attended.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            x = x + weights[f"{name}.attention.dense.weight"] @ torch.cat(attended)
            normed = norm(x, weights[f"{name}.post_attention_layernorm.weight"])
            is_dense = layer < config["first_k_dense_replace"]
            x = x + (
                mlp(normed, weights, f"{name}.mlp") if is_dense else experts(normed, weights, f"{name}.mlp", config)
            )
        logits.append(weights["lm_head.weight"] @ norm(x, weights["model.norm.weight"]))
    return torch.stack(logits)


@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_logits_equal_the_reference(kind: str, tmp_path: Path) -> None:
    model = make_model(MIXTURES[kind])
    save_model(model, model.spec, tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    tokens = torch.randint(0, 37, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    packed = PackedAttention(torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS))
    want = torch.cat([reference_logits(part.tolist(), weights, config) for part in tokens.split(LENGTHS)])
    assert want.std() > 0.3
    torch.testing.assert_close(model.logits(model(tokens, positions, packed)), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_folder_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = make_model(MIXTURES[kind])
    save_model(model, model.spec, tmp_path, max_shard_bytes=3000)
    assert read_spec(tmp_path) == model.spec
    back = load_model(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name
    assert sum(parameter.numel() for parameter in model.parameters()) == model.spec.num_parameters


def test_the_older_name_of_the_family_is_read(tmp_path: Path) -> None:
    model = make_model(MIXTURES["groups"])
    save_model(model, model.spec, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bailing_moe"}))
    assert read_spec(tmp_path) == model.spec
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_qkv_bias": True}))
    with pytest.raises(ModelError, match="use_qkv_bias"):
        read_spec(tmp_path)
