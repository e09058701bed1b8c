"""Which GPUs ranks see, in a cluster that is told of GPUs it has not: Ray counts and masks them all the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from asystem.config import Config, PlacementConfig, RuntimeConfig
from asystem.controller.run import gpus_of_a_rank
from asystem.errors import ConfigError
from asystem.spmd import Collect, Dispatch, Worker, make_runtime, remote, spawn
from asystem.spmd.runtimes.cluster import new_temp_dir, prepare_environment, remove_temp_dir


class Looker(Worker):
    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def sees(self) -> tuple[str, str]:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "all"), os.environ["LOCAL_RANK"]


@pytest.fixture
def gpus() -> Iterator[None]:
    prepare_environment()
    import ray

    folder = new_temp_dir()
    ray.init(address="local", num_gpus=3, include_dashboard=False, _temp_dir=str(folder), log_to_driver=False)
    yield
    ray.shutdown()
    remove_temp_dir(folder)


def test_each_rank_sees_a_gpu_of_its_own_or_its_half_of_one(gpus: None) -> None:
    config = Config()
    config.training.ranks = 2
    with make_runtime(RuntimeConfig(), PlacementConfig()) as runtime:
        assert runtime.num_gpus == 3
        each = gpus_of_a_rank(config, runtime.num_gpus)
        trainers = spawn(Looker, name="trainers", ranks=2, runtime=runtime, gpus=each)
        sharing = [spawn(Looker, name=name, ranks=1, runtime=runtime, gpus=each / 2) for name in ("one", "other")]
        free = spawn(Looker, name="rewarders", ranks=1, runtime=runtime)
        seen = [place for group in (trainers, *sharing) for place in asyncio.run(group.sees())]
        owners = {devices for devices, _ in seen[:2]}
        assert owners | {seen[2][0]} == {"0", "1", "2"}
        assert seen[2] == seen[3], "half of a GPU each"
        assert {rank for _, rank in seen} == {"0"}
        assert len(asyncio.run(free.sees())) == 1, "ranks without a GPU of their own start all the same"
        with pytest.raises(ConfigError, match=r"more needs 1 GPUs \(1 ranks of 1\), and 0 of 3 are free"):
            spawn(Looker, name="more", ranks=1, runtime=runtime, gpus=each)
