"""The schedule study's runs: which schedules there are, what each trains, and what a finished run's folder says."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROLES = {"decode": "generation", "update": "training", "score": "reward"}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Schedule:
    """Φ, σ and η by name. ``budget`` is whether a window ends by Φ; ``decoupled`` what corrects stale tokens."""

    name: str
    budget: bool
    sigma: int
    eta: int
    decoupled: bool = True

    def overrides(self, token_budget: int) -> list[str]:
        """The keys of the three numbers, and of the loss where it is not the default's decoupled one."""
        keys = [
            f"rollout.token_budget={token_budget if self.budget else 'null'}",
            f"rollout.retention={self.sigma}",
            f"rollout.max_staleness={self.eta}",
        ]
        return keys if self.decoupled else [*keys, "algorithm.anchor=behavior", "algorithm.correction=none"]


SYNCHRONOUS = Schedule("synchronous", False, 0, 0)
LOCKSTEP = [SYNCHRONOUS, *(Schedule(f"C3PO++ σ={sigma}", True, sigma, 0) for sigma in (1, 2, 4))]
PATIENT = Schedule("C3PO++ σ=10", True, 10, 0)  # W2's longest responses live for nine windows
AHEAD = [Schedule(f"η={eta}", True, 4, eta) for eta in (1, 2, 4, 8)]
COUPLED = [Schedule(f"η={eta}, coupled", True, 4, eta, decoupled=False) for eta in (1, 2, 4, 8)]


@dataclass(frozen=True)
class Workload:
    """W2, or its small twin: prompts x samples of random tokens, response lengths log-normal with sigma 1."""

    prompts: int
    samples: int
    prompt_tokens: int
    median: int
    longest: int
    overrides: tuple[str, ...]

    @property
    def capacity(self) -> int:
        return self.prompts * self.samples

    @property
    def budget(self) -> int:
        """Φ: the tokens that `capacity` responses have in the mean."""
        bound = math.log(self.longest / self.median)
        below = math.exp(0.5) * self.median * _normal(bound - 1)
        return round(self.capacity * (below + self.longest * (1 - _normal(bound))))

    def keys(self) -> list[str]:
        """What all schedules have in common."""
        return [
            f"algorithm.group_size={self.samples}",
            f"data.max_prompt_tokens={self.prompt_tokens}",
            f"rollout.capacity={self.capacity}",
            f"rollout.max_new_tokens={self.longest}",
            f"rollout.lengths.median={self.median}",
            f"generation.max_running={self.capacity}",
            *self.overrides,
        ]


GPU = Workload(64, 8, 128, 256, 4096, (
    "device=cuda", "model=qwen3_0_6b", "generation.kv_tokens=320000", "rollout.slice_steps=32",
    "training.micro_batch_tokens=16384",
))  # fmt: skip
CPU = Workload(8, 8, 16, 32, 512, ("device=cpu", "model=tiny", "rollout.slice_steps=16"))

TASK = '''
"""Random prompts; the reward is a coin's, so that every group has its share of signal."""
import random


def train():
    draw = random.Random(0)
    return [{{"prompt": "".join(draw.choices("abcdefghij", k={tokens}))}} for _ in range(4096)]


def reward(row, response):
    return float(random.Random(row["prompt"] + response).random() < 0.5)
'''


@dataclass(frozen=True)
class Run:
    """One `asystem train`, in a folder of its own."""

    folder: Path
    overrides: list[str] = field(hash=False)
    threads: int = 1

    @property
    def finished(self) -> bool:
        summary = self.folder / "summary.json"
        return summary.is_file() and json.loads(summary.read_text())["status"] == "finished"

    def start(self) -> str:
        """Runs it if it has not finished before; returns "", or its last error line."""
        if self.finished:
            return ""
        shutil.rmtree(self.folder, ignore_errors=True)
        command = [sys.executable, "-m", "asystem", "train", *self.overrides, f"run_dir={self.folder}",
                   "tracking=none", "tracking.console=false", "tracking.rollouts=false", "tracking.report=false",
                   f"runtime.threads_per_rank={self.threads}"]  # fmt: skip
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no error line"])[-1]


def start_all(runs: Sequence[Run], jobs: int) -> None:
    """Starts runs, so many at a time, and says what became of each; one that fails does not end the others."""
    with ThreadPoolExecutor(jobs) as pool:
        for run, error in zip(runs, pool.map(Run.start, runs), strict=True):
            print(f"{run.folder.name}: {error or 'finished'}", flush=True)


def write_recipe(out: Path, workload: Workload) -> Path:
    """The workload's recipe: its task, and nothing that `Workload.keys` does not say."""
    recipe = out / "w2"
    recipe.mkdir(parents=True, exist_ok=True)
    (recipe / "task.py").write_text(TASK.format(tokens=workload.prompt_tokens))
    (recipe / "config.yaml").write_text("data: {task: task.py, name: w2}\nweights: {probe_every: 0}\n")
    return recipe


def slug(name: str) -> str:
    """A schedule's name as a folder's."""
    plain = name.replace("σ=", "sigma").replace("η=", "eta").replace("++", "").lower()
    return "-".join(plain.replace(",", " ").split())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What the run logged, step 0 first."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def speed_figures(folder: Path, skip: int) -> dict[str, float]:
    """What a run of the workload measured, without its first steps.

    Returns:
        step_seconds; trained (tokens/s of the whole step); generated (tokens/s within rollout windows) and useful (the
        same of what was trained in the end); window_seconds; tokens, tokens_std (trained, a step);
        staleness_mean, staleness_max; purged (rollouts a step); idle_generation, idle_training (shares of the time).
    """
    rows = metrics(folder)
    begin, steps = rows[skip]["time"], rows[skip + 1 :]
    span = (begin, rows[-1]["time"])
    tokens = [row["rollout/tokens"] for row in steps]
    calls, closings = _trace(folder)
    windows = _windows(calls, closings, span)
    generated, seconds = sum(w[0] for w in windows), sum(w[1] for w in windows)
    busy = {role: _busy([c[1] for c in calls if ROLES.get(c[0]) == role], span) for role in ROLES.values()}
    return {
        "step_seconds": (span[1] - span[0]) / len(steps),
        "trained": sum(tokens) / (span[1] - span[0]),
        "generated": generated / seconds,
        "useful": min(1.0, sum(tokens) / generated) * generated / seconds,
        "window_seconds": seconds / len(windows),
        "tokens": statistics.fmean(tokens),
        "tokens_std": statistics.pstdev(tokens),
        "staleness_mean": statistics.fmean(row["rollout/staleness_mean"] for row in steps),
        "staleness_max": max(row["rollout/staleness_max"] for row in steps),
        "purged": statistics.fmean(row["rollout/purged"] for row in steps),
        "idle_generation": 1 - busy["generation"],
        "idle_training": 1 - busy["training"],
    }


def _trace(folder: Path) -> tuple[list[tuple[str, Interval]], list[tuple[float, int]]]:
    """Calls by method, and when windows closed with how many tokens; seconds since the epoch."""
    trace = json.loads((folder / "timeline.json").read_text())
    zero, events = trace["otherData"]["started"], trace["traceEvents"]
    calls = [(e["name"], (zero + e["ts"] / 1e6, zero + (e["ts"] + e["dur"]) / 1e6)) for e in events if e["ph"] == "X"]
    closings = [(zero + e["ts"] / 1e6, e["args"]["tokens"]) for e in events if e["ph"] == "i" and e["name"] == "window"]
    return calls, sorted(closings)


def _windows(
    calls: Iterable[tuple[str, Interval]], closings: Sequence[tuple[float, int]], span: Interval
) -> list[tuple[int, float]]:
    """(tokens, seconds) of each window that closed within the span, from its first decoding on."""
    starts = sorted(interval[0] for name, interval in calls if name == "decode")
    found, before = [], 0.0
    for closed, tokens in closings:
        first = next((start for start in starts if before <= start < closed), closed)
        if span[0] < closed <= span[1]:
            found.append((tokens, closed - first))
        before = closed
    return found


def _busy(intervals: Iterable[Interval], span: Interval) -> float:
    """The share of the span that the intervals cover."""
    covered, end = 0.0, span[0]
    for start, stop in sorted(intervals):
        start, stop = max(start, end), min(stop, span[1])
        covered += max(0.0, stop - start)
        end = max(end, stop)
    return covered / (span[1] - span[0])


def learning_curve(folder: Path, task: str) -> list[tuple[int, float]]:
    """(tokens trained by then, held-out accuracy) of each evaluation."""
    trained, curve = 0, []
    for row in metrics(folder):
        trained += row.get("rollout/tokens", 0)
        if (accuracy := row.get(f"eval/{task}/accuracy")) is not None:
            curve.append((trained, accuracy))
    return curve


def _normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
