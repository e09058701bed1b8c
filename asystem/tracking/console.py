"""What a run shows while it goes on: a live progress bar on a terminal, one aligned line a step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Protocol

PHASE_SECONDS = 5.0  # between two lines about a phase in which no step ends

# What a line shows: metric, label, format. What a step did not measure is left out of its line; of two metrics with one
# label the first is shown.
COLUMNS = (
    ("reward/mean", "reward", "5.3f"),
    ("train/perplexity", "perplexity", "7.3f"),
    ("dpo/accuracy", "preferred", "5.3f"),
    ("dpo/margin", "margin", "6.3f"),
    ("rollout/staleness_mean", "staleness", "4.2f"),
    ("rollout/length_mean", "length", "5.1f"),
    ("icepop/masked_fraction", "masked", "6.4f"),
    ("train/grad_norm", "grad", "6.3f"),
    ("rollout/tokens_per_second", "tokens/s", "7,.0f"),
    ("train/tokens_per_second", "tokens/s", "7,.0f"),
    ("train/mfu", "MFU", "6.1%"),
    ("time/step", "seconds", "5.2f"),
)


class Console(Protocol):
    """Where a run shows itself."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """An optimizer step is done."""

    def phase(self, text: str) -> None:
        """What goes on between two steps."""

    def close(self, line: str) -> None:
        """The run is over; ``line`` says how it ended."""


def make_console(wanted: bool, title: str, steps: int) -> Console:
    """The console for this standard output; ``steps`` is how many the run shall make."""
    if not wanted:
        return SilentConsole()
    return LiveConsole(title, steps) if sys.stdout.isatty() else PlainConsole(title, steps)


class SilentConsole:
    """Shows nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def close(self, line: str) -> None:
        """Nothing."""


class PlainConsole:
    """Lines for files, pipes and CI."""

    def __init__(self, title: str, steps: int) -> None:
        self._steps, self._width, self._spoke = steps, len(str(steps)), time.monotonic()
        print(title, flush=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One aligned line."""
        self._say(f"step {step:{self._width}}/{self._steps}  {columns(metrics)}")

    def phase(self, text: str) -> None:
        """A line, where nothing was said for some seconds."""
        if time.monotonic() - self._spoke >= PHASE_SECONDS:
            self._say(f"     {text}")

    def close(self, line: str) -> None:
        """The last line."""
        self._say(line)

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self._spoke = time.monotonic()


class LiveConsole:
    """A progress bar over the steps, with the newest figures beside it."""

    def __init__(self, title: str, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        width = 2 * len(str(steps)) + 1  # on a narrow terminal the figures are cut, not the count
        self._progress = Progress(
            BarColumn(bar_width=20, table_column=Column(min_width=20)),
            MofNCompleteColumn(table_column=Column(min_width=width)),
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[figures]}\n{task.fields[phase]}", markup=False),
            console=Console(),
        )
        self._progress.console.print(title, markup=False, highlight=False)
        self._progress.start()
        self._task = self._progress.add_task("", total=steps, figures="", phase="")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step, figures=columns(metrics))

    def phase(self, text: str) -> None:
        """The text after the bar."""
        self._progress.update(self._task, phase=text)

    def close(self, line: str) -> None:
        """Leaves the bar where it stands and prints the last line under it."""
        self._progress.update(self._task, phase="")
        self._progress.stop()
        print(line, flush=True)


def columns(metrics: Mapping[str, float]) -> str:
    """The figures of a step on one line; what was measured on held-out data first."""
    shown = [("accuracy", "5.3f", metrics[name]) for name in sorted(metrics) if is_accuracy(name)]
    shown += [("held-out loss", "6.4f", metrics[name]) for name in sorted(metrics) if is_held_out_loss(name)]
    figures = {label: (label, spec, metrics[name]) for name, label, spec in reversed(COLUMNS) if name in metrics}
    shown += reversed(figures.values())
    return "  ".join(f"{label} {value:{spec}}" for label, spec, value in shown if math.isfinite(value))


def is_held_out_loss(name: str) -> bool:
    """Whether a metric is `eval/<task>/loss`."""
    return name.startswith("eval/") and name.endswith("/loss")


def is_accuracy(name: str) -> bool:
    """Whether a metric is `eval/<task>/accuracy`."""
    return name.startswith("eval/") and name.endswith("/accuracy")
