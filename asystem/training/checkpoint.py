"""Checkpoints: torch.distributed.checkpoint's files, whole or not at all, and checked before they are read.

    step-000040/  manifest.json       every file's size, every tensor's shape, the score, and what is no tensor
                  .metadata           torch.distributed.checkpoint's own
                  __0_0.distcp ...    shards, at least one a rank
                  model/              config.json and the tokenizer, where the writer described them

They are written to `.step-000040.partial` and renamed, so that a folder with a proper name is complete; one that is
replaced or deleted is renamed first too, so that killing the process at any moment leaves the last good one. Ranks on
several hosts must see one file system. The number of ranks may differ between saving and loading.
`training.saving` writes them beside training and keeps their number down.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from asystem.errors import CapacityError, ModelError, TrainingError, nearest
from asystem.models import Held

MANIFEST = "manifest.json"
GIB = 2**30

Tensors = Mapping[str, Tensor | Held]
"""Whole tensors, DTensors, or blocks of tensors whose other blocks other ranks have."""

Describe = Callable[[Path], object]
"""Writes what a checkpoint holds beside its tensors into the folder that it is given. The first rank calls it."""


def save_checkpoint(
    folder: Path,
    tensors: Tensors,
    extra: dict[str, Any],
    *,
    world_size: int,
    score: float | None = None,
    describe: Describe | None = None,
) -> None:
    """Writes tensors and a JSON object. Every rank calls it; an older ``folder`` is replaced."""
    begin_checkpoint(folder, tensors, world_size=world_size)
    write_checkpoint(folder, tensors, extra, world_size=world_size, score=score, describe=describe)
    _barrier(world_size)


def begin_checkpoint(folder: Path, tensors: Tensors, *, world_size: int) -> None:
    """Makes room for `write_checkpoint`, and clears away what a killed writer has left. Every rank calls it.

    Raises:
        CapacityError: the disk has too little space for ``tensors``.
    """
    if world_size == 1 or dist.get_rank() == 0:
        partial = _partial(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)
        check_space(folder, checkpoint_bytes(tensors))
        partial.mkdir()
    _barrier(world_size)


def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    extra: dict[str, Any],
    *,
    world_size: int,
    group: dist.ProcessGroup | None = None,
    score: float | None = None,
    describe: Describe | None = None,
) -> None:
    """Writes what `begin_checkpoint` has made room for. Every rank calls it; on the first one, ``folder`` is complete
    when it returns.

    Args:
        group: for the collectives; a thread beside training needs one of its own.
        score: of the weights, on held-out data: the higher the better.

    Raises:
        TrainingError: a file could not be written, on any rank.
    """
    # Imported where it is used: it takes a second, in which a run can have started.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    from asystem.training.planners import BlockSavePlanner

    partial, held = _partial(folder), _held(tensors)
    planner, alone = BlockSavePlanner(held), world_size == 1
    try:
        with _no_single_process_warning():
            save(dict(held), checkpoint_id=partial, planner=planner, process_group=group, no_dist=alone)
        if world_size == 1 or dist.get_rank() == 0:  # by now all ranks have written
            if describe is not None:
                describe(partial)
            shapes = {name: list(tensor.shape) for name, tensor in held.items()}
            _write_manifest(partial, {"tensors": shapes, "score": score, "extra": extra})
            _replace(partial, folder)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise TrainingError(f"checkpoint {folder} was not written: rank {rank}: {cause}") from error
    except OSError as error:
        raise TrainingError(f"checkpoint {folder} was not written: {error}") from error


def load_checkpoint(folder: Path, tensors: Tensors, *, world_size: int, part: str | None = None) -> dict[str, Any]:
    """Fills ``tensors`` in place and returns the JSON object. Every rank calls it.

    Args:
        part: only what begins with it is looked for: ``"model."`` without the optimizer's state.

    Raises:
        ModelError: no checkpoint there, a missing or truncated file, or tensors of another model; nothing is changed.
    """
    manifest = read_manifest(folder)
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} of {size} bytes"
            raise ModelError(f"checkpoint {folder}: {name} {state}; restore it or resume from an earlier checkpoint")
    saved = {name: tuple(shape) for name, shape in manifest["tensors"].items() if name.startswith(part or "")}
    for name, tensor in tensors.items():
        if name not in saved:
            raise ModelError(f"checkpoint {folder} has no {name}{nearest(name, saved)}; it is of another model")
        if saved[name] != tuple(tensor.shape):
            raise ModelError(f"checkpoint {folder}: {name} is {saved[name]}, the model's is {tuple(tensor.shape)}")
    if unknown := sorted(saved.keys() - tensors.keys()):
        raise ModelError(f"checkpoint {folder} has {unknown[0]}, which the model has not; it is of another model")
    from torch.distributed.checkpoint.state_dict_loader import load

    from asystem.training.planners import BlockLoadPlanner

    held = _held(tensors)
    with _no_single_process_warning():
        load(dict(held), checkpoint_id=folder, planner=BlockLoadPlanner(held), no_dist=world_size == 1)
    extra: dict[str, Any] = manifest["extra"]
    return extra


def checkpoint_bytes(tensors: Tensors) -> int:
    """What the tensors take on disk, those of all ranks together."""
    return sum(held.num_bytes for held in _held(tensors).values())


def _held(tensors: Tensors) -> dict[str, Held]:
    return {name: each if isinstance(each, Held) else Held.of(each) for name, each in tensors.items()}


def check_space(folder: Path, needed: int, count: int = 1) -> None:
    """Refuses what the disk of ``folder`` cannot hold.

    Args:
        needed: bytes of one checkpoint. count: how many shall stand there at once.

    Raises:
        CapacityError: with both numbers and the remedy.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed * count:
        raise CapacityError(
            f"{count} checkpoint(s) of {needed / GIB:.3g} GiB do not fit on the disk of {existing}, where "
            f"{free / GIB:.3g} GiB are free: free some, lower checkpoint.keep_last or keep_best, or set run_dir to "
            "another disk"
        )


def list_checkpoints(parent: Path) -> list[Path]:
    """A folder's complete `step-*` checkpoints, oldest first."""
    complete = [path for path in parent.glob("step-*") if path.name[5:].isdigit() and (path / MANIFEST).is_file()]
    return sorted(complete, key=lambda path: int(path.name[5:]))


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest (or best) one of a run's folder.

    Raises:
        ModelError: there is none, or none with a score.
    """
    if (path / MANIFEST).is_file():
        return path
    parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not (complete := list_checkpoints(parent)):
        raise ModelError(f"{path} holds no complete checkpoint, neither itself nor in checkpoints/")
    if not best:
        return complete[-1]
    if not (scored := by_score(complete)):
        raise ModelError(f"no checkpoint of {path} has a score: none was written right after an evaluation")
    return scored[-1]


def by_score(checkpoints: list[Path]) -> list[Path]:
    """Those that have a score, best last; of equal ones the newer."""
    scores = [(read_manifest(path)["score"], place) for place, path in enumerate(checkpoints)]
    return [checkpoints[place] for _, place in sorted(pair for pair in scores if pair[0] is not None)]


def prune_checkpoints(parent: Path, keep_last: int, keep_best: int = 0) -> None:
    """Deletes all of a folder's checkpoints but the last and, beside them, the best ones. One rank calls it."""
    complete = list_checkpoints(parent)
    kept = set(complete[max(0, len(complete) - keep_last) :])
    if keep_best:
        kept |= set(by_score(complete)[-keep_best:])
    for path in complete:
        if path not in kept:
            trash = path.with_name(f".{path.name}.trash")
            shutil.rmtree(trash, ignore_errors=True)
            os.replace(path, trash)  # first, so that it is never found half deleted
            shutil.rmtree(trash)


def recover(parent: Path) -> None:
    """Puts a folder into order after its writer was killed: nothing half written or half deleted is left in it."""
    for old in parent.glob(".step-*.old"):
        name = old.name[1:].removesuffix(".old")
        if not (parent / name).exists():  # killed between the two renames of `_replace`
            os.replace(old, parent / name)
    for left in (path for kind in ("old", "partial", "trash") for path in parent.glob(f".step-*.{kind}")):
        shutil.rmtree(left, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `files`, `tensors`, `score`, `extra`.

    Raises:
        ModelError: it is no complete checkpoint, or its manifest cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("files", "tensors", "extra")} | {"score": manifest.get("score")}
    except FileNotFoundError:
        raise ModelError(f"{folder} is no complete checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"checkpoint {folder}: {MANIFEST} cannot be read: {error}") from None


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"files": files} | manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replace(source: Path, target: Path) -> None:
    """Renames a folder; one that has the name already steps aside first, and goes last (see `recover`)."""
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
