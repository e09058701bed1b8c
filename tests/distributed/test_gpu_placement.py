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
def gpus(request: pytest.FixtureRequest) -> Iterator[None]:
    prepare_environment()
    import ray

    folder = new_temp_dir()
    ray.init(
        address="local", num_gpus=request.param, include_dashboard=False, _temp_dir=str(folder), log_to_driver=False
    )
    yield
    ray.shutdown()
    remove_temp_dir(folder)


@pytest.mark.parametrize("gpus", [3], indirect=True)
def test_each_rank_sees_a_gpu_of_its_own(gpus: None) -> None:
    config = Config()
    config.training.ranks = 2
    with make_runtime(RuntimeConfig(), PlacementConfig()) as runtime:
        assert runtime.num_gpus == 3
        each = gpus_of_a_rank(config, runtime.num_gpus)
        groups = [spawn(Looker, name=n, ranks=r, runtime=runtime, gpus=each) for n, r in (("trainers", 2), ("gen", 1))]
        free = spawn(Looker, name="rewarders", ranks=1, runtime=runtime)
        seen = [place for group in groups for place in asyncio.run(group.sees())]
        assert sorted(devices for devices, _ in seen) == ["0", "1", "2"]
        assert {rank for _, rank in seen} == {"0"}
        assert len(asyncio.run(free.sees())) == 1, "ranks without a GPU of their own start all the same"
        with pytest.raises(ConfigError, match=r"more needs 1 GPUs \(1 ranks of 1\), and 0 of 3 are free"):
            spawn(Looker, name="more", ranks=1, runtime=runtime, gpus=each)


@pytest.mark.parametrize("gpus", [1], indirect=True)
def test_training_and_generation_share_an_only_gpu(gpus: None) -> None:
    with make_runtime(RuntimeConfig(), PlacementConfig()) as runtime:
        each = gpus_of_a_rank(Config(), runtime.num_gpus)
        groups = [spawn(Looker, name=name, ranks=1, runtime=runtime, gpus=each) for name in ("trainers", "generators")]
        assert [asyncio.run(group.sees()) for group in groups] == [[("0", "0")], [("0", "0")]]
