"""What `generation.dtype` and `generation.head_dtype` cost in log-probability, and on a GPU what they bring in speed.

    python benchmarks/precision.py [--device cuda] [--write]

Mismatch: the quickstart's model after its warm-up samples 256 rollouts in float32; each way of computing scores the
same tokens, and differs from float32 by so many nats. Speed (CUDA): tokens/s of Qwen3-0.6B's shape, 128 prompt and 128
new tokens, groups of 8.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import Row, cpu_name, row, show, slug, write
from torch import Tensor

from asystem.compose import load_config
from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.runner import head_logits
from asystem.models import Decoder, PackedAttention, init_weights, quantize, spec_from_config
from asystem.spmd import store
from asystem.types import RolloutRequest, SamplingParams, Trajectory
from asystem.workers import HybridWorker

INT8, FP8, F32, BF16 = torch.int8, torch.float8_e4m3fn, torch.float32, torch.bfloat16
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None, bool]] = {  # compute dtype, 8-bit weights, exact head
    "bfloat16": (BF16, None, False),
    "bfloat16, float32 head": (BF16, None, True),
    "float32, int8 weights": (F32, INT8, False),
    "bfloat16, int8 weights": (BF16, INT8, False),
    "bfloat16, int8 weights, float32 head": (BF16, INT8, True),
    "float32, fp8 weights": (F32, FP8, False),
    "bfloat16, fp8 weights": (BF16, FP8, False),
}


def warmed_up(device: str) -> tuple[Decoder, list[Trajectory]]:
    """The quickstart's model after its supervised warm-up, and rollouts that it sampled."""
    config = load_config(["recipe=quickstart", "tracking=none", f"device={device}", "training.dtype=float32"])
    with tempfile.TemporaryDirectory() as folder:
        worker = HybridWorker(config, Path(folder))
        asyncio.run(worker.setup())
        asyncio.run(worker.warm_up(config.training.warmup.steps))
        asks, trajectories = [RolloutRequest(i, i // 8, i // 8) for i in range(256)], []
        while asks or worker.engine.num_unfinished:
            finished = asyncio.run(worker.decode(asks, None)).finished
            trajectories += [store.get(rollout.ref)[rollout.row] for rollout in finished]
            asks = []
    return worker.engine.model, trajectories


@torch.no_grad()
def scored(model: Decoder, trajectories: list[Trajectory], exact: bool) -> Tensor:
    """Log-probabilities of all sampled tokens, by one forward."""
    device = model.embed.weight.device
    parts = [np.concatenate([t.prompt_tokens, t.tokens]) for t in trajectories]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    tokens = torch.from_numpy(np.concatenate(parts)).long().to(device)
    positions = torch.cat([torch.arange(len(part)) for part in parts]).to(device)
    attend = PackedAttention(torch.from_numpy(starts).int().to(device), max(map(len, parts)))
    rows = np.concatenate(
        [np.arange(s + len(t.prompt_tokens), e) for s, e, t in zip(starts, starts[1:], trajectories, strict=False)]
    )
    sampled = torch.from_numpy(rows).to(device)
    logits = head_logits(model, model(tokens, positions, attend)[sampled - 1], exact).float()
    return logits.log_softmax(-1).gather(1, tokens[sampled][:, None])[:, 0]


def mismatch(device: str) -> list[Row]:
    model, trajectories = warmed_up(device)
    want = scored(model, trajectories, exact=False)
    rows = []
    for name, (dtype, kind, exact) in WAYS.items():
        other = copy.deepcopy(model).to(dtype)
        off = (scored(other if kind is None else quantize(other, kind), trajectories, exact) - want).abs()
        for figure, value in (("mean", off.mean()), ("max", off.max())):
            rows.append(
                row(f"{name}: {figure} difference", float(value), "nats", better="lower", note=f"{len(off)} tokens")
            )
    return rows


def speed() -> list[Row]:
    config = load_config(["recipe=quickstart", "model=qwen3_0_6b", "data.max_prompt_tokens=128"])
    config.model.path = None
    whole = Decoder(spec_from_config(config.model))
    init_weights(whole, seed=0)
    rows = []
    for name, (dtype, kind, exact) in WAYS.items():
        if dtype is F32 or (kind is FP8 and torch.cuda.get_device_capability() < (8, 9)):
            continue
        model = copy.deepcopy(whole).to("cuda", dtype)
        head = "float32" if exact else "auto"
        engine = Engine(
            model if kind is None else quantize(model, kind), GenerationConfig(max_running=256, head_dtype=head),
            stop_ids=[], seed=0, max_length=256,
        )  # fmt: skip
        for batch in (1, 32, 256):
            rows.append(row(f"{name}: batch {batch}", max(rate(engine, batch) for _ in range(4)), "tokens/s"))
        del engine, model
        torch.cuda.empty_cache()
    return rows


def rate(engine: Engine, batch: int) -> float:
    prompts = np.random.default_rng(batch).integers(0, 1000, (batch, 128)).astype(np.int32)
    start = time.perf_counter()
    engine.submit(
        EngineRequest(i, i // 8, 0, prompts[i // 8], SamplingParams(128, ignore_eos=True)) for i in range(batch)
    )
    return engine.decode().generated / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/precision-<device>.json")
    args = parser.parse_args()
    rows = mismatch(args.device) + (speed() if args.device == "cuda" else [])
    show(rows)
    if args.write:
        device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
        print(f"written to {write('precision', device, rows, name=slug(device) if args.device == 'cuda' else 'cpu')}")


if __name__ == "__main__":
    main()
