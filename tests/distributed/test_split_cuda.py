"""Whole runs in split placement on GPUs: weights arrive, each parameter verified, each version probed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from asystem.config import Config, ModelConfig, Transport
from asystem.controller.run import train
from asystem.errors import AsystemError, ConfigError
from asystem.spmd import Collect, Dispatch, remote
from asystem.state import Published
from asystem.training import export_checkpoint
from asystem.types import Ref, Trajectory
from asystem.workers import GenerateWorker

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("transport", ["auto", "shared_memory", "store"])
def test_a_trainer_and_a_generator_publish(small_run: Config, transport: str, lora_rank: int) -> None:
    small_run.device, small_run.steps, small_run.weights.transport = "cuda", 2, Transport(transport)
    small_run.model = ModelConfig(num_layers=2)  # heads of 32, as kernels want them
    small_run.generation.kv_tokens, small_run.training.lora.rank = 4096, lora_rank
    small_run.weights.probe_every = 1
    assert train(small_run)["steps"] == 2
    lines = (Path(small_run.run_dir or "") / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["sync/gigabytes_per_second"] > 0 for line in lines)


@pytest.mark.skipif(GPUS < 4, reason="needs four CUDA devices")
@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_two_trainers_and_a_generator_of_two_ranks_publish(small_run: Config, transport: str) -> None:
    small_run.device, small_run.steps, small_run.weights.transport = "cuda", 2, Transport(transport)
    small_run.model = ModelConfig(num_layers=2)  # heads of 32, as kernels want them
    small_run.training.ranks = small_run.generation.ranks = small_run.generation.tensor_parallel = 2
    small_run.generation.kv_tokens, small_run.weights.probe_every = 4096, 1
    assert train(small_run)["steps"] == 2


@pytest.mark.skipif(GPUS != 1, reason="needs one CUDA device alone")
def test_nccl_between_two_halves_of_a_gpu_is_refused(small_run: Config) -> None:
    small_run.device, small_run.weights.transport = "cuda", Transport.nccl
    with pytest.raises(ConfigError, match="two ranks share one here: use ipc"):
        train(small_run)


class Killed(GenerateWorker):
    """Its process is killed when it is to take version 1 over."""

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def load_weights(
        self, weights: Sequence[Ref[Published]], version: int, probe: bool = False
    ) -> Ref[list[Trajectory]] | None:
        if version == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().load_weights(weights, version, probe)


def test_a_killed_generator_is_named_and_the_next_run_starts_with_what_was_trained(
    small_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run.device, small_run.model = "cuda", ModelConfig(num_layers=2)
    small_run.generation.kv_tokens, small_run.runtime.deadline_seconds = 4096, 30.0
    run_dir = Path(small_run.run_dir or "")
    with monkeypatch.context() as patch:
        patch.setattr("asystem.controller.run.GenerateWorker", Killed)
        with pytest.raises(AsystemError, match=r"generators rank 0.*died.*which saved checkpoints/step-000001"):
            train(small_run)
    saved = run_dir / "checkpoints" / "step-000001"
    export_checkpoint(saved, run_dir / "model")
    small_run.run_dir, small_run.steps = str(run_dir.with_name("next")), 2
    small_run.model.path = str(run_dir / "model")
    assert train(small_run)["steps"] == 2
