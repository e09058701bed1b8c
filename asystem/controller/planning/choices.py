"""One way to run a recipe on a machine, and what it takes of a GPU's memory, by phase and role.

The numbers of training and generation are those of `training.memory` and `generation.memory`, which their engines check
themselves; here they are added up as the placement has them stand together:

    hybrid            weights once; each phase beside what the other one holds throughout
    hybrid, asleep    each phase beside the weights and the captured steps alone
    split             each on its own GPU; two processes on an only one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch

from asystem.config import Config, PlacementKind, Recompute, TrainingConfig
from asystem.generation.memory import GenerationPlan
from asystem.memory import GIB, Machine
from asystem.models import ModelSpec, Shard
from asystem.training import TrainingPlan, TrainMemory
from asystem.training.memory import shapes
from asystem.workers.build import pick_dtype

CONTEXT = int(0.85 * GIB)  # of a process on a GPU: CUDA, kernels, libraries; 0.82 to 0.85 on an H200 and an H100
NCCL = int(0.4 * GIB)  # channels of a process that talks to others

Roles = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """What the plan may choose. Nothing of it changes what is computed, but for the order of sums.

    Attributes:
        kv_tokens: 0 = not yet known.
    """

    placement: PlacementKind
    training_ranks: int
    generation_ranks: int
    recompute: Recompute
    offload: bool
    sleep: bool
    micro: int
    zero: int = 3
    kv_tokens: int = 0

    @property
    def layout(self) -> str:
        if self.placement is PlacementKind.hybrid:
            return f"hybrid on {self.training_ranks}"
        return f"split {self.training_ranks} + {self.generation_ranks}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a choice on the fullest GPU: of each phase by role, with the pool that there is room for.

    Attributes:
        moving: bytes that go to the host's memory and back in a step. states: masters and moments on the device.
        short: 0, or the bytes by which the smallest possible pool exceeds the room.
    """

    phases: dict[str, dict[str, int]]
    kv_tokens: int
    moving: int
    states: int
    short: int

    def worst(self) -> tuple[str, int]:
        """The phase that takes the most, and how much."""
        name = max(self.phases, key=lambda phase: sum(self.phases[phase].values()))
        return name, sum(self.phases[name].values())


class Estimator:
    """Estimates the memory of choices for one recipe on one machine."""

    def __init__(self, config: Config, spec: ModelSpec, machine: Machine) -> None:
        self.config, self.spec, self.machine = config, spec, machine
        device = torch.device(machine.device)
        self.dtype = pick_dtype(config.training.dtype, device)
        self.decode_dtype = pick_dtype(config.generation.dtype, device)
        self.limit = int(machine.card.memory * config.generation.memory_fraction)
        self._model = shapes(spec, config.training)
        self.training = cache(self._training)
        self.generation = cache(self._generation)
        self._step = cache(lambda *plan_and_micro: self.training(*plan_and_micro[:-1]).of(plan_and_micro[-1]))

    def training_config(self, recompute: Recompute, offload: bool, zero: int) -> TrainingConfig:
        return replace(self.config.training, recompute=recompute, offload_optimizer=offload, zero=str(zero))

    def train(self, choice: Choice) -> TrainMemory:
        """Of the choice's training alone."""
        return self._step(choice.training_ranks, choice.recompute, choice.offload, choice.zero, choice.micro)

    def of(self, choice: Choice) -> Estimate:
        """Of all phases."""
        train, plan = self.train(choice), self.generation()
        hybrid = choice.placement is PlacementKind.hybrid
        together = hybrid or choice.training_ranks + choice.generation_ranks > self.machine.devices
        phases = self._hybrid(choice, train, plan) if hybrid else self._split(choice, train, plan, together)
        free = self.limit - max(sum(roles.values()) for roles in phases.values())
        holders = [name for name in phases if name != "training" or (together and not choice.sleep)]
        room = self.limit - max(sum(phases[name].values()) for name in holders)
        blocks = min(plan.wanted, max(0, room) // plan.block)
        least = plan.least if self.config.generation.kv_tokens is None else plan.wanted
        short = max(0, -free, 0 if blocks >= least else least * plan.block - room)
        for name in holders:
            phases[name]["kv"] = max(blocks, least) * plan.block
        phases = {name: {role: size for role, size in roles.items() if size} for name, roles in phases.items()}
        states = train.masters + train.moments
        moving = states + self._copy(choice) + sum(self._reference(train).values())
        tokens = blocks * self.config.generation.block_size
        return Estimate(phases, tokens, moving if choice.sleep else 0, states, short)

    def adapted(self) -> int:
        """Numbers of the matrices that have adapters."""
        return self.training(1, Recompute.none, False).adapted

    def _hybrid(self, choice: Choice, train: TrainMemory, plan: GenerationPlan) -> dict[str, dict[str, int]]:
        common = {"weights": train.weights, "context": self._context(choice)}
        places = {"gathered": train.gathered} if choice.offload else {}  # those of offloaded states stay
        copy, held = self._copy(choice), plan.workspace - plan.passing
        states = {"masters": train.masters, "moments": train.moments} | self._reference(train)
        copied = {"decoding weights": copy}
        asleep = choice.sleep
        merging = self._largest(choice) if copy else 0
        training = common | states | ({} if asleep else copied) | _passes(train)
        training["workspace"] = training.get("workspace", 0) + held
        return {
            "generation": common | places | copied | ({} if asleep else states) | {"workspace": plan.workspace},
            "training": training,
            "publication": common | places | copied | ({} if asleep else states) | {"workspace": held + merging},
        }

    def _split(
        self, choice: Choice, train: TrainMemory, plan: GenerationPlan, together: bool
    ) -> dict[str, dict[str, int]]:
        context = {"context": self._context(choice)}
        states = {"weights": train.weights, "masters": train.masters, "moments": train.moments}
        training = context | states | self._reference(train) | _passes(train)
        generation = context | {"decoding weights": plan.weights, "workspace": plan.workspace}
        if together:
            resting = plan.workspace - plan.passing
            states |= {"gathered": train.gathered} if choice.offload else {}
            training = _added(training, context | {"decoding weights": plan.weights, "workspace": resting})
            generation = _added(generation, context | states | self._reference(train))
        return {"generation": generation, "training": training, "publication": dict(generation)}

    def _training(self, ranks: int, recompute: Recompute, offload: bool, zero: int = 3) -> TrainingPlan:
        cfg = self.training_config(recompute, offload, zero)
        device, model = self.machine.device, self._model
        return TrainingPlan(self.spec, cfg, dtype=self.dtype, ranks=ranks, device=device, model=model)

    def _generation(self) -> GenerationPlan:
        config, length = self.config, self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens
        spec, parallel = self.spec, config.generation.tensor_parallel
        if parallel > 1:
            spec = Shard(0, parallel, None).spec(spec)
        weights = spec.num_parameters * self.decode_dtype.itemsize
        if config.generation.dtype in ("int8", "fp8"):
            weights -= spec.active_matrix_weights * (self.decode_dtype.itemsize - 1)
        return GenerationPlan(
            spec,
            config.generation,
            max_length=length,
            dtype=self.decode_dtype,
            device=self.machine.device,
            weights=weights,
        )

    def _copy(self, choice: Choice) -> int:
        """What a hybrid rank decodes with beside the weights it trains: sharded ones whole, adapted ones merged."""
        if choice.training_ranks > 1:
            return self.spec.num_parameters * self.decode_dtype.itemsize
        return self.adapted() * self.dtype.itemsize

    def _largest(self, choice: Choice) -> int:
        """While a copy is refreshed: one whole parameter, or one merged matrix in float32 with what is added to it."""
        merged = self.config.training.lora.rank > 0
        shapes = [p.shape for p in self.training(1, Recompute.none, False).model.layers.parameters()]
        if choice.training_ranks > 1:
            shapes.append(torch.Size((self.spec.vocab_size, self.spec.hidden_size)))
        return max(prod(shape) for shape in shapes) * (14 if merged else self.decode_dtype.itemsize)

    def _reference(self, train: TrainMemory) -> dict[str, int]:
        if self.config.algorithm.kl_coefficient == 0:
            return {}
        shared = self.config.training.lora.rank > 0
        return {"reference": 0 if shared else train.weights}

    def _context(self, choice: Choice) -> int:
        if not self.machine.is_gpu:
            return 0
        return CONTEXT + (NCCL if choice.training_ranks + choice.generation_ranks > 2 else 0)


def _passes(train: TrainMemory) -> dict[str, int]:
    """A step's own memory at its peak: the passes', or the update's where that is more."""
    passes = train.activations + max(train.head, train.block)
    roles = {"gathered": train.gathered, "gradients": train.gradients}
    if train.update > passes:
        return roles | {"workspace": train.update}
    return roles | {"activations": train.activations, "workspace": passes - train.activations}


def _added(some: Roles, others: Roles) -> dict[str, int]:
    return {role: some.get(role, 0) + others.get(role, 0) for role in [*some, *(r for r in others if r not in some)]}
