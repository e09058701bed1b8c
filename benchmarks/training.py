"""Training on one GPU: tokens a second, model FLOPs utilisation and peak memory of W1's training half and of W3.

    python benchmarks/training.py [--only TEXT ...] [--repeats 5] [--write]
    python benchmarks/training.py --device cpu --tiny        the same on a tiny model: does it run?

Random weights, random tokens. W1 is one optimizer step over 256 sequences of 128 prompt and 512 response tokens, W2 one
over 512 whose responses are log-normal, of median 256 and at most 4,096, W3 one over two sequences of 16,384. A step is
forward, backward, clipping and AdamW; the median of the repeats counts, after two steps that warm up. Each case runs in
a process of its own, under its cap of the card's memory if it has one, so that a case that does not fit leaves the
others alone.

MFU = operations that the step needs / seconds / rate of a large bf16 product, measured here. Operations count attention
as causal, nothing that is computed again, and no gradient of frozen matrices (`asystem/training/flops.py`); the
published figures of other trainers count 6 a weight beside LoRA too, which a second row gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from record import Row, cpu_name, row, show, write
from schedules_runs import GPU

from asystem.config import Config, LoraConfig, Recompute, TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.rollout import drawn_length
from asystem.training import TrainEngine, TrainingPlan, supervised_loss
from asystem.training.flops import product_rate, train_flops
from asystem.workers.build import training_environment

GIB = 2**30
PROMPT = 128
SMALL = ModelSpec(
    "qwen3", 151_936, 1024, 3072, 28, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6, qk_norm=True,
    tie_embeddings=True, max_positions=40_960, dtype="bfloat16",
)  # fmt: skip
SHAPES = {
    "0.6B": SMALL,
    "4B": replace(SMALL, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32),
    "tiny": replace(SMALL, vocab_size=211, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
                    num_kv_heads=2, head_dim=16),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`sequences` of `length` tokens, the first `PROMPT` of which are not trained, on a shape.

    Attributes:
        median: of responses, which are then log-normal and make at most `length` tokens; None = all have `length`.
        cap: GiB of the card that the process may use; None = all.
        seconds, mfu, gib: the marks for them.
    """

    name: str
    shape: str
    sequences: int
    length: int
    median: int | None = None
    cap: int | None = None
    micro: int = 16_384
    choices: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    mfu: float | None = None
    gib: float | None = None

    @property
    def title(self) -> str:
        return self.name if self.cap is None else f"{self.name}, {self.cap} GB card"

    def responses(self, seed: int) -> list[int]:
        """Tokens of each sequence that are trained."""
        longest = self.length - PROMPT
        if self.median is None:
            return [longest] * self.sequences
        first = seed * self.sequences
        return [drawn_length(self.median, 1.0, longest, seed=0, rollout=first + i) for i in range(self.sequences)]


LORA, FULL = {"lora": LoraConfig(rank=16)}, {"recompute": Recompute.full}
KEEP = {"keep_logits": True}
W1 = Case("W1 0.6B", "0.6B", 256, 640, choices=KEEP, seconds=1.3, mfu=0.6)
W2 = Case("W2 0.6B", "0.6B", GPU.capacity, PROMPT + GPU.longest, median=GPU.median)
W3 = Case("W3 0.6B", "0.6B", 2, 16_384, choices=FULL, mfu=0.4, gib=12.5)
W3_LORA = replace(W3, name="W3 0.6B LoRA", choices=FULL | LORA, mfu=None, gib=None)
W3_4B = replace(W3, name="W3 4B LoRA", shape="4B", choices=FULL | LORA, mfu=0.45, gib=16.0)
CASES = [
    W1,
    W2,
    W3,
    W3_4B,
    W3_LORA,
    replace(W1, name="W1 0.6B, logits again", choices={}, seconds=None, mfu=None),
    replace(W1, name="W1 0.6B, 8k a micro-batch", micro=8192, cap=24, choices={}, seconds=None, mfu=None),
    replace(W1, name="W1 0.6B, recompute full", cap=16, choices=FULL, seconds=None, mfu=None),
    *(replace(case, cap=cap) for case in (W3, W3_4B, W3_LORA) for cap in (24, 16)),
    replace(W3, name="W3 0.6B, recompute selective", choices={"recompute": Recompute.selective}, mfu=None, gib=None),
    replace(W3, name="W3 0.6B, recompute none", choices={}, mfu=None, gib=None),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", help="cases whose title contains one of these; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short sequences, to see that all runs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/training-<device>.json")
    parser.add_argument("--child", metavar="TITLE", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases_of(args: argparse.Namespace) -> list[Case]:
    cases = CASES
    if args.tiny:
        tiny: dict[str, Any] = {"shape": "tiny", "sequences": 4, "length": PROMPT + 72, "micro": 400}
        cases = [replace(case, **tiny, seconds=None, mfu=None, gib=None) for case in cases]
    return [case for case in cases if args.only is None or any(text in case.title for text in args.only)]


def batch_of(case: Case, seed: int) -> list[PackedBatch]:
    rng, vocab = np.random.default_rng(seed), SHAPES[case.shape].vocab_size
    responses = case.responses(seed)
    weight = 1.0 / sum(responses)
    samples = [Sample(rng.integers(0, vocab, PROMPT), rng.integers(0, vocab, n), weight) for n in responses]
    return pack(samples, case.micro)


def run_case(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """In a process of its own: the seconds of each step, and what it took of the device's memory."""
    spec, cuda = SHAPES[case.shape], device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda and case.cap is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap * GIB / total))
    cfg = TrainingConfig(micro_batch_tokens=case.micro, **case.choices)
    with torch.device("meta"):
        model = Decoder(spec)
    model = model.to(dtype).to_empty(device=device)
    init_weights(model, seed=0)
    engine = TrainEngine(model, cfg, device=device, dtype=dtype, total_steps=1000)
    times, tokens, largest = [], [], 0
    flops: dict[bool, list[float]] = {False: [], True: []}  # by whether frozen weights are left out
    for turn in range(2 + repeats):
        micro = batch_of(case, turn)
        if cuda:
            torch.cuda.synchronize()
            if turn == 1:  # compiling and loading models take memory that training does not
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        engine.step(micro, supervised_loss)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        tokens.append(sum(len(packed.tokens) for packed in micro))
        largest = max(largest, *(len(packed.tokens) for packed in micro))  # packing evens them out
        for frozen, found in flops.items():
            found.append(train_flops(spec, micro, frozen=frozen))
    return {
        "times": times[2:],
        "tokens": tokens[2:],
        "flops": flops[cfg.lora.rank > 0][2:],
        "flops_all": flops[False][2:],
        "planned": TrainingPlan(spec, cfg, dtype=dtype).of(largest).total,
        "largest": largest,
        "reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "allocated": torch.cuda.max_memory_allocated() if cuda else None,
    }


def child(title: str, args: argparse.Namespace) -> dict[str, Any] | str:
    """The result of a case in a process of its own, or why there is none."""
    command = [sys.executable, __file__, "--child", title, "--device", args.device, "--repeats", str(args.repeats)]
    environment = {**os.environ, **training_environment(Config())}
    done = subprocess.run(
        command + ["--tiny"] * args.tiny, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    if "OutOfMemoryError" in done.stderr:
        return "does not fit"
    if "CapacityError: " in done.stderr:
        return done.stderr.strip().splitlines()[-1].partition("CapacityError: ")[2]
    print(done.stderr[-4000:], file=sys.stderr)
    return "failed: " + done.stderr.strip().splitlines()[-1]


def run_child(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    if args.child == "rate":
        result: dict[str, Any] = {"rate": product_rate(device, repeats=20)}
    else:
        args.only = None
        case = next(case for case in cases_of(args) if case.title == args.child)
        result = run_case(case, device, args.repeats)
    print(json.dumps(result))


def rows_of(case: Case, result: dict[str, Any] | str, rate: float) -> list[Row]:
    lengths = str(case.length) if case.median is None else f"at most {case.length}"
    note = f"{case.sequences} x {lengths} tokens, {case.micro} a micro-batch, {describe(case)}"
    if isinstance(result, str):
        return [row(f"{case.title}: rate", None, "tokens/s", note=f"{note}; {result}")]
    seconds = statistics.median(result["times"])
    spread = (max(result["times"]) - min(result["times"])) / seconds
    rows = [
        row(f"{case.title}: step", round(seconds, 4), "s", mark=case.seconds, better="lower",
            note=f"{note}; spread {100 * spread:.1f} %"),
        row(f"{case.title}: rate", round(a_second(result, "tokens"), 1), "tokens/s"),
        row(f"{case.title}: MFU", round(a_second(result, "flops") / rate, 3), "1", mark=case.mfu,
            note=f"{statistics.median(result['flops']) / 1e12:.4g} TFLOP needed, of {rate / 1e12:.4g} TFLOP/s"),
    ]  # fmt: skip
    if result["flops_all"] != result["flops"]:
        counted = round(a_second(result, "flops_all") / rate, 3)
        rows.append(row(f"{case.title}: MFU, frozen weights counted as trained", counted, "1"))
    if result["reserved"] is not None:
        allocated = f"{result['allocated'] / GIB:.2f} GiB of it in tensors, planned {result['planned'] / GIB:.2f}"
        allocated += f" for {result['largest']:,} tokens"
        peak = round(result["reserved"] / GIB, 2)
        rows.append(row(f"{case.title}: peak", peak, "GiB", mark=case.gib, better="lower", note=allocated))
    return rows


def a_second(result: dict[str, Any], what: str) -> float:
    """The median over the steps, which have different lengths in W2."""
    rates = (value / seconds for value, seconds in zip(result[what], result["times"], strict=True))
    return float(statistics.median(rates))


def describe(case: Case) -> str:
    words = [f"{name}={getattr(value, 'name', value)}" for name, value in case.choices.items() if name != "lora"]
    if lora := case.choices.get("lora"):
        words.append(f"LoRA r={lora.rank}")
    return ", ".join([f"{case.shape} shape", *words])


def main() -> None:
    args = parse()
    if args.child:
        return run_child(args)
    measured = child("rate", args)
    if isinstance(measured, str):
        sys.exit(f"the rate of products could not be measured: {measured}")
    rate = measured["rate"]
    rows = [row("bf16 product of 8,192: rate", round(rate / 1e12, 1), "TFLOP/s", note="what MFU is a part of")]
    show(rows)
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    for case in cases_of(args):
        found = rows_of(case, child(case.title, args), rate)
        show(found)
        rows += found
        if args.write:  # after each case: what ends early has shown something
            write("training", device, rows, partial=args.only is not None)


if __name__ == "__main__":
    main()
