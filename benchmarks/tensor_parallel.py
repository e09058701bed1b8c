"""Generation by replicas that are cut over several GPUs of one host (tensor parallel), against one GPU.

    python benchmarks/tensor_parallel.py [--ranks 2] [--only NAME ...] [--repeats 2] [--write]

Random weights; 128 prompt and 512 new tokens, as in `generation.py`, whose clock this uses. What a rank cannot but read
a step is half of the weights and half of the keys and values on two GPUs, so twice the rate is the most there is; what
stands between is two sums over the ranks a layer, of batch x hidden numbers each.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from generation import SHAPES, Bench, Case, build, release
from local_ranks import run_ranks
from record import Row, row, show, slug, write

from asystem.models import Shard

SHAPES["qwen3-8b"] = replace(SHAPES["qwen3-4b"], hidden_size=4096, intermediate_size=12288, tie_embeddings=False)
BATCHES = ((1, 1), (4, 8), (32, 8))  # prompts, samples of each
CASES = [
    Case(f"{name}, batch {prompts * group}", shape, prompts, group, 512)
    for name, shape in (("4B", "qwen3-4b"), ("8B", "qwen3-8b"))
    for prompts, group in BATCHES
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/tensor-parallel-<device>.json")
    return parser.parse_args()


def seconds_of(case: Case, part: Shard | None, repeats: int) -> float:
    """Of a whole run, prefill included: the median of some, after one."""
    bench = Bench(case, build(SHAPES[case.shape], part))
    times = [bench.run(turn) for turn in range(1 + repeats)][1:]
    del bench
    release()
    return statistics.median(times)


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.cuda.set_device(rank)
    init = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=init, rank=rank, world_size=args.ranks, timeout=timedelta(seconds=300)
    )
    group = dist.new_group(list(range(args.ranks)))
    rows: list[Row] = []
    for case in (case for case in CASES if args.only is None or case.name in args.only):
        alone = seconds_of(case, None, args.repeats) if rank == 0 else 0.0
        dist.barrier()
        cut = seconds_of(case, Shard(rank, args.ranks, group), args.repeats)
        dist.barrier()
        tokens, note = case.batch * case.new, f"{case.prompts} prompts x {case.group}, {case.shape} shape, bf16"
        if rank == 0:
            found = [
                row(f"{case.name}: one GPU", tokens / alone, "tokens/s", note=note),
                row(f"{case.name}: {args.ranks} GPUs, tensor parallel", tokens / cut, "tokens/s"),
                row(
                    f"{case.name}: speed-up",
                    alone / cut,
                    "times",
                    note=f"{args.ranks} replicas would give {args.ranks}",
                ),
            ]
            show(found)
            rows += found
            if args.write:  # after each case: what ends early has shown something
                device, partial = torch.cuda.get_device_name(), args.only is not None
                name = f"{slug(device)}-x{args.ranks}"
                write(
                    "tensor-parallel", f"{args.ranks} x {device}", rows, name=name, packages=["triton"], partial=partial
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(work, parse())
