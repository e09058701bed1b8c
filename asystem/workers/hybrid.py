"""ASystem's Hybrid Runtime: training and generation in one worker, over one copy of the weights.

one rank              the engine decodes with the very tensors that the optimizer writes
with adapters         it has merged copies of the matrices that have one, and shares all others
several ranks         each trains a shard (FSDP2) and decodes by itself, with a whole copy in generation's dtype; a
                      publication gathers what trains: (n - 1) / n of the copy's bytes come to each of n ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asystem.config import Config
from asystem.data.batch import Batch
from asystem.models import decoding_copy, refresh_copy
from asystem.spmd import Collect, Dispatch, remote
from asystem.state import WeightPayload
from asystem.stats import Stats
from asystem.types import Ref, Trajectory
from asystem.workers.build import build_trained, pick_device, pick_dtype
from asystem.workers.generate import GenerateWorker
from asystem.workers.train import TrainWorker


class HybridWorker(TrainWorker, GenerateWorker):
    """Both programs on one device, taking turns: a rank answers its calls one after another."""

    collective = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        TrainWorker.__init__(self, config, run_dir)
        self._stamped: int | None = None  # the version that the engine knows of already

    async def setup(self) -> None:
        device = pick_device(self.config)
        model = build_trained(self.config, device)
        self.start_training(model)  # first: it brings the shared weights into the dtype that both compute in
        self.start_generation(decoding_copy(model, pick_dtype(self.config.generation.dtype, device)))

    @remote(Dispatch.SPLIT, Collect.SUM)
    async def update(self, batch: Batch) -> Stats:
        """As in training. Where the weights are shared, the next slice of decoding reads the new ones, whether or not
        they have been published, and its tokens say so."""
        stats = await super().update(batch)
        if self.shares_weights:
            self._stamped = batch.version + 1
            self.engine.weights_updated(self._stamped)
        return stats

    @property
    def shares_weights(self) -> bool:
        """Whether both runtimes have the same tensors, all of them."""
        return self.engine.model is self.trainer.model

    @remote(Dispatch.BROADCAST, Collect.CONCAT)
    async def export_weights(self) -> list[Ref[WeightPayload]]:
        """Nothing is sent: what a rank cannot share, `load_weights` brings."""
        return []

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def load_weights(
        self, weights: Sequence[Ref[WeightPayload]], version: int, probe: bool = False
    ) -> Ref[list[Trajectory]] | None:
        """Refreshes what is not shared; else publishing is the new version number alone."""
        self.check_version(version)
        refresh_copy(self.engine.model, self.trainer.model)
        if self._stamped != version:
            self.engine.weights_updated(version)
        return self.probe() if probe and self.rank == 0 else None
