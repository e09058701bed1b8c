"""Training over several GPUs of one host: is it the training of one, and how much faster?

    python benchmarks/ranks.py [--ranks 2] [--only TEXT ...] [--write]
    python benchmarks/ranks.py --device cpu --tiny           the same on gloo ranks and tiny models: does it run?

W1's sequences (128 prompt, 512 response tokens), 128 of them a step, random weights and tokens, AdamW. Each case trains
five steps over the same batch from the same weights: with one GPU, sharded (FSDP2), with every layer shared (tensor
parallel), with the experts spread (expert parallel). Losses are compared with one GPU's; they differ by what bfloat16
rounds otherwise. The rate is that of the fastest of the last three steps, over all ranks; efficiency is the rate over
that of one GPU times the ranks. The batch is the same, so each rank has the less to do the more there are.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from local_ranks import run_ranks
from record import Row, cpu_name, row, show, slug, write

from asystem.config import TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.models import Decoder, ModelSpec, MoESpec, init_weights
from asystem.stats import Stats
from asystem.training import TrainEngine, supervised_loss

GIB, STEPS, TIMED = 2**30, 5, 3
DENSE = ModelSpec(
    "qwen3", 151_936, 1024, 3072, 28, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6, qk_norm=True,
    tie_embeddings=True, max_positions=40_960,
)  # fmt: skip
TINY = {"vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16}  # fmt: skip
EXPERTS = replace(DENSE, family="qwen3_moe", num_layers=16, moe=MoESpec(16, 4, 768))
SHAPES = {"0.6B": DENSE, "16 experts": EXPERTS}


@dataclass(frozen=True)
class Case:
    """A way to train a shape; ``key`` is the option that takes all ranks, None = FSDP2 alone.

    Attributes:
        zero: `training.zero`.
        mark: efficiency aimed at.
    """

    shape: str
    name: str
    alone: bool = False
    key: str | None = None
    zero: str = "auto"
    mark: float | None = None

    @property
    def title(self) -> str:
        return f"{self.shape}, {self.name}"


CASES = [
    Case("0.6B", "one", alone=True),
    Case("0.6B", "FSDP", mark=0.9),
    Case("0.6B", "FSDP, zero=3", zero="3"),
    Case("0.6B", "tensor", key="tensor_parallel", mark=0.75),
    Case("16 experts", "one", alone=True),
    Case("16 experts", "FSDP", mark=0.9),
    Case("16 experts", "experts spread", key="expert_parallel", mark=0.8),
]


@dataclass(frozen=True)
class Found:
    """Of one case: losses and norms of each step, seconds of the timed ones, bytes at the peak on the first rank."""

    losses: list[float]
    norms: list[float]
    seconds: list[float]
    peak: int | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="cases whose title contains one of these, and those of one GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short sequences, to see that all runs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ranks-<device>-x<ranks>.json")
    return parser.parse_args()


def chosen(only: list[str] | None) -> list[Case]:
    """The cases asked for, and those of one GPU that they are compared with."""
    wanted = [case for case in CASES if only is None or any(text in case.title for text in only)]
    shapes = {case.shape for case in wanted}
    return [case for case in CASES if case in wanted or (case.alone and case.shape in shapes)]


def batch_of(args: argparse.Namespace, spec: ModelSpec, rank: int, ranks: int) -> list[PackedBatch]:
    """The rows of one of the ranks that have rows of their own."""
    count, prompt, trained, micro = (8, 16, 24, 120) if args.tiny else (128, 128, 512, 16_384)
    rng, weight = np.random.default_rng(0), 1.0 / (count * trained)
    tokens = rng.integers(0, spec.vocab_size, (count, prompt + trained))
    samples = [Sample(line[:prompt], line[prompt:], weight) for line in tokens[rank::ranks]]
    return pack(samples, micro)


def run_case(args: argparse.Namespace, case: Case, device: torch.device) -> Found:
    cuda = device.type == "cuda"
    spec = SHAPES[case.shape]
    if args.tiny:
        spec = replace(spec, **TINY, moe=spec.moe and replace(spec.moe, intermediate_size=32))
    with torch.device("meta"):
        model = Decoder(spec)
    model = model.to_empty(device=device)
    init_weights(model, seed=0)
    cfg = TrainingConfig(lr=1e-4, micro_batch_tokens=16_384, zero=case.zero)
    if case.key is not None:
        setattr(cfg, case.key, args.ranks)
    dtype, world = torch.bfloat16 if cuda else torch.float32, 1 if case.alone else args.ranks
    engine = TrainEngine(model, cfg, device=device, dtype=dtype, world_size=world, total_steps=1000)
    del model
    losses, norms, seconds = [], [], []
    micro = batch_of(args, spec, engine.ranks.data_rank, engine.ranks.data)
    for step in range(STEPS):
        if cuda and step == STEPS - TIMED:  # compiling takes memory that training does not
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        wait(cuda)
        start = time.perf_counter()
        stats = engine.step(micro, supervised_loss)
        wait(cuda)
        seconds.append(time.perf_counter() - start)
        loss, norm = summed(stats, engine)
        losses.append(loss)
        norms.append(norm)
    return Found(losses, norms, seconds[-TIMED:], torch.cuda.max_memory_allocated() if cuda else None)


def wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
    dist.barrier()


def summed(stats: Stats, engine: TrainEngine) -> tuple[float, float]:
    """The batch's loss and its gradient's norm, of all ranks."""
    part = stats.to_dict() if engine.ranks.is_first else {}
    parts: list[Any] = [part]
    if engine.world_size > 1:
        parts = [None] * engine.world_size
        dist.all_gather_object(parts, stats if engine.ranks.is_first else None)
        part = sum((each for each in parts[1:] if each is not None), start=parts[0]).to_dict()
    return part["train/loss"], part["train/grad_norm"]


def rows_of(args: argparse.Namespace, case: Case, found: Found, one: Found | None) -> list[Row]:
    count = 8 * 40 if args.tiny else 128 * 640
    rate, ranks = count / min(found.seconds), 1 if case.alone else args.ranks
    rows = [row(f"{case.title}: rate", rate, "tokens/s", note=f"{ranks} rank(s), {count} tokens a step")]
    if found.peak is not None:
        rows.append(row(f"{case.title}: peak a rank", found.peak / GIB, "GiB", better="lower"))
    if case.alone or one is None:
        return rows
    worst = max(abs(a - b) for a, b in zip(found.losses, one.losses, strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(found.norms, one.norms, strict=True))
    bound = 1e-4 if args.device == "cpu" else 2e-2
    losses = f"{STEPS} steps, losses {found.losses[0]:.4f} -> {found.losses[-1]:.4f}, one {one.losses[-1]:.4f}"
    return [
        *rows,
        row(f"{case.title}: efficiency", rate * min(one.seconds) / count / ranks, "1", mark=case.mark),
        row(f"{case.title}: loss, most off one's", worst, "nats", mark=bound, better="lower", note=losses),
        row(f"{case.title}: gradient norm, most off one's", norm, "1", mark=5 * bound, better="lower"),
    ]


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    """All cases, one after another, on each rank; the first one tells."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks) if args.device == "cpu" else 1)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks, timeout=timedelta(seconds=300),
    )  # fmt: skip
    ones: dict[str, Found] = {}
    rows: list[Row] = []
    for case in chosen(args.only):
        found = run_case(args, case, device)
        if case.alone:
            ones[case.shape] = found
        told = rows_of(args, case, found, ones.get(case.shape))
        rows += told
        if rank == 0:
            show(told)
        if rank == 0 and args.write:  # after each case: what ends early has shown something
            name = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
            write(
                "ranks",
                f"{args.ranks} x {name}",
                rows,
                name=f"{slug(name)}-x{args.ranks}",
                partial=args.only is not None,
            )
        torch.compiler.reset()  # each case has graphs of its own, of which torch keeps eight
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def main() -> None:
    args = parse()
    run_ranks(work, args, device=args.device)


if __name__ == "__main__":
    main()
