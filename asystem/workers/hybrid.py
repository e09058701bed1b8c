"""ASystem's Hybrid Runtime: training and generation in one worker, over one copy of the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from asystem.config import Config
from asystem.spmd import Collect, Dispatch, remote
from asystem.state import WeightPayload
from asystem.types import Ref
from asystem.workers.build import build_model, pick_device
from asystem.workers.generate import GenerateWorker
from asystem.workers.train import TrainWorker


class HybridWorker(TrainWorker, GenerateWorker):
    """Both programs on one device. The engine decodes with the very tensors that the optimizer writes."""

    collective = False

    def __init__(self, config: Config, run_dir: Path) -> None:
        TrainWorker.__init__(self, config, run_dir)

    async def setup(self) -> None:
        model = build_model(self.config, pick_device(self.config), torch.float32)
        self.start_training(model)  # first: it brings the shared weights into the dtype that both compute in
        self.start_generation(model)

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def export_weights(self) -> Ref[WeightPayload]:
        """Nothing is copied: publishing is the new version number alone."""
        return Ref(None)

    @remote(Dispatch.BROADCAST)
    async def load_weights(self, weights: Ref[WeightPayload], version: int) -> None:
        self.check_version(version)
        self.engine.weights_updated(version)
