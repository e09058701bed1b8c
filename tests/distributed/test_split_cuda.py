"""Whole runs in split placement on GPUs: weights arrive, each parameter verified, each version probed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from asystem.config import Config, ModelConfig, Transport
from asystem.controller.run import train
from asystem.errors import ConfigError

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
