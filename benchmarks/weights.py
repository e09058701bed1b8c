"""Publishing weights (W4): from training to generation, each in its own process.

    python benchmarks/weights.py [--device cuda] [--models qwen3_0_6b ...] [--turns 5] [--write]
    python benchmarks/weights.py --device cpu --tiny          # whether it runs

Real worker groups over Ray, random weights in bfloat16. A publication is what the controller awaits: training writes
what it holds, or begins to send it; generation takes it over, and its decoding stands meanwhile (the pause). `of a
copy` compares the published bytes with those that plain copies of the parameters copy: on a CPU in the time that the
controller waits, on a GPU in that of the ranks themselves. Parameters that live in their buffer are copied once, others
twice. Over a process group it compares with the link, measured by the same sends.
"""

from __future__ import annotations

import argparse
import asyncio
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from record import Row, cpu_name, row, show, slug, write

from asystem.config import Config, ModelConfig, PlacementConfig, RuntimeConfig, Transport
from asystem.models import Box, Decoder, Shard, init_weights, local_piece, spec_from_config
from asystem.spmd import Collect, Dispatch, Worker, make_runtime, remote, spawn, store
from asystem.spmd.exchange import Transfer
from asystem.state import Inbox, Outbox, Published, StreamInbox, StreamOutbox, Terms
from asystem.state.checksum import Checksums, settled
from asystem.types import Ref

ROOT = Path(__file__).resolve().parent.parent
DTYPE = torch.bfloat16
GPU_MARK, CPU_MARK, PAUSE_MARK = 0.8, 0.5, 5.0  # of a copy or link; of a copy; ms for the smallest model
LINK_BYTES = 1 << 28
PUBLISHED = (  # of papers and READMEs: GB, seconds
    ("Awex over NCCL, 10B, published", 31, 0.8),
    ("Awex over RDMA, 10B, published", 31, 0.5),
    ("verl, 10B, published by Awex", 31, 3.5),
    ("Awex over NCCL, 100B, published", 191, 9.0),
    ("verl, 100B, published by Awex", 191, 35.0),
)


@dataclass(frozen=True)
class Case:
    """One way from training to generation; ``ranks`` on either side, with more than one FSDP to tensor parallelism.

    Attributes:
        gpus: that a rank of training owns, and one of generation.
    """

    transport: Transport
    device: str
    ranks: int = 1
    gpus: tuple[float, float] = (0.0, 0.0)

    @property
    def is_mapped_over_a_link(self) -> bool:
        """Whether generation reads another card's memory, all of it."""
        return self.transport is Transport.ipc and self.gpus == (1.0, 1.0)

    @property
    def label(self) -> str:
        name = "gloo" if self.transport is Transport.nccl and self.device == "cpu" else self.transport.value
        return name + (f", FSDP {self.ranks} to TP {self.ranks}" if self.ranks > 1 else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", help="of configs/model; default: as many as the device can")
    parser.add_argument("--transports", nargs="+", choices=[t.value for t in Transport][1:], help="default: all")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.4 M parameters")
    parser.add_argument("--turns", type=int, default=5, help="the best counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/weights-<device>.json")
    args = parser.parse_args()
    args.partial = args.models is not None or args.transports is not None
    if args.tiny:
        args.models = ["tiny"]
    elif args.models is None:
        args.models = ["qwen3_0_6b", "qwen3_1_7b"] + (["qwen3_4b", "qwen3_8b"] if args.device == "cuda" else [])
    return args


def config_of(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text()))


class Rank(Worker):
    """What both sides have: a model on a device, whose memory is touched before the clock runs."""

    def __init__(self, config: ModelConfig, case: Case) -> None:
        self.config, self.case = config, case
        self.device = torch.device(case.device, 0) if case.device == "cuda" else torch.device("cpu")
        self.terms = Terms(case.ranks, case.ranks, self.device, 120.0, Config().weights.bucket_bytes)

    def build(self, part: Shard | None, seed: int | None) -> Decoder:
        spec = spec_from_config(self.config)
        with torch.device("meta"):
            model = (Decoder(spec) if part is None else part.decoder(spec)).to(DTYPE)
        model.to_empty(device=self.device)
        for parameter in model.parameters():
            parameter.data.zero_()
        if seed is not None:
            init_weights(model, seed)
        return model.requires_grad_(False)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def best(self, act: Callable[[], Any], times: int = 5) -> float:
        """Seconds of the fastest of so many, after one."""
        found = float("inf")
        for turn in range(times + 1):
            self.wait()
            start = time.perf_counter()
            act()
            self.wait()
            found = min(found, time.perf_counter() - start) if turn else found
        return found

    def link(self, exchange: Any, peer: int, is_sent: bool) -> float:
        """Bytes a second of plain sends from one rank to another."""
        block = torch.ones(LINK_BYTES, dtype=torch.uint8, device=self.device)
        exchange.begin()
        return LINK_BYTES / self.best(lambda: exchange.post([Transfer(peer, block, is_sent)])(), times=3)


class Sender(Rank):
    async def setup(self) -> None:
        model = self.build(None, seed=0)
        if self.case.ranks > 1:
            from torch.distributed.fsdp import fully_shard

            for block in model.layers:
                fully_shard(block)
            fully_shard(model)
        self.model = model
        if self.case.transport is Transport.nccl:
            self.outbox: Any = StreamOutbox(model, DTYPE, 1, self.rank, self.terms)
        else:
            self.outbox = Outbox(model, DTYPE, 1, self.case.transport, self.rank)

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def device_name(self) -> str:
        return torch.cuda.get_device_name(0) if self.device.type == "cuda" else cpu_name()

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def copy_rate(self) -> float:
        """Bytes a second of plain copies of all parameters, of 4 GB of them at most."""
        pairs, size = [], 0
        for parameter in self.model.parameters():
            if size < 4e9:
                block = local_piece(parameter.detach())[1]
                pairs.append((block, torch.zeros_like(block)))
                size += block.nbytes

        def copy() -> None:
            for source, target in pairs:
                target.copy_(source)

        return size / self.best(copy)

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def checksum_seconds(self) -> float:
        """Seconds of the checksums of all parameters, prepared as publications have them from the second on."""
        blocks = [parameter.detach() for parameter in self.model.parameters()]
        prepared = Checksums([(b, Box.whole(tuple(b.shape)), tuple(b.shape)) for b in blocks])
        return self.best(lambda: settled([prepared.take()]))

    @remote(Dispatch.BROADCAST, Collect.CONCAT)
    async def export(self, verify: int) -> list[tuple[Ref[Published], float]]:
        """Hands the weights over; with the seconds that this took."""
        start = time.perf_counter()
        self.outbox.verify_every = verify
        return [(store.put(self.outbox.write()), time.perf_counter() - start)]

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def measure_link(self) -> float:
        self.outbox.settle()
        return self.link(self.outbox._exchange, self.case.ranks + self.rank, True)


class Receiver(Rank):
    async def setup(self) -> None:
        part = Shard(self.rank, self.case.ranks) if self.case.ranks > 1 else None
        model = self.build(part, seed=None)
        stream = self.case.transport is Transport.nccl
        self.inbox: Any = StreamInbox(model, self.rank, self.terms) if stream else Inbox(model)

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def load(self, weights: Sequence[Ref[Published]]) -> float:
        """Takes weights over; returns the seconds that this took."""
        start = time.perf_counter()
        self.inbox.read(store.get_many(weights))
        return time.perf_counter() - start

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def measure_map(self, weights: Sequence[Ref[Published]]) -> float:
        """Bytes a second of a plain copy out of training's buffer."""
        (payload,) = store.get_many(weights)
        block = payload.buffer.flat()[:LINK_BYTES]
        here = torch.empty_like(block)
        return block.nbytes / self.best(lambda: here.copy_(block))

    @remote(Dispatch.BROADCAST, Collect.SUM)
    async def held_bytes(self) -> int:
        """Of all ranks: what is sent, of which some have the same."""
        return sum(parameter.nbytes for parameter in self.inbox.model.parameters())

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def measure_link(self) -> float:
        return self.link(self.inbox._exchange, self.rank, False)


@dataclass
class Times:
    """The best of several publications: seconds as the controller saw them, of writing, of the pause; and bytes."""

    whole: float = float("inf")
    work: float = float("inf")  # writing and pause, as the ranks themselves measured them
    pause: float = float("inf")
    size: int = 0


async def publish(sender: Sender, receiver: Receiver, verify: int, turns: int) -> Times:
    best = Times()
    for turn in range(turns + 1):
        start = time.perf_counter()
        handed = await sender.export(verify)
        loading = max(await receiver.load([ref for ref, _ in handed]))
        whole, writing = time.perf_counter() - start, max(seconds for _, seconds in handed)
        if turn:
            best.whole, best.pause = min(best.whole, whole), min(best.pause, loading)
            best.work = min(best.work, writing + loading)
        best.size = sum(ref.num_bytes for ref, _ in handed)
    return best


async def link_rate(sender: Sender, receiver: Receiver, case: Case) -> float:
    """Of one pair of ranks; 0 where training and generation share a device."""
    if case.is_mapped_over_a_link:
        return await receiver.measure_map([ref for ref, _ in await sender.export(0)])
    if case.transport is not Transport.nccl:
        return 0.0
    rates = await asyncio.gather(sender.measure_link(), receiver.measure_link())
    return min(rates)


@contextmanager
def groups(config: ModelConfig, case: Case, args: argparse.Namespace) -> Iterator[tuple[Sender, Receiver]]:
    with make_runtime(runtime_config(args), PlacementConfig()) as runtime:
        common: dict[str, Any] = {"ranks": case.ranks, "runtime": runtime}
        sender = spawn(Sender, config, case, name="trainers", collective=case.ranks > 1, gpus=case.gpus[0], **common)
        receiver = spawn(Receiver, config, case, name="generators", gpus=case.gpus[1], **common)
        yield sender, receiver


def runtime_config(args: argparse.Namespace) -> RuntimeConfig:
    store_bytes = 256 * 2**20 if args.tiny or args.device == "cuda" else 6 * 2**30
    return RuntimeConfig(threads_per_rank=args.threads, object_store_bytes=store_bytes, deadline_seconds=150.0)


def measure(name: str, case: Case, args: argparse.Namespace) -> list[Row]:
    """The figures of one model over one transport."""
    rows: list[Row] = []
    label = f"{name}, {case.label}"
    with groups(config_of(name), case, args) as (sender, receiver):
        times = {verify: asyncio.run(publish(sender, receiver, verify, args.turns)) for verify in (0, 1)}
        copied = asyncio.run(sender.copy_rate())
        rows.append(row(f"{label}: a copy on the device", copied / 1e9, "GB/s", note="bytes copied"))
        link = asyncio.run(link_rate(sender, receiver, case))
        sent = asyncio.run(receiver.held_bytes())
        if link:
            plain = "copies" if case.is_mapped_over_a_link else "sends"
            rows.append(row(f"{label}: the link", link * case.ranks / 1e9, "GB/s", note=f"plain {plain} of 256 MiB"))
        checking = asyncio.run(sender.checksum_seconds()) if case.ranks == 1 else None
    for verify, found in times.items():
        rows += figures(
            label + ", verified" * verify,
            found,
            name,
            case,
            copied,
            sent / (link * case.ranks or 1),
            is_marked=not verify,
        )
    if checking is not None:
        size = times[0].size
        share = checking / (size / copied)
        note = f"{checking * 1e3:.3g} ms for {size / 1e9:.3g} GB"
        rows.append(
            row(f"{label}: checksums of all, of a copy's time", share, "1", mark=1.0, better="lower", note=note)
        )
    cost = (times[1].work - times[0].work) * 1e3
    rows.append(row(f"{label}: checksums in a publication", cost, "ms", better="lower", note="both sides"))
    show(rows)
    return rows


def figures(
    label: str, found: Times, name: str, case: Case, copied: float, floor: float, *, is_marked: bool
) -> Iterator[Row]:
    """Rows of some publications; ``floor`` is what the link would need for all that is sent, seconds."""
    is_gpu, is_stream = case.device == "cuda", case.transport is Transport.nccl
    note = f"{found.size / 1e9:.3g} GB in {found.whole * 1e3:.3g} ms, of them the ranks' work {found.work * 1e3:.3g} ms"
    yield row(f"{label}: rate", found.size / found.whole / 1e9, "GB/s", note=note)
    shares_a_card = case.transport is Transport.ipc and case.gpus[0] < 1 and case.ranks == 1
    pause_mark = PAUSE_MARK if is_marked and shares_a_card and name == "qwen3_0_6b" else None
    yield row(f"{label}: generation's pause", found.pause * 1e3, "ms", mark=pause_mark, better="lower")
    if is_stream:
        mark = GPU_MARK if is_marked and is_gpu else None
        yield row(f"{label}: of the link", floor / found.work, "1", mark=mark)
    elif case.is_mapped_over_a_link:
        mark = GPU_MARK if is_marked else None
        yield row(f"{label}: the pause's copy, of the link", floor / found.pause, "1", mark=mark)
    elif is_gpu and case.ranks == 1:
        mark = GPU_MARK if is_marked and case.transport is Transport.ipc else None
        yield row(f"{label}: the ranks' work, of a copy", found.size / found.work / copied, "1", mark=mark)
        yield row(f"{label}: the pause's copy, of a copy", found.size / found.pause / copied, "1")
    elif not is_gpu:
        mark = CPU_MARK if is_marked and case.transport is Transport.shared_memory else None
        yield row(f"{label}: of a copy", found.size / found.whole / copied, "1", mark=mark)


def cases(args: argparse.Namespace, num_gpus: int) -> list[Case]:
    """The transports that this machine has."""
    if args.device == "cpu":
        found = [Case(t, "cpu") for t in (Transport.shared_memory, Transport.store, Transport.nccl)]
        found += [Case(Transport.nccl, "cpu", ranks=2)] if args.tiny else []
    else:
        own = (1.0, 1.0) if num_gpus > 1 else (0.5, 0.5)  # two processes share an only one
        found = [Case(Transport.ipc, "cuda", gpus=own), Case(Transport.shared_memory, "cuda", gpus=own)]
        found += [Case(Transport.nccl, "cuda", gpus=own)] if num_gpus > 1 else []
        # Two cards with a rank of either side each: half of what a rank takes is on its own card.
        found += [Case(Transport.ipc, "cuda", ranks=2, gpus=(0.6, 0.4))] if num_gpus == 2 else []
        found += [Case(Transport.nccl, "cuda", ranks=2, gpus=own)] if num_gpus > 3 else []
    return [case for case in found if not args.transports or case.transport.value in args.transports]


def hybrid() -> list[Row]:
    """In hybrid placement both engines have one storage: the bytes of generation's parameters that are its own."""
    import tempfile

    from asystem.workers import HybridWorker

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.py").write_text(
            'def train(): return [{"prompt": "a", "answer": "b"}]\ndef evaluation(): return []\n'
            "def demonstrations(): return []\n"
            "def reward(row, response): return 0.0\n"
        )
        config = Config(recipe_dir=folder, device="cpu")
        config.data.task, config.generation.graphs, config.rollout.max_new_tokens = "task.py", False, 4
        config.data.max_prompt_tokens = 8
        worker = HybridWorker(config, Path(folder))
        asyncio.run(worker.setup())
        handed = asyncio.run(worker.export_weights())
        own = {parameter.data_ptr() for parameter in worker.trainer.model.parameters()}
        copied = sum(p.nbytes for p in worker.engine.model.parameters() if p.data_ptr() not in own)
    total = sum(ref.num_bytes for ref in handed) + copied
    rows = [row("hybrid placement: bytes copied", total, "B", mark=0, better="lower", note="a small model on a CPU")]
    show(rows)
    return rows


def attempt(label: str, act: Callable[[], list[Row]]) -> list[Row]:
    """The rows, or one that says why there are none: a case that fails does not hide the others."""
    try:
        return act()
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        rows = [row(f"{label}: rate", None, "GB/s", note=f"failed: {type(error).__name__}: {reason}")]
        show(rows)
        return rows


def main() -> None:
    args = parse()
    rows: list[Row] = []
    with make_runtime(runtime_config(args), PlacementConfig()) as runtime:  # the others join its cluster
        num_gpus = int(runtime.num_gpus) if args.device == "cuda" else 0
        for name in args.models:
            for case in cases(args, num_gpus):
                if case.transport is Transport.shared_memory and case.device == "cuda" and name != args.models[0]:
                    continue  # through the host: once, to compare with
                rows += attempt(f"{name}, {case.label}", lambda name=name, case=case: measure(name, case, args))
                write_all(args, rows, num_gpus)
    rows += attempt("hybrid placement: bytes copied", hybrid)
    known = [
        row(f"{what}: rate", gb / seconds, "GB/s", note=f"{gb} GB in {seconds:g} s") for what, gb, seconds in PUBLISHED
    ]
    show(known)
    write_all(args, rows + known, num_gpus)


def write_all(args: argparse.Namespace, rows: Sequence[Row], num_gpus: int) -> None:
    """After each case: what ends early has shown something."""
    if not args.write:
        return
    device, name = f"{cpu_name()}, {args.threads} threads a rank", "cpu"
    if args.device == "cuda":
        device = torch.cuda.get_device_name(0)
        name = slug(device) + f"-x{num_gpus}" * (num_gpus > 1)
        device = f"{num_gpus} x {device}" if num_gpus > 1 else device
    write("weights", device, rows, packages=["ray", "triton"], name=name, partial=args.partial)


if __name__ == "__main__":
    main()
