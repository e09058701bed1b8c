"""A recorded run once more, in the recorded order: `asystem replay RUN`.

An asynchronous run is a race: which slice of decoding came before which weights differs from run to run. The
controller writes each of its acts to `rollouts/events.jsonl` before it acts, and calls on one rank run in the order in
which they are made. So doing the same acts one after another gives each worker the same calls in the same order, and
with the same seed and arithmetic every token, reward and loss is the same, bit for bit; only the overlap is lost.

    decode    a slice began on a replica, with what the pool had to ask and this lease
    decoded   its report arrived
    window    the window closed: groups were handed over, others purged
    update    the batch of this window, and of those before that were not trained yet, began to train
    weights   the newest weights were sent to the generators
    evaluate  held-out prompts were asked

What the pool asks follows from these. Holds on CPUs; on GPUs as far as their kernels are deterministic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial, reduce
from itertools import count
from pathlib import Path
from typing import Any

from asystem.config import Config
from asystem.controller.batches import rollout_metrics
from asystem.controller.loop import Controller
from asystem.controller.run import train
from asystem.errors import DataError
from asystem.rollout import Window
from asystem.tracking import EVENTS, is_timing
from asystem.types import DecodeReport

Event = dict[str, Any]


class Replay(Controller):
    """A controller that follows recorded events instead of the clock."""

    def __init__(self, events: Iterable[Event], *args: Any) -> None:
        super().__init__(*args)
        self.events = events

    async def run(self) -> None:
        """Repeats the events, to the last batch that was trained."""
        self._reports: dict[int, DecodeReport] = {}  # by replica
        self._closed: list[Window] = []  # and not trained
        self._metrics: dict[str, float] = {}  # of the step under way
        await self._warm_up()
        for event in self.events:
            await getattr(self, f"_on_{event.pop('event')}")(**event)
        self._log()
        await self._save()

    async def _on_decode(self, replica: int, lease: int | None) -> None:
        self._reports[replica] = await self.replicas[replica].decode(self.pool.ask(replica), lease)

    async def _on_decoded(self, replica: int) -> None:
        report = self._reports.pop(replica)
        self.pool.finish(report.finished)
        self._scores.update((score.rollout, score) for score in await self.rewarders.score(report.finished))
        self.generated += report.generated
        self.tracker.progress(tokens=self.generated, phase="replay", in_flight=sum(self.pool.num_in_flight))

    async def _on_window(self, **_: Any) -> None:
        self._closed.append(self.pool.close_window())
        for replica, rollouts in self._closed[-1].to_drop().items():
            await self.replicas[replica].drop(rollouts)

    async def _on_update(self, window: int) -> None:
        self._log()
        closed = reduce(Window.join, (each for each in self._closed if each.index <= window))
        self._closed = [each for each in self._closed if each.index > window]
        batch = self._batch(closed)
        stats = await self.trainers.update(batch)
        self.version += 1
        self.trained += batch.num_tokens
        self._metrics = rollout_metrics(closed, batch) | stats.to_dict()

    async def _on_weights(self, **_: Any) -> None:
        await self._publish_weights()

    async def _on_evaluate(self) -> None:
        self._metrics |= await self._evaluate()
        if self.version == 0:
            self._log()

    def _log(self) -> None:
        if self._metrics:
            self.tracker.log(self.version, self.version, self._metrics)
        self._metrics = {}


def replay(config: Config, run: Path) -> tuple[Path, int, list[str]]:
    """Repeats a recorded run in a folder beside it.

    Args:
        config: the run's own. run: its folder.

    Returns:
        The new folder, how many steps both logged, and what differs in them, see `differences`.

    Raises:
        DataError: the run recorded no events. Others as `train`.
    """
    events = read_events(run)
    names = (f"{run.name}-replay{'' if number == 1 else f'-{number}'}" for number in count(1))
    folder = next(path for name in names if not (path := run.with_name(name)).exists())
    train(replace(config, run_dir=str(folder)), partial(Replay, events))
    return folder, *differences(run, folder)


def read_events(run: Path) -> list[Event]:
    """The events of a run's folder; a last line that a crash cut off is left out.

    Raises:
        DataError: it recorded none, or a line in the middle cannot be read.
    """
    path = run / EVENTS
    if not path.is_file():
        raise DataError(f"{run} has no {EVENTS}: it is no run's folder, or of a version that recorded none")
    lines = path.read_text(encoding="utf-8").splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not JSON: {error}") from error
    return events


def differences(recorded: Path, replayed: Path) -> tuple[int, list[str]]:
    """Steps that both runs logged, and what differs in them, timings aside: "step 3: train/loss 0.5 -> 0.25"."""
    rows = [_metrics(run) for run in (recorded, replayed)]
    steps = sorted(rows[0].keys() & rows[1].keys())
    found = []
    for step in steps:
        before, after = rows[0][step], rows[1][step]
        names = [name for name in sorted(before.keys() | after.keys()) if not is_timing(name)]
        found += [f"step {step}: {n} {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]
    return len(steps), found


def _metrics(run: Path) -> dict[int, dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}
