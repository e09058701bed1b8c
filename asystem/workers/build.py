"""What workers have in common: device, dtype, model and tokenizer out of the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from asystem.config import Config, ModelConfig, Transport
from asystem.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from asystem.errors import ConfigError, DataError
from asystem.models import (
    Decoder,
    ModelSpec,
    Shard,
    check_experts,
    check_folder,
    check_lora,
    check_parallel,
    init_weights,
    load_model,
    quantize,
    spec_from_config,
)
from asystem.plugin import resolve
from asystem.state import Inbox, Outbox, StreamInbox, StreamOutbox, Terms

PATIENCE = 0.9  # of the deadline: who waited in vain says for whom before it is itself overdue


def pick_device(config: Config) -> torch.device:
    """The configured device; auto takes the rank's GPU when there is one.

    Where ranks own GPUs, each sees its own alone; else the variable LOCAL_RANK, which runtimes set, tells them apart.

    Raises:
        ConfigError: a GPU is asked for, and there is none here.
    """
    if config.device == "cpu" or not torch.cuda.is_available():
        if config.device == "cuda":
            raise ConfigError(
                "device=cuda, and PyTorch sees no GPU here: use device=cpu, or auto to take what there is"
            )
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def training_environment(config: Config, *, shared: bool = False) -> dict[str, str]:
    """Variables for a process that trains, set before CUDA's allocator is made: segments that grow where they are, so
    that less of the memory between tensors lies idle. None on CPUs, or where the user has configured the allocator.

    Args:
        shared: generation works in that process, whose graphs are captured and whose memory sleeps, or reads its memory
            over CUDA IPC, which takes no handles of such segments.
    """
    if shared or config.device == "cpu" or {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What to compute in. auto, and beside 8-bit weights: bfloat16 on CUDA, float32 on CPU, where bfloat16 products
    have no fast path.
    """
    if name in ("auto", "int8", "fp8"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def pick_quantized(name: str, device: torch.device) -> torch.dtype | None:
    """The 8-bit dtype of the weights, None where there is none.

    Raises:
        ConfigError: fp8 on a device that cannot compute with it.
    """
    if name != "fp8":
        return torch.int8 if name == "int8" else None
    if device.type != "cuda":  # widened for each product, as int8
        return torch.float8_e4m3fn
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        card = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        raise ConfigError(f"generation.dtype=fp8 needs compute capability 8.9, and {card}: use int8")
    return torch.float8_e4m3fn


def tokenizer_path(model: ModelConfig) -> str:
    """A model folder brings its own tokenizer; without one, `model.tokenizer` names it."""
    return model.path if model.path is not None else model.tokenizer


def build_tokenizer(config: Config, vocab_size: int) -> Tokenizer:
    """The tokenizer, checked against the model's vocabulary.

    Raises:
        DataError: no tokenizer or chat template there, or it has ids that the model has not.
    """
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    check_tokenizer(tokenizer, vocab_size)
    if config.model.chat_template is not None:
        path = resolve(config.model.chat_template, config.recipe_dir)
        if not path.is_file():
            raise DataError(f"model.chat_template: {path} does not exist")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def build_model(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    part: Shard | None = None,
    quantized: torch.dtype | None = None,
) -> Decoder:
    """The model with its folder's weights, or random ones drawn from the run's seed (equal on all workers).

    Args:
        part: what this rank holds of it; None = all.
        quantized: the 8-bit dtype of the blocks' matrices; None = `dtype`.

    Raises:
        ModelError: the folder is incomplete or of an unsupported kind.
    """
    if config.model.path is not None:
        return load_model(config.model.path, dtype=dtype, device=device, part=part, quantized=quantized)
    model = Decoder(spec_from_config(config.model))
    init_weights(model, config.seed)
    if part is not None:
        model = part.cut(model)
    model = model.to(device=device, dtype=dtype)
    return model if quantized is None else quantize(model, quantized)


def build_trained(config: Config, device: torch.device, part: Shard | None = None) -> Decoder:
    """The model to train: in float32, for the masters; frozen weights at once in the dtype that computes. Those to be
    kept in fewer bits, or streamed, stay in the host's memory.

    Args:
        part: what this rank holds of it where it is cut over ranks; None = all.
    """
    training = config.training
    dtype = pick_dtype(training.dtype, device) if training.lora.rank > 0 else torch.float32
    waits = training.lora.base != "auto" or training.offload_parameters
    return build_model(config, torch.device("cpu") if waits else device, dtype, part)


def replica_part(rank: int, ranks: int, size: int) -> Shard | None:
    """What a rank holds of its replica's model, where `size` ranks in a row are a replica; None = all.

    All ranks of the group call it: each makes the process groups of all replicas, as torch wants it.
    """
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
    return Shard(rank % size, size, groups[rank // size])


class Reader(Protocol):
    """Takes over what all ranks of training have handed over, of the transport's own kind."""

    def read(self, payloads: Sequence[Any]) -> None: ...


def build_outbox(
    config: Config, model: nn.Module, dtype: torch.dtype, device: torch.device, rank: int
) -> Outbox | StreamOutbox:
    """What a rank of training publishes its weights with, in ``dtype``."""
    weights = config.weights
    if weights.transport is Transport.nccl:
        return StreamOutbox(model, dtype, weights.verify_every, rank, _terms(config, device))
    return Outbox(model, dtype, weights.verify_every, weights.transport, rank)


def build_inbox(config: Config, model: Decoder, device: torch.device, rank: int) -> Reader:
    """What a rank of generation takes published weights over with."""
    stream = config.weights.transport is Transport.nccl
    return StreamInbox(model, rank, _terms(config, device)) if stream else Inbox(model)


def _terms(config: Config, device: torch.device) -> Terms:
    ranks, seconds = (config.training.ranks, config.generation.ranks), PATIENCE * config.runtime.deadline_seconds
    return Terms(*ranks, device, seconds, config.weights.bucket_bytes)


def check_model(config: Config) -> tuple[ModelSpec, Tokenizer]:
    """Looks at the model folder, the tokenizer and the adapter without reading weights, before anything starts.

    Raises:
        ModelError, DataError: as `build_model` and `build_tokenizer` would, later.
        ConfigError: the model cannot be cut over as many ranks as asked, or kept in `generation.dtype`; or something is
            asked of experts that it does not have.
    """
    spec = spec_from_config(config.model) if config.model.path is None else check_folder(config.model.path)[0]
    check_parallel(spec, config.generation.tensor_parallel)
    check_parallel(spec, config.training.tensor_parallel, "training.tensor_parallel")
    check_experts(spec, config.training.expert_parallel)
    _check_experts(spec, config)
    check_lora(spec, config.training.lora)
    return spec, build_tokenizer(config, spec.vocab_size)


def _check_experts(spec: ModelSpec, config: Config) -> None:
    training = config.training
    for key, asked in (
        ("algorithm.routing_replay", config.algorithm.routing_replay),
        ("generation.return_routing", config.generation.return_routing),
        ("training.balance_coefficient", training.balance_coefficient),
        ("training.router_z_coefficient", training.router_z_coefficient),
    ):
        if asked and spec.moe is None:
            value = "true" if asked is True else f"{asked:g}"
            raise ConfigError(f"{key}={value} needs a model with experts; {spec.family} has none")
    if training.expert_bias_rate > 0 and (spec.moe is None or not spec.moe.has_bias):
        raise ConfigError(
            f"training.expert_bias_rate={training.expert_bias_rate:g} needs experts with biases "
            f"(bailing_moe_v2); {spec.family} has none: set it to 0"
        )
