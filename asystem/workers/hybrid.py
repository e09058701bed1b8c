"""ASystem's Hybrid Runtime: training and generation in one worker, over one copy of the weights.

With adapters (`training.lora`) the engine decodes with merged copies of the matrices that have one; it shares the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asystem.config import Config
from asystem.models import merged_copy, refresh_merged
from asystem.spmd import Collect, Dispatch, remote
from asystem.state import Published
from asystem.types import Ref, Trajectory
from asystem.workers.build import build_trained, pick_device
from asystem.workers.generate import GenerateWorker
from asystem.workers.train import TrainWorker


class HybridWorker(TrainWorker, GenerateWorker):
    """Both programs on one device. The engine decodes with the very tensors that the optimizer writes."""

    collective = False

    def __init__(self, config: Config, run_dir: Path) -> None:
        TrainWorker.__init__(self, config, run_dir)

    async def setup(self) -> None:
        model = build_trained(self.config, pick_device(self.config))
        self.start_training(model)  # first: it brings the shared weights into the dtype that both compute in
        self.start_generation(merged_copy(model) if self.config.training.lora.rank > 0 else model)

    @remote(Dispatch.BROADCAST, Collect.CONCAT)
    async def export_weights(self) -> list[Ref[Published]]:
        """Nothing is copied: publishing is the new version number alone."""
        return []

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def load_weights(
        self, weights: Sequence[Ref[Published]], version: int, probe: bool = False
    ) -> Ref[list[Trajectory]] | None:
        self.check_version(version)
        if self.config.training.lora.rank > 0:
            refresh_merged(self.engine.model, self.trainer.model)
        self.engine.weights_updated(version)
        return self.probe() if probe else None
