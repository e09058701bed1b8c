"""The schedule study: synchronous, C3PO++ and asynchronous RL side by side; how fast, and how well they learn.

    python benchmarks/schedules.py --part speed --device cuda   W2 on one GPU, runs one after another
    python benchmarks/schedules.py --part speed --device cuda --ranks 2     on two: hybrid against split placement
    python benchmarks/schedules.py --part speed                 its small twin over Ray on two CPU cores
    python benchmarks/schedules.py --part learning --jobs 2     recipes/c3po with each schedule and seed, on CPU cores
    python benchmarks/schedules.py --part floor                 what the schedules' arithmetic allows, simulated
    python benchmarks/schedules.py --part page                  results as tables of docs/schedules.md, and as curves

Runs lie in --out and are kept: what has finished is not run again, and results are written after each schedule.
`--only NAME ...` takes some schedules alone. Learning runs are one thread each, `--jobs` of them at a time, and never
use a GPU; with --device cuda their rows go into that device's file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import record
import schedules_floor
import schedules_page
from record import Row, cpu_name, row, show
from schedules_runs import (
    AHEAD,
    COUPLED,
    CPU,
    GPU,
    LOCKSTEP,
    PATIENT,
    ROOT,
    SYNCHRONOUS,
    Run,
    Schedule,
    learning_curve,
    metrics,
    slug,
    speed_figures,
    start_all,
    write_recipe,
)

ROLLOUT_MARK, STEP_MARK = 2.5, 1.5  # times the synchronous schedule's, on W2
LEARNING_BUDGET, LEARNING_STEPS = 1_900, 100  # Φ: what 256 responses have in the mean; steps that train EQUAL tokens
EQUAL = 175_000  # tokens trained at which accuracies are compared
FOLDER = record.FOLDER
SPLIT, HYBRID = "placement=split runtime=ray", "placement=hybrid runtime=inline"
PLANNED = "as planned"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "learning", "floor", "page"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of a speed run (processes, with --device cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="learning runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a speed run")
    parser.add_argument("--skip", type=int, default=5, help="steps of a speed run before those (synchronous: 1)")
    parser.add_argument("--only", nargs="+", help="names of schedules, as --part floor prints them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "schedules", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    return parser.parse_args()


# --- speed -----------------------------------------------------------------------------------------------------------


def speed_schedules(device: str, ranks: int) -> list[tuple[str, Schedule, str]]:
    """(name, schedule, where it runs). On one GPU lockstep shares the weights, and what runs ahead has half of it."""
    if ranks > 1:
        return list(placed(ranks))
    if device == "cpu":
        return [(s.name, s, SPLIT) for s in (*LOCKSTEP, PATIENT, *AHEAD)]
    synchronous, *others = [(s.name, s, HYBRID) for s in (*LOCKSTEP, PATIENT)]
    ahead = [(s.name, s, SPLIT) for s in AHEAD]
    # What the marks are about comes first: a machine may be there for a short time, and the next run goes on.
    return [synchronous, others[-1], *ahead[:2], *others[:-1], *ahead[2:], ("synchronous, split", SYNCHRONOUS, SPLIT)]


def placed(ranks: int) -> Iterator[tuple[str, Schedule, str]]:
    """The same on several GPUs: all of them hybrid, some for training and the others for generation, and as planned."""
    hybrid = f"placement=hybrid runtime=ray training.ranks={ranks} generation.ranks={ranks}"
    schedules = [SYNCHRONOUS, PATIENT, *AHEAD[:2]]
    yield SYNCHRONOUS.name, SYNCHRONOUS, hybrid
    for trainers in dict.fromkeys((ranks // 2, max(1, ranks // 4))):
        split = f"placement=split runtime=ray training.ranks={trainers} generation.ranks={ranks - trainers}"
        for schedule in reversed(schedules):
            yield f"{schedule.name}, {trainers} + {ranks - trainers}", schedule, split
    yield from ((schedule.name, schedule, hybrid) for schedule in schedules[1:])
    yield from ((f"{s.name}, {PLANNED}", s, "placement=auto runtime=ray") for s in (SYNCHRONOUS, AHEAD[0]))


def speed(args: argparse.Namespace) -> None:
    workload = GPU if args.device == "cuda" else CPU
    recipe = write_recipe(args.out, workload)
    for name, schedule, where in speed_schedules(args.device, args.ranks):
        if args.only and name not in args.only:
            continue
        overrides = [f"recipe={recipe}", *where.split(), *workload.keys(), *schedule.overrides(workload.budget),
                     f"steps={skipped(schedule, args) + args.steps}", "checkpoint.at_end=false"]  # fmt: skip
        threads = 8 if args.device == "cuda" else 1
        start_all([Run(speed_folder(args) / slug(name), overrides, threads)], jobs=1)
        write_results(args, "W2", speed_rows(args))


def speed_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.out / (f"speed-{args.device}" + f"-x{args.ranks}" * (args.ranks > 1))
    return folder


def skipped(schedule: Schedule, args: argparse.Namespace) -> int:
    """Steps until a run is in its stride: windows that carry nothing are so from the second on."""
    return args.skip if schedule.budget else 1


def speed_rows(args: argparse.Namespace) -> list[Row]:
    figures = {}
    of_schedule: dict[Schedule, dict[str, float]] = {}  # trained tokens/s by name
    for name, schedule, _ in speed_schedules(args.device, args.ranks):
        run = Run(speed_folder(args) / slug(name), [])
        if run.finished:
            figures[name] = speed_figures(run.folder, skipped(schedule, args))
            of_schedule.setdefault(schedule, {})[name] = figures[name]["trained"]
    label, rows = "W2" if args.device == "cuda" else "W2's twin", []
    units = {
        "step_seconds": ("step", "s", "lower"),
        "trained": ("trained, whole step", "tokens/s", "higher"),
        "generated": ("generated, rollout phase", "tokens/s", "higher"),
        "useful": ("trained, rollout phase", "tokens/s", "higher"),
        "window_seconds": ("rollout window", "s", "lower"),
        "tokens": ("tokens a step", "tokens", "higher"),
        "tokens_std": ("tokens a step, standard deviation", "tokens", "lower"),
        "staleness_mean": ("staleness, mean", "versions", "lower"),
        "staleness_max": ("staleness, max", "versions", "lower"),
        "purged": ("purged rollouts a step", "rollouts", "lower"),
        "idle_generation": ("idle share of generation", "1", "lower"),
        "idle_training": ("idle share of training", "1", "lower"),
    }
    base = figures.get(SYNCHRONOUS.name)
    for name, found in figures.items():
        rows += [row(f"{label}: {name}: {units[k][0]}", found[k], units[k][1], better=units[k][2]) for k in units]
        if base is not None and name != SYNCHRONOUS.name:
            ratios = (("rollout phase", "useful", ROLLOUT_MARK), ("whole step", "trained", STEP_MARK))
            for what, key, mark in ratios:
                note = "trained tokens a second, over synchronous"
                value = found[key] / base[key]
                rows.append(row(f"{label}: {name}: speed-up, {what}", value, "times", mark=mark, note=note))
    for rates in of_schedule.values():
        for name in (name for name in rates if name.endswith(PLANNED)):
            if by_hand := {other: rate for other, rate in rates.items() if other != name}:
                best = max(by_hand, key=by_hand.__getitem__)
                value, note = rates[name] / by_hand[best], f"trained tokens a second, over those of {best}"
                rows.append(row(f"{label}: {name}: over the best by hand", value, "times", mark=0.95, note=note))
    return rows


# --- learning --------------------------------------------------------------------------------------------------------


def learning(args: argparse.Namespace) -> None:
    out = args.out / "learning"
    common = ["recipe=c3po", "runtime=inline"]
    warm = ["steps=1", "training.lr=1e-12", "evaluation.prompts=1"]  # one step that changes nothing ends the warm-up
    bases = [Run(out / f"base-{seed}", [*common, *warm, f"seed={seed}"]) for seed in args.seeds]
    start_all(bases, args.jobs)
    for base in bases:
        export(base.folder, base.folder / "model")
    schedules = [s for s in (*LOCKSTEP, *AHEAD, *COUPLED) if not args.only or s.name in args.only]
    for first in range(0, len(schedules), max(1, args.jobs // len(args.seeds))):
        part = schedules[first : first + max(1, args.jobs // len(args.seeds))]
        runs = [learning_run(out, schedule, seed) for schedule in part for seed in args.seeds]
        start_all(runs, args.jobs)
        write_results(args, "learning", learning_rows(args))


def learning_run(out: Path, schedule: Schedule, seed: int) -> Run:
    overrides = ["recipe=c3po", "runtime=inline", f"model.path={out / f'base-{seed}' / 'model'}", f"seed={seed}",
                 "training.warmup.steps=0", *schedule.overrides(LEARNING_BUDGET), f"steps={LEARNING_STEPS}",
                 "checkpoint.at_end=false"]  # fmt: skip
    return Run(out / f"{slug(schedule.name)}-{seed}", overrides)


def export(run: Path, model: Path) -> None:
    """A base model's Hugging Face folder."""
    if not model.is_dir():
        command = [sys.executable, "-m", "asystem", "export", str(run), str(model)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def accuracy_at(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    """The mean of the evaluations in the last sixth before so many trained tokens."""
    assert curve[-1][0] >= 0.97 * tokens, f"the run trained {curve[-1][0]} tokens only: raise LEARNING_STEPS"
    return statistics.fmean(accuracy for trained, accuracy in curve if 5 / 6 * tokens <= trained <= tokens)


def curves(args: argparse.Namespace) -> dict[str, list[list[tuple[int, float]]]]:
    """Learning curves by schedule, one a seed, of schedules that have all seeds."""
    found = {}
    for schedule in (*LOCKSTEP, *AHEAD, *COUPLED):
        runs = [learning_run(args.out / "learning", schedule, seed) for seed in args.seeds]
        if all(run.finished for run in runs):
            found[schedule.name] = [learning_curve(run.folder, "sort") for run in runs]
    return found


def learning_rows(args: argparse.Namespace) -> list[Row]:
    finals = {name: [accuracy_at(c, EQUAL) for c in found] for name, found in curves(args).items()}
    rows, base = [], finals.get(SYNCHRONOUS.name)
    note = f"held-out prompts, {EQUAL:,} tokens trained; seeds {' '.join(map(str, args.seeds))}; CPU: {cpu_name()}"
    for schedule in (*LOCKSTEP, *AHEAD, *COUPLED):
        if (found := finals.get(schedule.name)) is None:
            continue
        name = f"learning: {schedule.name}"
        rows.append(row(f"{name}: accuracy", statistics.fmean(found), "1", note=note))
        rows.append(row(f"{name}: accuracy, standard error", standard_error(found), "1", better="lower"))
        runs = [learning_run(args.out / "learning", schedule, seed).folder for seed in args.seeds]
        steps = [step for run in runs for step in metrics(run)[1:]]
        for key, unit in (("rollout/staleness_mean", "versions"), ("rollout/staleness_max", "versions"),
                          ("mismatch/logprob_diff_mean", "nats"), ("train/grad_norm", "1")):  # fmt: skip
            values = [step[key] for step in steps if step.get(key) is not None]
            value = max(values) if key.endswith("max") else statistics.fmean(values)
            rows.append(row(f"{name}: {key}", value, unit, better="lower"))
        if base is not None and schedule != SYNCHRONOUS:
            error = standard_error(base)
            marked = schedule.decoupled and schedule.eta <= 2 and error is not None
            mark = -error if marked and error is not None else None
            what = "accuracy less the synchronous one's" + ("; the mark is its standard error" if marked else "")
            value = statistics.fmean(found) - statistics.fmean(base)
            rows.append(row(f"{name}: difference", value, "1", mark=mark, note=what))
    return rows


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# --- results ---------------------------------------------------------------------------------------------------------


def write_results(args: argparse.Namespace, part: str, found: list[Row]) -> None:
    """`c3po-<device>.json` with these rows in place of the part's old ones, and its curves."""
    record.FOLDER = args.results
    device, name = cpu_name(), "cpu"
    if args.device == "cuda":
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
        name = record.slug(device)
    if args.ranks > 1:
        device, name = f"{args.ranks} x {device}", f"{name}-x{args.ranks}"
    path = args.results / f"c3po-{name}.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    others = [r for r in before if not r["name"].startswith(part)]
    rows = [*others, *found] if part == "learning" else [*found, *others]
    shown = {(r["name"], r["value"]) for r in before}
    show([r for r in found if (r["name"], r["value"]) not in shown])
    record.write("c3po", device, rows, name=name)
    if part == "learning":
        drawn = curves(args)
        (args.results / f"c3po-curves-{name}.json").write_text(json.dumps(drawn, ensure_ascii=False) + "\n")


def main() -> None:
    args = parse()
    args.out = args.out.resolve()
    if args.part == "speed":
        speed(args)
    elif args.part == "learning":
        learning(args)
    elif args.part == "floor":
        schedules_floor.write([*LOCKSTEP, PATIENT])
    if args.results == FOLDER:
        schedules_page.write(args.results)


if __name__ == "__main__":
    main()
