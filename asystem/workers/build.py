"""What workers have in common: device, dtype, model and tokenizer out of the configuration."""

from __future__ import annotations

import torch

from asystem.config import Config, ModelConfig
from asystem.data.task import resolve
from asystem.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from asystem.errors import DataError
from asystem.models import Decoder, ModelSpec, check_folder, init_weights, load_model, spec_from_config


def pick_device(config: Config, local_rank: int = 0) -> torch.device:
    """The configured device; auto takes the rank's GPU when there is one."""
    kind = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on CUDA, float32 on CPU, where bfloat16 products have no fast path."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


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


def build_model(config: Config, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The model with its folder's weights, or random ones drawn from the run's seed (equal on all workers).

    Raises:
        ModelError: the folder is incomplete or of an unsupported kind.
    """
    if config.model.path is not None:
        return load_model(config.model.path, dtype=dtype, device=device)
    model = Decoder(spec_from_config(config.model))
    init_weights(model, config.seed)
    return model.to(device=device, dtype=dtype)


def check_model(config: Config) -> tuple[ModelSpec, Tokenizer]:
    """Looks at the model folder and the tokenizer without reading weights, before anything starts.

    Raises:
        ModelError, DataError: as `build_model` and `build_tokenizer` would, later.
    """
    spec = spec_from_config(config.model) if config.model.path is None else check_folder(config.model.path)[0]
    return spec, build_tokenizer(config, spec.vocab_size)
