"""What a run has and does around its loop: worker groups, counts, warm-up, scores, evaluation, checkpoints."""

from __future__ import annotations

import asyncio

from asystem.config import Config
from asystem.controller.batches import accuracy, build_batch, mean_rewards
from asystem.data.batch import Batch
from asystem.errors import PublicationError
from asystem.rollout import Pool, PromptOrder, Window
from asystem.spmd import replicas
from asystem.tracking import Tracker
from asystem.types import Ref, Score, Trajectory
from asystem.workers import GenerateWorker, RewardWorker, TrainWorker

Scoring = list[asyncio.Task[list[Score]]]


class Session:
    """A run's worker groups, what was counted so far, and what its batches and measurements are made of."""

    def __init__(
        self,
        config: Config,
        trainers: TrainWorker,
        generators: GenerateWorker,
        rewarders: RewardWorker,
        pool: Pool,
        tracker: Tracker,
    ) -> None:
        self.config, self.pool, self.tracker = config, pool, tracker
        self.trainers, self.generators, self.rewarders = trainers, generators, rewarders
        self.replicas = replicas(generators)
        self.version = self.generated = self.trained = 0  # of the weights; response tokens
        self.accuracy: dict[int, float] = {}  # on held-out prompts, by version
        self._scores: dict[int, Score] = {}  # of finished rollouts whose group still waits

    async def _gather(self, scoring: Scoring) -> None:
        for scores in await asyncio.gather(*scoring):
            self._scores.update((score.rollout, score) for score in scores)

    def _batch(self, window: Window) -> Batch:
        """The batch of a window whose scores are there; the order of prompts learns from them."""
        batch = build_batch(self.config, window, self._scores, self.version)
        if isinstance(self.pool.prompts, PromptOrder):
            for prompt, reward in mean_rewards(batch):
                self.pool.prompts.learn(prompt, reward)
        return batch

    async def _evaluate(self) -> dict[str, float]:
        """Accuracy on held-out prompts under the weights just published; rollouts in flight are held meanwhile."""
        if not (rows := await self.generators.num_held_out()):
            return {}
        self.tracker.record("evaluate")
        finished = await self.generators.evaluate(list(range(min(rows, self.config.evaluation.prompts))))
        self.accuracy[self.version] = accuracy(await self.rewarders.score(finished, held_out=True))
        return {f"eval/{self.config.data.name}/accuracy": self.accuracy[self.version]}

    async def _check_probe(self, probe: Ref[list[Trajectory]]) -> None:
        """Compares samples of generation with what training makes of them.

        Raises:
            PublicationError: they differ by more than `weights.probe_bound`.
        """
        mean, worst = await self.trainers.score_probe(probe)
        if not mean <= (bound := self.config.weights.probe_bound):
            raise PublicationError(
                f"generation and training differ by {mean:.3g} nats a token (worst {worst:.3g}) in samples taken right "
                f"after version {self.version} was published; weights.probe_bound={bound:g}. Either they compute "
                "different models, or generation is that coarse: then raise the bound"
            )

    async def _warm_up(self) -> None:
        steps = self.config.training.warmup.steps
        for done in range(0, steps, 20):
            stats = await self.trainers.warm_up(min(20, steps - done))
            self.tracker.progress(tokens=0, phase=f"warm-up {done}/{steps}, loss {stats.to_dict()['train/loss']:.3f}")

    async def _save(self) -> None:
        await self.trainers.save(self.version, self.accuracy.get(self.version))

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.version % every == 0
