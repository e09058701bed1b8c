"""The shape of a decoder, and its translation from and to Hugging Face's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asystem.config import ModelConfig
from asystem.errors import ModelError, nearest

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# What transformers assumes when a config.json leaves the key out, by family.
_DEFAULT_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}
_DTYPES = {"float32", "bfloat16", "float16"}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the low rotary frequencies (rope_type "llama3").

    Attributes:
        factor: wavelengths beyond ``original_max_positions / low_freq_factor`` tokens are stretched by it.
        high_freq_factor: wavelengths below ``original_max_positions / high_freq_factor`` stay; between, a blend.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides the shapes and the arithmetic of a `models.decoder.Decoder`."""

    family: str  # llama | qwen2 | qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rotary (Qwen3)
    qkv_bias: bool = False  # Qwen2
    tie_embeddings: bool = False
    max_positions: int = 4096
    dtype: str = "float32"  # what the folder's weights are stored in: a hint for loading, not a constraint

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise ModelError(f'unsupported model family "{self.family}"{nearest(self.family, ARCHITECTURES)}')
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "max_positions"):
            if getattr(self, name) < 1:
                raise ModelError(f"model {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads; "
                "num_heads must be a multiple of num_kv_heads"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ModelError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        d = self.hidden_size
        attention = d * (self.q_size + 2 * self.kv_size) + self.q_size * d
        attention += (self.q_size + 2 * self.kv_size) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * d * self.intermediate_size + 2 * d
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)


def spec_from_config(config: ModelConfig) -> ModelSpec:
    """The spec of ``config.path``'s folder, or, without a path, of the shape that the recipe gives.

    Raises:
        ModelError: an unsupported family or feature, or a folder without a readable config.json.
    """
    if config.path is not None:
        return read_spec(config.path)
    return ModelSpec(
        family=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        qk_norm=config.family == "qwen3",
        qkv_bias=config.family == "qwen2",
        tie_embeddings=config.tie_embeddings,
        max_positions=config.max_positions,
    )


def read_spec(folder: str | Path) -> ModelSpec:
    """The spec in a Hugging Face folder's config.json.

    Raises:
        ModelError: no such folder or file, malformed JSON, or an unsupported model.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; model.path must be a Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    try:
        return spec_from_hf(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def spec_from_hf(config: dict[str, Any]) -> ModelSpec:
    """Reads a config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises:
        ModelError: an unsupported family or feature, named together with what is supported, or a missing key.
    """
    family = str(config.get("model_type"))
    if family not in ARCHITECTURES:
        raise ModelError(f'model_type "{family}" is not supported; supported are {", ".join(ARCHITECTURES)}')
    _refuse_unsupported(family, config)
    theta, scaling = _rope_from_hf(config)
    heads, hidden = int(_need(config, "num_attention_heads")), int(_need(config, "hidden_size"))
    default_head_dim = 128 if family == "qwen3" else hidden // heads
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelSpec(
        family=family,
        vocab_size=int(_need(config, "vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(_need(config, "intermediate_size")),
        num_layers=int(_need(config, "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or default_head_dim),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config.get("max_position_embeddings", _DEFAULT_POSITIONS[family])),
        dtype=dtype if dtype in _DTYPES else "float32",
    )


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read; the inverse of `spec_from_hf`."""
    scaling: dict[str, Any] | None = None
    if spec.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_max_positions,
        }
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": spec.rope_theta},
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tie_embeddings,
        "dtype": spec.dtype,
        "torch_dtype": spec.dtype,
    }
    if spec.family != "qwen2":
        config["attention_bias"] = False
    if spec.family != "llama":
        config["use_sliding_window"] = False
    return config


def _need(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ModelError(f'config.json has no "{key}"')
    return config[key]


def _refuse_unsupported(family: str, config: dict[str, Any]) -> None:
    """Features that would change the arithmetic and that the decoder does not have."""
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f'hidden_act "{config["hidden_act"]}" is not supported; only "silu" is')
    if family != "qwen2" and config.get("attention_bias"):
        raise ModelError(f"attention_bias is not supported for {family}; only qwen2 has biases (on q, k and v)")
    if config.get("mlp_bias"):
        raise ModelError("mlp_bias is not supported; only MLPs without bias are")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ModelError("sliding-window attention is not supported; only full attention is")
    if config.get("quantization_config"):
        raise ModelError("quantized weights are not supported; only float32, bfloat16 and float16 are")


def _rope_from_hf(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling; rope_parameters wins, as in transformers 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ModelError("partial rotary embedding is not supported; only partial_rotary_factor 1.0 is")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(f'rope type "{kind}" is not supported; supported are default, llama3')
    return theta, RopeScaling(
        factor=float(_need(rope, "factor")),
        low_freq_factor=float(_need(rope, "low_freq_factor")),
        high_freq_factor=float(_need(rope, "high_freq_factor")),
        original_max_positions=int(_need(rope, "original_max_position_embeddings")),
    )
