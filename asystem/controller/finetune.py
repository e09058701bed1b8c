"""Fine-tuning: what `asystem sft` and `asystem dpo` call, on the training group that RL uses.

Rows become batches in an order that the seed and the position alone decide; held-out rows are measured before, between
and after. The controller knows rows by number and length; the ranks hold the datasets and encode what they train on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from asystem.config import Command, Config
from asystem.controller.run import ending
from asystem.data.examples import Example, ExampleBatch, load_examples
from asystem.errors import ConfigError, DataError
from asystem.rollout import PromptOrder
from asystem.spmd import make_runtime, spawn
from asystem.tracking import Tracker, new_run_dir
from asystem.training import export_checkpoint, find_checkpoint
from asystem.workers import FinetuneWorker
from asystem.workers.build import check_model, training_environment


def finetune(config: Config) -> dict[str, Any]:
    """Fine-tunes as configured, exports the model, and returns the run's summary.

    Raises:
        ConfigError, DataError, ModelError: before anything starts, if the dataset or the model cannot be used.
        AsystemError: what ended the run; its folder is complete up to then.
    """
    data = survey(config)
    config = replace(config, steps=data.steps)
    run_dir = new_run_dir(config)
    tracker = Tracker(config, run_dir)
    loop: Finetuner | None = None
    with ending(tracker, lambda: {} if loop is None else loop.summary()):
        with make_runtime(config.runtime, config.placement, on_call=tracker.call) as runtime:
            trainers = spawn(
                FinetuneWorker,
                config,
                run_dir,
                name="trainers",
                ranks=config.training.ranks,
                runtime=runtime,
                replica_ranks=config.training.tensor_parallel,
                gpus=0.0 if config.device == "cpu" else 1.0,
                environment=training_environment(config),
            )
            loop = Finetuner(config, trainers, data, tracker)
            asyncio.run(loop.run())
        if config.finetune.export:
            export_checkpoint(find_checkpoint(run_dir), run_dir / "model")
    return tracker.finish("finished", {})


class Survey:
    """Both datasets as the controller knows them.

    Attributes:
        train, held_out: rows that are not too long. dropped: training rows that are.
        steps: optimizer steps of the run.
    """

    def __init__(self, train: list[Example], held_out: list[Example], dropped: int, config: Config) -> None:
        self.train, self.held_out, self.dropped = train, held_out, dropped
        epochs, size = config.finetune.epochs, config.finetune.batch_size
        self.num_rows = config.steps * size if epochs is None else math.ceil(epochs * len(train))
        self.steps = math.ceil(self.num_rows / size)


def survey(config: Config) -> Survey:
    """Reads and encodes every row once, before anything starts.

    Raises:
        ConfigError: `finetune.max_tokens` is beyond the model. DataError: a row or the whole dataset cannot be used.
    """
    spec, tokenizer = check_model(config)
    longest = config.finetune.max_tokens
    if longest > spec.max_positions:
        raise ConfigError(
            f"finetune.max_tokens={longest} exceeds the {spec.max_positions} positions of the model in "
            f"{config.model.path}: lower it"
        )
    train, held_out = load_examples(config, tokenizer)
    found = train.survey()
    if not found:
        raise DataError(f"all {len(train)} training rows are longer than finetune.max_tokens={longest}: raise it")
    warn = logging.getLogger("asystem").warning
    if dropped := len(train) - len(found):
        warn("%d of %d training rows are longer than finetune.max_tokens=%d: left out", dropped, len(train), longest)
    if not any(example.ends for example in found):
        warn(
            "no answer ends in an end token (%s), so that the model will not learn to stop: name the one that the chat "
            'template writes as "eos_token_id" in generation_config.json',
            ", ".join(tokenizer.end_tokens),
        )
    return Survey(found, held_out.survey()[: config.evaluation.prompts], dropped, config)


class Finetuner:
    """Trains on one batch of rows after another."""

    def __init__(self, config: Config, trainers: FinetuneWorker, data: Survey, tracker: Tracker) -> None:
        self.config, self.trainers, self.data, self.tracker = config, trainers, data, tracker
        self.step = self.trained = 0  # optimizer steps; tokens that the loss counted
        self.losses: dict[int, float] = {}  # on held-out rows, by step

    async def run(self) -> None:
        """Trains `config.steps` batches."""
        if self.config.command is Command.dpo:
            asked = {row.number: row for row in self._order()}
            scored = {row.number: row for row in await self._reference(list(asked.values()))}
            self.data.train = [scored.get(row.number, row) for row in self.data.train]
            self.data.held_out = await self._reference(self.data.held_out, held_out=True)
        counts = {"data/rows": len(self.data.train), "data/dropped": self.data.dropped}
        self.tracker.log(0, 0, counts | await self._evaluate())
        for batch in self._batches():
            stats = await self.trainers.update(batch)
            self.step += 1
            self.trained += batch.num_trained
            metrics = stats.to_dict()
            if self.config.command is Command.sft:
                metrics["train/perplexity"] = perplexity(metrics["train/loss"])
            done = min(self.step * self.config.finetune.batch_size, self.data.num_rows)
            metrics["train/epoch"] = done / len(self.data.train)
            if self.step == self.config.steps or self._is_due(self.config.evaluation.every):
                metrics |= await self._evaluate()
            self.tracker.log(self.step, self.step, metrics)
            if self.step == self.config.steps or self._is_due(self.config.checkpoint.every):
                await self.trainers.save(self.step, self._score())

    def summary(self) -> dict[str, Any]:
        """The figures of `summary.json` that the tracker does not know."""
        losses = list(self.losses.values())
        return {
            "steps": self.step,
            "eval_loss_first": losses[0] if losses else None,
            "eval_loss_last": losses[-1] if losses else None,
            "tokens_trained": self.trained,
            "rows": len(self.data.train),
            "rows_dropped": self.data.dropped,
        }

    def _batches(self) -> Iterator[ExampleBatch]:
        rows = self._order()
        while batch := list(islice(rows, self.config.finetune.batch_size)):
            yield ExampleBatch.of(batch)

    def _order(self) -> Iterator[Example]:
        """The rows that the run trains on, as they come."""
        order = PromptOrder(len(self.data.train), seed=self.config.seed, shuffle=self.config.data.shuffle)
        for _ in range(self.data.num_rows):
            yield self.data.train[next(order)]

    async def _evaluate(self) -> dict[str, float]:
        if not self.data.held_out:
            return {}
        stats = (await self.trainers.evaluate(ExampleBatch.of(self.data.held_out, held_out=True))).to_dict()
        name, loss = f"eval/{self.config.data.name}", stats["loss"]
        self.losses[self.step] = loss
        if self.config.command is Command.sft:
            return {f"{name}/loss": loss, f"{name}/perplexity": perplexity(loss)}
        shown = {key.removeprefix("dpo/"): value for key, value in stats.items() if key.startswith("dpo/")}
        return {f"{name}/loss": loss} | {f"{name}/{key}": value for key, value in shown.items()}

    async def _reference(self, rows: Sequence[Example], *, held_out: bool = False) -> list[Example]:
        """Scored once, under the weights that training starts from; some at a time, for the sake of deadlines."""
        found: dict[int, Example] = {}
        size = 16 * self.config.finetune.batch_size
        for start in range(0, len(rows), size):
            self.tracker.progress(tokens=0, phase=f"reference {start}/{len(rows)}")
            part = await self.trainers.reference(ExampleBatch.of(list(rows[start : start + size]), held_out=held_out))
            found |= {row.number: row for row in part}
        return [found[row.number] for row in rows]

    def _score(self) -> float | None:
        return -self.losses[self.step] if self.step in self.losses else None

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats."""
    return math.exp(min(loss, 700.0))
