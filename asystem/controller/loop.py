"""The whole algorithm. Read this file first, then `rollout/pool.py` and `algorithms/`.

              asks, leases                  windows                     batches
    Pool ───────────────────▶ generators ───────────▶ rewarders ───────────────▶ trainers
     ▲                             ▲   finished rollouts, as they finish            │
     └── purged prompts            └──────────────── weights, version + 1 ──────────┘

Two loops run beside each other. `_generate` opens one rollout window after another; it waits only for `_ahead`, which
lets it be at most η batches ahead of training. `run` trains one batch after another and publishes the weights; it waits
only for a window. Rewards are computed while their window still decodes. Three numbers make every schedule:

    Φ token budget   a window hands over when it has generated Φ tokens; None = when all that it asked for is finished
    σ retention      windows that an unfinished group may outlive before its prompt is asked again
    η staleness      batches by which generation may be ahead: 0 is lockstep, 1 overlaps one step, more is asynchronous

A token trained at version v was sampled at version v - σ - η or later. A rank answers calls in the order in which they
come: weights change between two slices of decoding. Token arrays and weights stay behind references; ids are seen here.
"""

from __future__ import annotations

import asyncio

from asystem.controller.batches import kept_groups, rollout_metrics
from asystem.controller.session import Scoring, Session
from asystem.rollout import TokenBudget, Window


class Controller(Session):
    """Orchestrates three worker groups, each of which is one local object or many ranks: the calls read the same."""

    async def run(self) -> None:
        """Warms up, then trains `config.steps` batches. Any failure ends every task and is raised."""
        self._windows: asyncio.Queue[tuple[Window, Scoring]] = asyncio.Queue()
        self._ahead = asyncio.Semaphore(self.config.rollout.max_staleness + 1)  # batches begun and not yet trained
        await self._warm_up()
        await self._publish_weights()
        self.tracker.log(0, 0, await self._evaluate())
        async with asyncio.TaskGroup() as self._tasks:
            generation = self._tasks.create_task(self._generate())
            while self.version < self.config.steps:
                await self._train(*await self._windows.get())
            generation.cancel()
        await self._save()

    async def _train(self, window: Window, scoring: Scoring) -> None:
        await self._gather(scoring)
        batch = self._batch(window)
        self.tracker.record("update", window=window.index)
        stats = await self.trainers.update(batch)
        self.version += 1
        self.trained += batch.num_tokens
        await self._publish_weights()
        self._ahead.release()
        metrics = rollout_metrics(window, batch) | stats.to_dict()
        if self.version == self.config.steps or self._is_due(self.config.evaluation.every):
            metrics |= await self._evaluate()
        self.tracker.log(self.version, self.version, metrics)
        if self._is_due(self.config.checkpoint.every):
            await self._save()

    async def _generate(self) -> None:
        while True:
            await self._ahead.acquire()
            scoring: Scoring = []
            window = await self._window(scoring)
            while not await self._suffices(window, scoring):
                window = window.join(await self._window(scoring))
            self._windows.put_nowait((window, scoring))

    async def _suffices(self, window: Window, scoring: Scoring) -> bool:
        """Whether it makes a batch: some group is complete, or as many have signal as dynamic sampling asks for."""
        algorithm = self.config.algorithm
        if algorithm.dynamic_sampling == 0 or window.count >= algorithm.dynamic_windows:
            return bool(window.groups)
        await self._gather(scoring)
        return kept_groups(self.config, window.groups, self._scores) >= algorithm.dynamic_sampling

    async def _window(self, scoring: Scoring) -> Window:
        """C3PO++: decode until Φ new tokens exist, wherever each rollout stands then."""
        budget = TokenBudget(self.config.rollout.token_budget)
        while True:
            async with asyncio.TaskGroup() as drives:
                for replica in range(len(self.replicas)):
                    drives.create_task(self._drive(replica, budget, scoring))
            if budget.exhausted or not self.pool.in_flight:
                break  # else a replica ran out of work under a lease that others can use
        window = self.pool.close_window()
        self.tracker.event("window", index=window.index, tokens=budget.spent, groups=len(window.groups))
        for replica, rollouts in window.to_drop().items():
            await self.replicas[replica].drop(rollouts)
        return window

    async def _drive(self, replica: int, budget: TokenBudget, scoring: Scoring) -> None:
        """Keeps one replica decoding, slice after slice; sends off for rewards what finished in each."""
        while not budget.exhausted and (lease := budget.lease(len(self.replicas))) != 0:
            asks = self.pool.ask(replica)
            if not self.pool.num_in_flight[replica]:
                return budget.settle(lease, 0)
            self.tracker.record("decode", replica=replica, lease=lease)
            report = await self.replicas[replica].decode(asks, lease)
            self.tracker.record("decoded", replica=replica)
            budget.settle(lease, report.counted(self.config.rollout.budget_counts))
            self.pool.finish(report.finished)
            if report.finished:
                scoring.append(self._tasks.create_task(self.rewarders.score(report.finished)))
            self.generated += report.generated
            self.tracker.progress(tokens=self.generated, phase="rollouts", in_flight=sum(self.pool.num_in_flight))

    async def _publish_weights(self) -> None:
        weights = await self.trainers.export_weights()  # decoding goes on; loading them is the only pause
        self.tracker.event("weights", version=self.version, bytes=sum(part.num_bytes for part in weights))
        probe = await self.generators.load_weights(weights, self.version, self._is_due(self.config.weights.probe_every))
        if probe is not None:
            await self._check_probe(probe)
