"""Tables of docs/schedules.md from results, between `<!-- table NAME -->` and `<!-- end -->`; curves as PNG."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "schedules.md"

SPEED = ("step", "trained, whole step", "generated, rollout phase", "speed-up, rollout phase", "speed-up, whole step",
         "tokens a step", "tokens a step, standard deviation", "staleness, mean", "staleness, max",
         "purged rollouts a step", "idle share of generation", "idle share of training")  # fmt: skip
LEARNING = ("accuracy", "accuracy, standard error", "difference", "rollout/staleness_mean", "rollout/staleness_max",
            "mismatch/logprob_diff_mean", "train/grad_norm")  # fmt: skip


def replace(name: str, lines: Sequence[str]) -> None:
    """Puts lines between the page's markers of that name."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert pattern.search(text), f"{PAGE} has no table {name}"
    PAGE.write_text(pattern.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text), encoding="utf-8")


def write(folder: Path) -> None:
    """Rewrites all tables whose results are there, and draws the curves where matplotlib is."""
    speed, learning = [], []
    for path in sorted(folder.glob("c3po-*.json")):
        result = json.loads(path.read_text())
        if not isinstance(result.get("rows"), list):
            continue
        of = _by_schedule(result["rows"])
        heading = [f"{result['device']}, {result['date']}, `{result['command']}`:", ""]
        if rows := {k[1]: v for k, v in of.items() if k[0].startswith("W2")}:
            speed += [*heading, *_table(rows, SPEED), ""]
        if rows := {k[1]: v for k, v in of.items() if k[0] == "learning"}:
            learning += [*heading, *_table(rows, LEARNING), ""]
    for name, lines in (("speed", speed), ("learning", learning)):
        if lines:
            replace(name, lines[:-1])
    for path in sorted(folder.glob("c3po-curves-*.json")):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))


def _by_schedule(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        part, schedule, figure = row["name"].split(": ", 2)
        found.setdefault((part, schedule), {})[figure] = row
    return found


def _table(rows: dict[str, dict[str, dict[str, Any]]], figures: Sequence[str]) -> list[str]:
    """A column a figure, a row a schedule."""
    units = {name: row["unit"] for found in rows.values() for name, row in found.items()}
    heads = [f"{name}, {units[name]}" if units.get(name, "1") not in ("1", "times") else name for name in figures]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(figures)}"]
    for name, found in rows.items():
        cells = [_cell(found[figure]["value"]) if figure in found else "" for figure in figures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | None) -> str:
    if value is None:
        return "not run"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Held-out accuracy over trained tokens: the mean of the seeds, and their range."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        print(f"{path.name} is not drawn: matplotlib is not installed")
        return
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, constrained_layout=True)
    parts = (
        ("in lockstep", [n for n in curves if "η" not in n]),
        ("ahead of training, decoupled", [n for n in curves if "η" in n and "coupled" not in n]),
        ("ahead of training, coupled", [n for n in curves if "coupled" in n]),
    )
    for axes, (title, names) in zip(panels, parts, strict=True):
        for name in dict.fromkeys([*(n for n in curves if n == "synchronous"), *names]):
            grid, lines = _common(curves[name])
            means = [statistics.fmean(values) for values in zip(*lines, strict=True)]
            (line,) = axes.plot(grid, means, label=name, color="black" if name == "synchronous" else None)
            low, high = ([pick(values) for values in zip(*lines, strict=True)] for pick in (min, max))
            axes.fill_between(grid, low, high, alpha=0.12, color=line.get_color())
        axes.set(title=title, xlabel="tokens trained")
        axes.legend(loc="lower right")
    panels[0].set_ylabel("held-out accuracy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _common(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[list[float]]]:
    """Curves at common numbers of tokens, by linear interpolation."""
    last = min(curve[-1][0] for curve in curves)
    grid = [last * i // 40 for i in range(41)]
    return grid, [[_at(curve, tokens) for tokens in grid] for curve in curves]


def _at(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    before = max((point for point in curve if point[0] <= tokens), key=lambda point: point[0])
    after = min((point for point in curve if point[0] >= tokens), key=lambda point: point[0])
    part = (tokens - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[1] + part * (after[1] - before[1])
