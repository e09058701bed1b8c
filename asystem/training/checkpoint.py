"""Checkpoints: torch.distributed.checkpoint's files, whole or not at all, and checked before they are read.

    step-000040/  manifest.json       every file's size, every tensor's shape, and what is no tensor
                  .metadata           torch.distributed.checkpoint's own
                  __0_0.distcp ...    shards, at least one a rank

They are written to `.step-000040.partial` and renamed, so that a folder with a proper name is complete. Ranks on
several hosts must see one file system. The number of ranks may differ between saving and loading.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from asystem.errors import ModelError, nearest

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], extra: dict[str, Any], *, world_size: int) -> None:
    """Writes tensors (whole, or DTensors) and a JSON object. Every rank calls it; an older ``folder`` is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    is_first = world_size == 1 or dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(world_size)
    with _no_single_process_warning():
        save(dict(tensors), checkpoint_id=partial, no_dist=world_size == 1)
    _barrier(world_size)
    if is_first:
        manifest = {
            "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "extra": extra,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _replace(partial, folder)
    _barrier(world_size)


def load_checkpoint(folder: Path, tensors: dict[str, Tensor], *, world_size: int) -> dict[str, Any]:
    """Fills ``tensors`` in place and returns the JSON object. Every rank calls it.

    Raises:
        ModelError: no checkpoint there, a missing or truncated file, or tensors of another model; nothing is changed.
    """
    manifest = _read_manifest(folder)
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} of {size} bytes"
            raise ModelError(f"checkpoint {folder}: {name} {state}; restore it or resume from an earlier checkpoint")
    saved = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    for name, tensor in tensors.items():
        if name not in saved:
            raise ModelError(f"checkpoint {folder} has no {name}{nearest(name, saved)}; it is of another model")
        if saved[name] != tuple(tensor.shape):
            raise ModelError(f"checkpoint {folder}: {name} is {saved[name]}, the model's is {tuple(tensor.shape)}")
    if unknown := sorted(saved.keys() - tensors.keys()):
        raise ModelError(f"checkpoint {folder} has {unknown[0]}, which the model has not; it is of another model")
    with _no_single_process_warning():
        load(dict(tensors), checkpoint_id=folder, no_dist=world_size == 1)
    extra: dict[str, Any] = manifest["extra"]
    return extra


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Deletes all but the last ``keep`` of a folder's `step-*` checkpoints. One rank calls it."""
    complete = sorted(path for path in parent.glob("step-*") if (path / MANIFEST).is_file())
    for path in complete[: max(0, len(complete) - keep)]:
        shutil.rmtree(path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("files", "tensors", "extra")}
    except FileNotFoundError:
        raise ModelError(f"{folder} is no complete checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"checkpoint {folder}: {MANIFEST} cannot be read: {error}") from None


def _replace(source: Path, target: Path) -> None:
    """Renames a folder; one that has the name already steps aside first, and goes last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """torch warns of a single process even when it is told of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _barrier(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()
