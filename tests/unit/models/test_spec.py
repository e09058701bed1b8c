"""config.json in and out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asystem.config import ModelConfig
from asystem.errors import ModelError
from asystem.models import ModelSpec, RopeScaling, read_spec, spec_from_config, spec_from_hf, spec_to_hf

LLAMA = ModelSpec("llama", 128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500_000.0, max_positions=131072)
SCALED = ModelSpec(**{**vars(LLAMA), "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "dtype": "bfloat16"})
QWEN2 = ModelSpec("qwen2", 151936, 896, 4864, 24, 14, 2, 64, qkv_bias=True, tie_embeddings=True)
QWEN3 = ModelSpec("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, qk_norm=True, tie_embeddings=True)


@pytest.mark.parametrize("spec", [LLAMA, SCALED, QWEN2, QWEN3])
def test_round_trip(spec: ModelSpec) -> None:
    config = json.loads(json.dumps(spec_to_hf(spec)))
    assert spec_from_hf(config) == spec
    older = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    newer = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert spec_from_hf(older) == spec_from_hf(newer) == spec


def test_keys_left_out_take_the_family_s_defaults() -> None:
    config = {k: v for k, v in spec_to_hf(LLAMA).items() if k not in ("head_dim", "num_key_value_heads")}
    assert (spec_from_hf(config).head_dim, spec_from_hf(config).num_kv_heads) == (128, 32)
    config = {k: v for k, v in spec_to_hf(QWEN3).items() if k != "head_dim"}
    assert spec_from_hf(config).head_dim == 128  # not 1024 / 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, '"gpt2" is not supported; supported are llama, qwen2, qwen3'),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope type "yarn".*default, llama3'),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, 'rope type "linear"'),
        ({"rope_parameters": {"rope_type": "llama3"}}, '"factor"'),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial"),
        ({"hidden_size": None}, 'no "hidden_size"'),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_from_hf(spec_to_hf(LLAMA) | change)


def test_from_the_recipe() -> None:
    spec = spec_from_config(ModelConfig(family="qwen2", num_heads=8, num_kv_heads=2, head_dim=16, tie_embeddings=False))
    assert (spec.qkv_bias, spec.qk_norm, spec.num_heads, spec.q_size, spec.kv_size) == (True, False, 8, 128, 32)
    assert spec_from_config(ModelConfig()).qk_norm
    with pytest.raises(ModelError, match=r'"qwen" \(did you mean "qwen2"\?\)|"qwen" \(did you mean "qwen3"\?\)'):
        spec_from_config(ModelConfig(family="qwen"))


def test_from_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(spec_to_hf(QWEN2)))
    assert spec_from_config(ModelConfig(path=str(tmp_path))) == QWEN2
    file.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_spec(tmp_path)
    file.write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        read_spec(tmp_path)
    file.write_text(json.dumps(spec_to_hf(QWEN2) | {"model_type": "bert"}))
    with pytest.raises(ModelError, match=r'config\.json: model_type "bert"'):
        read_spec(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_spec(tmp_path / "nowhere")
