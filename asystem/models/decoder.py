"""One decoder for packed training and for paged decoding.

All tokens stand on one flattened axis ``[T]``: packed training sequences, a decode batch (one token of each sequence)
or a chunk of prompts. Only attention differs between these, so the caller hands it in as an `Attend`. Projections that
read the same input are fused into one matrix (q, k, v; gate, up); `models.hf` splits and joins them for Hugging Face's
folders.

    tokens [T] -> embed -> block * L -> norm -> hidden [T, D] -> logits [N, V], for those rows that need them
                            |
                            x + o_proj(attend(layer, q, k, v)),  then  x + mlp(norm(x)), the mlp maybe of experts
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asystem.models.moe import MoE
from asystem.models.spec import ModelSpec, RopeScaling

if TYPE_CHECKING:
    from asystem.models.parallel import Shard


class Attend(Protocol):
    """How attention sees the past: all that differs between training and decoding."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, d], k and v [T, Hk, d], after norm and rotary -> [T, Hq, d]."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 inside whatever the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """The projections around attention; attention itself is the caller's."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.qkv_proj = nn.Linear(spec.hidden_size, spec.q_size + 2 * spec.kv_size, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.q_size, spec.hidden_size, bias=False)
        q_norm, k_norm = spec.qk_norm_sizes
        self.q_norm = RMSNorm(q_norm, spec.rms_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(k_norm, spec.rms_eps) if spec.qk_norm else None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> q [T, Hq, d], k [T, Hk, d], v [T, Hk, d], normed and rotated."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x).view(x.shape[0], heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """x [T, H, d], over each head or over all of them together, as the norm's weight is long."""
    out: Tensor = norm(x.reshape(len(x), -1, len(norm.weight)))
    return out.view(x.shape)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """One layer: attention and MLP, or a mixture of experts, each on a normed copy of the residual stream.

    `project` and `finish` are the layer without attention: `compile_parts` compiles them, and leaves the attention
    between them, which reads the layer's number and lengths that change, out of the graphs.

    Attributes:
        enter, reduce: where the layer is cut over ranks (`models.parallel`), what its matrices read passes through the
            first, which makes its gradient whole, and the second makes whole what this rank has computed.
    """

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.index = index
        self.enter: Callable[[Tensor], Tensor] = _itself
        self.reduce: Callable[[Tensor], Tensor] = _itself
        self.attn_norm = RMSNorm(spec.hidden_size, spec.rms_eps)
        self.attn = Attention(spec)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.rms_eps)
        self.mlp = _mlp(spec, index)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All that comes before attention: x [T, D] -> q, k, v."""
        return self.attn.project(self.enter(self.attn_norm(x)), cos, sin)

    def finish(self, x: Tensor, attended: Tensor, experts: Tensor | None = None) -> Tensor:
        """All that comes after it: x [T, D], attended [T, Hq, d] -> [T, D]; experts [T, top_k], or the
        router's own choice."""
        x = x + self.reduce(self.attn.o_proj(attended.flatten(1)))
        normed = self.enter(self.mlp_norm(x))
        out: Tensor = x + self.reduce(self.mlp(normed) if experts is None else self.mlp(normed, given=experts))
        return out

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, experts: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.finish(x, attend(self.index, q, k, v), experts)

    @property
    def spread_experts(self) -> nn.Module | None:
        """The experts, where they stand on several ranks."""
        experts = self.mlp.experts if isinstance(self.mlp, MoE) else None
        return experts if experts is not None and experts.exchange is not None else None

    def compile_parts(self, **options: Any) -> None:
        """Compiles `project` and `finish` with torch.compile's options; all layers share the two graphs.

        Compiling a whole block instead would compile it once for each layer and each longest length, and stop at
        torch's limit of eight. Call it before ``fully_shard``.
        """
        if isinstance(self.mlp, MoE):
            self.mlp.leave_uncompiled()
        setattr(self, "project", torch.compile(self.project, **options))  # noqa: B010 (mypy: a method)
        setattr(self, "finish", torch.compile(self.finish, **options))  # noqa: B010


def _itself(x: Tensor) -> Tensor:
    return x


def _mlp(spec: ModelSpec, layer: int) -> MLP | MoE:
    size, moe = spec.hidden_size, spec.moe
    if moe is None or not moe.has_experts(layer):
        return MLP(size, spec.intermediate_size)
    return MoE(size, moe, MLP(size, moe.shared_size) if moe.shared_size else None)


class Decoder(nn.Module):
    """A decoder of one of the families in `spec.ARCHITECTURES`.

    It may be built under ``torch.device("meta")``, then `to_empty` and `init_weights` or loading: rotary frequencies
    are no buffer but computed at first use. Under FSDP2 with mixed precision, set ``cast_forward_inputs=False`` on the
    blocks, so that rotary tables stay float32 as they are in decoding.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, index) for index in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_eps)
        self.head = None if spec.tie_embeddings else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.shard: Shard | None = None  # which part of a model this is, where it is cut over ranks
        self._inv_freq: Tensor | None = None

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, routing: Tensor | None = None) -> Tensor:
        """tokens, positions [T] int64 -> final-normed hidden states [T, D].

        Args:
            routing: [T, layers with experts, top_k], experts in the place of the routers' own choice where they are not
                negative; None = nowhere.
        """
        x = self.embed(tokens)
        cos, sin = self.rotary(positions)
        choices = [] if routing is None else [layer.contiguous() for layer in routing.unbind(1)]
        given = dict(zip(self.spec.expert_layers if choices else [], choices, strict=True))
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend, given.get(index))
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V] float32; the product itself runs in the model's dtype."""
        return F.linear(hidden, self.head_weight()).float()

    def head_weight(self) -> Tensor:
        """[V, D], the embedding's own weight when they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin, both [T, 1, r / 2] float32 for the r numbers of a head that are rotated."""
        if self._inv_freq is None or self._inv_freq.device != positions.device:
            self._inv_freq = inverse_frequencies(self.spec).to(positions.device)
        angles = (positions[:, None].float() * self._inv_freq)[:, None, :]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32 of each head's first numbers, as many as cos and sin are for.

    Their halves are paired as Hugging Face does: x [T, H, d] -> the same shape and dtype.
    """
    rest = x[..., 2 * cos.shape[-1] :]
    left, right = x[..., : 2 * cos.shape[-1]].float().chunk(2, dim=-1)
    rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Rotary frequencies in radians per token, [rotary_dim / 2] float32 on the CPU."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32, device="cpu") / spec.rotary_dim
    inv_freq = 1.0 / spec.rope_theta**exponents
    return inv_freq if spec.rope_scaling is None else _stretch(inv_freq, spec.rope_scaling)


def _stretch(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: long wavelengths are stretched by ``factor``, short ones stay, those between are blended."""
    turns = scaling.original_max_positions * inv_freq / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq * keep + inv_freq / scaling.factor * (1 - keep)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Normal weights, zero biases, norms of one, in place.

    Each parameter draws from a generator seeded by ``seed`` and its own name, so that neither the order of modules nor
    a new module changes the others. Parameters must be whole (not yet sharded); equal seeds give equal weights on
    devices of one kind.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            parameter.normal_(0.0, std, generator=generator)
