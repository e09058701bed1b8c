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

from asystem.config import Config, Transport
from asystem.controller.run import train
from asystem.errors import AsystemError, PublicationError
from asystem.models import Decoder, ModelSpec, Shard, init_weights
from asystem.spmd import Collect, Dispatch, remote
from asystem.state import Published, StreamInbox, StreamOutbox, Terms
from asystem.training.checkpoint import read_manifest
from asystem.types import Ref, Trajectory
from asystem.workers import GenerateWorker

SPEC = ModelSpec("qwen3", 23, 16, 24, 2, 4, 2, 4, qk_norm=True)
TERMS = Terms(2, 2, torch.device("cpu"), seconds=60.0, bucket_bytes=16384)
VERSIONS = 3


def model_at(version: int) -> Decoder:
    model = Decoder(SPEC)
    init_weights(model, version)
    return model


def _sharded() -> Decoder:
    from torch.distributed.fsdp import fully_shard

    model = model_at(0)
    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


@torch.no_grad()
def _set(model: Decoder, version: int, rank: int) -> None:
    """A rank's weights of a version, of shards or of a part."""
    source = model_at(version) if model.shard is None else Shard(rank, 2).cut(model_at(version))
    for name, value in source.named_parameters():
        parameter = model.get_parameter(name)
        if model.shard is None:
            parts = value.chunk(2, 0)
            parameter.to_local().copy_(parts[rank] if rank < len(parts) else value[:0])  # type: ignore[attr-defined]
        else:
            parameter.copy_(value)


def _trainer(rank: int, meeting: dist.Store, is_cut: bool) -> None:
    dist.init_process_group("gloo", store=dist.PrefixStore("trainers", meeting), rank=rank, world_size=2)
    model = Shard(rank, 2).cut(model_at(0)) if is_cut else _sharded()
    outbox = StreamOutbox(model, torch.bfloat16, 1, rank, TERMS)
    for version in range(VERSIONS):
        _set(model, version, rank)
        announced = outbox.write()
        if rank == 0:
            meeting.set(f"announced {version}", pickle.dumps(announced).hex())
        meeting.wait([f"loaded {version} {rank}" for rank in range(2)], timedelta(seconds=60))
    outbox.settle()
    dist.destroy_process_group()


def _generator(rank: int, meeting: dist.Store, is_cut: bool) -> None:
    """Has a half; the first one all, where training has halves."""
    model = (model_at(9) if is_cut and rank == 0 else Shard(rank, 2).cut(model_at(9))).bfloat16()
    inbox = StreamInbox(model, rank, TERMS)
    for version in range(VERSIONS):
        inbox.read([pickle.loads(bytes.fromhex(meeting.get(f"announced {version}").decode()))])
        whole = model_at(version)
        for name, want in (whole if model.shard is None else Shard(rank, 2).cut(whole)).named_parameters():
            assert torch.equal(model.get_parameter(name), want.bfloat16()), (version, name)
        meeting.set(f"loaded {version} {rank}", "")


def _rank(rank: int, folder: Path, is_cut: bool) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "store"), 4)
    meeting.set_timeout(timedelta(seconds=60))
    _trainer(rank, meeting, is_cut) if rank < 2 else _generator(rank - 2, meeting, is_cut)


@pytest.mark.parametrize("is_cut", [False, True], ids=["shards to halves", "halves to all and a half"])
def test_what_two_trainers_hold_reaches_two_generators(tmp_path: Path, is_cut: bool) -> None:
    mp.spawn(_rank, (tmp_path, is_cut), nprocs=4)  # type: ignore[no-untyped-call]


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
    cluster: None, small_run: Config, monkeypatch: pytest.MonkeyPatch, transport: str, message: str
) -> None:
    monkeypatch.setattr("asystem.controller.run.GenerateWorker", Lost)
    small_run.weights.transport, small_run.weights.probe_every = Transport(transport), 0
    small_run.runtime.deadline_seconds = 8.0
    small_run.generation.ranks = 2 if transport == "nccl" else 1
    with pytest.raises(AsystemError, match=message):
        train(small_run)
    assert read_manifest(Path(small_run.run_dir or "") / "checkpoints" / "step-000001")


class Confused(GenerateWorker):
    """Has the numbers of version 1, and takes one matrix for its negative: no checksum sees that."""

    def probe(self) -> Ref[list[Trajectory]]:
        if self.engine.version == 1:
            with torch.no_grad():
                self.engine.model.get_parameter("layers.0.mlp.down_proj.weight").neg_()
            self.engine.weights_updated(1)
        return super().probe()


def test_a_probe_that_differs_ends_the_run_and_training_is_kept(
    cluster: None, small_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asystem.controller.run.GenerateWorker", Confused)
    small_run.weights.probe_every, small_run.weights.probe_bound = 1, 1e-5
    with pytest.raises(PublicationError, match=r"differ by [\d.e-]+ nats a token .* after version 1 was published"):
        train(small_run)
    assert read_manifest(Path(small_run.run_dir or "") / "checkpoints" / "step-000001")
