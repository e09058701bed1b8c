"""The memory plan of training: what a step takes of each rank's device, known before it runs.

    held        weights, masters, moments; what FSDP2 gathers; places that streamed weights and offloaded states pass
                through
    gradients   their sums over micro-batches, and of one in the model's dtype
    then the larger of
      activations + the larger of the head's chunk and a block's backward pass, of the largest micro-batch
      the update of as many values as the optimizer takes at once

Activations a token and layer, in numbers of the model's dtype (D hidden, Q and K the widths of query and key heads,
F the MLP's): what autograd saves beside weights. Compiled blocks compute silu(gate) again, eager ones keep it too.

    none        4 D + 3 Q + 3 K + 3 F (eager: 4 F)   x, its norm, q k v before and after rotary, what attention made of
                                                     them, the residual, its norm, gate and up, their product
    selective   D + 3 Q + 3 K                        and once, of the block computed again, what `none` keeps
    full        D                                    and the same

Experts keep for each of a token's k chosen ones 2 D + 3 I (eager: 4 I), and the router its input in float32.
The CUDA context, libraries' workspaces and what PyTorch's allocator keeps unused (5 to 10 %) come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import nn

from asystem.config import Compile, Master, Optimizer, Recompute, TrainingConfig
from asystem.errors import CapacityError
from asystem.models import Block, Decoder, FrozenLinear, LoraLinear, ModelSpec, Shard, add_lora
from asystem.training.head import chunk_rows
from asystem.training.offload import PLACES
from asystem.training.optimizer import PIECE
from asystem.training.states import block_size

STEP = 64  # tokens; sizes of a micro-batch that are proposed are multiples of it


@dataclass(frozen=True, slots=True)
class TrainMemory:
    """Bytes on one rank's device at a step's peak.

    Attributes:
        weights, masters, moments: held throughout; masters that are the weights count as weights, offloaded states not.
        gathered: whole weights of sharded ones while they compute; places of streamed weights and offloaded states.
        gradients: sums, and one in the model's dtype. activations: until the backward pass.
        head: chunks of logits. block: gradients inside one block, and its activations where they are recomputed.
        update: of the optimizer's arithmetic, when activations are gone.
        tokens: of the micro-batch.
    """

    weights: int
    masters: int
    moments: int
    gathered: int
    gradients: int
    activations: int
    head: int
    block: int
    update: int
    tokens: int

    @property
    def held(self) -> int:
        """Before and after a step."""
        return self.weights + self.masters + self.moments

    @property
    def total(self) -> int:
        passes = self.activations + max(self.head, self.block)
        return self.held + self.gathered + self.gradients + max(passes, self.update)


def train_memory(spec: ModelSpec, cfg: TrainingConfig, *, dtype: torch.dtype, ranks: int = 1) -> TrainMemory:
    """What a GPU holds at the peak of a step over micro-batches of ``cfg.micro_batch_tokens``."""
    return TrainingPlan(spec, cfg, dtype=dtype, ranks=ranks).of(cfg.micro_batch_tokens)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a GPU, within its own limit
    (`torch.cuda.set_per_process_memory_fraction`); None on a CPU, whose memory is no fixed card."""
    if device.type != "cuda":
        return None
    index: int | None = device.index  # "cuda" alone has none, and not every function below takes it
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free + reserved - allocated, limit - allocated))


def stages(cfg: TrainingConfig, ranks: int) -> tuple[int, ...]:
    """Those of `training.zero` that a run may choose from: what travels least comes first, what takes least last."""
    if ranks == 1:
        return (3,)
    return (1, 2, 3) if cfg.zero == "auto" else (int(cfg.zero),)


def shapes(spec: ModelSpec, cfg: TrainingConfig) -> Decoder:
    """The model that trains, or a rank's part of it, on the meta device."""
    shard = Shard(0, cfg.tensor_parallel, expert_size=cfg.expert_parallel)
    with torch.device("meta"):
        model = Decoder(spec) if shard.size == shard.expert_size == 1 else shard.decoder(spec)
        if cfg.lora.rank > 0:
            add_lora(model, cfg.lora)
    return model


class TrainingPlan:
    """Plans micro-batches of any size for a `TrainEngine` with these arguments.

    Args:
        device: cuda, or cpu, which offloads nothing, and whose attention and norms keep more than is counted here.
        model: with adapters, on the meta device; None = made here.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cfg: TrainingConfig,
        *,
        dtype: torch.dtype,
        ranks: int = 1,
        device: str = "cuda",
        model: Decoder | None = None,
    ) -> None:
        self.cfg, self.dtype, self.ranks = cfg, dtype, ranks
        self.zero = stages(cfg, ranks)[-1]  # more is taken where it is left
        self.offloads = cfg.offload_optimizer and device == "cuda"
        self.compiled = cfg.compile is Compile.always or (cfg.compile is Compile.auto and device == "cuda")
        self.streams = cfg.offload_parameters and device == "cuda"
        self.stochastic = cfg.master is Master.bfloat16_stochastic
        self.model = shapes(spec, cfg) if model is None else model
        self.spec = self.model.spec  # of a rank's part
        self._sharded = self._shards()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        streamed = self.model.layers.parameters() if self.streams else ()
        self._away = set(streamed)  # in the host's memory, but for what streams

    def of(self, tokens: int) -> TrainMemory:
        """For a largest micro-batch of that many tokens."""
        kept, whole = self._kept
        return replace(
            self._without_tokens,
            activations=tokens * kept + 3 * tokens * self.spec.hidden_size * self.dtype.itemsize,
            head=self._head(tokens),
            block=tokens * whole + self._without_tokens.block,
            tokens=tokens,
        )

    @cached_property
    def _without_tokens(self) -> TrainMemory:
        """What is the same for all sizes, of which hundreds are looked at."""
        return TrainMemory(
            weights=self._weights(),
            masters=self._masters(),
            moments=self._moments(),
            gathered=self._gathered() + self._places() + self._streaming(),
            gradients=self._gradients(),
            activations=0,
            head=0,
            block=self._dense() + self._leaving(),
            update=self._update(),
            tokens=0,
        )

    @property
    def adapted(self) -> int:
        """Numbers of the matrices that have adapters."""
        return sum(m.base.in_features * m.base.out_features for m in self.model.modules() if isinstance(m, LoraLinear))

    def largest(self, capacity: int, below: int) -> int:
        """The most tokens under ``below``, a multiple of 64, that fit into so many bytes; 0 = none."""
        low, high = 0, (below - 1) // STEP
        while low < high:  # every part grows with the tokens
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.of(middle * STEP).total <= capacity else (low, middle - 1)
        return low * STEP

    def check(self, tokens: int, free: int) -> None:
        """Refuses a micro-batch that does not fit beside the weights and states, which are there already.

        Args:
            free: bytes that the device has left.

        Raises:
            CapacityError: with the largest ``training.micro_batch_tokens`` that would fit, or what else would help.
        """
        plan = self.of(tokens)
        if plan.total - plan.held <= free:
            return
        short = (
            f"a micro-batch of {tokens} tokens (training.micro_batch_tokens={self.cfg.micro_batch_tokens}) needs "
            f"{_gib(plan.total - plan.held)} beside {_gib(plan.held)} of weights and optimizer states, and "
            f"{_gib(free)} are free"
        )
        if largest := self.largest(free + plan.held, below=tokens):
            raise CapacityError(f"{short}: set training.micro_batch_tokens={largest} or lower")
        raise CapacityError(
            f"{short}: none fits; try training.recompute=full, training.optimizer=adamw8bit, training.lora.rank=16, "
            "training.offload_parameters=true or more training.ranks"
        )

    def _weights(self) -> int:
        """Sharded ones that train are the float32 masters, or in the model's dtype where that is how masters are."""
        sharded_master = self.ranks > 1 and not self.stochastic
        return sum(
            self._local(p) * (4 if p.requires_grad and sharded_master else self._size(p))
            for p in self.model.parameters()
            if p not in self._away
        )

    def _size(self, p: nn.Parameter) -> int:
        """Bytes of one of its numbers where the model computes: a frozen matrix may be in fewer bits."""
        return self.dtype.itemsize if p.is_floating_point() else p.element_size()

    def _masters(self) -> int:
        is_copy = self.ranks == 1 and self.dtype is not torch.float32 and not self.stochastic
        return 4 * self._count() if is_copy and not self.offloads else 0

    def _moments(self) -> int:
        return 0 if self.offloads else sum(self._moment_bytes(p) for p in self.trained)

    def _moment_bytes(self, p: nn.Parameter) -> int:
        count = self._local(p)
        if self.cfg.optimizer is Optimizer.adamw8bit and p.ndim >= 2:
            return 2 * (count + 4 * count // block_size(p.shape[-1]))
        return 2 * count * self._state_size()

    def _gradients(self) -> int:
        """Sums, and the largest one on its way to them: a tied embedding's waits from the head to the lookup."""
        sums = sum(self._local(p) for p in self.trained if p not in self._away) * self._state_size()
        passing = 0 if self.dtype is torch.float32 else max(p.numel() for p in self.trained) * self.dtype.itemsize
        return sums + passing

    def _gathered(self) -> int:
        """Under FSDP2: embedding, norm and head throughout, two blocks (all of them below stage 3), and one block's
        gradients in float32; in stage 1 all gradients beside."""
        if self.ranks == 1:
            return 0
        layers = [list(layer.parameters()) for layer in self.model.layers]
        block = max(sum(p.numel() for p in layer) for layer in layers)
        trained = max(sum(p.numel() for p in layer if p.requires_grad) for layer in layers)
        everything = sum(p.numel() for p in self.model.parameters())
        root = everything - sum(p.numel() for layer in layers for p in layer)
        weights = root + 2 * block if self.zero == 3 else everything
        whole = 4 * sum(p.numel() for p in self.trained) if self.zero == 1 else 0
        return weights * self.dtype.itemsize + trained * (4 + self.dtype.itemsize) + whole

    def _streaming(self) -> int:
        """Weights of two blocks."""
        blocks = self.model.layers if self.streams else ()
        return 2 * max((sum(p.numel() * self._size(p) for p in block.parameters()) for block in blocks), default=0)

    def _leaving(self) -> int:
        """Gradients on their way to the host in the backward pass: of about two blocks, and two in float32."""
        blocks = self.model.layers if self.streams else ()
        trained = [[p.numel() for p in block.parameters() if p.requires_grad] for block in blocks]
        each = (2 * self.dtype.itemsize * sum(block) + 8 * max(block, default=0) for block in trained)
        return max(each, default=0)

    def _places(self) -> int:
        if not self.offloads:
            return 0
        master = 4 if not self.stochastic and self.dtype is not torch.float32 else 0
        streamed = 4 + self.dtype.itemsize  # gradients, and what weights become
        return PLACES * max(
            self._at_once(p) * (master + (streamed if p in self._away else 0))
            + self._moment_bytes(p) * self._at_once(p) // p.numel()
            for p in self.trained
        )

    def _update(self) -> int:
        """Values in float32 beside states that are kept in less, the gradient twice, and 12 bytes to round."""
        fewer = self.stochastic + 2 * (self.stochastic or self.cfg.optimizer is Optimizer.adamw8bit)
        if not fewer and not self.offloads:
            return 0
        return max(self._at_once(p) for p in self.trained) * (4 * fewer + 8 + (12 if fewer else 0))

    @cached_property
    def _kept(self) -> tuple[int, int]:
        """Bytes a token: of all layers until the backward pass, and inside the one that it is in."""
        spec, size = self.spec, self.dtype.itemsize
        attended = 3 * (spec.q_size + spec.kv_size) * size + 4 * spec.num_heads
        everything, inside = [], []
        for index in range(spec.num_layers):
            mlp, gradients = self._mlp(index)
            norms = 4 * (2 + (spec.num_heads + spec.num_kv_heads) * spec.qk_norm)
            everything.append((4 * spec.hidden_size + self._adapted(index)) * size + attended + norms + mlp)
            inside.append(2 * spec.hidden_size * size + gradients)
        if self.cfg.recompute is Recompute.none:
            return sum(everything), max(inside)
        kept = spec.hidden_size * size + (attended if self.cfg.recompute is Recompute.selective else 0)
        return spec.num_layers * kept, max(map(sum, zip(everything, inside, strict=True)))

    def _mlp(self, index: int) -> tuple[int, int]:
        """Bytes a token in a layer's MLP or experts: kept, and of gradients at once."""
        moe, size, d = self.spec.moe, self.dtype.itemsize, self.spec.hidden_size
        activated = 3 if self.compiled else 4
        if moe is None or not moe.has_experts(index):
            return activated * self.spec.intermediate_size * size, 4 * self.spec.intermediate_size * size
        rows = moe.top_k * (2 * d + activated * moe.intermediate_size)
        routing = 4 * (d + 2 * moe.num_experts) + 32 * moe.top_k  # in float32, and numbers of experts and rows
        gradients = moe.top_k * ((d + 4 * moe.intermediate_size) * size + 8 * d)  # rows are weighted in float32
        return (rows + activated * moe.shared_size) * size + routing, gradients

    def _adapted(self, index: int) -> int:
        """Numbers a token between A and B in a layer."""
        return sum(p.shape[0] for name, p in self.model.layers[index].named_parameters() if name.endswith("lora_A"))

    def _dense(self) -> int:
        """The largest frozen matrix made whole out of fewer bits, and numbers of pairs on the way."""
        if self.cfg.lora.rank == 0 or self.cfg.lora.base == "auto":
            return 0
        return max(
            module.in_features * module.out_features * (2 * self.dtype.itemsize + 2)
            for module in self.model.modules()
            if isinstance(module, FrozenLinear)
        )

    def _head(self, tokens: int) -> int:
        """Logits of a chunk, in float32 also rounded, and where it trains the gradient of its weights."""
        rows = tokens if self.cfg.keep_logits else min(tokens, chunk_rows(self.spec.vocab_size))
        is_exact = self.cfg.head_dtype == "float32" and self.dtype is not torch.float32
        logits = rows * self.spec.vocab_size * (self.dtype.itemsize + 4 * is_exact)
        head = self.model.head_weight()
        return logits + (head.numel() * self.dtype.itemsize if head.requires_grad else 0)

    def _state_size(self) -> int:
        return self.dtype.itemsize if self.stochastic else 4

    def _count(self) -> int:
        return sum(map(self._local, self.trained))

    def _shards(self) -> dict[nn.Parameter, int]:
        """Ranks over which FSDP2 shards each parameter of a rank's part (`training.ranks`)."""
        data = self.ranks // self.cfg.tensor_parallel
        over = dict.fromkeys(self.model.parameters(), self.ranks)
        for block in self.model.layers:
            assert isinstance(block, Block), "a decoder's layers are blocks"
            over |= dict.fromkeys(block.parameters(), data)
            if (experts := block.spread_experts) is not None:
                over |= dict.fromkeys(experts.parameters(), data // self.cfg.expert_parallel)
        return over

    def _local(self, p: nn.Parameter) -> int:
        """Numbers of a parameter on the rank with the most: FSDP2 cuts rows."""
        return -(-p.shape[0] // self._sharded[p]) * prod(p.shape[1:])

    def _at_once(self, p: nn.Parameter) -> int:
        """Values of it that the optimizer takes together where it does not take all: whole rows."""
        width = prod(p.shape[1:])
        return min(self._local(p), max(1, PIECE // width) * width)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
