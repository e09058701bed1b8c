"""A whole GRPO step of a 1 M-parameter model on a CPU: asystem against TRL, one after the other, several times over.

    python benchmarks/cpu_step.py [--steps 12] [--turns 3] [--threads 2] [--trl-python PATH --trl-script PATH] [--write]

Both train 4 layers of 128 (vocabulary 259, random weights) on one-digit sums: 4 prompts x 8 completions of at most 32
tokens a step, temperature 1, one AdamW update at 1e-3, float32. Ours is `asystem train` in one process, in lockstep.
TRL runs in a Python of its own that has it, through a script that prints one JSON line with `median_step_s`,
`median_tok_per_s_whole_step` and `median_gen_tok_per_s`; without one its figures stay null. The median step of a turn
counts, without its first steps, and the median of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import Row, cpu_name, row, show, write

MARK = 2.0  # times TRL's rate

TASK = """
import random, re

def _rows(seed, count):
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    return [{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in pairs]

def train():
    return _rows(0, 512)

def reward(row, response):
    match = re.match(r"\\s*(\\d+)", response)
    digits = sum(c.isdigit() for c in response) / max(1, len(response))
    return float(bool(match) and match.group(1) == row["answer"]) + 0.5 * digits
"""

RECIPE = {
    "data": {"task": "task.py", "name": "sums", "max_prompt_tokens": 16},
    "model": {"vocab_size": 259, "hidden_size": 128, "intermediate_size": 512, "num_layers": 4, "num_heads": 4,
              "num_kv_heads": 2, "head_dim": 32, "tie_embeddings": True},
    "algorithm": {"group_size": 8, "correction": "none", "normalizer": "token"},
    "rollout": {"capacity": 32, "token_budget": None, "max_staleness": 0, "max_new_tokens": 32, "slice_steps": 32},
    "training": {"lr": 1e-3, "weight_decay": 0.0},
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-python", help="a Python with torch, transformers and TRL")
    parser.add_argument("--trl-script", help="a GRPO script for the same shape, see above")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cpu-step-<device>.json")
    return parser.parse_args()


def ours(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run of `asystem train`: medians over its steps but the first."""
    recipe = folder / "sums"
    recipe.mkdir(exist_ok=True)
    (recipe / "task.py").write_text(TASK)
    (recipe / "config.yaml").write_text(json.dumps(RECIPE))
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", "asystem", "train", f"recipe={recipe}", "runtime=inline", "tracking=none",
               f"steps={args.steps}", f"run_dir={run}", f"runtime.threads_per_rank={args.threads}"]  # fmt: skip
    subprocess.run(command, env=environment(args), stdout=subprocess.DEVNULL, check=True)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
    seconds, tokens = [s["time/step"] for s in steps], [s["rollout/tokens"] for s in steps]
    decoding = [s["time/generators_decode"] for s in steps]
    return {
        "step": statistics.median(seconds),
        "rate": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "generation": statistics.median(n / s for n, s in zip(tokens, decoding, strict=True)),
    }


def theirs(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run of the TRL script."""
    command = [args.trl_python, args.trl_script, "--steps", str(args.steps), "--threads", str(args.threads)]
    done = subprocess.run(command, env=environment(args), cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    printed = json.loads(done.stdout.strip().splitlines()[-1])
    names = {"step": "median_step_s", "rate": "median_tok_per_s_whole_step", "generation": "median_gen_tok_per_s"}
    return {name: float(printed[key]) for name, key in names.items()} | {"trl": printed["trl"]}


def environment(args: argparse.Namespace) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}


def median(turns: list[dict[str, float]], name: str) -> float | None:
    return statistics.median(turn[name] for turn in turns) if turns else None


def rows_of(mine: list[dict[str, float]], trl: list[dict[str, float]]) -> list[Row]:
    rows = []
    note = f"median of {len(mine)} turns"
    labels = {"rate": ("whole step", "tokens/s", "higher"), "generation": ("generation alone", "tokens/s", "higher"),
              "step": ("whole step", "s", "lower")}  # fmt: skip
    for name, (label, unit, better) in labels.items():
        a, b = median(mine, name), median(trl, name)
        assert a is not None
        rows.append(row(f"asystem: {label}", a, unit, better=better, note=note))
        rows.append(row(f"TRL: {label}", b, unit, better=better, note=note))
        if name != "step":
            ratio = None if b is None else a / b
            over = "generated tokens a second, asystem over TRL"
            rows.append(row(f"ratio: {label}", ratio, "times", mark=MARK, note=over))
    return rows


def main() -> None:
    args = parse()
    mine: list[dict[str, float]] = []
    trl: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(args.turns):
            if args.trl_python and args.trl_script:
                trl.append(theirs(args, Path(name)))
            mine.append(ours(args, Path(name)))
    rows = rows_of(mine, trl)
    show(rows)
    if args.write:
        version = {"trl": str(trl[0]["trl"])} if trl else {}
        print(f"written to {write('cpu-step', f'{cpu_name()}, {args.threads} threads', rows, versions=version)}")


if __name__ == "__main__":
    main()
