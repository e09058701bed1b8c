"""The controller's one partner for everything that is written down or shown."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asystem.config import Config
from asystem.tracking.console import is_accuracy, make_console
from asystem.tracking.report import write_report
from asystem.tracking.run_dir import finite, plain, recipe_name, write_config, write_json
from asystem.tracking.timeline import Timeline, overlap
from asystem.tracking.wandb_run import WandbRun
from asystem.types import CallRecord

EVENTS = "rollouts/events.jsonl"


def is_timing(name: str) -> bool:
    """Whether a metric depends on the clock or the machine: two runs of one seed in one process agree in all others."""
    return name.startswith(("time", "memory/")) or name.endswith(("_per_second", "/mfu")) or "seconds" in name


class Tracker:
    """Writes a run's folder while the run goes on: a line of `metrics.jsonl` is on disk once it is logged."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        """Opens the folder.

        Raises:
            ConfigError: W&B was asked for by name and cannot start.
        """
        self.config, self.run_dir = config, run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, run_dir / "config.yaml")
        self._recipe = recipe_name(config)
        self._wandb = WandbRun(
            config.tracking.wandb,
            run_dir,
            recipe=self._recipe,
            project=config.tracking.project,
            config=plain(config),
        )
        self._metrics = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        (run_dir / "rollouts").mkdir(exist_ok=True)
        self._events = open(run_dir / EVENTS, "a", encoding="utf-8")  # noqa: SIM115
        self._timeline = Timeline()
        self._started = self._logged = time.time()
        self._tokens = self._logged_tokens = 0  # generated: as of the last progress(), and of the last log()
        self._seconds: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._peaks: dict[str, int] = {}  # bytes, by group
        self._published = 0  # bytes of weights since the last log()
        self._accuracy: list[float] = []
        self._step = 0
        self._summary: dict[str, Any] | None = None
        title = f"{self._recipe}: {config.steps} steps, run folder {run_dir}"
        self._console = make_console(config.tracking.console, title, config.steps)

    def log(self, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """Writes what a step measured, with the rates and times since the last call of this method.

        Added, unless given: `time/step`, `time/<group>_<method>` (seconds of calls, the mean over the group's ranks),
        `rollout/tokens_per_second` (generated, over all the time), `train/tokens_per_second` (over the updates alone;
        response tokens, or without rollouts all tokens), `sync/seconds` and `sync/gigabytes_per_second` (publishing
        weights: writing, then loading), `memory/<group>_peak_gib` (of the rank that held most, so far).
        NaN and infinity are written as null.
        """
        now = time.time()
        metrics = {**self._rates(now, metrics), **metrics}
        line = {"step": step, "version": version, "time": now}
        line |= {name: finite(value) for name, value in sorted(metrics.items())}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        self._wandb.log(step, metrics)
        if math.isfinite(metrics.get("reward/mean", math.nan)):
            self._timeline.count(now, "reward/mean", metrics["reward/mean"])
        accuracies = [value for name, value in metrics.items() if is_accuracy(name)]
        self._accuracy += [sum(accuracies) / len(accuracies)] if accuracies else []  # the mean over tasks
        self._step, self._logged, self._logged_tokens = step, now, self._tokens
        self._published = 0
        self._seconds.clear()
        self._console.step(step, metrics)

    def call(self, record: CallRecord) -> None:
        """Notes a worker's call, for the timeline and for `time/<group>_<method>`."""
        self._timeline.add(record)
        self._seconds[record.group, record.method][record.rank] += record.end - record.start
        self._peaks[record.group] = max(record.peak_bytes, self._peaks.get(record.group, 0))

    def record(self, event: str, **fields: Any) -> None:
        """Writes down what the controller does next, for `asystem replay`: a line of `rollouts/events.jsonl`."""
        self._events.write(json.dumps({"event": event} | plain(fields)) + "\n")
        self._events.flush()

    def event(self, name: str, **fields: Any) -> None:
        """As `record`, and marks the instant in the timeline: weights published, a window closed."""
        self.record(name, **fields)
        self._published += fields.get("bytes", 0) if name == "weights" else 0
        self._timeline.mark(time.time(), name, plain(fields))

    def progress(self, *, tokens: int, phase: str, in_flight: int = 0) -> None:
        """Shows what goes on between two steps. ``tokens`` counts all that the run has generated."""
        self._tokens = max(self._tokens, tokens)
        now = time.time()
        self._timeline.count(now, "rollouts in flight", in_flight)
        seconds = now - self._logged
        rate = (self._tokens - self._logged_tokens) / seconds if seconds > 0.5 else 0.0  # too soon to tell before
        figures = [phase]
        figures += [f"{in_flight} in flight"] if in_flight else []
        figures += [f"{rate:,.0f} tokens/s"] if rate else []
        self._console.phase(", ".join(figures))

    def finish(self, status: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Ends the run: `summary.json`, `timeline.json`, `report.html`, W&B, and one last line on the console.

        Args:
            status: "finished", "failed" or "interrupted". summary: figures that outrank what the tracker counted.

        Returns:
            The summary. A second call changes nothing and returns the same.
        """
        if self._summary is not None:
            return self._summary
        measured = overlap(self._timeline.calls)
        self._summary = {"status": status} | self._counted() | plain(dict(summary)) | {"overlap": measured}
        self._metrics.close()
        self._events.close()
        write_json(self.run_dir / "summary.json", self._summary)
        if self.config.tracking.timeline:
            write_json(self.run_dir / "timeline.json", self._timeline.trace(), indent=None)
        page = self._report()
        self._wandb.finish(self._summary, failed=status != "finished")
        self._console.close(closing_line(self._recipe, self._summary, page))
        return self._summary

    def _rates(self, now: float, given: Mapping[str, float]) -> dict[str, float]:
        times = {f"time/{group}_{method}": _mean(ranks) for (group, method), ranks in self._seconds.items()}
        times |= {f"memory/{group}_peak_gib": peak / 2**30 for group, peak in self._peaks.items() if peak}
        times["time/step"] = now - self._logged
        if self._tokens > self._logged_tokens:
            times["rollout/tokens_per_second"] = (self._tokens - self._logged_tokens) / max(times["time/step"], 1e-9)
        if (sync := self._spent("export_weights", "load_weights")) > 0:
            times["sync/seconds"] = sync
            times["sync/gigabytes_per_second"] = self._published / sync / 1e9
        update = self._spent("update")
        trained = given.get("rollout/tokens", given.get("train/tokens"))
        if update > 0 and trained is not None:
            times["train/tokens_per_second"] = trained / update
        return times

    def _spent(self, *methods: str) -> float:
        """Seconds in these methods since the last log(), the mean over the ranks of each group."""
        return sum(_mean(ranks) for (_, method), ranks in self._seconds.items() if method in methods)

    def _counted(self) -> dict[str, Any]:
        return {
            "recipe": self._recipe,
            "steps": self._step,
            "wall_seconds": time.time() - self._started,
            "eval_first": self._accuracy[0] if self._accuracy else None,
            "eval_last": self._accuracy[-1] if self._accuracy else None,
            "tokens_generated": self._tokens,
            "tokens_trained": 0,
        }

    def _report(self) -> Path:
        """Writes the page; it is the least of what a run leaves, so its failure hides nothing else."""
        if not self.config.tracking.report:
            return self.run_dir
        try:
            return write_report(self.run_dir)
        except Exception as error:
            logging.getLogger("asystem").warning("report.html was not written: %r", error)
            return self.run_dir


def closing_line(recipe: str, summary: Mapping[str, Any], page: Path) -> str:
    """How a run ended, in one line."""
    held_out = "".join(
        f"held-out {what} {summary[f'{key}_first']:.3f} -> {summary[f'{key}_last']:.3f}, "
        for what, key in (("accuracy", "eval"), ("loss", "eval_loss"))
        if summary.get(f"{key}_first") is not None
    )
    work = "generated" if summary["tokens_generated"] or not summary["tokens_trained"] else "trained"
    shares = {"training": summary["overlap"]["generation_training"], "reward": summary["overlap"]["generation_reward"]}
    shown = [f"generation/{name} {share:.0%}" for name, share in shares.items() if share is not None]
    overlapped = f", overlap {' '.join(shown)}" if shown else ""
    page = page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page
    return (
        f"{recipe} {summary['status']}: {held_out}{summary['steps']} steps, {summary['wall_seconds']:.1f} s, "
        f"{summary[f'tokens_{work}']:,} tokens {work}{overlapped}; {page}"
    )


def _mean(ranks: Mapping[int, float]) -> float:
    return sum(ranks.values()) / len(ranks)
