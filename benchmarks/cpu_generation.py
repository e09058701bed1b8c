"""Decoding on a CPU: the native engine against transformers' `generate`, one model, one batch.

    python benchmarks/cpu_generation.py [--threads 2] [--batch 64] [--repeats 5] [--write]

Both draw from the whole distribution at temperature 1, to a fixed length; the engine keeps the log-probability of each
token, `generate` does not. The runs alternate, so that a busy machine slows both; the best of each counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from record import Row, cpu_name, row, show, write

from asystem.config import GenerationConfig, ModelConfig
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder, init_weights, save_model, spec_from_config
from asystem.types import SamplingParams

MARK = 3.0  # times transformers' rate
PROMPT = 24


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="samples of one prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cpu-generation-<device>.json")
    return parser.parse_args()


def native(model: Decoder, prompts: np.ndarray, args: argparse.Namespace) -> Callable[[], int]:
    """A function that generates once and returns the number of tokens."""
    config = GenerationConfig(max_running=args.batch)
    engine = Engine(model, config, stop_ids=[], seed=0, max_length=PROMPT + args.new_tokens)
    params = SamplingParams(args.new_tokens, ignore_eos=True)

    def generate() -> int:
        engine.submit(EngineRequest(i, i // args.group, 0, tokens, params) for i, tokens in enumerate(prompts))
        return engine.decode().generated

    return generate


def reference(model: Decoder, prompts: np.ndarray, args: argparse.Namespace) -> Callable[[], int]:
    """The same through transformers, from the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, model.spec, folder)
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(prompts).long()
    mask = torch.ones_like(tokens)

    def generate() -> int:
        with torch.inference_mode():
            out = theirs.generate(
                tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
                pad_token_id=0, min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens,
            )  # fmt: skip
        return int(out[:, PROMPT:].numel())

    return generate


def measure(runs: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Tokens a second of each, the best of `repeats` after one warm-up."""
    rates = dict.fromkeys(runs, 0.0)
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            rate = run() / (time.perf_counter() - start)
            if turn:
                rates[name] = max(rates[name], rate)
    return rates


def rows_of(rates: dict[str, float], args: argparse.Namespace) -> list[Row]:
    note = f"batch {args.batch}, {PROMPT} prompt and {args.new_tokens} new tokens, 4 layers of 128, vocabulary 259"
    ratio = rates["asystem"] / rates["transformers"]
    return [
        row("asystem", rates["asystem"], "tokens/s", note=note),
        row("transformers generate", rates["transformers"], "tokens/s", note=note),
        row("ratio", ratio, "times", mark=MARK, note=note),
    ]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    model = Decoder(spec_from_config(ModelConfig()))
    init_weights(model, seed=0)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.spec.vocab_size, (args.batch // args.group, PROMPT)).repeat(args.group, axis=0)
    runs = {"asystem": native(model, prompts, args), "transformers": reference(model, prompts, args)}
    rates = measure(runs, args.repeats)
    rows = rows_of(rates, args)
    show(rows)
    if args.write:
        device = f"{cpu_name()}, {args.threads} threads"
        print(f"written to {write('cpu-generation', device, rows, packages=['transformers'])}")


if __name__ == "__main__":
    main()
