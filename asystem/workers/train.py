"""The training program: SPMD over its ranks; a batch in, an optimizer step on every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asystem.algorithms.loss import policy_loss
from asystem.algorithms.normalizers import token_weights
from asystem.config import Config
from asystem.data.batch import Batch, BatchRow
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.data.stats import Stats
from asystem.data.task import Row, load_task
from asystem.models import Decoder
from asystem.spmd import Collect, Dispatch, Worker, remote, store
from asystem.state import WeightPayload, export_weights
from asystem.tracking.rollouts import RolloutWriter
from asystem.training import TrainEngine
from asystem.types import Ref, Trajectory
from asystem.workers.build import build_model, build_tokenizer, pick_device


class TrainWorker(Worker):
    """Holds the model, its optimizer, and the demonstrations of the warm-up."""

    collective = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    async def setup(self) -> None:
        self.start_training(build_model(self.config, pick_device(self.config), torch.float32))

    def start_training(self, model: Decoder) -> None:
        """Builds the engine around a model, which a hybrid worker shares with generation."""
        config = self.config
        self.tokenizer = build_tokenizer(config, model.spec.vocab_size)
        self.task = load_task(config.data, config.recipe_dir)
        self.engine_ = None
