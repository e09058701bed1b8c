"""`rollouts/`: every trained rollout, a JSON object a line, one file for each step and rank."""

from __future__ import annotations

import json
import math
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

QUEUED_STEPS = 8  # steps whose rollouts may wait to be written before training waits for the disk

_NAME = re.compile(r"step-(\d+)-rank(\d+)\.jsonl")


class RolloutWriter:
    """Writes in a thread of its own, so that training does not wait for the disk."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        self._queue: queue.Queue[tuple[int, list[dict[str, Any]]] | None] = queue.Queue(QUEUED_STEPS)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="rollout-writer", daemon=True)
        self._thread.start()

    def write(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Hands a step's rollouts over; ``step`` goes first in each. Waits only if many steps are still unwritten.

        Raises:
            Exception: what kept an earlier step from being written, such as a full disk.
        """
        self._check()
        self._queue.put((step, list(records)))

    def flush(self) -> None:
        """Returns when all that was handed over is on disk.

        Raises:
            Exception: what kept something from being written.
        """
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Flushes and ends the thread; a second call does nothing."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._check()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            step, records = item
            try:
                text = "".join(_line({"step": step} | record) for record in records)
                (self._folder / f"step-{step:06d}-rank{self._rank}.jsonl").write_text(text, encoding="utf-8")
            except Exception as error:  # for the next call: training shall hear of it, and nobody wait for ever
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


def steps_written(run_dir: Path) -> list[int]:
    """The steps that have rollouts, in order."""
    return sorted({int(match[1]) for match in map(_match, (run_dir / "rollouts").glob("step-*.jsonl")) if match})


def read_rollouts(run_dir: Path, steps: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
    """The rollouts of some steps (all by default), by step and rank. A line cut off by a crash is passed over."""
    wanted = None if steps is None else set(steps)
    files = {path: match for path in (run_dir / "rollouts").glob("step-*.jsonl") if (match := _match(path))}
    for path, match in sorted(files.items(), key=lambda item: (int(item[1][1]), int(item[1][2]))):
        if wanted is None or int(match[1]) in wanted:
            yield from _read_lines(path)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _match(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name)


def _line(record: dict[str, Any]) -> str:
    return json.dumps({name: _rounded(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _rounded(value: Any) -> Any:
    """Floats to 5 digits after the point; NaN and infinity become null."""
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
