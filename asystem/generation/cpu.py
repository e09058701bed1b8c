"""Decode steps on a CPU, each one call of compiled code (`kernels.cpu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from asystem.generation.kernels import cpu
from asystem.generation.kv_cache import KVCache
from asystem.generation.rows import FULL, STOPPED, Rows
from asystem.generation.runner import EagerRunner, StepContext
from asystem.generation.scheduler import Prefill
from asystem.models.decoder import MLP, Block, Decoder


class CpuRunner:
    """A `runner.Runner` for dense float32 models on CPUs. Prefills, and batches with top-k or top-p, are eager."""

    run_ahead = 1

    def __init__(self, model: Decoder, cache: KVCache, rows: Rows, stop_ids: Collection[int]) -> None:
        self.model, self.cache, self.rows = model, cache, rows
        self._eager = EagerRunner(model, cache, rows, stop_ids)
        self._stops = torch.zeros(rows.vocab_size, dtype=torch.uint8)
        self._stops[list(stop_ids)] = 1
        self._cos, self._sin = (x.contiguous() for x in model.rotary(torch.arange(rows.tokens.shape[1])))
        self._step = self._fixed()
        self._version: int | None = None

    def moved(self) -> None:
        """They are looked up before the next step."""
        self._version = None

    def prefill(self, prefills: Sequence[Prefill], context: StepContext) -> None:
        self._eager.prefill(prefills, context)

    def decode(self, steps: int, context: StepContext) -> None:
        if context.truncated:
            return self._eager.decode(steps, context)
        step = self._step
        if context.version != self._version or step.embedding != cpu.address(self.model.embed.weight):
            self._version = context.version  # whoever changed the weights may have moved them
            self._find_weights()
        step.rows, step.longest, step.version = context.num_rows, context.longest, context.version
        cpu.decode(step)

    def _fixed(self) -> cpu.Step:
        """All that stays from step to step."""
        spec, rows, step = self.model.spec, self.rows, cpu.Step()
        step.sgemm, step.num_layers, step.size, step.inner = (
            cpu.sgemm(), spec.num_layers, spec.hidden_size, spec.intermediate_size,
        )  # fmt: skip
        step.q_heads, step.kv_heads, step.head, step.vocab = (
            spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size,
        )  # fmt: skip
        step.half, step.block_size, step.eps = self._cos.shape[-1], self.cache.block_size, spec.rms_eps
        step.stopped, step.full = STOPPED, FULL
        step.table_stride, step.stride = rows.table.stride(0), rows.tokens.stride(0)
        step.cosine, step.sine, step.stops = (cpu.address(x) for x in (self._cos, self._sin, self._stops))
        for name in (
            "drawn", "done", "last_token", "position", "key", "limit", "heeds_stop", "table", "temperature", "tokens",
            "logprobs", "versions",
        ):  # fmt: skip
            setattr(step, name, cpu.address(getattr(rows, name)))
        most, attended = len(rows.drawn), spec.num_heads * spec.head_dim
        widths = {
            "x": spec.hidden_size, "normed": spec.hidden_size, "qkv": attended + 2 * spec.kv_size,
            "attended": attended, "gate_up": 2 * spec.intermediate_size, "gated": spec.intermediate_size,
            "logits": spec.vocab_size,
        }  # fmt: skip
        self._scratch: dict[str, Tensor] = {name: torch.empty(most, width) for name, width in widths.items()}
        self._scratch["lengths"] = torch.empty(most, dtype=torch.int64)
        for name, tensor in self._scratch.items():
            setattr(step, name, cpu.address(tensor))
        return step

    def _find_weights(self) -> None:
        model, step = self.model, self._step
        self._layers = (cpu.Layer * model.spec.num_layers)(*map(self._layer, model.layers))
        step.layers = ctypes.addressof(self._layers)
        step.embedding, step.norm = cpu.address(model.embed.weight), cpu.address(model.norm.weight)
        step.head_weight = cpu.address(model.head_weight())

    def _layer(self, block: nn.Module) -> cpu.Layer:
        assert isinstance(block, Block) and isinstance(block.mlp, MLP)
        attn, mlp, (keys, values) = block.attn, block.mlp, self.cache.data[block.index]
        parameters = (
            block.attn_norm.weight, attn.qkv_proj.weight, attn.qkv_proj.bias,
            None if attn.q_norm is None else attn.q_norm.weight, None if attn.k_norm is None else attn.k_norm.weight,
            attn.o_proj.weight, block.mlp_norm.weight, mlp.gate_up_proj.weight, mlp.down_proj.weight, keys, values,
        )  # fmt: skip
        return cpu.Layer(*map(cpu.address, parameters))


def is_supported(model: Decoder, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `CpuRunner` can decode with this model here."""
    is_plain = all(map(_is_plain, model.layers))
    is_whole = model.shard is None  # the compiled step has no place for a collective
    return device.type == "cpu" and dtype is torch.float32 and is_plain and is_whole and cpu.is_available()


def _is_plain(block: nn.Module) -> bool:
    """Dense, with whole weights, norms of single heads, and heads that the compiled code has room for."""
    if not isinstance(block, Block) or type(block.mlp) is not MLP:
        return False
    attn, mlp = block.attn, block.mlp
    products = (attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj)
    fits = attn.head_dim <= cpu.MOST_HEAD and (attn.q_norm is None or attn.q_norm.weight.numel() == attn.head_dim)
    return fits and all(type(product) is nn.Linear for product in products)
