"""Checkpoints beside training: a copy is made at once, a thread writes it, and training goes on meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from asystem.config import CheckpointConfig
from asystem.models import Held
from asystem.training.checkpoint import (
    Describe,
    begin_checkpoint,
    check_space,
    checkpoint_bytes,
    prune_checkpoints,
    write_checkpoint,
)
from asystem.training.engine import TrainEngine


class Saver:
    """Writes an engine's checkpoints, one at a time, and deletes those that `checkpoint.keep_last` and `keep_best` do
    not spare. Each rank makes one, and every call is collective.

    Args:
        describe: writes what a checkpoint holds beside its tensors.
    """

    def __init__(self, engine: TrainEngine, cfg: CheckpointConfig, describe: Describe | None = None) -> None:
        self.engine, self.cfg, self.describe = engine, cfg, describe
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        self._last: Path | None = None

    def check_space(self, parent: Path) -> None:
        """Refuses to begin a run whose checkpoints the disk cannot hold: those kept, and the one being written.

        Raises:
            CapacityError: with the sizes and the remedy.
        """
        count = self.cfg.keep_last + self.cfg.keep_best + 1 if self.cfg.every else int(self.cfg.at_end)
        check_space(parent, checkpoint_bytes(self.engine.state()[0]), count)

    def save(self, folder: Path, score: float | None = None) -> float:
        """Copies the engine's state and leaves the rest to a thread. A folder that was written last is left alone.

        Args:
            folder: its name is `step-<number>`.
            score: of these weights on held-out data: the higher the better.

        Returns:
            seconds for which training stood still: a write that still went on is waited for.

        Raises:
            CapacityError: no space for it. TrainingError: the one before could not be written.
        """
        started = time.perf_counter()
        self.wait()
        if folder != self._last:
            tensors, extra = self.engine.state()
            begin_checkpoint(folder, tensors, world_size=self.engine.world_size)
            copies = {name: held.to_host() for name, held in tensors.items()}
            if self.engine.world_size > 1 and self._group is None:
                # Its own: collectives of the thread and of training would otherwise meet each other.
                self._group = dist.new_group(backend="gloo")
            self._last = folder
            self._writing = self._thread.submit(self._write, folder, copies, extra, score)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            TrainingError: the checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, folder: Path, copies: dict[str, Held], extra: dict[str, object], score: float | None) -> None:
        write_checkpoint(
            folder,
            copies,
            extra,
            world_size=self.engine.world_size,
            group=self._group,
            score=score,
            describe=self.describe,
        )
        if self.engine.rank == 0:
            prune_checkpoints(folder.parent, self.cfg.keep_last, self.cfg.keep_best)
