"""Checkpoints of training state through torch.distributed.checkpoint: sharded, loadable at another number of ranks."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LRScheduler

from asystem.errors import ModelError


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler, folder: Path, extra: dict[str, Any]
) -> None:
    """Writes beside ``folder`` and renames at the end, so that a kill leaves the former checkpoint or the whole new one.

    All ranks call it together.
    """
    partial = folder.with_name(folder.name + ".partial")
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "extra": extra}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that without a process group one process saves: as meant
        dcp.save(state, checkpoint_id=partial)
    _barrier()
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    _barrier()


def load_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler, folder: Path
) -> dict[str, Any]:
    """Reads a checkpoint into model, optimizer and schedule, in place; returns its ``extra``.

    Raises:
        ModelError: the folder is missing, a file of it is missing or truncated, or it is of another model.
    """
    if not (folder / ".metadata").is_file():
        raise ModelError(f"{folder} is no complete checkpoint: it has no .metadata; choose another step's folder")
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "extra": {}}
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state["extra"] = {name.removeprefix("extra."): None for name in names if name.startswith("extra.")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=folder)
    except Exception as error:  # torch wraps whatever a rank met: a missing key, a size, a file that ends early
        raise ModelError(f"checkpoint {folder} cannot be loaded: {str(error).strip().splitlines()[-1]}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    extra: dict[str, Any] = state["extra"]
    return extra


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Deletes all but the newest ``keep_last`` of the step-… folders."""
    steps = sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".partial")
    for path in steps[: max(0, len(steps) - keep_last)]:
        shutil.rmtree(path, ignore_errors=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
