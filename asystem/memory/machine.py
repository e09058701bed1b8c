"""Machines to plan for: a small table of cards, and the machine that this is.

Rates are the makers' figures: dense bf16 products with float32 sums, memory, the bus to the host each way, and the way
to another card of the same host (NVLink where there is one, else through the host). `controller.planning.predict` says
what part of them is taken to be reached.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, replace

import torch

from asystem.errors import ConfigError, nearest

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """One device.

    Attributes:
        memory: bytes. flops: operations a second of a bf16 product. bandwidth: bytes a second of its memory.
        bus, link: bytes a second each way, to the host and to another card.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    bus: float
    link: float


CARDS = {
    card.name: card
    for card in (
        Card("H200", 139 * GIB, 989e12, 4.8e12, 55e9, 450e9),
        Card("H100", 79 * GIB, 989e12, 3.35e12, 55e9, 450e9),
        Card("A100", 79 * GIB, 312e12, 2.04e12, 25e9, 300e9),
        Card("5090", 31 * GIB, 209e12, 1.79e12, 55e9, 25e9),
        Card("4090", 24 * GIB, 165e12, 1.01e12, 25e9, 12e9),
        Card("3090", 24 * GIB, 71e12, 0.94e12, 25e9, 12e9),
    )
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Equal devices of one host; without GPUs it is one device, whose memory and cores all ranks share."""

    card: Card
    devices: int
    is_gpu: bool

    @property
    def device(self) -> str:
        """As torch names the kind."""
        return "cuda" if self.is_gpu else "cpu"

    def __str__(self) -> str:
        return f"{self.devices} × {self.card.name}, {self.card.memory / GIB:.3g} GiB"


def machine_of(gpus: int, memory: float | None = None, card: str | None = None) -> Machine:
    """A machine that need not be here.

    Args:
        memory: GiB of each GPU; None = the card's. card: a name of `CARDS`; None = the one whose memory is nearest.

    Raises:
        ConfigError: an unknown card, no GPU, or neither a card nor its memory.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: give at least 1, or leave it out to plan for this machine")
    if card is not None and card not in CARDS:
        raise ConfigError(f'--card "{card}" is unknown{nearest(card, CARDS)}: give --memory GIB for another one')
    if card is None and memory is None:
        raise ConfigError(f"--gpus {gpus} of which card? add --memory GIB or --card NAME ({', '.join(CARDS)})")
    if memory is not None and not memory > 0:
        raise ConfigError(f"--memory {memory:g} must be above 0: GiB of one GPU")
    found = CARDS[card] if card is not None else _like(memory or 0.0)
    return Machine(found if memory is None else replace(found, memory=int(memory * GIB)), gpus, True)


def this_machine(device: str = "auto") -> Machine:
    """The GPUs that PyTorch sees here, or the CPU and its memory, whose rates are measured (a fraction of a second)."""
    if device == "cpu" or not torch.cuda.is_available():
        return Machine(_measured_cpu(), 1, False)
    name, memory = _first_gpu()
    return Machine(card_named(name, memory), torch.cuda.device_count(), True)


def card_named(name: str, memory: int) -> Card:
    """The card of a device's full name, as "NVIDIA H200"; one that is not in the table gets the rates of that with the
    nearest memory."""
    known = next((card for key, card in CARDS.items() if key in name), None)
    return replace(known or _like(memory / GIB), name=known.name if known is not None else name, memory=memory)


def _like(memory: float) -> Card:
    return min(CARDS.values(), key=lambda card: abs(card.memory / GIB - memory))


def _first_gpu() -> tuple[str, int]:
    """Name and bytes of the first GPU that may be used, without a CUDA context in this process where that can be."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", f"--id={first}", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        name, memory = answer.splitlines()[0].rsplit(",", 1)
        return name.strip(), int(memory) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        found = torch.cuda.get_device_properties(0)
        return found.name, found.total_memory


def _measured_cpu() -> Card:
    """What one thread of torch's does here, in float32, as ranks compute."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    a, b = torch.ones(512, 512), torch.ones(512, 512)
    source, target = torch.ones(2**24), torch.empty(2**24)
    product = min(_seconds(lambda: torch.mm(a, b)) for _ in range(5))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(3))
    bandwidth = 2 * source.nbytes / copy
    return Card(f"CPU, {os.cpu_count()} cores", memory, 2 * 512**3 / product, bandwidth, bandwidth, bandwidth)


def _seconds(work: object) -> float:
    assert callable(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
