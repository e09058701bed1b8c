"""The shape of a mixture of experts, and its translation from and to Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from asystem.config import ModelConfig
from asystem.errors import ModelError

FAMILIES = ("qwen3_moe", "olmoe", "bailing_moe_v2")


@dataclass(frozen=True)
class MoESpec:
    """Which layers have experts, and how a token chooses its own.

        scores = softmax or sigmoid of the router's logits, in float32
        chosen = the top_k experts by score + bias, among the best groups of experts alone
        weight = score of each chosen one, / their sum if normalize, * scaling

    Attributes:
        intermediate_size: width of one expert.
        shared_size: width of the expert that computes every token beside the chosen ones; 0 = none.
        dense_layers: layers with an MLP instead.
        groups, top_groups: the experts lie in equal groups, and those of `top_groups` groups may be chosen: the ones
            with the highest sums of their two best scores (DeepSeek-V3, arXiv:2412.19437, §2.1.2).
        has_bias: a bias per expert counts in choosing, not in weighting (arXiv:2408.15664).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_size: int = 0
    dense_layers: tuple[int, ...] = ()
    score: str = "softmax"  # softmax | sigmoid
    normalize: bool = True
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1
    has_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "intermediate_size", "groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ModelError(f"mixture of experts: {name} is {getattr(self, name)}; it must be at least 1")
        size, rest = divmod(self.num_experts, self.groups)
        if rest or (self.groups > 1 and size < 2):
            raise ModelError(f"{self.num_experts} experts cannot lie in {self.groups} equal groups of at least 2")
        if self.top_groups > self.groups:
            raise ModelError(f"a token cannot choose among {self.top_groups} of {self.groups} groups of experts")
        if self.top_k > self.top_groups * size:
            raise ModelError(f"a token cannot choose {self.top_k} of {self.top_groups * size} experts")

    def has_experts(self, layer: int) -> bool:
        return layer not in self.dense_layers

    @property
    def choice_dtype(self) -> torch.dtype:
        """The smallest that holds an expert's number."""
        return torch.uint8 if self.num_experts <= 256 else torch.int16

    def check(self, family: str, num_layers: int) -> None:
        """Refuses what the family's folders cannot say.

        Raises:
            ModelError: naming it.
        """
        if not any(map(self.has_experts, range(num_layers))):
            raise ModelError(f"none of {num_layers} layers has experts; use a dense family")
        is_ling, dense = family == "bailing_moe_v2", self.dense_layers
        more = self.shared_size, self.groups - 1, self.has_bias, self.scaling - 1, self.score != "softmax"
        if not is_ling and any(more):
            raise ModelError(f"{family} has neither shared experts, groups of experts, biases, scaling nor sigmoid")
        if is_ling and (not self.has_bias or self.score != "sigmoid" or self.normalize != (self.top_k > 1)):
            raise ModelError("bailing_moe_v2 routes by normalised sigmoid scores with a bias")
        if (is_ling and dense != tuple(range(len(dense)))) or (family == "olmoe" and dense):
            raise ModelError(f"{family} cannot have experts in all layers but {list(dense)}")

    def weights(self, hidden_size: int) -> int:
        """Numbers of one layer's router, experts and shared expert."""
        experts = 3 * hidden_size * (self.num_experts * self.intermediate_size + self.shared_size)
        return experts + self.num_experts * (hidden_size + self.has_bias)

    def active_weights(self, hidden_size: int) -> int:
        """Those of them that one token is multiplied with."""
        return hidden_size * (3 * (self.top_k * self.intermediate_size + self.shared_size) + self.num_experts)


def moe_from_config(config: ModelConfig) -> MoESpec | None:
    """The mixture of the shape that a recipe gives; None for dense families."""
    if config.family not in FAMILIES:
        return None
    experts, is_ling = config.experts, config.family == "bailing_moe_v2"
    return MoESpec(
        num_experts=experts.count,
        top_k=experts.per_token,
        intermediate_size=experts.intermediate_size,
        shared_size=experts.shared * experts.intermediate_size,
        dense_layers=tuple(range(experts.first_dense_layers)),
        score="sigmoid" if is_ling else "softmax",
        normalize=config.family != "olmoe",
        scaling=experts.scaling,
        groups=experts.groups,
        top_groups=experts.top_groups,
        has_bias=is_ling,
    )


def moe_from_hf(family: str, config: dict[str, Any]) -> MoESpec | None:
    """The mixture in a config.json; None for dense families.

    Raises:
        ModelError: a missing key, or a combination that makes no sense.
    """
    if family not in FAMILIES:
        return None
    top_k, layers = _number(config, "num_experts_per_tok"), range(_number(config, "num_hidden_layers"))
    if family == "bailing_moe_v2":
        inner = _number(config, "moe_intermediate_size")
        return MoESpec(
            num_experts=_number(config, "num_experts"),
            top_k=top_k,
            intermediate_size=inner,
            shared_size=inner * int(config.get("num_shared_experts") or 0),
            dense_layers=tuple(layers[: int(config.get("first_k_dense_replace") or 0)]),
            score="sigmoid",
            normalize=top_k > 1,
            scaling=float(config.get("routed_scaling_factor", 2.5)),
            groups=int(config.get("n_group", 8)),
            top_groups=int(config.get("topk_group", 4)),
            has_bias=True,
        )
    step, dense = int(config.get("decoder_sparse_step") or 1), set(config.get("mlp_only_layers") or ())
    return MoESpec(
        num_experts=_number(config, "num_experts", "num_local_experts"),
        top_k=top_k,
        intermediate_size=_number(config, "intermediate_size" if family == "olmoe" else "moe_intermediate_size"),
        dense_layers=tuple(layer for layer in layers if layer in dense or (layer + 1) % step),
        normalize=bool(config.get("norm_topk_prob", False)),
    )


def _number(config: dict[str, Any], *keys: str) -> int:
    """The first of these keys that is there."""
    for key in keys:
        if config.get(key) is not None:
            return int(config[key])
    raise ModelError(f'config.json has no "{keys[0]}"')


def moe_to_hf(family: str, moe: MoESpec) -> dict[str, Any]:
    """The keys of a config.json that describe the mixture; the inverse of `moe_from_hf`."""
    config: dict[str, Any] = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize,
        "output_router_logits": False,
    }
    if family == "olmoe":
        return config | {"intermediate_size": moe.intermediate_size, "clip_qkv": None}
    config["moe_intermediate_size"] = moe.intermediate_size
    if family == "qwen3_moe":
        return config | {"decoder_sparse_step": 1, "mlp_only_layers": list(moe.dense_layers)}
    return config | {
        "num_shared_experts": moe.shared_size // moe.intermediate_size,
        "first_k_dense_replace": len(moe.dense_layers),
        "routed_scaling_factor": moe.scaling,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
    }
