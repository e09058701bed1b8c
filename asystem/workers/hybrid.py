"""ASystem's Hybrid Runtime: training and generation in one worker, over one copy of the weights.

    one rank              the engine decodes with the very tensors that the optimizer writes
    with adapters         it has merged copies of the matrices that have one, and shares all others
    several ranks         each trains a shard (FSDP2) and decodes by itself, with a whole copy in generation's dtype; a
                          publication gathers what trains: (n - 1) / n of the copy's bytes come to each of n ranks

The two take turns: a rank answers its calls one after another. With `placement.sleep=always` what the other one alone
needs is asleep meanwhile (`asystem.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from asystem.config import Config, Sleep
from asystem.data.batch import Batch
from asystem.memory import GIB, AMem, MappedRegion, Moved, can_map
from asystem.models import Decoder, decoding_copy, refresh_copy
from asystem.spmd import Collect, Dispatch, remote
from asystem.state import Published
from asystem.stats import Stats
from asystem.training.states import local
from asystem.types import Ref, Trajectory
from asystem.workers.build import build_trained, pick_device, pick_dtype
from asystem.workers.generate import GenerateWorker
from asystem.workers.train import TrainWorker

HELD_BY = {"generation": ("copy", "kv"), "training": ("states", "reference")}


class HybridWorker(TrainWorker, GenerateWorker):
    """Both programs on one device.

    Attributes:
        memory: what sleeps; None = nothing does.
    """

    collective = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        TrainWorker.__init__(self, config, run_dir)
        self.memory: AMem | None = None
        self._moved = Moved()  # since the last update
        self._stamped: int | None = None  # the version that the engine knows of already

    def build(self) -> Decoder:
        """The model that both share, as training starts with it."""
        return build_trained(self.config, pick_device(self.config))

    async def setup(self) -> None:
        device, model = pick_device(self.config), self.build()
        self.start_training(model)  # first: it brings the shared weights into the dtype that both compute in
        copy = decoding_copy(model, pick_dtype(self.config.generation.dtype, device))
        if self.config.placement.sleep is not Sleep.always:
            return self.start_generation(copy)
        self.memory = memory = AMem(device)
        memory.add("states", map(local, self.trainer.optimizer.tensors().values()), apart_from=_parameters(copy, model))
        memory.add("copy", _parameters(copy), apart_from=_parameters(model))
        memory.enter(["copy"])  # the pool is planned for what is left
        if device.type == "cuda" and can_map():
            self.start_generation(copy, self._map_pool)
        else:
            self.start_generation(copy)
            memory.add("kv", [self.engine.cache.data])

    def _map_pool(self, nbytes: int) -> Tensor:
        """Memory for the KV pool whose addresses stay, so that captured decode steps do."""
        region = MappedRegion(nbytes, pick_device(self.config))
        assert self.memory is not None, "only what sleeps needs it"
        self.memory.add("kv", region)
        return region.tensor

    def begin_generation(self) -> None:
        """Wakes the KV pool and copies; optimizer states fall asleep."""
        self._begin("generation")

    def begin_training(self) -> None:
        """Wakes optimizer states; the KV pool gives way, its content only where unfinished rollouts need it."""
        self._begin("training")

    def _begin(self, phase: str) -> None:
        if self.memory is None:
            return
        if self.trainer.reference is not None and "reference" not in self.memory.held():
            reference = _parameters(self.trainer.reference)
            self.memory.add("reference", reference, apart_from=_parameters(self.trainer.model))
        falls_asleep = phase == "training" and self.memory.held()["kv"] > 0
        drop = ["kv"] if falls_asleep and not self.engine.rest() else []
        self._moved += self.memory.enter(HELD_BY[phase], drop)

    @remote(Dispatch.SPLIT, Collect.SUM)
    async def update(self, batch: Batch) -> Stats:
        """As in training. Where the weights are shared, the next slice of decoding reads the new ones, whether or not
        they have been published, and its tokens say so."""
        stats = await super().update(batch)
        if self.shares_weights:
            self._stamped = batch.version + 1
            self.engine.weights_updated(self._stamped)
        if self.memory is not None:
            stats.add_mean("time/sleep", self._moved.seconds, 1.0)
            stats.add_mean("memory/moved_gib", (self._moved.slept + self._moved.woken) / GIB, 1.0)
            self._moved = Moved()
        return stats

    @property
    def shares_weights(self) -> bool:
        """Whether both runtimes have the same tensors, all of them."""
        return self.engine.model is self.trainer.model

    @remote(Dispatch.BROADCAST, Collect.GATHER)
    async def export_weights(self) -> list[Ref[Published]]:
        """Nothing is sent: what a rank cannot share, `load_weights` brings."""
        return []

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def load_weights(
        self, weights: Sequence[Ref[Published]], version: int, probe: bool = False
    ) -> Ref[list[Trajectory]] | None:
        """Refreshes what is not shared; else publishing is the new version number alone."""
        self.check_version(version)
        self.begin_generation()
        refresh_copy(self.engine.model, self.trainer.model)
        if self._stamped != version:
            self.engine.weights_updated(version)
        return self.probe() if probe and self.rank == 0 else None


def _parameters(*modules: torch.nn.Module) -> list[Tensor]:
    """This rank's part of each parameter."""
    return [local(parameter) for module in modules for parameter in module.parameters()]
