"""Decode steps on a GPU without the host in the way: one CUDA graph a batch size, replayed many times unseen.

A graph holds the whole step, from the embedding of the newest tokens to the drawn ones written into `rows.Rows`. Rows
that ended stand still until the host looks; sequences leave and join between calls. Batch sizes are rounded up to a few
buckets, and a bucket is captured when it is first used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from asystem.generation.crowds import ALONE, CrowdTable, Sharing, power_of_two
from asystem.generation.kernels.attention import Parts, Tiling, decode_attention, divide
from asystem.generation.kernels.chosen import can_route, chosen_experts, route
from asystem.generation.kernels.few import FewRows
from asystem.generation.kernels.grouped import grouped_tiles
from asystem.generation.kernels.layers import add_rms_norm, embed, rotary_write, swiglu
from asystem.generation.kernels.linear import MOST_ROWS, is_skinny, linear, norm_linear, takes_norm
from asystem.generation.kernels.sampling import draw
from asystem.generation.kernels.tiled import is_tiled, tiled_linear
from asystem.generation.kv_cache import KVCache
from asystem.generation.routing import RoutingCache
from asystem.generation.rows import FULL, RUNNING, STOPPED, Rows
from asystem.generation.runner import EagerRunner, StepContext, head_logits
from asystem.generation.sampler import sample, uniform
from asystem.generation.scheduler import Prefill
from asystem.models.decoder import MLP, Block, Decoder, RMSNorm
from asystem.models.moe import Experts, MoE
from asystem.models.quantized import QuantizedLinear

_PROGRAMS_PER_SM = 8  # attention is divided into at least so many a multiprocessor, and one a row in the mean
_TILING = Tiling(keys=64, warps=4, stages=2)


class CapturedRunner:
    """A `runner.Runner` for CUDA devices of compute capability 8.0 and up. Prefills are eager.

    Parameters may change in place between calls; where they or the KV pool moved, the graphs are captured anew.
    """

    run_ahead = 32

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        rows: Rows,
        stop_ids: Collection[int],
        *,
        exact_head: bool = False,
        routing: RoutingCache | None = None,
    ) -> None:
        self.model, self.cache, self.rows, self._exact_head = model, cache, rows, exact_head
        device = rows.device
        self._eager = EagerRunner(model, cache, rows, stop_ids, exact_head=exact_head, routing=routing)
        self._routing = routing
        self._stops = torch.zeros(rows.vocab_size, dtype=torch.uint8, device=device)
        self._stops[list(stop_ids)] = 1
        num_rows, max_length = rows.tokens.shape
        self._control = torch.zeros(2, dtype=torch.int64, device=device)  # rows in use, version of the weights
        self._lengths = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._cos, self._sin = model.rotary(torch.arange(max_length, device=device))
        self._crowds = CrowdTable(num_rows, device)
        self._few = FewRows(model.spec.num_heads, model.spec.num_kv_heads, max_length, device)
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._graphs: dict[tuple[int, Sharing], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # an opaque handle
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # one: cuBLAS keeps memory for each
        self._parameters: list[nn.Parameter] = []
        self._addresses: list[int] = []
        self._version: int | None = None

    def moved(self) -> None:
        """Nothing: addresses are compared before every call."""

    def prefill(self, prefills: Sequence[Prefill], context: StepContext) -> None:
        self._eager.prefill(prefills, context)

    def decode(self, steps: int, context: StepContext) -> None:
        with torch.cuda.device(self.rows.device):
            self._forget_moved_weights(context.version)
            batch = _bucket(context.num_rows, len(self._lengths))
            sharing = ALONE
            if batch > MOST_ROWS:
                sharing = self._crowds.refresh(self.rows, context.num_rows, self.cache.block_size)
            graph = None if context.truncated else self._graph(batch, sharing)
            self._control[0].fill_(context.num_rows)
            self._control[1].fill_(context.version)
            for _ in range(steps):
                if graph is None:  # sorting the vocabulary takes far longer than launching the step
                    self._step(batch, sharing, truncated=True)
                else:
                    graph.replay()

    def _forget_moved_weights(self, version: int) -> None:
        if version != self._version:  # walking through all modules takes a millisecond
            self._parameters, self._version = list(self.model.parameters()), version
        addresses = [self.cache.data.data_ptr(), *(parameter.data_ptr() for parameter in self._parameters)]
        if addresses != self._addresses:
            self._graphs.clear()
            self._pool = None  # it went with the last graph
            self._addresses = addresses

    def _graph(self, batch: int, sharing: Sharing) -> torch.cuda.CUDAGraph:
        graph = self._graphs.get((batch, sharing))
        if graph is None:
            graph = self._graphs[batch, sharing] = self._capture(batch, sharing)
        return graph

    def _capture(self, batch: int, sharing: Sharing) -> torch.cuda.CUDAGraph:
        """Records one step. It runs once before, with no row in use, so that kernels are compiled and loaded."""
        self._control[0].zero_()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(batch, sharing, truncated=False)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a store, a profiler) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._step(batch, sharing, truncated=False)
        self._pool = self._pool or graph.pool()
        return graph

    def _step(self, batch: int, sharing: Sharing, truncated: bool) -> None:
        """One token for rows 0..batch-1, as far as they are in use and have not ended."""
        model, rows, lengths = self.model, self.rows, self._lengths[:batch]
        blocks: list[Block] = list(model.layers)  # type: ignore[arg-type]
        first = blocks[0].attn_norm
        x, hidden = embed(
            rows.last_token[:batch], rows.position[:batch], rows.done[:batch], self._control, model.embed.weight,
            first.weight, first.eps, lengths,
        )  # fmt: skip
        parts = self._divide(batch, sharing)
        qkv = _project(blocks[0].attn.qkv_proj, hidden)
        with self._kept(batch):
            for index, block in enumerate(blocks):
                attended = self._attend(block, qkv, batch, sharing, parts)
                product = block.reduce(_project(block.attn.o_proj, attended))
                product, x = _mlp(block, x, product)
                if index + 1 < len(blocks):
                    follower = blocks[index + 1]
                    qkv, x = _norm_project(x, product, follower.attn_norm, follower.attn.qkv_proj)
        hidden = add_rms_norm(x, product, model.norm.weight, model.norm.eps)
        logits = head_logits(model, hidden, self._exact_head)
        if truncated:
            self._draw_truncated(logits.float(), batch)
        else:
            draw(rows, logits, lengths, self._control, self._stops)

    def _kept(self, batch: int) -> AbstractContextManager[None]:
        if self._routing is None:
            return nullcontext()
        lengths, size = self._lengths[:batch], self.cache.block_size
        position = (lengths - 1).clamp_(min=0)
        blocks = self.rows.table[:batch].gather(1, (position // size)[:, None].long())[:, 0]
        return self._routing.keep(blocks, position % size, lengths > 0)

    def _attend(self, block: Block, qkv: Tensor, batch: int, sharing: Sharing, parts: Parts | None) -> Tensor:
        attn, table, lengths = block.attn, self.rows.table[:batch], self._lengths[:batch]
        keys, values = self.cache.data[block.index]
        q_norm, k_norm = attn.q_norm, attn.k_norm
        if q_norm is not None and k_norm is not None and q_norm.weight.numel() != attn.head_dim:
            _norm_whole(qkv, q_norm, k_norm)
            q_norm = k_norm = None
        turned = (
            qkv, None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps, self._cos, self._sin, lengths, table, keys, values,
        )  # fmt: skip
        if parts is None:
            return self._few.attend(*turned)
        rotary_write(*turned, attn.num_heads)
        return decode_attention(
            qkv, keys, values, table, lengths, attn.num_heads, parts, crowds=self._crowds.of(batch, sharing),
            crowd_splits=sharing.splits, tiling=_TILING,
        )  # fmt: skip

    def _divide(self, batch: int, sharing: Sharing) -> Parts | None:
        """Parts for the attention of all layers: enough programs for the device, but none of few tiles."""
        if batch <= MOST_ROWS:
            return None  # `FewRows` divides by itself
        kv_heads = self.cache.num_kv_heads
        fill = _PROGRAMS_PER_SM * self._processors // kv_heads
        least, aim = _TILING.keys * (2 if batch < fill else 4), max(fill, batch)
        return divide(self._lengths[:batch], kv_heads, aim=aim, least=least, crowds=self._crowds.of(batch, sharing))

    def _draw_truncated(self, logits: Tensor, batch: int) -> None:
        """Top-k and top-p, by the sampler; what `Rows.record` does, for rows that do not stand still."""
        rows, used = self.rows, slice(0, batch)
        index, drawn, active = torch.arange(batch, device=logits.device), rows.drawn[used], self._lengths[used] > 0
        u = uniform(rows.key[used], drawn)
        tokens, logprobs = sample(logits, rows.temperature[used], u, (rows.top_k[used], rows.top_p[used]))
        for cells, new in ((rows.tokens, tokens.int()), (rows.logprobs, logprobs), (rows.versions, self._control[1])):
            cells[index, drawn] = torch.where(active, new.to(cells.dtype), cells[index, drawn])
        rows.last_token[used] = torch.where(active, tokens, rows.last_token[used])
        rows.position[used] += active
        drawn += active
        stopped = (self._stops[tokens] == 1) & (rows.heeds_stop[used] == 1)
        done = torch.where(stopped, STOPPED, torch.where(drawn >= rows.limit[used], FULL, RUNNING))
        rows.done[used] = torch.where(active, done, rows.done[used])


def _mlp(block: Block, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the block's MLP or experts make of norm(x + y), and x + y."""
    if not isinstance(block.mlp, MLP):
        hidden = add_rms_norm(x, y, block.mlp_norm.weight, block.mlp_norm.eps)
        return block.reduce(_mixture(block.mlp, hidden)), x
    gated, x = _norm_project(x, y, block.mlp_norm, block.mlp.gate_up_proj, gate=True)
    return block.reduce(_project(block.mlp.down_proj, gated)), x


def _mixture(moe: MoE, x: Tensor) -> Tensor:
    experts = moe.experts
    if len(x) > MOST_ROWS or type(experts) is not Experts or experts.exchange is not None:
        out: Tensor = moe(x, grouped_tiles)
        return out
    shares, chosen = moe.router(x, kernel=route if can_route(moe.router) else None)
    out = chosen_experts(x, shares, chosen, experts.gate_up, experts.down)
    return out if moe.shared is None else out + moe.shared(x)


def _project(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), by a kernel of ours where that is quicker."""
    if isinstance(module, (nn.Linear, QuantizedLinear)) and is_skinny(x, module.weight):
        return linear(x, module.weight, module.bias, _scale(module))
    if isinstance(module, QuantizedLinear) and is_tiled(x):
        return tiled_linear(x, module.weight, module.channel_scale, module.bias)
    out: Tensor = module(x)
    return out


def _norm_whole(qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> None:
    """Norms all query heads of a row together and all its key heads, in place."""
    q, k = q_norm.weight.numel(), k_norm.weight.numel()
    qkv[:, :q] = q_norm(qkv[:, :q])
    qkv[:, q : q + k] = k_norm(qkv[:, q : q + k])


def _scale(module: nn.Linear | QuantizedLinear) -> Tensor | None:
    return module.channel_scale if isinstance(module, QuantizedLinear) else None


def _norm_project(
    x: Tensor, y: Tensor, norm: RMSNorm, module: nn.Module, *, gate: bool = False
) -> tuple[Tensor, Tensor]:
    """module(norm(x + y)), with silu(gate) * up of it where that is what it computes, and x + y."""
    if isinstance(module, (nn.Linear, QuantizedLinear)) and is_skinny(x, module.weight) and takes_norm(module.weight):
        return norm_linear(x, y, norm.weight, norm.eps, module.weight, module.bias, _scale(module), swiglu=gate)
    product = _project(module, add_rms_norm(x, y, norm.weight, norm.eps))
    return swiglu(product) if gate else product, x


def _bucket(num_rows: int, most: int) -> int:
    """The batch size to compute: powers of two up to 64, then multiples of 64; never more than there are rows."""
    return min(power_of_two(num_rows) if num_rows <= 64 else -(-num_rows // 64) * 64, most)
