"""One optimizer step over packed micro-batches, on one process or sharded over ranks by FSDP2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from asystem.config import Schedule, TrainingConfig
from asystem.data.packing import PackedBatch, placeholder
from asystem.data.stats import Stats
from asystem.errors import TrainingError
from asystem.models import Decoder
from asystem.training.checkpoint import load_checkpoint, save_checkpoint
from asystem.training.optimizer import make_optimizer, schedule_factor
from asystem.training.policy import Policy

LossFunction = Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, Stats]]
"""(micro-batch, log-probabilities [T], entropies [T]) -> its part of the loss of the whole batch, and metrics."""


class TrainEngine:
    """Holds float32 master weights, AdamW's moments and the step count.

    Args:
        model: whole, equal on all ranks; it is sharded in place when there are several.
        device: where to compute. dtype: of the forward pass; reductions and weights stay float32.
        world_size: ranks of the process group that is already formed.
        temperature: that rollouts are sampled at.
    """

    def __init__(
        self,
        model: Decoder,
        config: TrainingConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        world_size: int = 1,
        total_steps: int = 1,
        temperature: float = 1.0,
    ) -> None:
        self.config, self.device, self.dtype, self.world_size = config, device, dtype, world_size
        self.model = model
        self.policy = Policy(model, temperature)
        if world_size > 1:
            for block in model.layers:
                fully_shard(block)
            fully_shard(self.policy)
        self._bad_steps = 0
        self.start_phase(config.lr, config.schedule, config.lr_warmup_steps, total_steps)

    def start_phase(self, lr: float, schedule: Schedule, warmup_steps: int, total_steps: int) -> None:
        """Begins with fresh moments and a fresh schedule (after the supervised warm-up, say)."""
        self.optimizer = make_optimizer(self.policy, self.config, lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, schedule_factor(schedule, warmup_steps, total_steps)
        )

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Log-probabilities [T] of each micro-batch's labels under the present weights."""
        outs = []
        for batch in self._in_step(micro_batches):
            with self._autocast():
                outs.append(self.policy(batch)[0])
        return outs[: len(micro_batches)]

    def step(self, micro_batches: Sequence[PackedBatch], loss_function: LossFunction) -> Stats:
        """Forward and backward over all micro-batches, then one optimizer step.

        A gradient that is NaN or infinite skips the step: weights and moments stay as they were.

        Raises:
            TrainingError: `training.max_bad_steps` steps in a row were skipped; names the rollouts of this one.
        """
        stats = Stats()
        for batch in self._in_step(micro_batches):
            with self._autocast():
                logprobs, entropy = self.policy(batch)
            loss, metrics = loss_function(batch, logprobs, entropy)
            (loss * self.world_size).backward()  # FSDP2 averages over ranks; the loss is already the global batch's
            stats += metrics
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip_norm)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(grad_norm):
            self.optimizer.step()
            self.schedule.step()
            self._bad_steps = 0
            stats.add_max("train/grad_norm", grad_norm)
        else:
            self._skip(micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        stats.add_max("train/skipped", float(self._bad_steps > 0))
        stats.add_max("train/lr", float(self.schedule.get_last_lr()[0]))
        return stats

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Writes weights, moments and schedule into ``folder``, which appears whole or not at all."""
        save_checkpoint(self.policy, self.optimizer, self.schedule, folder, extra or {})

    def load(self, folder: Path) -> dict[str, Any]:
        """Reads a checkpoint in place, at any number of ranks; returns what was saved as ``extra``.

        Raises:
            ModelError: it is incomplete, or of another model.
        """
        return load_checkpoint(self.policy, self.optimizer, self.schedule, folder)

    def _skip(self, micro_batches: Sequence[PackedBatch]) -> None:
        self._bad_steps += 1
        if self._bad_steps >= self.config.max_bad_steps:
            rollouts = sorted(rollout for batch in micro_batches for rollout in batch.rollouts)
            raise TrainingError(
                f"the gradient was NaN or infinite in {self._bad_steps} steps in a row "
                f"(training.max_bad_steps={self.config.max_bad_steps}); rollouts of this step: {rollouts[:16]}; "
                "lower training.lr or training.clip_norm, or look at these rollouts' log-probabilities"
            )

    def _in_step(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The micro-batches on the device, and placeholders up to the number that the busiest rank has.

        Every forward and backward is a collective under FSDP2, so all ranks must make equally many.
        """
        batches = [batch.to(self.device) for batch in micro_batches]
        if self.world_size > 1:
            count = torch.tensor(len(batches), device=self.device)
            dist.all_reduce(count, dist.ReduceOp.MAX)
            batches += [placeholder().to(self.device) for _ in range(int(count) - len(batches))]
        return batches

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)
