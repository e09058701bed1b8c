"""The fine-tuning program: SPMD over its ranks; rows in, an optimizer step on every rank. Supervised, or DPO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from asystem.config import Command, Config
from asystem.data.examples import Example, ExampleBatch, load_examples
from asystem.data.packing import PackedBatch, pack_groups
from asystem.spmd import Collect, Dispatch, Worker, remote
from asystem.stats import Stats
from asystem.training import (
    LossFn,
    Meter,
    PreferenceLoss,
    Ranks,
    Saver,
    TrainEngine,
    describe_model,
    sequence_sums,
    supervised_loss,
)
from asystem.workers.build import build_tokenizer, build_trained, pick_device, pick_dtype


class FinetuneWorker(Worker):
    """Holds the model, its optimizer, and both datasets, so that a batch is a list of row numbers."""

    collective = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    async def setup(self) -> None:
        config, device = self.config, pick_device(self.config)
        ranks = Ranks.of(config.training, self.world_size)
        model = build_trained(config, device, ranks.shard)
        tokenizer = build_tokenizer(config, model.spec.vocab_size)
        self.train, self.held_out = load_examples(config, tokenizer)
        self.trainer = TrainEngine(
            model,
            config.training,
            device=device,
            dtype=pick_dtype(config.training.dtype, device),
            world_size=self.world_size,
            total_steps=config.steps,
            seed=config.seed,
            ranks=ranks,
        )
        training = config.training
        self.meter = Meter(self.trainer.spec, device, frozen=training.lora.rank > 0, sharing=training.tensor_parallel)
        describe = describe_model(self.trainer.spec, tokenizer, config.model, config.training.lora)
        self.saver = Saver(self.trainer, config.checkpoint, describe)
        self.saver.check_space(self.run_dir)

    @remote(Dispatch.SPLIT, Collect.SUM)
    async def update(self, batch: ExampleBatch) -> Stats:
        """One optimizer step; metrics of all ranks."""
        micro, loss_fn = self._micro_batches(batch), self._loss(batch)
        return self.meter.measure(micro, lambda: self.trainer.step(micro, loss_fn))

    @remote(Dispatch.SPLIT, Collect.SUM)
    async def evaluate(self, batch: ExampleBatch) -> Stats:
        """`loss`, the batch's under the present weights, and what else the loss measures."""
        stats, micro, loss_fn = Stats(), self._micro_batches(batch), self._loss(batch)
        for packed, logprobs in zip(micro, self.trainer.logprobs(micro), strict=True):
            loss, part = loss_fn(packed.to(self.trainer.device), logprobs, torch.zeros_like(logprobs))
            stats += part
            stats.add_sum("loss", float(loss))
        return stats.settled()

    @remote(Dispatch.SPLIT, Collect.CONCAT)
    async def reference(self, batch: ExampleBatch) -> list[Example]:
        """The rows (DPO's pairs) with the present weights' log-probabilities of both answers."""
        sums: dict[int, tuple[float, float]] = {}
        micro = self._micro_batches(batch)
        for packed, logprobs in zip(micro, self.trainer.logprobs(micro), strict=True):
            pairs = sequence_sums(packed.to(self.trainer.device), logprobs).tolist()
            sums |= {number: (pair[0], pair[1]) for number, pair in zip(packed.rollouts[::2], pairs, strict=True)}
        return [replace(row, reference=sums[row.number]) for row in batch.rows]

    @remote(Dispatch.BROADCAST)
    async def save(self, step: int, score: float | None) -> None:
        """Begins a checkpoint of all training state and lets training go on; the last step's is complete on return.

        Args:
            score: of these weights on held-out data, the higher the better; None = not measured.

        Adapters are also written as a PEFT folder, the run's `adapter/`.
        """
        if step < self.config.steps or self.config.checkpoint.at_end:
            self.saver.save(self.run_dir / "checkpoints" / f"step-{step:06d}", score)
        if step == self.config.steps:
            self.saver.wait()
        if self.config.training.lora.rank > 0:
            self.trainer.save_adapter(self.run_dir / "adapter", self.config.model.path)

    def _loss(self, batch: ExampleBatch) -> LossFn:
        if self.config.command is Command.sft:
            return supervised_loss
        reference = {row.number: row.reference for row in batch.rows}
        return PreferenceLoss(self.config.dpo, reference, num_pairs=batch.num_rows)

    def _micro_batches(self, batch: ExampleBatch) -> list[PackedBatch]:
        """The rows packed, weighted for a mean over the trained tokens of the global batch; pairs stay together."""
        examples = self.held_out if batch.held_out else self.train
        weight = 1.0 / max(1, batch.num_trained)
        groups = [[s.sample(weight, row.number) for s in examples.sequences(row.number)] for row in batch.rows]
        return pack_groups(groups, self.config.training.micro_batch_tokens)
