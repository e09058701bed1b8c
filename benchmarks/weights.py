"""Publishing weights (W4): from training to generation, each in its own process.

    python benchmarks/weights.py [--models qwen3_0_6b qwen3_1_7b] [--turns 5] [--write]

Real worker groups over Ray: a trainer and a generator, each with a whole model in bfloat16. A publication is what the
controller awaits: the trainer writes what it holds, the generator takes it over. Its floor on one host is two copies of
the bytes, so half the rate of a copy is all that there is to have. Pause is the part in which decoding stands.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from record import Row, cpu_name, row, show, write

from asystem.config import ModelConfig, PlacementConfig, RuntimeConfig
from asystem.models import Decoder, init_weights, spec_from_config
from asystem.spmd import Collect, Dispatch, Worker, make_runtime, remote, spawn, store
from asystem.state import Inbox, Outbox, WeightPayload
from asystem.types import Ref

ROOT = Path(__file__).resolve().parent.parent
DTYPE = torch.bfloat16
MARK = 0.5  # of a copy's rate


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["qwen3_0_6b", "qwen3_1_7b"], help="of configs/model")
    parser.add_argument("--turns", type=int, default=5, help="the best counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/weights-cpu.json")
    return parser.parse_args()


def build(config: ModelConfig, seed: int | None) -> Decoder:
    """Random weights, or with None whatever lies in memory."""
    with torch.device("meta"):
        model = Decoder(spec_from_config(config)).to(DTYPE)
    model.to_empty(device="cpu")
    if seed is None:
        for parameter in model.parameters():
            parameter.data.zero_()  # touched, so that no page is new when the clock runs
    else:
        init_weights(model, seed)
    return model


class Sender(Worker):
    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    async def setup(self) -> None:
        self.model = build(self.config, seed=0)
        self.outboxes = {verify: Outbox(self.model, verify_every=verify) for verify in (0, 1)}

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def copy_rate(self) -> float:
        """Bytes a second of plain copies of all parameters, the best of three."""
        pairs = [(parameter.detach(), torch.zeros_like(parameter)) for parameter in self.model.parameters()]
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            for source, target in pairs:
                target.copy_(source)
            best = max(best, sum(t.nbytes for _, t in pairs) / (time.perf_counter() - start))
        return best

    @remote(Dispatch.BROADCAST, Collect.CONCAT)
    async def export(self, verify: int) -> list[Ref[WeightPayload]]:
        return [store.put(self.outboxes[verify].write())]


class Receiver(Worker):
    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    async def setup(self) -> None:
        self.inbox = Inbox(build(self.config, seed=None))

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def load(self, weights: Sequence[Ref[WeightPayload]]) -> float:
        """Takes weights over; returns the seconds that this took."""
        start = time.perf_counter()
        self.inbox.read(store.get_many(weights))
        return time.perf_counter() - start


async def publish(sender: Sender, receiver: Receiver, verify: int, turns: int) -> tuple[float, float, int]:
    """Seconds of a publication and of its pause, the best of so many turns after one; and its bytes."""
    best, pause, size = float("inf"), float("inf"), 0
    for turn in range(turns + 1):
        start = time.perf_counter()
        weights = await sender.export(verify)
        loading = await receiver.load(weights)
        if turn:
            best, pause = min(best, time.perf_counter() - start), min(pause, loading)
        size = sum(part.num_bytes for part in weights)
    return best, pause, size


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    config = ModelConfig(**yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text()))
    rows = []
    copied = 0.0
    for shared in (True, False):
        runtime_config = RuntimeConfig(
            threads_per_rank=args.threads, shared_memory=shared, object_store_bytes=6 * 2**30
        )
        with make_runtime(runtime_config, PlacementConfig()) as runtime:
            sender = spawn(Sender, config, name="trainers", ranks=1, runtime=runtime, gpus=0)
            receiver = spawn(Receiver, config, name="generators", ranks=1, runtime=runtime, gpus=0)
            if shared:
                copied = asyncio.run(sender.copy_rate())
                rows.append(row(f"{name}: a copy", copied / 1e9, "GB/s", better="higher"))
            for verify in (0, 1) if shared else (0,):
                seconds, pause, size = asyncio.run(publish(sender, receiver, verify, args.turns))
                label = f"{name}: " + ("shared memory" if shared else "Ray's store") + ", verified" * verify
                is_marked = shared and not verify
                rate = size / seconds
                note = f"{size / 1e9:.2f} GB, pause {pause:.3g} s"
                rows.append(row(label, rate / 1e9, "GB/s", better="higher", note=note))
                mark = MARK if is_marked else None
                rows.append(row(f"{label}, of a copy", rate / copied, "1", mark=mark, better="higher"))
    show(rows)
    return rows


def main() -> None:
    args = parse()
    rows = [each for name in args.models for each in measure(name, args)]
    if args.write:
        device = f"{cpu_name()}, {args.threads} threads a rank"
        print(f"written to {write('weights', device, rows, packages=['ray'], name='cpu')}")


if __name__ == "__main__":
    main()
