"""Hybrid placement on one GPU: W1's whole step, full and LoRA training on capped cards, sleep and wake.

    python benchmarks/hybrid.py [--only TEXT ...] [--write]
    python benchmarks/hybrid.py --device cpu --tiny        the same on a tiny model: does it run?

Random weights; every response runs to its limit of 512 tokens behind a prompt of 128. A step is the workers' own:
`HybridWorker.decode` in slices until all rollouts are finished, `update` over all of them, `export_weights` and
`load_weights`. W1 is 32 prompts x 8. Sizes, recompute, offload and sleep are what `asystem plan` chooses for the card
or the cap, and its memory by phase is compared with what PyTorch's allocator saw (and pages mapped beside it); the CUDA
context is outside both. Each case is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import Row, cpu_name, row, show, write
from torch import Tensor

from asystem.config import Config, PlacementKind, RuntimeKind, Sleep
from asystem.controller.planning import Plan, Workload, make_plan, settings
from asystem.controller.planning.choices import CONTEXT
from asystem.data.batch import Batch, BatchRow
from asystem.memory import GIB, AMem, MappedRegion, can_map, this_machine
from asystem.models import Decoder, init_weights, spec_from_config
from asystem.types import FinishedRollout, RolloutRequest
from asystem.workers import HybridWorker, TrainWorker
from asystem.workers.build import pick_device, pick_dtype

PROMPT, NEW = 128, 512
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_layers": 28, "num_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_layers": 28, "num_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_layers": 36, "num_heads": 32},
}
TASK = """
import random
def train():
    draw = random.Random(0)
    return [{"prompt": "".join(draw.choices("abcdefgh", k=PROMPT)), "answer": ""} for _ in range(32)]
def evaluation(): return []
def reward(row, response): return 0.0
"""


@dataclass(frozen=True)
class Case:
    """`prompts` x 8 rollouts on a shape, on a card of so many GiB (None = this one)."""

    name: str
    shape: str
    prompts: int = 32
    cap: float | None = None
    lora: int = 0
    steps: int = 3
    sleep: Sleep = Sleep.auto
    mark: float | None = None  # seconds a step
    overlap: bool = False  # measure generation beside training too


CASES = [
    Case("W1 0.6B", "0.6B", steps=4, mark=3.5, overlap=True),
    Case("0.6B full, 16 GB card", "0.6B", cap=16),
    Case("1.7B full, 24 GB card", "1.7B", prompts=8, cap=24),
    Case("4B LoRA, 24 GB card", "4B", prompts=8, cap=24, lora=16),
    Case("0.6B, phases asleep", "0.6B", prompts=8, sleep=Sleep.always),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", help="cases whose name contains one of these; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens, to see that all runs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/hybrid-<device>.json")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- one case, in a process of its own --------------------------------------------------------------------------------


def config_of(case: Case, args: argparse.Namespace, folder: Path) -> Config:
    prompt, new = (8, 6) if args.tiny else (PROMPT, NEW)
    (folder / "task.py").write_text(TASK.replace("PROMPT", str(prompt)))
    config = Config(recipe="hybrid", recipe_dir=str(folder), device=args.device, steps=1000)
    config.data.task, config.data.max_prompt_tokens = "task.py", prompt
    model = config.model
    model.family, model.vocab_size, model.num_kv_heads, model.head_dim = "qwen3", 151_936, 8, 128
    model.max_positions, model.rope_theta = 40_960, 1e6
    for key, value in SHAPES[case.shape].items():
        setattr(model, key, value)
    if args.tiny:
        model.vocab_size, model.hidden_size, model.intermediate_size, model.num_layers = 259, 32, 64, 2
        model.num_heads, model.num_kv_heads, model.head_dim = 4, 2, 8
    config.rollout.capacity, config.rollout.max_new_tokens = 8 * case.prompts, new
    config.rollout.slice_steps = 64
    config.generation.max_running = 8 * case.prompts
    config.training.lora.rank = case.lora
    config.placement.kind, config.placement.sleep = PlacementKind.hybrid, case.sleep
    config.runtime.kind, config.tracking.rollouts = RuntimeKind.inline, False
    return config


def planned(config: Config, case: Case, args: argparse.Namespace) -> Plan:
    machine = this_machine(args.device)
    if case.cap is not None and machine.is_gpu:
        machine = replace(machine, card=replace(machine.card, memory=int(case.cap * GIB)))
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap * GIB / total))
    machine = replace(machine, devices=1)
    spec = spec_from_config(config.model)
    return make_plan(config, spec, machine, Workload.of(config), only=PlacementKind.hybrid)


class RandomHybrid(HybridWorker):
    """Draws its weights on the device, in a moment: a worker draws on the CPU."""

    def build(self) -> Decoder:
        """In the dtype in which training wants it."""
        lora, device = self.config.training.lora.rank > 0, pick_device(self.config)
        with torch.device("meta"):
            model = Decoder(spec_from_config(self.config.model))
        model = model.to(pick_dtype("auto", device) if lora else torch.float32).to_empty(device=device)
        init_weights(model, seed=0)
        return model


class Bench:
    """Steps of a hybrid worker, and what it has of the device in each phase."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.cuda = config, config.device == "cuda"
        self._loop = asyncio.new_event_loop()
        self._decoding = asyncio.new_event_loop()
        self.worker = RandomHybrid(config, folder)
        self._loop.run_until_complete(self.worker.setup())
        self.worker.sampling = replace(self.worker.sampling, ignore_eos=True)
        self.version = self.next = 0
        self.peaks: dict[str, int] = {}

    def step(self) -> dict[str, float]:
        """Seconds of each phase; the peaks of all steps stay in `peaks`."""
        seconds = {}
        begin, end = self.worker.begin_generation, self.worker.begin_training
        finished, seconds["generation"] = self._timed("generation", begin, self.generate)
        stats, seconds["training"] = self._timed("training", end, lambda: self.train(finished))
        _, seconds["publication"] = self._timed("publication", begin, self.publish)
        seconds["sleep"] = stats.to_dict().get("time/sleep", 0.0)
        seconds["step"] = seconds["generation"] + seconds["training"] + seconds["publication"]
        return seconds

    def generate(self) -> list[FinishedRollout]:
        prompts = self.config.rollout.capacity // 8
        requests = [RolloutRequest(self.next + i, self.next // 8 + i // 8, i // 8 % 32) for i in range(8 * prompts)]
        self.next += len(requests)
        finished: list[FinishedRollout] = []
        while len(finished) < 8 * prompts:
            finished += self._decoding.run_until_complete(self.worker.decode(requests, None)).finished
            requests = []
        return finished

    def train(self, finished: list[FinishedRollout]) -> Any:
        return self._loop.run_until_complete(self.worker.update(self.batch(finished)))

    def batch(self, finished: list[FinishedRollout]) -> Batch:
        rows = [
            BatchRow(
                f.ref, f.row, f.rollout, f.group, f.prompt, f.prompt_length, f.length, 1.0, (-1.0) ** f.rollout, None
            )
            for f in sorted(finished, key=lambda f: f.rollout)
        ]
        tokens = sum(row.length for row in rows)
        return Batch(rows, self.version, tokens, len(rows))

    def publish(self) -> None:
        self.version += 1
        payloads = self._loop.run_until_complete(self.worker.export_weights())
        assert payloads == [], "nothing is sent"
        self._loop.run_until_complete(self.worker.load_weights(payloads, self.version))

    def overlapped(self) -> tuple[float, float]:
        """Seconds of generation and training one after another, and of both at once, each on a stream of its own: what
        interleaving could win at best. The weights change under the decoding, so that it is a measurement alone."""
        finished = self.generate()
        batch = self.batch(finished)

        def train() -> None:  # without telling the engine, which is at work
            self._loop.run_until_complete(TrainWorker.update(self.worker, batch))

        alone = self._timed("", _nothing, self.generate)[1] + self._timed("", _nothing, train)[1]

        def decode() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                self.generate()

        def both() -> None:
            thread = threading.Thread(target=decode)
            thread.start()
            train()
            thread.join()

        return alone, self._timed("", _nothing, both)[1]

    def roles(self) -> dict[str, int]:
        """Bytes of tensors on the device by role, states awake."""
        self.worker.begin_training()
        trainer, engine = self.worker.trainer, self.worker.engine
        weights = _storages(trainer.model.parameters())
        copies = {k: v for k, v in _storages(engine.model.parameters()).items() if k not in weights}
        states = _storages(trainer.optimizer.tensors().values())
        kept = {k: v for k, v in states.items() if k not in weights}
        device = "cuda" if self.cuda else "cpu"
        return {
            "weights": sum(weights.values()),
            "decoding weights": sum(copies.values()),
            "masters, moments": sum(v for k, v in kept.items() if k[0] == device),
            "states in the host's memory": sum(v for k, v in kept.items() if k[0] != device),
            "kv": engine.cache.data.nbytes,
        }

    def _timed(self, phase: str, begin: Callable[[], None], work: Callable[[], Any]) -> tuple[Any, float]:
        """Its seconds, with those of waking up; the peak is of what comes after."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        begin()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        result = work()
        if self.cuda:
            torch.cuda.synchronize()
            if phase:
                peak = torch.cuda.max_memory_allocated() + (self._mapped() if phase != "training" else 0)
                self.peaks[phase] = max(self.peaks.get(phase, 0), peak)
                reserved = torch.cuda.max_memory_reserved() + (self._mapped() if phase != "training" else 0)
                self.peaks[f"{phase}, reserved"] = max(self.peaks.get(f"{phase}, reserved", 0), reserved)
        return result, time.perf_counter() - start

    def _mapped(self) -> int:
        """Bytes of the pool where PyTorch's allocator does not know of it."""
        memory = self.worker.memory
        return memory.held()["kv"] if memory is not None and can_map() else 0


def _nothing() -> None: ...


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[str, int], int]:
    """By device and address, so that what is shared counts once."""
    found = {}
    for tensor in tensors:
        storage = tensor.detach().untyped_storage()
        found[tensor.device.type, storage._cdata] = storage.nbytes()
    return found


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        config = config_of(case, args, Path(name))
        plan = planned(config, case, args)
        chosen = plan.apply(config)
        bench = Bench(chosen, Path(name))
        bench.step()  # compiles, captures
        bench.step()
        bench.peaks.clear()
        if bench.cuda:
            torch.cuda.empty_cache()
        steps = [bench.step() for _ in range(case.steps)]
        result: dict[str, Any] = {
            "steps": steps,
            "settings": settings(config, plan),
            "predicted": plan.best.seconds | {"step": plan.best.step},
            "planned": plan.best.memory.phases,
            "peaks": bench.peaks,
            "roles": bench.roles(),
        }
        if bench.cuda:
            free, total = torch.cuda.mem_get_info()
            result["context"] = total - free - torch.cuda.memory_reserved() - bench._mapped()
            if case.overlap:
                result["overlap"] = bench.overlapped()
        return result


def run_sleep(args: argparse.Namespace) -> dict[str, Any]:
    """10 GB to the host and back through `AMem`, the bus's own rate, and a graph over memory that slept."""
    cuda = args.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    count, size = (20, 500_000_000) if cuda and not args.tiny else (4, 1_000_000)
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8, device=device) for _ in range(count)]
    sums = [int(t.view(torch.int32).sum(dtype=torch.int64)) for t in tensors]
    memory = AMem(device)
    memory.add("states", tensors)
    times = []
    for _ in range(4):
        slept, woken = memory.enter([]), memory.enter(["states"])
        times.append((slept.seconds, woken.seconds))
    equal = sums == [int(t.view(torch.int32).sum(dtype=torch.int64)) for t in tensors]
    result = {"bytes": count * size, "times": times[1:], "first": times[0], "equal": equal}
    if cuda:
        result |= {"bus": bus_rates(device), "graph": graph_survives(device)}
    return result


def bus_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second of one copy of 1 GiB out of and into the device, pinned: the best of 5."""
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(GIB, dtype=torch.uint8, device=device)
    rates = []
    for source, target in ((there, host), (host, there)):
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rates.append(GIB / min(seconds))
    return rates[0], rates[1]


def graph_survives(device: torch.device) -> bool | None:
    """A graph captured over a `MappedRegion` computes with what is there after sleep and wake."""
    if not can_map():
        return None
    region = MappedRegion(64 << 20, device)
    numbers = region.tensor.view(torch.float32)
    out = torch.zeros((), device=device)
    numbers.fill_(1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.sum(numbers, dim=0, out=out)
    memory = AMem(device)
    memory.add("kv", region)
    address = numbers.data_ptr()
    memory.enter([])
    memory.enter(["kv"])
    numbers.mul_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    return numbers.data_ptr() == address and float(out) == 2.0 * numbers.numel()


# --- all of them ------------------------------------------------------------------------------------------------------


def rows_of(case: Case, result: dict[str, Any]) -> list[Row]:
    steps, chosen = result["steps"], result["settings"]
    tokens = 8 * case.prompts * (PROMPT + NEW)
    note = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())
    rows = [
        row(f"{case.name}: step", statistics.median(s["step"] for s in steps), "s", mark=case.mark, better="lower",
            note=f"{tokens:,} tokens; {note}; worst {max(s['step'] for s in steps):.3f}")
    ]  # fmt: skip
    for phase in ("generation", "training", "publication", "sleep"):
        seconds = statistics.median(s[phase] for s in steps)
        predicted = f"predicted {result['predicted'][phase]:.3g}"
        rows.append(row(f"{case.name}: {phase}", seconds, "s", better="lower", note=predicted))
    if "overlap" in result:
        alone, both = result["overlap"]
        note = f"generation and training one after another {alone:.3f} s, on two streams at once {both:.3f} s"
        rows.append(row(f"{case.name}: time that interleaving could save", 1 - both / alone, "1", note=note))
    for phase, roles in result["planned"].items():
        measured = result["peaks"].get(phase)
        if measured is not None:
            rows.append(_peak(case, phase, roles, measured, result))
    for role, measured in result["roles"].items():
        rows.append(row(f"{case.name}: {role}", measured / GIB, "GiB", better="lower", note=_role(role, result)))
    if "context" in result:
        note = f"planned {CONTEXT / GIB:.2f}"
        rows.append(row(f"{case.name}: context", result["context"] / GIB, "GiB", better="lower", note=note))
    return rows


def _peak(case: Case, phase: str, roles: dict[str, int], measured: int, result: dict[str, Any]) -> Row:
    """The measured peak as a part of the planned one; the mark is within a tenth of 1."""
    expected = sum(size for role, size in roles.items() if role != "context")
    parts = ", ".join(f"{role} {size / GIB:.2f}" for role, size in roles.items() if role != "context")
    reserved = result["peaks"][f"{phase}, reserved"] / GIB
    note = f"{measured / GIB:.2f} GiB in tensors, {reserved:.2f} reserved; planned {expected / GIB:.2f}: {parts}"
    return row(f"{case.name}: peak of {phase} over plan", measured / expected, "1", mark=1.1, better="lower", note=note)


def _role(role: str, result: dict[str, Any]) -> str:
    names = ("masters", "moments") if role == "masters, moments" else (role,)
    phase = "generation" if role in ("kv", "decoding weights") else "training"
    return f"planned {sum(result['planned'][phase].get(name, 0) for name in names) / GIB:.2f}"


def sleep_rows(result: dict[str, Any]) -> list[Row]:
    size = result["bytes"]
    rows = []
    for index, (way, word) in enumerate((("sleep", "out"), ("wake", "in"))):
        seconds = min(times[index] for times in result["times"])
        note = f"{size / 1e9:.3g} GB, {size / seconds / 1e9:.1f} GB/s; the first time {result['first'][index]:.2f} s"
        if "bus" in result:
            note += f"; the bus alone, {word}: {result['bus'][index] / 1e9:.1f} GB/s"
        rows.append(row(f"AMem: {way}", seconds, "s", mark=size / 1e10, better="lower", note=note))
    rows.append(row("AMem: bits that woke equal", float(result["equal"]), "1", mark=1.0))
    if result.get("graph") is not None:
        rows.append(row("AMem: a captured graph survives", float(result["graph"]), "1", mark=1.0))
    return rows


def child(name: str, args: argparse.Namespace) -> dict[str, Any] | str:
    """The result of a case in a process of its own, or why there is none."""
    command = [sys.executable, __file__, "--child", name, "--device", args.device]
    done = subprocess.run(command + ["--tiny"] * args.tiny, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    print(done.stderr[-3000:], file=sys.stderr)
    return "failed: " + (done.stderr.strip().splitlines() or ["no word"])[-1]


def main() -> None:
    args = parse()
    if args.child:
        found = run_sleep(args) if args.child == "AMem" else run_case(_named(args.child), args)
        print(json.dumps(found))
        return
    random.seed(0)
    rows: list[Row] = []
    for name in [case.name for case in CASES] + ["AMem"]:
        if args.only is not None and not any(text in name for text in args.only):
            continue
        started = time.perf_counter()
        result = child(name, args)
        if isinstance(result, str):
            found = [row(f"{name}: step", None, "s", better="lower", note=result)]
        else:
            found = sleep_rows(result) if name == "AMem" else rows_of(_named(name), result)
        show(found)
        print(f"    {name}: {time.perf_counter() - started:.1f} s in all", flush=True)
        rows += found
        if args.write:  # after each case: what ends early has shown something
            device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
            write("hybrid", device, rows, partial=args.only is not None)


def _named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


if __name__ == "__main__":
    main()
