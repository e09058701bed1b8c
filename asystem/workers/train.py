"""The training program: SPMD over its ranks; a batch in, an optimizer step on every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asystem.algorithms import policy_loss, token_weight
from asystem.config import Config, Schedule
from asystem.data.batch import Batch, BatchRow
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.data.stats import Stats
from asystem.data.task import Row, load_task
from asystem.models import Decoder
from asystem.spmd import Collect, Dispatch, Worker, remote, store
from asystem.state import WeightPayload, export_weights
from asystem.tracking.rollouts import RolloutWriter
from asystem.training import TrainEngine, supervised_loss
from asystem.training.checkpoint import prune_checkpoints
from asystem.types import Ref, Trajectory
from asystem.workers.build import build_model, build_tokenizer, pick_device, pick_dtype


class TrainWorker(Worker):
    """Holds the model, its optimizer, and the demonstrations of the warm-up."""

    collective = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    async def setup(self) -> None:
        self.start_training(build_model(self.config, pick_device(self.config), torch.float32))

    def start_training(self, model: Decoder) -> None:
        """Builds the engine around a model, which a hybrid worker shares with generation."""
        config, device = self.config, next(model.parameters()).device
        self.tokenizer = build_tokenizer(config, model.spec.vocab_size)
        self.task = load_task(config.data, config.recipe_dir)
        self.trainer = TrainEngine(
            model,
            config.training,
            device=device,
            dtype=pick_dtype(config.training.dtype, device),
            world_size=self.world_size,
            total_steps=config.steps * config.training.minibatches,
            temperature=config.rollout.temperature,
        )
        self._wire_dtype = pick_dtype(config.generation.dtype, device)
        self._warm_ups = 0
        self._writer = RolloutWriter(self.run_dir / "rollouts", self.rank) if config.tracking.rollouts else None

    @remote(Dispatch.SPLIT, Collect.SUM)
    async def update(self, batch: Batch) -> Stats:
        """One pass over a batch, in `training.minibatches` optimizer steps; metrics summed over the ranks."""
        trajectories = _fetch(batch.rows)
        stats = Stats()
        minibatches = batch.minibatches(self.config.training.minibatches)
        old = (
            [None] * len(minibatches)
            if len(minibatches) == 1
            else [self._old_logprobs(m, trajectories) for m in minibatches]
        )
        for minibatch, old_logprobs in zip(minibatches, old, strict=True):
            stats += self._update(minibatch, trajectories, old_logprobs)
        return stats

    @remote(Dispatch.BROADCAST, Collect.SUM)
    async def warm_up(self, steps: int) -> Stats:
        """Supervised steps on demonstrations; the last of them leaves fresh moments for reinforcement learning."""
        warmup = self.config.training.warmup
        if self._warm_ups == 0:
            self.trainer.start_phase(warmup.lr, Schedule.constant, min(20, warmup.steps), warmup.steps)
        stats = Stats()
        for _ in range(steps):
            rows = random.Random(f"{self.config.seed}/{self._warm_ups}").choices(
                self.task.demonstrations, k=warmup.batch_size
            )
            samples = [self._demonstration(row) for row in rows]
            total = sum(len(sample.tokens) for sample in samples)
            for sample in samples:
                sample.weight = 1.0 / total
            micro = pack(samples[self.rank :: self.world_size], self.config.training.micro_batch_tokens)
            stats = self.trainer.step(micro, supervised_loss)
            self._warm_ups += 1
        if self._warm_ups == warmup.steps:
            training = self.config.training
            self.trainer.start_phase(
                training.lr, training.schedule, training.lr_warmup_steps, self.config.steps * training.minibatches
            )
        return stats

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def export_weights(self) -> Ref[WeightPayload]:
        """The present weights behind a reference, in the dtype that generation wants."""
        payload = export_weights(self.trainer.model, self._wire_dtype, keep=self.rank == 0)
        return store.put(payload) if payload is not None else Ref(None)

    @remote(Dispatch.BROADCAST)
    async def save(self, folder: Path) -> None:
        """A checkpoint of all training state, whole or not at all; older ones beyond `checkpoint.keep_last` go."""
        if self._writer is not None:
            self._writer.flush()
        self.trainer.save(folder)
        if self.rank == 0:
            prune_checkpoints(folder.parent, self.config.checkpoint.keep_last)

    def _update(self, batch: Batch, trajectories: dict[int, Trajectory], old: dict[int, Tensor] | None) -> Stats:
        micro = self._micro_batches(batch, trajectories)
        present: dict[int, tuple[Tensor, Tensor]] = {}  # rollout -> its log-probabilities and correction weights

        def loss(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
            old_logprobs = None if old is None else _aligned(packed, old)
            value, weights, stats = policy_loss(packed, logprobs, entropy, old_logprobs, self.config.algorithm)
            if self._writer is not None:
                columns = zip(packed.per_sample(logprobs.detach()), packed.per_sample(weights), strict=True)
                present.update(zip(packed.rollouts, columns, strict=True))
            return value, stats

        stats = self.trainer.step(micro, loss)
        for row in batch.rows:
            staleness = batch.version - trajectories[row.rollout].versions
            stats.add_mean("rollout/staleness_mean", float(staleness.sum()), len(staleness))
        if self._writer is not None:
            self._writer.write(
                batch.version + 1,
                [self._record(row, trajectories[row.rollout], *present[row.rollout]) for row in batch.rows],
            )
        return stats

    def _micro_batches(self, batch: Batch, trajectories: dict[int, Trajectory]) -> list[PackedBatch]:
        samples = []
        for row in batch.rows:
            trajectory = trajectories[row.rollout]
            weight = token_weight(
                self.config.algorithm.normalizer,
                length=row.length,
                num_rollouts=max(1, batch.num_rollouts),
                num_tokens=max(1, batch.num_tokens),
                token_budget=self.config.rollout.token_budget,
            )
            samples.append(
                Sample(
                    trajectory.prompt_tokens,
                    trajectory.tokens,
                    trajectory.logprobs,
                    weight=weight if row.error is None else 0.0,
                    advantage=row.advantage,
                    rollout=row.rollout,
                )
            )
        return pack(samples, self.config.training.micro_batch_tokens)

    def _old_logprobs(self, batch: Batch, trajectories: dict[int, Trajectory]) -> dict[int, Tensor]:
        """Log-probabilities under the weights that the step starts with; needed once a batch makes several updates."""
        micro = self._micro_batches(batch, trajectories)
        return {
            rollout: values
            for packed, logprobs in zip(micro, self.trainer.logprobs(micro), strict=True)
            for rollout, values in zip(packed.rollouts, packed.to(logprobs.device).per_sample(logprobs), strict=True)
        }

    def _demonstration(self, row: Row) -> Sample:
        prompt = self.tokenizer.encode_prompt(row["prompt"])
        response = [*self.tokenizer.encode(row["response"]), self.tokenizer.eos_id]
        zeros = np.zeros(len(response), dtype=np.float32)
        return Sample(np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32), zeros, weight=0.0)

    def _record(self, row: BatchRow, trajectory: Trajectory, logprobs: Tensor, weights: Tensor) -> dict[str, object]:
        """What `rollouts/` keeps of one trained rollout; lists are per response token."""
        return {
            "rollout": row.rollout,
            "group": row.group,
            "prompt": row.prompt,
            "prompt_text": self.tokenizer.decode(trajectory.prompt_tokens.tolist(), skip_special=False),
            "response_text": self.tokenizer.decode(trajectory.tokens.tolist()),
            "tokens": trajectory.tokens.tolist(),
            "infer_logprobs": trajectory.logprobs.tolist(),
            "train_logprobs": logprobs.tolist(),
            "versions": trajectory.versions.tolist(),
            "mask": (weights > 0).int().tolist(),
            "reward": row.reward,
            "advantage": row.advantage,
            "finish": trajectory.finish.value,
            "error": row.error,
        }


def _fetch(rows: Sequence[BatchRow]) -> dict[int, Trajectory]:
    lists = store.get_many([row.ref for row in rows])
    return {row.rollout: trajectories[row.row] for row, trajectories in zip(rows, lists, strict=True)}


def _aligned(packed: PackedBatch, values: dict[int, Tensor]) -> Tensor:
    """Per-rollout values [length] laid out on the packed axis [T]; 0 outside the response."""
    out = torch.zeros_like(packed.logprobs)
    parts = [values[rollout] for rollout in packed.rollouts if rollout in values]
    out[packed.mask] = torch.cat(parts) if parts else out.new_zeros(0)
    return out
