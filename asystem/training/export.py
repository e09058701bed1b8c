"""From a checkpoint to a Hugging Face folder, which transformers, vLLM and `model.path` read."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from asystem.data.tokenizer import Tokenizer, load_tokenizer
from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, save_model, spec_from_hf, spec_to_hf
from asystem.training.checkpoint import Describe, load_checkpoint, read_manifest

DESCRIPTION = "model"  # a checkpoint's folder with config.json and the tokenizer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_model(spec: ModelSpec, tokenizer: Tokenizer) -> Describe:
    """What a checkpoint must hold beside its tensors, so that it can be exported wherever it is."""

    def write(checkpoint: Path) -> None:
        folder = checkpoint / DESCRIPTION
        tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps(spec_to_hf(spec), indent=2) + "\n", encoding="utf-8")

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
    with torch.device("meta"):
        model = Decoder(spec)
    if missing := [name for name, _ in model.named_parameters() if f"model.{name}" not in shapes]:
        raise ModelError(f"checkpoint {checkpoint} holds no whole model: it lacks {len(missing)} tensors, {missing[0]}")
    chosen = dtype or spec.dtype
    model.to(DTYPES[chosen]).to_empty(device="cpu")
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    load_checkpoint(checkpoint, tensors, world_size=1, part="model.")
    save_model(model, spec, out, load_tokenizer(description))
    return chosen
