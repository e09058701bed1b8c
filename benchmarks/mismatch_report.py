"""What `mismatch.py` makes of its runs: the rows of the results file, the tables of docs/mismatch.md, the curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from curves import Curve, plot, table, write_table
from record import FOLDER, Row, row, show, slug, write

Run = dict[str, Any]
MARKED = ("int8, η 8", "bfloat16, η 8")  # here uncorrected runs should all collapse, and none with IcePop
PANELS = {
    "held-out accuracy": "accuracy",
    "gradient norm": "grad_norm",
    "mean |log p_train - log p_infer|, nats": "difference_mean",
    "masked fraction": "masked",
}


def values(run: Run, name: str) -> list[float]:
    """Of a curve; a run without it gives none."""
    return [value for _, value in run["curves"].get(name, [])]


def last(numbers: Sequence[float], share: int = 4) -> float:
    """Mean of the last quarter, in which single evaluations of an unsteady run count less."""
    return fmean(numbers[-max(1, len(numbers) // share) :])


def has_collapsed(run: Run) -> bool:
    """Stopped for NaN gradients, or in the last quarter of its evaluations below half of its best."""
    accuracy = values(run, "accuracy")
    return bool(run["stopped"]) or last(accuracy) < max(accuracy) / 2


def line(run: Run) -> str:
    """A run in one line, to be printed as it ends."""
    accuracy, masked = values(run, "accuracy"), values(run, "masked") or [0.0]
    return (
        f"{run['setting']:20} {run['correction']:14} seed {run['seed']}  accuracy {accuracy[0]:.3f} -> "
        f"{last(accuracy):.3f} (best {max(accuracy):.3f})  difference {fmean(values(run, 'difference_mean')):.4f}  "
        f"masked {fmean(masked):.4f}  norm <= {max(values(run, 'grad_norm')):.3g}  {run['seconds']:.0f} s"
        f"{'  NaN' * run['stopped']}{'  COLLAPSED' * has_collapsed(run)}"
    )


def groups(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Runs by setting and correction, by seed."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        found.setdefault(run["setting"], {}).setdefault(run["correction"], []).append(run)
    return found


def mean(runs: Sequence[Run], name: str, of: Callable[[Sequence[float]], float] = fmean) -> float | None:
    """Over runs, of what ``of`` makes of each one's curve; None where none has it."""
    found = [of(numbers) for run in runs if (numbers := values(run, name))]
    return fmean(found) if found else None


def result_rows(setting: str, correction: str, runs: Sequence[Run]) -> list[Row]:
    """Figures of all seeds of one setting and correction."""
    head, seeds = f"{setting}, {correction}", len(runs)
    marks = {"none": float(seeds), "icepop": 0.0} if setting in MARKED else {}
    collapsed, better = sum(map(has_collapsed, runs)), "higher" if marks and correction == "none" else "lower"
    each = ", ".join(f"{last(values(run, 'accuracy')):.3f}" for run in runs)
    rows = [
        row(f"{head}: collapsed runs", collapsed, f"of {seeds}", mark=marks.get(correction), better=better),
        row(f"{head}: accuracy, last quarter", mean(runs, "accuracy", last), "share", note=f"seeds: {each}"),
    ]
    for label, name, unit, of in (
        ("best accuracy", "accuracy", "share", max),
        ("reward, last quarter", "reward", "share", last),
        ("gradient norm, mean", "grad_norm", "1", fmean),
        ("gradient norm, largest", "grad_norm", "1", max),
        ("log-prob difference, mean", "difference_mean", "nats", fmean),
        ("log-prob difference, largest", "difference_max", "nats", max),
        ("p_train / p_infer, percentile 1", "ratio_p01", "1", fmean),
        ("p_train / p_infer, percentile 99", "ratio_p99", "1", fmean),
        ("masked fraction", "masked", "share", fmean),
        ("entropy of masked tokens", "masked_entropy", "nats", fmean),
        ("entropy of all tokens", "entropy", "nats", fmean),
        ("experts replaced", "replaced", "share", fmean),
        ("staleness, mean", "staleness", "versions", fmean),
    ):
        if (value := mean(runs, name, of)) is not None:
            better = "higher" if name in ("accuracy", "reward", "ratio_p01") else "lower"
            rows.append(row(f"{head}: {label}", value, unit, better=better))
    return rows


def setting_table(corrections: dict[str, list[Run]]) -> str:
    """One setting's corrections side by side, means over seeds."""
    header = ["correction", "collapsed", "accuracy, each seed", "mean", "reward", "gradient norm: mean, largest",
              "difference, nats: mean, largest", "masked", "entropy: masked, all"]  # fmt: skip
    return table(header, [[name, *_cells(runs)] for name, runs in corrections.items()])


def _cells(runs: Sequence[Run]) -> list[str]:
    accuracy = [last(values(run, "accuracy")) for run in runs]
    masked, masked_entropy = mean(runs, "masked"), mean(runs, "masked_entropy")
    return [
        f"{sum(map(has_collapsed, runs))} of {len(runs)}",
        " ".join(f"{value:.2f}" for value in accuracy),
        f"**{fmean(accuracy):.3f}**",
        f"{mean(runs, 'reward', last):.3f}",
        f"{mean(runs, 'grad_norm'):.2g}, {max(max(values(run, 'grad_norm')) for run in runs):.3g}",
        f"{mean(runs, 'difference_mean'):.3f}, {max(max(values(run, 'difference_max')) for run in runs):.1f}",
        "" if masked is None else f"{100 * masked:.2f} %",
        f"{'' if masked_entropy is None else f'{masked_entropy:.2f}, '}{mean(runs, 'entropy'):.2f}",
    ]


def report(runs: Sequence[Run], device: str, name: str, order: Sequence[str]) -> None:
    """Writes benchmarks/results/icepop-NAME.json, a figure a setting beside it, and the page's tables.

    Args:
        device: the hardware, in words.
        order: of corrections.
    """
    rows: list[Row] = []
    for setting, found in groups(runs).items():
        corrections = {each: found[each] for each in order if each in found}
        for correction, members in corrections.items():
            rows += result_rows(setting, correction, members)
        plot(
            FOLDER / f"icepop-{name}-{slug(setting.replace('η', 'staleness'))}.png",
            _panels(corrections),
            xlabel="step",
            logarithmic=list(PANELS)[1:3],
        )
        write_table("mismatch.md", f"{name}: {setting}", setting_table(corrections))
    show(rows)
    print(f"written to {write('icepop', device, rows, name=name)}")


def _panels(corrections: dict[str, list[Run]]) -> dict[str, dict[str, list[Curve]]]:
    return {
        title: {
            name: [run["curves"][key] for run in runs if key in run["curves"]] for name, runs in corrections.items()
        }
        for title, key in PANELS.items()
    }


def read(out: Path) -> list[Run]:
    """The runs that stand in a folder's runs.jsonl."""
    file = out / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
