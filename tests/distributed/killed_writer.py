"""Kills a process that writes checkpoints, again and again, and looks at what it left. Run by test_killed_writer.py.

Forks, so that torch is imported once; prints one JSON line a kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from asystem.config import CheckpointConfig
from asystem.models import Held
from asystem.training import Saver
from asystem.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint

SIZE, TENSORS = 1_000_000, 4  # 16 MB: some ten milliseconds to write


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {f"model.{i}": torch.full((SIZE,), float(step)) for i in range(TENSORS)}


def write_for_ever(parent: Path, start: int) -> None:
    engine: Any = SimpleNamespace(world_size=1, rank=0)
    saver = Saver(engine, CheckpointConfig(every=1, keep_last=1))
    for step in range(start, start + 100_000):
        held = {name: Held.of(tensor) for name, tensor in tensors(step).items()}
        engine.state = lambda held=held, step=step: (held, {"step": step})
        saver.save(parent / f"step-{step:06d}")


def kill_one(parent: Path, start: int, draw: random.Random) -> dict[str, Any]:
    """Lets a writer complete a checkpoint, and kills it somewhere in one that follows."""
    if (writer := os.fork()) == 0:
        write_for_ever(parent, start)
    while not any(int(path.name[5:]) >= start for path in list_checkpoints(parent)):
        assert os.waitpid(writer, os.WNOHANG) == (0, 0), "the writer ended by itself"
        time.sleep(0.001)
    good = int(find_checkpoint(parent).name[5:])
    if draw.random() < 0.7:
        while not list(parent.glob(".step-*.partial/*.distcp")):
            pass
    time.sleep(draw.random() * 0.03)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    left = sorted(path.name.rpartition(".")[2] for path in parent.glob(".step-*"))
    found = find_checkpoint(parent)
    loaded = tensors(-1)
    extra = load_checkpoint(found, loaded, world_size=1)
    values = sorted({value for tensor in loaded.values() for value in tensor.unique().tolist()})
    return {"good": good, "found": int(found.name[5:]), "step": extra["step"], "values": values, "left": left}


def main() -> None:
    torch.set_num_threads(1)
    parent, kills = Path(sys.argv[1]), int(sys.argv[2])
    draw, start = random.Random(0), 1
    for _ in range(kills):
        result = kill_one(parent, start, draw)
        print(json.dumps(result), flush=True)
        start = result["found"] + 1


if __name__ == "__main__":
    main()
