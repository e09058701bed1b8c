"""What `test_torchrun.py` runs on each node: two groups of two ranks, spread, that report to a file and stay busy."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from asystem.config import PlacementConfig, RuntimeConfig
from asystem.spmd import Collect, Dispatch, Worker, bootstrap, make_runtime, remote, spawn


class Member(Worker):
    collective = True

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    @remote(Dispatch.BROADCAST, Collect.ALL)
    async def reduce(self) -> float:
        import torch
        import torch.distributed as dist

        value = torch.tensor([self.rank + 1.0])
        dist.all_reduce(value)
        return value.item()

    @remote(Dispatch.BROADCAST)
    async def sleep(self) -> None:
        time.sleep(300)


async def talk(output: Path, groups: list[Member]) -> None:
    nodes = [await group.node() for group in groups]
    report = json.dumps({"nodes": nodes, "sums": [await group.reduce() for group in groups]})
    output.with_suffix(".part").write_text(report)
    output.with_suffix(".part").rename(output)
    await groups[0].sleep()


def main() -> None:
    output = Path(sys.argv[1])
    (output.parent / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    with bootstrap(RuntimeConfig(), lost_seconds=8) as is_controller:
        if is_controller:
            with make_runtime(RuntimeConfig(), PlacementConfig(spread=True)) as runtime:
                groups = [spawn(Member, name=name, ranks=2, runtime=runtime) for name in ("trainers", "generators")]
                asyncio.run(talk(output, groups))


if __name__ == "__main__":
    main()
