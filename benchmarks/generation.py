"""Generation on a GPU: tokens a second of the native engine, and what of the memory bandwidth that is.

    python benchmarks/generation.py [--only NAME ...] [--repeats 3] [--vllm] [--write]

Random weights; every rollout runs to its length limit. W1 is 32 prompts x 8 samples, 128 prompt and 512 new tokens, on
Qwen3-0.6B's shape. The clock runs from the submission of the prompts to the last finished rollout, prefill included;
the median of the repeats counts, after one run that warms up. Cases of W2 are decode steps of rows in the middle of its
responses, whose lengths are log-normal: the median of 32 steps a repeat. `--vllm` runs W1 through vLLM in the same
call, as fast as it can be set (no detokenizing, only the sampled log-probabilities), where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Row, row, show, write
from schedules_runs import GPU as W2

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.sequence import Unfinished
from asystem.models import Decoder, ModelSpec, MoESpec, Shard, init_weights, save_model
from asystem.rollout import drawn_length
from asystem.types import SamplingParams

PROMPT = 128
SMALL = ModelSpec(
    "qwen3", 151_936, 1024, 3072, 28, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6, qk_norm=True,
    tie_embeddings=True, max_positions=40_960, dtype="bfloat16",
)  # fmt: skip
SHAPES = {
    "qwen3-0.6b": SMALL,
    "qwen3-1.7b": replace(SMALL, hidden_size=2048, intermediate_size=6144),
    "qwen3-4b": replace(SMALL, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32),
    "16 experts": replace(SMALL, family="qwen3_moe", moe=MoESpec(num_experts=16, top_k=2, intermediate_size=1536)),
}


@dataclass(frozen=True)
class Case:
    """`prompts` x `group` rollouts of `new` tokens on a shape, with the marks that they should reach."""

    name: str
    shape: str
    prompts: int
    group: int
    new: int
    rate_mark: float | None = None  # tokens/s
    bandwidth_mark: float | None = None  # fraction of the copy bandwidth

    @property
    def batch(self) -> int:
        return self.prompts * self.group


CASES = [
    Case("W1", "qwen3-0.6b", 32, 8, 512, rate_mark=72_000),
    Case("W1 with 2,048 new tokens", "qwen3-0.6b", 32, 8, 2048, bandwidth_mark=0.65),
    Case("0.6B, batch 1", "qwen3-0.6b", 1, 1, 512, bandwidth_mark=0.6),
    Case("0.6B, batch 32", "qwen3-0.6b", 4, 8, 512),
    Case("1.7B, batch 1", "qwen3-1.7b", 1, 1, 512),
    Case("1.7B, batch 32", "qwen3-1.7b", 4, 8, 512),
    Case("1.7B, batch 256", "qwen3-1.7b", 32, 8, 512),
    Case("4B, batch 1", "qwen3-4b", 1, 1, 512),
    Case("4B, batch 32", "qwen3-4b", 4, 8, 512),
    Case("4B, batch 256", "qwen3-4b", 32, 8, 512),
    Case("MoE with 16 experts, batch 1", "16 experts", 1, 1, 512),
    Case("MoE with 16 experts, batch 32", "16 experts", 4, 8, 512),
    Case("MoE with 16 experts, batch 256", "16 experts", 32, 8, 512),
]

IN_FLIGHT = {f"W2, {rows} rows": rows for rows in (512, 256, 64)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm", action="store_true", help="run W1 through vLLM too")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/generation-<device>.json")
    parser.add_argument("--vllm-child", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args()


def step_bytes(case: Case, spec: ModelSpec) -> float:
    """Bytes that a decode step cannot but read, on average over the run: the weights once, and the KV cache with each
    group's prompt once. What it writes is below 1 % of that. Of experts, those that some row chooses, were they equally
    popular."""
    weights = spec.num_parameters * 2
    if (moe := spec.moe) is not None:
        idle = moe.num_experts * (1 - moe.top_k / moe.num_experts) ** case.batch
        weights -= round(idle * 2 * 3 * spec.hidden_size * moe.intermediate_size * len(spec.expert_layers))
    token = kv_bytes(spec)
    full_blocks = PROMPT // 16 * 16
    shared = case.prompts * full_blocks if case.group > 1 else 0
    alone = PROMPT - (full_blocks if case.group > 1 else 0) + case.new / 2
    return weights + token * (shared + case.batch * alone)


def kv_bytes(spec: ModelSpec) -> int:
    """Of a token's keys and values, bf16."""
    return spec.num_layers * 2 * spec.kv_size * 2


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 2 GiB reads and writes: the best of 10."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(2 * source.nbytes / min(times))


def build(spec: ModelSpec, part: Shard | None = None) -> Decoder:
    """A model of random weights, or a rank's part of one."""
    with torch.device("meta"):
        model = Decoder(spec) if part is None else part.decoder(spec)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    init_weights(model, seed=0)
    return model


class Bench:
    """One case on one engine: `run` generates it all and returns its seconds."""

    def __init__(self, case: Case, model: Decoder) -> None:
        self.case = case
        config = GenerationConfig(max_running=case.batch)
        self.engine = Engine(model, config, stop_ids=[], seed=0, max_length=PROMPT + case.new)
        self.steps = 0

    def submit(self, seed: int) -> None:
        case, rng = self.case, np.random.default_rng(seed)
        prompts = rng.integers(0, SMALL.vocab_size, (case.prompts, PROMPT)).astype(np.int32)
        params = SamplingParams(case.new, ignore_eos=True)
        self.engine.submit(
            EngineRequest(i, i // case.group, 0, prompts[i // case.group], params) for i in range(case.batch)
        )

    def run(self, seed: int) -> float:
        start = time.perf_counter()
        self.submit(seed)
        decoded = self.engine.decode()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        assert decoded.generated == self.case.batch * self.case.new, f"{decoded.generated} tokens were generated"
        self.steps = decoded.steps
        return seconds

    def run_with_clocks(self, seed: int) -> tuple[float, float]:
        """Seconds of the prefill, and those of the decode steps in which the host did not wait for the device.

        The clocks themselves make the device wait, so that this run's own time does not count.
        """
        rows, runner = self.engine.rows, self.engine.runner
        prefill, progress, clock = runner.prefill, rows.progress, {"prefill": 0.0, "wait": 0.0}

        def timed(name: str, function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if name == "wait":  # the wait comes first; what follows is a copy of a few bytes
                    start = time.perf_counter()
                    torch.cuda.synchronize()
                    clock[name] += time.perf_counter() - start
                    return function(*args, **kwargs)
                start = time.perf_counter()
                function(*args, **kwargs)
                torch.cuda.synchronize()
                clock[name] += time.perf_counter() - start
                return None

            return call

        runner.prefill, rows.progress = timed("prefill", prefill), timed("wait", progress)  # type: ignore[method-assign]
        try:
            total = self.run(seed)
        finally:
            runner.prefill, rows.progress = prefill, progress  # type: ignore[method-assign]
        return clock["prefill"], total - clock["prefill"] - clock["wait"]


@dataclass(frozen=True)
class Result:
    """Medians over the repeats. rate: tokens/s. step, host: seconds of a decode step, and the host's share of them."""

    rate: float
    spread: float  # (highest - lowest) rate over the median
    step: float
    host: float
    prefill: float


def measure(case: Case, model: Decoder, repeats: int) -> Result:
    bench = Bench(case, model)
    bench.run(0)
    times = [bench.run(1 + turn) for turn in range(repeats)]
    prefill, host = bench.run_with_clocks(1 + repeats)
    seconds, tokens = statistics.median(times), case.batch * case.new
    spread = (max(times) - min(times)) / seconds
    return Result(tokens / seconds, spread, (seconds - prefill) / bench.steps, host / bench.steps, prefill)


def ages(rows: int) -> list[int]:
    """Tokens that rollouts in flight have: of a response as long as likely to be met, a part as likely as any other."""
    draw, found = random.Random(0), list[int]()
    while len(found) < rows:
        length = drawn_length(W2.median, 1.0, W2.longest, seed=0, rollout=draw.randrange(10**9))
        if draw.random() < length / W2.longest:
            found.append(draw.randint(1, length))
    return found


def in_flight(rows: int, model: Decoder, repeats: int, steps: int = 32) -> tuple[float, float]:
    """Seconds of a decode step of such rows, and the bytes that it cannot but read."""
    rng, drawn, prompt = np.random.default_rng(0), ages(rows), W2.prompt_tokens
    new = W2.longest + steps * (repeats + 1)
    config = GenerationConfig(max_running=rows, kv_tokens=sum(drawn) + rows * (prompt + steps * (repeats + 2) + 32))
    engine = Engine(model, config, stop_ids=[], seed=0, max_length=prompt + new)
    prompts = rng.integers(0, SMALL.vocab_size, (rows // W2.samples, prompt)).astype(np.int32)
    params, unfinished = SamplingParams(new, ignore_eos=True), []
    for i, age in enumerate(drawn):
        group = i // W2.samples
        tokens = rng.integers(0, SMALL.vocab_size, age).astype(np.int32)
        request = EngineRequest(i, group, group, prompts[group], params)
        unfinished.append(Unfinished(request, tokens, np.zeros(age, np.float32), np.zeros(age, np.int32)))
    engine.restore(unfinished)
    engine.decode(max_steps=steps)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.decode(max_steps=steps)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps)
    cached = sum(drawn) + rows * (steps * (1 + repeats / 2) + prompt / W2.samples)
    return statistics.median(times), SMALL.num_parameters * 2 + cached * kv_bytes(SMALL)


def in_flight_rows(name: str, found: tuple[float, float] | None, bandwidth: float) -> list[Row]:
    step, moved = (None, 0.0) if found is None else found
    note = f"0.6B, {W2.prompt_tokens} prompt tokens, responses of at most {W2.longest}, of median {W2.median}"
    return [
        row(f"{name}: decode step", step and 1e3 * step, "ms", better="lower", note=note),
        row(f"{name}: fraction of the copy bandwidth", step and moved / step / bandwidth, "1"),
    ]


def memory_over_plan(case: Case, model: Decoder) -> float:
    """Peak of the memory taken from the device in a whole run, over what the engine planned."""
    release()
    torch.cuda.reset_peak_memory_stats()
    bench = Bench(case, model)
    bench.run(0)
    return torch.cuda.max_memory_reserved() / sum(bench.engine.plan().values())


def first_token(case: Case, model: Decoder) -> float:
    """Seconds from this process's start to the first tokens of all rollouts on the host (Linux only)."""
    bench = Bench(case, model)
    bench.submit(0)
    bench.engine.decode(max_steps=bench.engine.runner.run_ahead)
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def vllm_rate(case: Case, folder: str) -> float:
    """Tokens/s of W1 through vLLM, in a process of its own; the better of two runs after one that warms up."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
                   "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, __file__, "--only", case.name, "--vllm-child", folder]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(next(line for line in out.splitlines() if line.startswith("rate ")).removeprefix("rate "))


def vllm_child(case: Case, folder: str) -> None:
    from vllm import LLM  # type: ignore[import-not-found]
    from vllm import SamplingParams as TheirParams

    llm = LLM(
        model=folder, dtype="bfloat16", gpu_memory_utilization=0.6, max_model_len=PROMPT + case.new + 16,
        enable_prefix_caching=True, max_num_seqs=case.batch, disable_log_stats=True, skip_tokenizer_init=True,
    )  # fmt: skip
    params = TheirParams(
        n=case.group, max_tokens=case.new, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False
    )
    best = 0.0
    for turn in range(3):
        rng = np.random.default_rng(turn)
        prompts = [
            {"prompt_token_ids": rng.integers(0, SMALL.vocab_size, PROMPT).tolist()} for _ in range(case.prompts)
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        assert tokens == case.batch * case.new, f"{tokens} tokens were generated"
        best = max(best, tokens / seconds if turn else 0.0)
    print(f"rate {best:.0f}", flush=True)


def rows_of(case: Case, result: Result | None, bandwidth: float) -> list[Row]:
    spec = SHAPES[case.shape]
    moved = step_bytes(case, spec)
    note = f"{case.prompts} prompts x {case.group}, {PROMPT} prompt and {case.new} new tokens, {case.shape} shape, bf16"
    if result is None:
        note += "; not run"

    def of(value: float, digits: int) -> float | None:
        return None if result is None else round(value, digits)

    r = result or Result(*[0.0] * 5)
    fraction = moved / (r.step or 1.0) / bandwidth
    spread = "" if result is None else f"; spread {100 * r.spread:.1f} %, prefill {1e3 * r.prefill:.1f} ms"
    return [
        row(f"{case.name}: rate", of(r.rate, 0), "tokens/s", mark=case.rate_mark, note=note + spread),
        row(f"{case.name}: decode step", of(1e3 * r.step, 3), "ms", better="lower", note="without prefill"),
        row(f"{case.name}: host time a step", of(1e6 * r.host, 1), "us", better="lower", note="not waiting"),
        row(f"{case.name}: bytes a step", round(moved / 1e9, 3), "GB", better="lower",
            note="the least: weights once, a group's prompt once, else all keys and values once; mean over the run"),
        row(f"{case.name}: fraction of the copy bandwidth", of(fraction, 3), "1", mark=case.bandwidth_mark,
            note="bytes a step over the time of a step"),
    ]  # fmt: skip


def start_rows(case: Case, model: Decoder, cold: bool) -> list[Row]:
    """What is measured once: the way to the first token, and memory."""
    cache, mark = ("cold", 40) if cold else ("warm", 15)
    seconds, over = first_token(case, model), memory_over_plan(case, model)
    note = "imports, random weights, compilation, capture"
    name = f"W1: start to first tokens, {cache} kernel cache"
    return [
        row(name, round(seconds, 1), "s", mark=mark, better="lower", note=note),
        row("W1: peak memory over the plan", round(over, 3), "times", mark=1.05, better="lower"),
    ]


def vllm_rows(case: Case, ours: float | None, run: bool) -> list[Row]:
    rate = None
    if run:
        with tempfile.TemporaryDirectory() as folder:
            save_model(build(SHAPES[case.shape]), SHAPES[case.shape], folder + "/model")
            release()
            rate = vllm_rate(case, folder + "/model")
    ratio = None if rate is None or ours is None else round(ours / rate, 2)
    note = "detokenize=False, logprobs=0; the better of two runs in the same call"
    return [
        row("W1 through vLLM: rate", rate, "tokens/s", note=note),
        row("W1: times vLLM", ratio, "times", mark=2.0),
    ]


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    args = parse()
    cases = [case for case in CASES if args.only is None or case.name in args.only]
    if args.vllm_child:
        return vllm_child(cases[0], args.vllm_child)
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    cold, w1 = not any(cache.glob("*")), CASES[0]
    rows = start_rows(w1, build(SHAPES[w1.shape]), cold) if w1 in cases else []
    bandwidth = copy_bandwidth()
    rows.append(row("copy bandwidth", round(bandwidth / 1e12, 3), "TB/s", note="2 GiB, read plus written"))
    show(rows)
    results: dict[str, Result] = {}
    vllm = vllm_rows(w1, None, run=False)
    flying: dict[str, tuple[float, float]] = {}

    def write_all() -> None:  # after each shape: what ends early has shown something
        if args.write:
            found = [line for case in CASES for line in rows_of(case, results.get(case.name), bandwidth)]
            partial, names = args.only is not None, ["triton", "vllm"]
            found += [line for name in IN_FLIGHT for line in in_flight_rows(name, flying.get(name), bandwidth)]
            write("generation", torch.cuda.get_device_name(), rows + found + vllm, packages=names, partial=partial)

    for shape in SHAPES:
        mine = [case for case in cases if case.shape == shape]
        rows_too = [name for name in IN_FLIGHT if SHAPES[shape] is SMALL and (args.only is None or name in args.only)]
        model = build(SHAPES[shape]) if mine or rows_too else None
        for name in rows_too:
            assert model is not None
            flying[name] = in_flight(IN_FLIGHT[name], model, args.repeats)
            show(in_flight_rows(name, flying[name], bandwidth))
            release()
        for case in mine:
            assert model is not None
            results[case.name] = measure(case, model, args.repeats)
            show(rows_of(case, results[case.name], bandwidth))
            release()
        del model
        release()
        write_all()
    vllm = vllm_rows(w1, results["W1"].rate if "W1" in results else None, args.vllm)
    show(vllm)
    write_all()


if __name__ == "__main__":
    main()
