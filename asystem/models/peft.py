"""Adapters in and out of PEFT's folders: adapter_config.json and adapter_model.safetensors.

PEFT names the tensors of a layer `base_model.model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank],
one pair for each of Hugging Face's matrices (https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asystem.config import LoraConfig
from asystem.errors import ModelError
from asystem.models.lora import LoraLinear, check_targets
from asystem.models.spec import ModelSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What would change the arithmetic, and the one value of each that LoraLinear computes.
_PLAIN: dict[str, Any] = {"bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None}
_PLAIN |= {"rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "layers_to_transform": None}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters under PEFT's names, whole tensors on every rank. Collective where they are sharded."""
    state: dict[str, Tensor] = {}
    for layer in _layers(model):
        for part, a, b in layer.adapters():
            state |= {_key(part.name, "A"): a, _key(part.name, "B"): b}
    return state


def save_adapter(state: dict[str, Tensor], cfg: LoraConfig, folder: str | Path, base: str | None = None) -> None:
    """Writes a folder that PEFT opens; one rank calls it. It appears whole, in the place of an older one.

    Args:
        state: of `adapter_state`.
        base: the model folder or hub name that the adapters belong to.
    """
    folder = Path(folder)
    config = _PLAIN | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "target_modules": list(cfg.targets),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        partial, old = Path(temporary) / "new", Path(temporary) / "old"
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        save_file(copies, partial / WEIGHTS, metadata={"format": "pt"})
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)


def check_lora(spec: ModelSpec, cfg: LoraConfig) -> None:
    """Looks at the targets, and at the config of ``cfg.adapter``'s folder, before anything starts.

    Raises:
        ModelError: a target that the model has not, no such folder, another rank, scale or targets there, or a kind of
            adapter that is not plain LoRA.
    """
    if cfg.rank > 0:
        check_targets(spec, cfg.targets)
    if cfg.adapter is None:
        return
    path = Path(cfg.adapter) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; training.lora.adapter must be a PEFT folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ModelError(f'{path}: peft_type is "{config.get("peft_type")}"; only "LORA" is supported')
    for key, plain in _PLAIN.items():
        if (config.get(key) or None) != (plain or None):
            raise ModelError(f"{path}: {key}={config[key]} is not supported; only {key}={plain} is")
    for key, ours, value in (("r", "rank", cfg.rank), ("lora_alpha", "alpha", cfg.alpha)):
        if config.get(key) != value:
            raise ModelError(f"{path}: {key}={config.get(key)}, but training.lora.{ours}={value:g}; set that to it")
    theirs = config.get("target_modules")
    if not isinstance(theirs, list) or set(theirs) != set(cfg.targets):
        raise ModelError(f"{path}: target_modules={theirs}, but training.lora.targets={sorted(cfg.targets)}")


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Copies a folder's tensors into a model that has adapters (`add_lora`) and is not yet sharded.

    Raises:
        ModelError: the file is missing or corrupt, or its tensors are of another model; nothing is changed then.
    """
    path = Path(folder) / WEIGHTS
    try:
        saved = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; training.lora.adapter must be a PEFT folder") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is truncated or corrupt: {error}") from None
    state = adapter_state(model)
    for kind, names in (("lacks", state.keys() - saved.keys()), ("has unexpected", saved.keys() - state.keys())):
        if names:
            raise ModelError(f"{path} {kind} {len(names)} of {len(state)} tensors, {min(names)} first")
    for name, tensor in state.items():
        if saved[name].shape != tensor.shape:
            found, wanted = list(saved[name].shape), list(tensor.shape)
            raise ModelError(f"{path}: {name} has shape {found}, the model asks for {wanted}")
    for name, tensor in state.items():  # views of the parameters
        tensor.copy_(saved[name])


def _layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def _key(module: str, letter: str) -> str:
    return f"base_model.model.{module}.lora_{letter}.weight"
