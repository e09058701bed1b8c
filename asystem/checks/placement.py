"""Who owns what: ranks, GPUs, generation's dtypes, and how weights travel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asystem.checks.rules import Rule, above, at_least

if TYPE_CHECKING:
    from asystem.config import Config


def placement(config: Config) -> Iterator[Rule]:
    inline, hybrid = config.runtime.kind.value == "inline", config.placement.kind.value == "hybrid"
    auto = config.placement.kind.value == "auto"
    for section in ("training", "generation", "reward"):
        yield at_least(f"{section}.ranks", getattr(config, section).ranks, 1)
    ranks, parallel = config.generation.ranks, config.generation.tensor_parallel
    yield at_least("generation.tensor_parallel", parallel, 1)
    yield (
        ranks % parallel != 0,
        f"generation.ranks={ranks} is no multiple of generation.tensor_parallel={parallel}, the ranks of one replica; "
        f"use {ranks + -ranks % parallel}",
    )
    yield (
        inline and parallel > 1,
        f"generation.tensor_parallel={parallel} needs a process for each rank: use runtime=ray",
    )
    yield (
        inline and config.training.ranks > 1,
        f"training.ranks={config.training.ranks} needs a process for each rank: use runtime=ray, or training.ranks=1",
    )
    yield (
        hybrid and (config.training.ranks != config.generation.ranks or parallel > 1),
        f"placement=hybrid with training.ranks={config.training.ranks}, generation.ranks={ranks} and "
        f"generation.tensor_parallel={parallel}: each of its ranks trains and generates by itself; set both ranks to "
        "one number and tensor_parallel=1, or use placement=split",
    )
    yield (
        auto and config.command.value != "train",
        f"placement=auto is for asystem train; asystem {config.command.value} has one group of workers: leave it out",
    )
    yield (
        config.placement.sleep.value == "always" and not (hybrid or auto),
        "placement.sleep=always has phases take turns in one process, and placement=split has two: use "
        "placement=hybrid, or sleep=auto",
    )


def parallel(config: Config) -> Iterator[Rule]:
    training = config.training
    ranks, tensor, expert = training.ranks, training.tensor_parallel, training.expert_parallel
    yield at_least("training.tensor_parallel", tensor, 1)
    yield at_least("training.expert_parallel", expert, 1)
    yield (
        ranks % (tensor * expert) != 0,
        f"training.ranks={ranks} is no multiple of training.tensor_parallel={tensor} x training.expert_parallel="
        f"{expert}; use {ranks + -ranks % (tensor * expert)}",
    )
    yield (
        tensor * expert > 1 and config.placement.kind.value == "hybrid",
        f"placement=hybrid decodes with whole copies, and training.tensor_parallel={tensor} x training.expert_parallel="
        f"{expert} ranks have parts of the layers alone: use placement=split",
    )
    cut = f"training.tensor_parallel={tensor}" if tensor > 1 else f"training.expert_parallel={expert}"
    yield (
        tensor * expert > 1 and training.lora.rank > 0,
        f"{cut} cuts matrices over ranks, and adapters (training.lora.rank={training.lora.rank}) stand beside whole "
        "ones: shard by training.ranks alone",
    )
    yield (
        tensor > 1 and training.optimizer.value == "adamw8bit",
        f"{cut} cuts rows through the blocks that training.optimizer=adamw8bit scales: use adamw, or "
        "training.tensor_parallel=1",
    )
    yield (
        tensor > 1 and training.master.value == "bfloat16_stochastic",
        f"{cut} needs norms that stay equal on the ranks that share them, and training.master=bfloat16_stochastic "
        "rounds each at random: use training.master=float32",
    )


def precision(config: Config) -> Iterator[Rule]:
    generation = config.generation
    dtype, head = generation.dtype, generation.head_dtype
    yield (
        dtype not in ("auto", "float32", "bfloat16", "int8", "fp8"),
        f'generation.dtype="{dtype}": choose auto, float32, bfloat16, int8 or fp8',
    )
    yield head not in ("auto", "float32"), f'generation.head_dtype="{head}": choose auto or float32'
    yield (
        dtype in ("int8", "fp8") and config.placement.kind.value == "hybrid",
        f"generation.dtype={dtype} needs weights of its own, and placement=hybrid shares them with training: "
        "use placement=split or generation.dtype=auto",
    )


def weights(config: Config) -> Iterator[Rule]:
    weights, transport = config.weights, config.weights.transport.value
    yield at_least("weights.bucket_bytes", weights.bucket_bytes, 4096)
    yield at_least("weights.verify_every", weights.verify_every, 0)
    yield at_least("weights.probe_every", weights.probe_every, 0)
    yield above("weights.probe_bound", weights.probe_bound, 0)
    yield (
        transport != "auto" and config.placement.kind.value == "hybrid",
        f"weights.transport={transport} carries weights between processes, and placement=hybrid has one copy of them: "
        "use auto, or placement=split",
    )
    yield (
        transport == "ipc" and config.device == "cpu",
        "weights.transport=ipc shares GPU memory, and device=cpu: use shared_memory",
    )
    yield (
        transport == "nccl" and config.runtime.kind.value == "inline",
        "weights.transport=nccl needs a process for each rank: use runtime=ray, or transport=auto",
    )
