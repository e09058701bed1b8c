"""The shape of a decoder, and its translation from and to Hugging Face's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asystem.config import ModelConfig
from asystem.errors import ModelError, nearest
from asystem.models.moe_spec import FAMILIES, MoESpec, moe_from_config, moe_from_hf, moe_to_hf

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "bailing_moe_v2": "BailingMoeV2ForCausalLM",
}

# What transformers assumes when a config.json leaves the key out, by family.
_DEFAULT_POSITIONS = {"llama": 2048, "olmoe": 4096, "bailing_moe_v2": 16384}  # Qwen: 32768
_HAS_QK_NORM = ("qwen3", "qwen3_moe", "olmoe", "bailing_moe_v2")
_LING_ROTARY = 0.5  # share of each head that Ling 2.0 rotates
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

    family: str  # a key of ARCHITECTURES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_factor: float = 1.0  # share of each head that is rotated: its first numbers (Ling 2.0)
    rms_eps: float = 1e-6
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rotary (Qwen3, Ling 2.0)
    qk_norm_whole: bool = False  # such a norm is over all heads together (OLMoE)
    qkv_bias: bool = False  # Qwen2
    tie_embeddings: bool = False
    max_positions: int = 4096
    dtype: str = "float32"  # what the folder's weights are stored in: a hint for loading, not a constraint
    moe: MoESpec | None = None  # `intermediate_size` is then that of the layers without experts

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
        if self.head_dim < 2 or self.head_dim % 2 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ModelError(
                f"head_dim is {self.head_dim}, of which {self.rotary_dim} are rotated; rotary embedding needs even "
                "numbers"
            )
        if self.qk_norm_whole and self.q_size != self.hidden_size:
            raise ModelError(f"{self.num_heads} heads of {self.head_dim} must fill hidden_size={self.hidden_size} here")
        if (self.moe is not None) != (self.family in FAMILIES):
            raise ModelError(f"{self.family} is {'not ' * (self.moe is not None)}a family with a mixture of experts")
        if self.moe is not None:
            self.moe.check(self.family, self.num_layers)

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that are rotated."""
        return int(self.head_dim * self.rotary_factor)

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """Numbers that one norm of q takes together, and one of k."""
        return (self.q_size, self.kv_size) if self.qk_norm_whole else (self.head_dim, self.head_dim)

    @property
    def expert_layers(self) -> list[int]:
        """The layers that have experts."""
        return [] if self.moe is None else [layer for layer in range(self.num_layers) if self.moe.has_experts(layer)]

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        d, experts = self.hidden_size, len(self.expert_layers)
        norms = sum(self.qk_norm_sizes) * self.qk_norm + 2 * d
        biases = (self.q_size + 2 * self.kv_size) * self.qkv_bias
        layers = self.num_layers * (self._attention_weights + norms + biases)
        layers += (self.num_layers - experts) * 3 * d * self.intermediate_size
        layers += experts * self.moe.weights(d) if self.moe is not None else 0
        return layers + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)

    @property
    def active_matrix_weights(self) -> int:
        """Numbers of the layers' matrices that one token is multiplied with."""
        d, experts = self.hidden_size, len(self.expert_layers)
        mlps = (self.num_layers - experts) * 3 * d * self.intermediate_size
        mlps += experts * self.moe.active_weights(d) if self.moe is not None else 0
        return self.num_layers * self._attention_weights + mlps

    @property
    def _attention_weights(self) -> int:
        return 2 * self.hidden_size * (self.q_size + self.kv_size)


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
        rotary_factor=_LING_ROTARY if config.family == "bailing_moe_v2" else 1.0,
        qk_norm=config.family in _HAS_QK_NORM,
        qk_norm_whole=config.family == "olmoe",
        qkv_bias=config.family == "qwen2",
        tie_embeddings=config.tie_embeddings,
        max_positions=config.max_positions,
        moe=moe_from_config(config),
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
    family = _family(config)
    if family not in ARCHITECTURES:
        raise ModelError(f'model_type "{family}" is not supported; supported are {", ".join(ARCHITECTURES)}')
    _refuse_unsupported(family, config)
    theta, scaling, rotary = _rope_from_hf(config)
    heads, hidden = int(_need(config, "num_attention_heads")), int(_need(config, "hidden_size"))
    default_head_dim = 128 if family == "qwen3" else hidden // heads
    eps = 1e-5 if family == "olmoe" else 1e-6
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
        rotary_factor=rotary,
        rms_eps=float(config.get("rms_norm_eps", eps)),
        qk_norm=family in _HAS_QK_NORM and bool(config.get("use_qk_norm", True)),
        qk_norm_whole=family == "olmoe",
        qkv_bias=family == "qwen2",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config.get("max_position_embeddings", _DEFAULT_POSITIONS.get(family, 32768))),
        dtype=dtype if dtype in _DTYPES else "float32",
        moe=moe_from_hf(family, config),
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
    if spec.family == "bailing_moe_v2":
        config |= {"use_qkv_bias": False, "use_bias": False, "use_qk_norm": spec.qk_norm, "num_nextn_predict_layers": 0}
        config["partial_rotary_factor"] = spec.rotary_factor
    elif spec.family != "qwen2":
        config["attention_bias"] = False
    if spec.family.startswith("qwen"):
        config["use_sliding_window"] = False
    return config if spec.moe is None else config | moe_to_hf(spec.family, spec.moe)


def _family(config: dict[str, Any]) -> str:
    """The model_type; some Ling 2.0 folders carry that of Ling 1 beside the right architecture."""
    family = str(config.get("model_type"))
    is_ling = family == "bailing_moe" and ARCHITECTURES["bailing_moe_v2"] in (config.get("architectures") or ())
    return "bailing_moe_v2" if is_ling else family


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
    if config.get("use_qkv_bias") or config.get("use_bias"):
        raise ModelError("use_qkv_bias and use_bias are not supported; only bailing_moe_v2 without biases is")
    if config.get("clip_qkv") is not None:
        raise ModelError(f"clip_qkv={config['clip_qkv']} is not supported; only null is")
    if config.get("mlp_bias"):
        raise ModelError("mlp_bias is not supported; only MLPs without bias are")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ModelError("sliding-window attention is not supported; only full attention is")
    if config.get("quantization_config"):
        raise ModelError("quantized weights are not supported; only float32, bfloat16 and float16 are")


def _rope_from_hf(config: dict[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, rotated share) from either spelling; rope_parameters wins, as in transformers 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    if share != 1.0 and _family(config) != "bailing_moe_v2":
        raise ModelError(f"partial_rotary_factor={share:g} is supported for bailing_moe_v2 alone")
    if kind == "default":
        return theta, None, share
    if kind != "llama3":
        raise ModelError(f'rope type "{kind}" is not supported; supported are default, llama3')
    scaling = RopeScaling(
        factor=float(_need(rope, "factor")),
        low_freq_factor=float(_need(rope, "low_freq_factor")),
        high_freq_factor=float(_need(rope, "high_freq_factor")),
        original_max_positions=int(_need(rope, "original_max_position_embeddings")),
    )
    return theta, scaling, share
