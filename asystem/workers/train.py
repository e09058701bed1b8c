"""The training program: SPMD over its ranks; a batch in, an optimizer step on every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asystem.algorithms import choose, correction_weights, policy_loss, token_weights, value_loss
from asystem.config import Config, Schedule
from asystem.data.batch import Batch, BatchRow
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.data.task import Row, load_task
from asystem.models import Decoder
from asystem.spmd import Collect, Dispatch, Worker, remote, store
from asystem.state import Published
from asystem.stats import Stats, merge
from asystem.tracking.rollouts import RolloutWriter
from asystem.training import Meter, Ranks, Saver, TrainEngine, describe_model, supervised_loss, with_token_advantages
from asystem.types import Ref, Trajectory
from asystem.workers.build import build_outbox, build_tokenizer, build_trained, pick_device, pick_dtype


class TrainWorker(Worker):
    """Holds the model, its optimizer, and the demonstrations of the warm-up."""

    collective = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    async def setup(self) -> None:
        ranks = Ranks.of(self.config.training, self.world_size)
        self.start_training(build_trained(self.config, pick_device(self.config), ranks.shard), ranks)

    def begin_training(self) -> None:
        """Called before whatever needs states or room for passes: a hybrid worker wakes them."""

    def start_training(self, model: Decoder, ranks: Ranks | None = None) -> None:
        """Builds the engine around a model, which a hybrid worker shares with generation."""
        config, device = self.config, pick_device(self.config)
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
            entropy_gradient=config.algorithm.entropy_coefficient != 0,
            value_head=config.algorithm.advantage == "gae",
            seed=config.seed,
            ranks=ranks,
        )
        training = config.training
        self.meter = Meter(self.trainer.spec, device, frozen=training.lora.rank > 0, sharing=training.tensor_parallel)
        self.algorithm = choose(config.algorithm, config.recipe_dir)
        if config.training.warmup.steps == 0:
            self._start_rl()
        describe = describe_model(self.trainer.spec, self.tokenizer, config.model, config.training.lora)
        self.saver = Saver(self.trainer, config.checkpoint, describe)
        self.saver.check_space(self.run_dir)
        wire_dtype = pick_dtype(config.generation.dtype, device)
        self._outbox = build_outbox(config, self.trainer.model, wire_dtype, device, self.rank)
        self._warm_ups = self._steps = 0  # supervised; of the run
        self._columns: dict[int, tuple[list[float], list[int]]] = {}
        writes = config.tracking.rollouts and self.trainer.ranks.is_first
        self._writer = RolloutWriter(self.run_dir / "rollouts", self.rank) if writes else None

    @remote(Dispatch.SPLIT, Collect.SUM)
    async def update(self, batch: Batch) -> Stats:
        """One pass over a batch, in `training.minibatches` optimizer steps of whole groups; metrics of all ranks."""
        self.begin_training()
        trajectories = _fetch(batch.rows)
        count = self.config.training.minibatches
        parts = [[row for row in batch.rows if row.group % count == part] for part in range(count)]
        micro = [self._micro_batches(batch, rows, trajectories) for rows in parts]
        stats = Stats()
        if self.config.algorithm.advantage == "gae":
            micro, stats = self._with_token_advantages(micro)
        elif count > 1:  # with one update the weights before it are the present ones, and need no pass of their own
            micro = [self._with_old_logprobs(part) for part in micro]
        if self.trainer.reference is not None:
            micro = [self._with_ref_logprobs(part) for part in micro]
        stats += merge(self._step(part) for part in micro)
        for trajectory in trajectories.values():
            staleness = batch.version - trajectory.versions
            stats.add_mean("rollout/staleness_mean", float(staleness.sum()), len(staleness))
        if self._writer is not None:
            records = [self._record(row, trajectories[row.rollout]) for row in batch.rows]
            self._writer.write(batch.version + 1, records)
        self._steps = batch.version + 1
        return stats

    @remote(Dispatch.BROADCAST, Collect.SUM)
    async def warm_up(self, steps: int) -> Stats:
        """Supervised steps on demonstrations; the last of them leaves fresh moments for reinforcement learning."""
        self.begin_training()
        warmup = self.config.training.warmup
        if self._warm_ups == 0:
            self.trainer.start_phase(warmup.lr, Schedule.constant, min(20, warmup.steps), warmup.steps)
        stats = Stats()
        for _ in range(steps):
            rows = random.Random(f"{self.config.seed}/{self._warm_ups}").choices(
                self.task.demonstrations, k=warmup.batch_size
            )
            pairs = [self._demonstration(row) for row in rows]
            weight = 1.0 / sum(len(response) for _, response in pairs)
            samples = [Sample(prompt, response, weight) for prompt, response in pairs]
            ranks = self.trainer.ranks
            micro = pack(samples[ranks.data_rank :: ranks.data], self.config.training.micro_batch_tokens)
            stats = self.trainer.step(micro, supervised_loss)
            self._warm_ups += 1
        if self._warm_ups == warmup.steps:
            training = self.config.training
            self.trainer.start_phase(
                training.lr, training.schedule, training.lr_warmup_steps, self.config.steps * training.minibatches
            )
            self._start_rl()
        return stats

    def _start_rl(self) -> None:
        """The weights that RL starts from are its reference, where the loss measures the distance to one."""
        if self.config.algorithm.kl_coefficient > 0:
            self.trainer.keep_reference()

    @remote(Dispatch.BROADCAST, Collect.GATHER)
    async def export_weights(self) -> list[Ref[Published]]:
        """Each rank's part of the present weights behind a reference, in the dtype that generation wants: written, or
        with `weights.transport=nccl` announced, and sent by a thread as soon as generation is there to receive.

        They must have been loaded before the weights change, and before the next call.
        """
        return [store.put(self._outbox.write())]

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def score_probe(self, probe: Ref[list[Trajectory]]) -> tuple[float, float]:
        """Scores what generation has just sampled; the mean and the largest difference of its log-probabilities, in
        nats a token. Whether it is too much is the controller's to say: an error here would end these ranks, which have
        what was trained."""
        self.begin_training()
        samples = [
            Sample(t.prompt_tokens, t.tokens, 0.0, infer_logprobs=t.logprobs, routing=self._replayed(t))
            for t in store.get(probe)
        ]
        micro = pack(samples, self.config.training.micro_batch_tokens)
        pairs = zip(self.trainer.logprobs(micro), micro, strict=True)
        gaps = torch.cat([(ours.cpu() - packed.infer_logprobs)[packed.label_rows].abs() for ours, packed in pairs])
        return float(gaps.mean()), float(gaps.max())

    @remote(Dispatch.BROADCAST)
    async def save(self, step: int | None, score: float | None) -> int:
        """Begins a checkpoint of all training state and lets training go on; the last one is complete on return.

        Args:
            step: optimizer steps of the run so far; None = the run ends here, at however many there were.
            score: of these weights on held-out data, the higher the better; None = not measured.

        Adapters are also written as a PEFT folder, the run's `adapter/`.

        Returns:
            the step.
        """
        self.begin_training()
        is_last = step is None or step == self.config.steps
        step = self._steps if step is None else step
        if self._writer is not None:
            self._writer.flush()
        if not is_last or self.config.checkpoint.at_end:
            self.saver.save(self.run_dir / "checkpoints" / f"step-{step:06d}", score)
        if is_last:
            self.saver.wait()
        if self.config.training.lora.rank > 0:
            self.trainer.save_adapter(self.run_dir / "adapter", self.config.model.path)
        return step

    def _step(self, micro_batches: Sequence[PackedBatch]) -> Stats:
        def loss(packed: PackedBatch, logprobs: Tensor, entropy: Tensor, *values: Tensor) -> tuple[Tensor, Stats]:
            total, stats = policy_loss(
                logprobs,
                infer_logprobs=packed.infer_logprobs,
                advantages=packed.advantages,
                token_weights=packed.token_weights,
                rows=packed.label_rows,
                sequence=packed.sequence,
                algorithm=self.algorithm,
                old_logprobs=packed.old_logprobs,
                ref_logprobs=packed.ref_logprobs,
                entropy=entropy,
            )
            if self._writer is not None:
                stats += Stats.later(partial(self._keep, packed, logprobs.detach()))
            return self._with_value_loss(total, stats, packed, *values)

        return self.meter.measure(micro_batches, lambda: self.trainer.step(micro_batches, loss))

    def _micro_batches(
        self, batch: Batch, rows: Sequence[BatchRow], trajectories: dict[int, Trajectory]
    ) -> list[PackedBatch]:
        weights = token_weights(
            self.config.algorithm.normalizer,
            [row.length for row in rows],
            num_rollouts=max(1, batch.num_rollouts),
            num_tokens=max(1, batch.num_tokens),
            token_budget=self.config.rollout.token_budget,
            max_new_tokens=self.config.rollout.max_new_tokens,
            minibatches=self.config.training.minibatches,
        )
        samples = [
            Sample(
                trajectories[row.rollout].prompt_tokens,
                trajectories[row.rollout].tokens,
                weight if row.error is None else 0.0,
                row.advantage,
                trajectories[row.rollout].logprobs,
                trajectories[row.rollout].versions,
                row.rollout,
                routing=self._replayed(trajectories[row.rollout]),
            )
            for row, weight in zip(rows, weights, strict=True)
        ]
        return pack(samples, self.config.training.micro_batch_tokens)

    def _replayed(self, trajectory: Trajectory) -> npt.NDArray[np.uint8 | np.int16] | None:
        """The experts to train it with; None = the model's own choice."""
        return trajectory.routing if self.config.algorithm.routing_replay else None

    def _with_value_loss(
        self, loss: Tensor, stats: Stats, packed: PackedBatch, values: Tensor | None = None
    ) -> tuple[Tensor, Stats]:
        if values is None or packed.old_values is None or packed.returns is None:
            return loss, stats
        part, more = value_loss(
            values,
            old_values=packed.old_values,
            returns=packed.returns,
            token_weights=packed.token_weights,
            rows=packed.label_rows,
            cfg=self.algorithm.cfg,
        )
        return loss + part, stats + more

    def _with_token_advantages(self, parts: Sequence[Sequence[PackedBatch]]) -> tuple[list[list[PackedBatch]], Stats]:
        """All of the batch at once, whose advantages are normalised together."""
        whole, stats = with_token_advantages(
            self.trainer, [packed for part in parts for packed in part], self.algorithm.cfg
        )
        found = iter(whole)
        return [[next(found) for _ in part] for part in parts], stats

    def _with_old_logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        old = self.trainer.logprobs(micro_batches)
        return [replace(packed, old_logprobs=values) for packed, values in zip(micro_batches, old, strict=True)]

    def _with_ref_logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        reference = self.trainer.logprobs(micro_batches, reference=True)
        return [replace(packed, ref_logprobs=values) for packed, values in zip(micro_batches, reference, strict=True)]

    def _keep(self, packed: PackedBatch, logprobs: Tensor) -> Stats:
        """Remembers each response's training log-probabilities and correction weights for `rollouts/`."""
        train = logprobs if packed.old_logprobs is None else packed.old_logprobs
        rows = packed.label_rows
        sequence = packed.sequence[rows].long()
        weights = correction_weights(
            self.algorithm.correction, train[rows], packed.infer_logprobs[rows], sequence, self.algorithm.cfg
        )
        lengths = torch.bincount(sequence, minlength=len(packed.rollouts)).tolist()
        kept = (weights != 0).int().cpu()
        columns = zip(torch.split(train[rows].cpu(), lengths), torch.split(kept, lengths), strict=True)
        for rollout, (values, mask) in zip(packed.rollouts, columns, strict=True):
            self._columns[rollout] = (values.tolist(), mask.tolist())
        return Stats()

    def _demonstration(self, row: Row) -> tuple[list[int], list[int]]:
        return (
            self.tokenizer.encode_prompt(row["prompt"]),
            [*self.tokenizer.encode(row["response"]), self.tokenizer.eos_id],
        )

    def _record(self, row: BatchRow, trajectory: Trajectory) -> dict[str, object]:
        """What `rollouts/` keeps of one trained rollout; lists are per response token."""
        train_logprobs, mask = self._columns.pop(row.rollout)
        return {
            "rollout": row.rollout,
            "group": row.group,
            "prompt": row.prompt,
            "prompt_text": self.tokenizer.decode(trajectory.prompt_tokens.tolist(), skip_special=False),
            "response_text": self.tokenizer.decode(trajectory.tokens.tolist()),
            "tokens": trajectory.tokens.tolist(),
            "infer_logprobs": trajectory.logprobs.tolist(),
            "train_logprobs": train_logprobs,
            "versions": trajectory.versions.tolist(),
            "mask": mask,
            "reward": row.reward,
            "advantage": row.advantage,
            "finish": trajectory.finish.value,
            "error": row.error,
        }


def _fetch(rows: Sequence[BatchRow]) -> dict[int, Trajectory]:
    lists = store.get_many([row.ref for row in rows])
    return {row.rollout: trajectories[row.row] for row, trajectories in zip(rows, lists, strict=True)}
