"""The schedule study's tables in docs/schedules.md, and its learning curves, both from benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curves import Curve, plot, table, write_table

PAGE = "schedules.md"
SPEED = ("step", "trained, whole step", "generated, rollout phase", "speed-up, rollout phase", "speed-up, whole step",
         "tokens a step", "tokens a step, standard deviation", "staleness, mean", "staleness, max",
         "purged rollouts a step", "idle share of generation", "idle share of training")  # fmt: skip
LEARNING = ("accuracy", "accuracy, standard error", "difference", "rollout/staleness_mean", "rollout/staleness_max",
            "mismatch/logprob_diff_mean", "train/grad_norm")  # fmt: skip
GRID = 40  # points of a drawn curve
Figures = dict[str, dict[str, Any]]


def write(folder: Path) -> None:
    """Rewrites both tables from all devices' results, and draws the curves where matplotlib is."""
    texts: dict[str, list[str]] = {"W2": [], "learning": []}
    for path in sorted(folder.glob("c3po-*.json")):
        result = json.loads(path.read_text())
        if path.name.startswith("c3po-curves-"):
            draw(result, path.with_suffix(".png"))
            continue
        for part, columns in (("W2", SPEED), ("learning", LEARNING)):
            if found := _by_schedule(result["rows"], part):
                heading = f"{result['device']}, {result['date']}, `{result['command']}`:"
                texts[part].append(f"{heading}\n\n{_table(found, columns)}")
    for part, name in (("W2", "speed"), ("learning", "learning")):
        if texts[part]:
            write_table(PAGE, name, "\n\n".join(texts[part]))


def _by_schedule(rows: Sequence[dict[str, Any]], part: str) -> dict[str, Figures]:
    """Rows are named "part: schedule: figure"."""
    found: dict[str, Figures] = {}
    for row in rows:
        of, schedule, figure = row["name"].split(": ", 2)
        if of.startswith(part):
            found.setdefault(schedule, {})[figure] = row
    return found


def _table(found: dict[str, Figures], columns: Sequence[str]) -> str:
    units = {name: row["unit"] for figures in found.values() for name, row in figures.items()}
    heads = [f"{name}, {units[name]}" if units.get(name, "1") not in ("1", "times") else name for name in columns]
    lines = [[name, *(_cell(figures.get(column)) for column in columns)] for name, figures in found.items()]
    return table(["", *heads], lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    value = row["value"]
    return "not run" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Held-out accuracy over trained tokens; the synchronous curves are in each panel."""
    titles = {
        "in lockstep": [name for name in curves if "η" not in name],
        "ahead of training": [name for name in curves if "η" in name and "coupled" not in name],
        "ahead of training, coupled": [name for name in curves if "coupled" in name],
    }
    panels = {
        title: {name: _common(curves[name]) for name in dict.fromkeys(["synchronous", *names]) if name in curves}
        for title, names in titles.items()
    }
    plot(path, panels, xlabel="tokens trained", columns=3)


def _common(curves: Sequence[Curve]) -> list[Curve]:
    """Curves at common numbers of tokens, by linear interpolation."""
    last = min(curve[-1][0] for curve in curves)
    return [[(last * i / GRID, _at(curve, last * i / GRID)) for i in range(GRID + 1)] for curve in curves]


def _at(curve: Curve, x: float) -> float:
    before = max((point for point in curve if point[0] <= x), key=lambda point: point[0])
    after = min((point for point in curve if point[0] >= x), key=lambda point: point[0])
    part = (x - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[1] + part * (after[1] - before[1])
