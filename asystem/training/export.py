"""From a checkpoint to a Hugging Face folder, which transformers, vLLM and `model.path` read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asystem.config import LoraConfig, ModelConfig
from asystem.data.tokenizer import Tokenizer, load_tokenizer
from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, add_lora, load_model, merge, save_model, spec_from_hf, spec_to_hf
from asystem.training.checkpoint import Describe, load_checkpoint, read_manifest

DESCRIPTION = "model"  # a checkpoint's folder with config.json, the tokenizer, and LORA where it holds adapters
LORA = "lora.json"  # the adapters' LoraConfig, and the folder of the weights beside them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_model(spec: ModelSpec, tokenizer: Tokenizer, model: ModelConfig, lora: LoraConfig) -> Describe:
    """What a checkpoint must hold beside its tensors, so that it can be exported wherever it is. Adapters belong to the
    weights in ``model.path``, which must still be there then.
    """
    base = None if model.path is None else str(Path(model.path).resolve())

    def write(checkpoint: Path) -> None:
        folder = checkpoint / DESCRIPTION
        tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps(spec_to_hf(spec), indent=2) + "\n", encoding="utf-8")
        if lora.rank > 0:
            adapters = {"base": base, "lora": asdict(lora)}
            (folder / LORA).write_text(json.dumps(adapters, indent=2) + "\n", encoding="utf-8")

    return write


def export_checkpoint(checkpoint: Path, out: Path, dtype: str | None = None) -> str:
    """Writes the weights of a complete checkpoint as a Hugging Face folder; needs neither its run nor its ranks.

    Args:
        out: a new or empty folder, or a model folder, which is replaced.
        dtype: float32, bfloat16 or float16; None = that of the folder which training started from.

    Returns:
        the dtype.

    Raises:
        ModelError: the checkpoint is damaged or holds no whole model, or ``out`` holds other files.
    """
    description = checkpoint / DESCRIPTION
    shapes = read_manifest(checkpoint)["tensors"]
    if not (description / "config.json").is_file():
        raise ModelError(f"checkpoint {checkpoint} does not describe its model: {description} has no config.json")
    spec = spec_from_hf(json.loads((description / "config.json").read_text(encoding="utf-8")))
    chosen = dtype or spec.dtype
    if (description / LORA).is_file():
        state = _merged(
            checkpoint, json.loads((description / LORA).read_text(encoding="utf-8")), DTYPES[chosen], shapes
        )
    else:
        state = _whole(checkpoint, spec, DTYPES[chosen], shapes)
    save_model(state, spec, out, load_tokenizer(description))
    return chosen


def _whole(checkpoint: Path, spec: ModelSpec, dtype: torch.dtype, saved: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Decoder(spec)
    if missing := [name for name, _ in model.named_parameters() if f"model.{name}" not in saved]:
        raise ModelError(f"checkpoint {checkpoint} holds no whole model: it lacks {len(missing)} tensors, {missing[0]}")
    state = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    _load(checkpoint, state, saved)
    return state


def _merged(
    checkpoint: Path, described: dict[str, Any], dtype: torch.dtype, saved: dict[str, Any]
) -> dict[str, Tensor]:
    """The weights that training started from, with the checkpoint's adapters merged into them."""
    if described["base"] is None:
        raise ModelError(f"checkpoint {checkpoint} holds adapters to random weights, which no folder has")
    try:
        model = load_model(described["base"])
    except ModelError as error:
        raise ModelError(f"checkpoint {checkpoint} holds adapters to {described['base']}: {error}") from None
    add_lora(model, LoraConfig(**(described["lora"] | {"base": "auto"})))  # into the folder's own numbers
    _load(checkpoint, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, saved)
    return merge(model, dtype)


def _load(checkpoint: Path, state: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Fills the tensors of a model; a value head, which belongs to training alone, is left out."""
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    if (head := "model.value_head") in saved:
        tensors[head] = torch.empty(saved[head])
    load_checkpoint(checkpoint, tensors, world_size=1, part="model.")
