"""Corrections of the mismatch between training and generation, on a small mixture of experts: which runs collapse?

    python benchmarks/mismatch.py --out runs/mismatch [--settings "int8, η 8"] [--corrections none icepop]
        [--seeds 0 1 2] [--steps 150] [--jobs 2] [--device cpu] [--write]

For each seed a model learns to sort from a careless teacher (`asystem sft recipe=icepop_moe/sft`); each run goes on
from it by RL (`recipe=icepop_moe`) under one setting and one correction, in a process of one thread. A run that is
done stands in OUT/runs.jsonl, a line each with its curves, and is not run again. `--write` makes the results file, the
curves and the tables of docs/mismatch.md of what stands there.

A run has collapsed if it was stopped for NaN gradients, or if its accuracy on held-out prompts in the last quarter of
its evaluations is below half of the best that it had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from mismatch_report import Run, line, read, report
from record import cpu_name, slug

SETTINGS = {
    "int8, η 8": ["generation.dtype=int8", "rollout.max_staleness=8"],
    "float32, η 8": ["generation.dtype=float32", "rollout.max_staleness=8"],
    "fp8, η 0": ["generation.dtype=fp8", "rollout.max_staleness=0"],
    "bfloat16, η 8": ["generation.dtype=bfloat16", "training.dtype=float32", "rollout.max_staleness=8"],
    "bfloat16, η 0": ["generation.dtype=bfloat16", "training.dtype=float32", "rollout.max_staleness=0"],
}
"""Overrides of the recipe: what generation computes in, and how many versions old its weights may be."""

DEVICES = {"cpu": ["int8, η 8", "float32, η 8", "fp8, η 0"], "cuda": ["bfloat16, η 8", "bfloat16, η 0"]}
"""The settings of each device's study; bfloat16 products have no fast path on most CPUs."""

REPLAY = ["algorithm.routing_replay=true", "generation.return_routing=true"]
CORRECTIONS: dict[str, list[str]] = {
    "none": ["algorithm.correction=none"],
    "tis": ["algorithm.correction=tis"],
    "icepop": ["algorithm.correction=icepop"],
    "icepop 0.5-2": ["algorithm.correction=icepop", "algorithm.icepop_beta=2"],
    "kpop": ["algorithm.correction=kpop"],
    "replay": ["algorithm.correction=none", *REPLAY],
    "icepop, replay": ["algorithm.correction=icepop", *REPLAY],
}

CURVES = {
    "accuracy": "eval/sort/accuracy",
    "reward": "reward/mean",
    "grad_norm": "train/grad_norm",
    "difference_mean": "mismatch/logprob_diff_mean",
    "difference_max": "mismatch/logprob_diff_max",
    "kl": "mismatch/kl_mean",
    "ratio_p01": "mismatch/ratio_p01",
    "ratio_p99": "mismatch/ratio_p99",
    "entropy": "train/entropy",
    "staleness": "rollout/staleness_mean",
    "clipped": "train/clip_fraction",
    "masked": "{correction}/masked_fraction",
    "masked_entropy": "{correction}/masked_entropy",
    "replaced": "routing/replaced_fraction",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/mismatch"))
    parser.add_argument("--settings", nargs="+", help="names, or NAME:key=value,key=value; default: the device's")
    parser.add_argument("--corrections", nargs="+", default=list(CORRECTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", action="store_true", help="the results file, the curves and the page's tables")
    args = parser.parse_args()
    args.settings = args.settings or DEVICES[args.device]
    return args


def overrides_of(setting: str) -> tuple[str, list[str]]:
    """A setting's name and overrides; unnamed ones are written NAME:key=value,key=value."""
    name, _, given = setting.partition(":")
    return name, SETTINGS.get(name, []) + [each for each in given.split(",") if each]


def asystem(command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command_line = [sys.executable, "-m", "asystem", command, *overrides, "tracking=none", "tracking.console=false"]
    command_line += ["training.compile=never"]  # it takes longer than such a run
    return subprocess.run(command_line, capture_output=True, text=True, env=environment, check=False)


def sft(out: Path, seed: int, device: str) -> None:
    """The model that the runs of a seed start from: OUT/sft-SEED/model."""
    folder = out / f"sft-{seed}"
    if (folder / "model" / "config.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    ended = asystem("sft", "recipe=icepop_moe/sft", f"seed={seed}", f"device={device}", f"run_dir={folder}")
    if ended.returncode:
        raise SystemExit(f"sft of seed {seed} failed: {ended.stderr[-2000:]}")


def train(out: Path, head: Run) -> Run:
    """One run; what it says of itself is read, and its folder removed.

    Raises:
        SystemExit: it failed otherwise than by NaN gradients.
    """
    folder = out / slug(f"run {head['setting']} {head['correction']} {head['seed']}".replace("η", "staleness"))
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    ended = asystem(
        "train", "recipe=icepop_moe", f"model.path={out}/sft-{head['seed']}/model", f"seed={head['seed']}",
        f"steps={head['steps']}", f"device={head['device']}", f"run_dir={folder}", "tracking.rollouts=false",
        "tracking.timeline=false", "tracking.report=false", *head["overrides"], *CORRECTIONS[head["correction"]],
    )  # fmt: skip
    stopped = ended.returncode != 0
    if stopped and "NaN or infinite gradient" not in ended.stderr:
        raise SystemExit(f"{folder.name} failed: {ended.stderr.strip()[-2000:]}")
    found = curves((folder / "metrics.jsonl").read_text().splitlines())
    shutil.rmtree(folder, ignore_errors=True)
    return head | {"seconds": round(time.perf_counter() - started, 1), "stopped": stopped, "curves": found}


def curves(lines: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """By name, the steps at which a metric was told and its values, of four digits."""
    found: dict[str, list[tuple[int, float]]] = {}
    for metrics in map(json.loads, lines):
        for name, key in CURVES.items():
            keys = [key.format(correction=correction) for correction in ("icepop", "kpop")]
            value = next((metrics[each] for each in keys if metrics.get(each) is not None), None)
            if value is not None:
                found.setdefault(name, []).append((metrics["step"], float(f"{value:.4g}")))
    return found


def asked(args: argparse.Namespace) -> list[Run]:
    """What tells each run that the command line asks for from others."""
    runs = []
    for seed, setting, correction in itertools.product(args.seeds, args.settings, args.corrections):
        name, overrides = overrides_of(setting)
        head: Run = {"setting": name, "overrides": overrides, "correction": correction, "seed": seed}
        runs.append(head | {"steps": args.steps, "device": args.device})
    return runs


def done(args: argparse.Namespace) -> list[Run]:
    """Those of the runs asked for that stand in OUT/runs.jsonl."""
    wanted = asked(args)
    return [run for run in read(args.out) if {key: run[key] for key in wanted[0]} in wanted]


def run_all(args: argparse.Namespace) -> None:
    """Runs what does not stand in OUT/runs.jsonl yet, and appends each as it ends."""
    args.out.mkdir(parents=True, exist_ok=True)
    lock, wanted = threading.Lock(), asked(args)
    known = [{key: run[key] for key in wanted[0]} for run in done(args)]

    def one(head: Run) -> None:
        run = train(args.out, head)
        with lock, (args.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(run) + "\n")
            print(line(run), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: sft(args.out, seed, args.device), args.seeds))
        for future in [pool.submit(one, head) for head in wanted if head not in known]:
            future.result()


def main() -> None:
    args = parse()
    run_all(args)
    if args.write:
        device = cpu_name() if args.device == "cpu" else torch.cuda.get_device_name()
        report(done(args), f"{device}, {args.jobs} runs at a time", args.device, list(CORRECTIONS))


if __name__ == "__main__":
    main()
