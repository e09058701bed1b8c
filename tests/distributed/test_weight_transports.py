"""Publications between processes: shards under FSDP to tensor-parallel parts, and ranks that are lost meanwhile."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from asystem.config import Config, Transport, WandbMode
from asystem.controller.run import train
from asystem.errors import AsystemError
from asystem.models import Decoder, ModelSpec, Shard, init_weights
from asystem.spmd import Collect, Dispatch, remote
from asystem.state import Published, StreamInbox, StreamOutbox, Terms
from asystem.training.checkpoint import read_manifest
from asystem.types import Ref, Trajectory
from asystem.workers import GenerateWorker

SPEC = ModelSpec("qwen3", 23, 16, 24, 2, 4, 2, 4, qk_norm=True)
TERMS = Terms(2, 2, torch.device("cpu"), seconds=60.0, bucket_bytes=16384)
VERSIONS = 3
TASK = """
def train(): return [{"prompt": "ab", "answer": "x"}, {"prompt": "cde", "answer": "y"}]
def evaluation(): return []
def demonstrations(): return []
def reward(row, response): return float(len(response) % 2)
"""


def model_at(version: int) -> Decoder:
    model = Decoder(SPEC)
    init_weights(model, version)
    return model


def _trainer(rank: int, meeting: dist.Store) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.PrefixStore("trainers", meeting), rank=rank, world_size=2)
    model = model_at(0)
    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    outbox = StreamOutbox(model, torch.bfloat16, 1, rank, TERMS)
    for version in range(VERSIONS):
        with torch.no_grad():
            for name, whole in model_at(version).named_parameters():
                parameter = model.get_parameter(name)
                mine = whole.chunk(2, 0)[rank] if rank < len(whole.chunk(2, 0)) else whole[:0]
                parameter.to_local().copy_(mine)  # type: ignore[attr-defined]
        announced = outbox.write()
        if rank == 0:
            meeting.set(f"announced {version}", pickle.dumps(announced).hex())
        meeting.wait([f"loaded {version} {rank}" for rank in range(2)], timedelta(seconds=60))
    outbox.settle()
    dist.destroy_process_group()


def _generator(rank: int, meeting: dist.Store) -> None:
    model = Shard(rank, 2).cut(model_at(9)).bfloat16()
    inbox = StreamInbox(model, rank, TERMS)
    for version in range(VERSIONS):
        inbox.read([pickle.loads(bytes.fromhex(meeting.get(f"announced {version}").decode()))])
        for name, want in Shard(rank, 2).cut(model_at(version)).named_parameters():
            assert torch.equal(model.get_parameter(name), want.bfloat16()), (version, name)
        meeting.set(f"loaded {version} {rank}", "")


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "store"), 4)
    meeting.set_timeout(timedelta(seconds=60))
    _trainer(rank, meeting) if rank < 2 else _generator(rank - 2, meeting)


def test_shards_of_two_trainers_reach_the_halves_of_two_generators(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=4)  # type: ignore[no-untyped-call]


class Lost(GenerateWorker):
    """Its last rank is killed, or hangs, when it is to take version 1 over."""

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def load_weights(
        self, weights: Sequence[Ref[Published]], version: int, probe: bool = False
    ) -> Ref[list[Trajectory]] | None:
        if version == 1 and self.rank == self.world_size - 1:
            if self.config.weights.transport is Transport.nccl:
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().load_weights(weights, version, probe)


@pytest.mark.parametrize(
    ("transport", "message"),
    [
        ("shared_memory",
         r"^generators rank 0 on \S+: load_weights: its process \(pid \d+\) died.*take version 1 over "
         r"from trainers rank 0, which saved checkpoints/step-000001$"),
        ("nccl",
         r"^generators rank 0 waited [\d.]+ s for generators rank 1 \(publication 1 from trainers to generators"),
    ],
    ids=["killed", "hanging"],
)  # fmt: skip
def test_a_generator_lost_while_it_takes_weights_over_is_named_and_training_is_kept(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, message: str
) -> None:
    monkeypatch.setattr("asystem.controller.run.GenerateWorker", Lost)
    (tmp_path / "task.py").write_text(TASK)
    config = Config(recipe="lost", recipe_dir=str(tmp_path), run_dir=str(tmp_path / "run"), device="cpu", steps=9)
    config.model.num_layers, config.model.hidden_size, config.model.intermediate_size = 1, 32, 64
    config.model.head_dim, config.generation.graphs = 8, False
    config.data.task, config.data.max_prompt_tokens = "task.py", 8
    config.rollout.max_new_tokens, config.rollout.capacity, config.algorithm.group_size = 4, 8, 4
    config.tracking.console = config.tracking.report = False
    config.tracking.wandb = WandbMode.disabled
    config.weights.transport, config.weights.probe_every = Transport(transport), 0
    config.runtime.deadline_seconds = 8.0
    config.generation.ranks = 2 if transport == "nccl" else 1
    with pytest.raises(AsystemError, match=message):
        train(config)
    assert read_manifest(tmp_path / "run" / "checkpoints" / "step-000001")
