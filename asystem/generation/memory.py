"""What the engine takes of a device's memory, known before anything is allocated.

Weights and the KV pool are shapes times sizes. The workspace is what a prefill batch and a decode step hold at once at
their largest: the model itself runs once on torch's meta device, where tensors have shapes but no memory, and the sizes
of the tensors alive are added up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asystem.config import GenerationConfig
from asystem.errors import CapacityError
from asystem.generation.routing import routing_bytes
from asystem.generation.rows import Rows
from asystem.generation.runner import DRAWN_LOGITS
from asystem.generation.sampler import sample, uniform
from asystem.generation.scheduler import READS
from asystem.models.decoder import Decoder
from asystem.models.spec import ModelSpec

# cuBLAS keeps 32 MiB for each stream on Hopper (8 MiB before it); the engine has one stream and one to capture on.
_LIBRARIES = 64 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device, all at once.

    Attributes:
        weights, kv: held throughout; kv with the routing, where that is returned.
        workspace: the running batch, and the most that a prefill and a step hold.
        num_blocks: KV blocks of the pool.
        passing: what of the workspace is free again when a call ends: what a prefill computes with.
    """

    weights: int
    kv: int
    workspace: int
    num_blocks: int
    passing: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.workspace


class GenerationPlan:
    """Plans pools of any size for an `Engine` with these arguments; `spec` is one rank's part of the model.

    Args:
        max_length: prompt and response tokens of the longest sequence. dtype: of weights and KV.
        device: cuda or cpu. On a CPU, where memory is no fixed card, the workspace is the running batch alone.
        weights: bytes of the model; None = those of `spec` in `dtype`.

    Raises:
        CapacityError: a pool of `config.kv_tokens` does not hold one sequence.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: GenerationConfig,
        *,
        max_length: int,
        dtype: torch.dtype,
        device: str = "cuda",
        weights: int | None = None,
    ) -> None:
        self.config, self.max_length = config, max_length
        size, given = config.block_size, config.kv_tokens
        self.least = -(-max_length // size)  # blocks of one sequence
        self.wanted = config.max_running * self.least if given is None else given // size
        if self.wanted < self.least:
            raise CapacityError(
                f"generation.kv_tokens={given} holds {self.wanted} blocks of {size} tokens, but one sequence of "
                f"{max_length} tokens needs {self.least}: set it to at least {self.least * size}"
            )
        token = 2 * spec.num_layers * spec.kv_size * dtype.itemsize
        self.block = size * (token + (routing_bytes(spec) if config.return_routing else 0))
        self.weights = spec.num_parameters * dtype.itemsize if weights is None else weights
        held, self.passing = _workspace(spec, config, max_length, dtype, device)
        self.workspace = held + self.passing

    def fit(self, capacity: int | None = None) -> MemoryPlan:
        """The plan within so many bytes for all of it; None = any number. Where `config.kv_tokens` is null, the pool
        takes what is left, but no more than `config.max_running` sequences of `max_length` need.

        Raises:
            CapacityError: the pool does not hold one sequence, or one of `config.kv_tokens` does not fit.
        """
        num_blocks = self.wanted
        if capacity is not None and num_blocks * self.block > capacity - self.weights - self.workspace:
            left = max(0, capacity - self.weights - self.workspace)
            self._check(left, capacity)
            num_blocks = left // self.block
        return MemoryPlan(self.weights, num_blocks * self.block, self.workspace, num_blocks, self.passing)

    def _check(self, left: int, capacity: int) -> None:
        config, given = self.config, self.config.kv_tokens
        least, what = self.least * self.block, f"one sequence of {self.max_length} tokens"
        remedy = "or the length of prompts and responses"
        if given is not None:
            least, what = self.wanted * self.block, f"generation.kv_tokens={given}"
            remedy = f"or the pool, to {left // self.block * config.block_size} tokens"
        if left < least:
            raise CapacityError(
                f"generation may take {_gib(capacity)} of the GPU (generation.memory_fraction="
                f"{config.memory_fraction:g}): beside {_gib(self.weights)} of weights and {_gib(self.workspace)} of "
                f"workspace {_gib(left)} are left for KV, but {what} needs {_gib(least)}; raise memory_fraction, or "
                f"lower generation.prefill_tokens={config.prefill_tokens}, generation.max_running="
                f"{config.max_running}, {remedy}"
            )


def plan_memory(
    spec: ModelSpec,
    config: GenerationConfig,
    *,
    max_length: int,
    dtype: torch.dtype,
    device: str = "cuda",
    weights: int | None = None,
    capacity: int | None = None,
) -> MemoryPlan:
    """`GenerationPlan.fit` at once."""
    plan = GenerationPlan(spec, config, max_length=max_length, dtype=dtype, device=device, weights=weights)
    return plan.fit(capacity)


def card_capacity(device: torch.device, fraction: float) -> int:
    """Bytes that this process may still take on a GPU, if `fraction` of its memory may be in use altogether.

    A process's own limit (`torch.cuda.set_per_process_memory_fraction`) is taken for the size of the card.
    """
    free, total = torch.cuda.mem_get_info(device)
    allocated, unused = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    unused -= allocated  # cached by PyTorch: as good as free
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free + unused - int((1 - fraction) * total), int(fraction * limit) - allocated))


def _workspace(
    spec: ModelSpec, config: GenerationConfig, max_length: int, dtype: torch.dtype, device: str
) -> tuple[int, int]:
    """Bytes held beside weights and KV, and those of a prefill. Captured steps keep their memory: the two add up.

    Plain steps (`generation.graphs=false`) and truncated sampling, for comparison and evaluation, take more.
    """
    table = -(-max_length // config.block_size)
    rows = Rows(config.max_running, max_length, table, spec.vocab_size, 0, torch.device("meta"))
    if device == "cpu":
        return rows.num_bytes, 0
    with torch.device("meta"):
        model = Decoder(spec).to(dtype)
    model.layers = torch.nn.ModuleList((model.layers[0], model.layers[-1]))  # nothing adds up over layers
    pool = config.max_running * max_length if config.kv_tokens is None else config.kv_tokens
    computed = min(config.prefill_tokens, pool)
    read = min(max(READS * config.prefill_tokens, max_length), pool)
    rotary = max_length * spec.head_dim * 4
    prefill = peak_bytes(lambda: _prefill(model, rows, computed, read))
    return rows.num_bytes + rotary + peak_bytes(lambda: _step(model, config.max_running)) + _LIBRARIES, prefill


def _prefill(model: Decoder, rows: Rows, computed: int, read: int) -> None:
    tokens = torch.zeros(computed, dtype=torch.int64, device="meta")
    hidden = model(tokens, tokens, _Reading(model.spec, read))
    count = min(len(rows.drawn), max(1, DRAWN_LOGITS // model.spec.vocab_size))
    used = slice(0, count)
    sample(
        model.logits(hidden[:1].expand(count, -1).contiguous()),
        rows.temperature[used],
        uniform(rows.key[used], rows.drawn[used]),
    )


def _step(model: Decoder, batch: int) -> None:
    """As `captured` computes it: the logits stay in the model's dtype."""
    tokens = torch.zeros(batch, dtype=torch.int64, device="meta")
    hidden = model(tokens, tokens, _Reading(model.spec, 0))
    torch.nn.functional.linear(hidden, model.head_weight())


class _Reading:
    """The memory of `kv_cache.PrefillAttention` on CUDA: gathered keys and values, the result and its softmax sums."""

    def __init__(self, spec: ModelSpec, read: int) -> None:
        self.shape = (read, spec.num_kv_heads, spec.head_dim)
        self.rows = torch.empty(read * spec.num_kv_heads, dtype=torch.int64, device="meta")

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gathered = [torch.empty(self.shape, dtype=q.dtype, device="meta") for _ in range(2)]
        sums = torch.empty(q.shape[:2], dtype=torch.float32, device="meta")
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        del gathered, sums
        return out


def peak_bytes(function: Callable[[], None]) -> int:
    """The most bytes of tensors made within `function` that are alive at once."""
    with torch.no_grad(), _Alive() as alive:
        function()
    peak: int = alive.peak
    return peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations return, and subtracts them when they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in before:
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.bytes -= num_bytes


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
