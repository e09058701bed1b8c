"""`asystem plan`: of all ways to run a recipe on a machine the one whose step is predicted to be the quickest, and why.

Every layout is tried with every recompute, micro-batch, offload and sleep. Those that do not fit are left out; a
complication must save 1 % of the predicted time. What was not chosen is told with its numbers: of each other value of
each choice the best way to have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

from asystem.config import Config, Master, Optimizer, PlacementKind, Recompute, RuntimeKind, Sleep, Transport
from asystem.controller.planning.choices import Choice, Estimate, Estimator
from asystem.controller.planning.predict import Workload, evened, generation_seconds, training_seconds
from asystem.errors import CapacityError
from asystem.memory import GIB, Machine
from asystem.models import ModelSpec
from asystem.training.memory import STEP, stages

LARGEST_MICRO = 32_768  # tokens; beyond it nothing gets quicker
RECOMPUTE = (Recompute.none, Recompute.selective, Recompute.full)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A choice with its numbers: seconds by phase, and of the whole step."""

    choice: Choice
    memory: Estimate
    seconds: dict[str, float]
    step: float

    @property
    def fits(self) -> bool:
        return self.memory.short == 0

    @property
    def cost(self) -> float:
        """Seconds, a complication counting 1 %."""
        c = self.choice
        return self.step * (1 + 0.01 * (RECOMPUTE.index(c.recompute) + c.offload + c.sleep))


@dataclass(frozen=True, slots=True)
class Plan:
    """What was chosen for a recipe on a machine, and the best way of each other value of each choice."""

    machine: Machine
    spec: ModelSpec
    work: Workload
    limit: int
    best: Candidate
    others: list[tuple[str, str, Candidate]]  # what differs, its value there, the best candidate that has it
    reasons: list[str]

    def apply(self, config: Config) -> Config:
        """The configuration with the choice in it."""
        return with_choice(config, self.best.choice, self.machine.is_gpu)


def make_plan(
    config: Config,
    spec: ModelSpec,
    machine: Machine,
    work: Workload | None = None,
    *,
    pinned: bool = False,
    only: PlacementKind | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        work: of a step; None = what the recipe asks for at its longest.
        pinned: placement, ranks and training stay as configured; only sleep and the pool are chosen.
        only: the placement to choose in; None = all.

    Raises:
        CapacityError: nothing fits: with the numbers of what came nearest, and what would.
    """
    work = work or Workload.of(config)
    estimator = Estimator(config, spec, machine)
    choices = [c for c in _choices(config, machine, work, pinned) if only in (None, c.placement)]
    found = [_candidate(estimator, choice, work) for choice in choices]
    fitting = [candidate for candidate in found if candidate.fits]
    if not found:
        raise CapacityError(
            f"{machine.devices} device(s) are too few for training.tensor_parallel={config.training.tensor_parallel} x "
            f"training.expert_parallel={config.training.expert_parallel} ranks of training and generation."
            f"tensor_parallel={config.generation.tensor_parallel} beside them: lower one of them"
        )
    if not fitting:
        raise CapacityError(_nothing_fits(config, spec, machine, work, estimator, found, pinned))
    best = min(fitting, key=lambda candidate: candidate.cost)
    plan = Plan(machine, spec, work, estimator.limit, best, list(_others(best, found)), [])
    plan.reasons.extend(_reasons(plan, estimator))
    return plan


def with_choice(config: Config, choice: Choice, is_gpu: bool) -> Config:
    """A copy of a configuration with a choice in it."""
    chosen = deepcopy(config)
    chosen.placement.kind = choice.placement
    chosen.placement.sleep = Sleep.always if choice.sleep else Sleep.never
    chosen.training.ranks, chosen.generation.ranks = choice.training_ranks, choice.generation_ranks
    chosen.training.micro_batch_tokens = choice.micro
    chosen.training.recompute, chosen.training.offload_optimizer = choice.recompute, choice.offload
    if choice.training_ranks > 1:
        chosen.training.zero = str(choice.zero)
    if is_gpu:
        chosen.device = "auto" if chosen.device == "cpu" else chosen.device  # a recipe of a CPU, on other machines
        chosen.generation.kv_tokens = choice.kv_tokens
    return chosen


def _layouts(config: Config, machine: Machine) -> Iterator[tuple[PlacementKind, int, int]]:
    inline, parallel = config.runtime.kind is RuntimeKind.inline, config.generation.tensor_parallel
    training = config.training
    cut = training.tensor_parallel * training.expert_parallel
    alone = inline or training.lora.base != "auto" or training.offload_optimizer
    devices = 1 if inline else machine.devices
    if cut == parallel == 1 and _can_share(config):
        yield PlacementKind.hybrid, 1 if alone else devices, 1 if alone else devices
    if devices == cut == parallel == 1:
        yield PlacementKind.split, 1, 1
    for trainers in range(cut, 2 if alone else devices, cut):
        if devices > trainers and (devices - trainers) % parallel == 0:
            yield PlacementKind.split, trainers, devices - trainers


def _can_share(config: Config) -> bool:
    """Whether generation can decode with what training has on the GPU (`checks` refuses the others)."""
    plain = config.generation.dtype not in ("int8", "fp8") and config.weights.transport is Transport.auto
    return plain and not config.training.offload_parameters


def _choices(config: Config, machine: Machine, work: Workload, pinned: bool) -> Iterator[Choice]:
    training = config.training
    layouts: Iterable[tuple[PlacementKind, int, int]] = _layouts(config, machine)
    recomputes: tuple[Recompute, ...] = RECOMPUTE
    if pinned:
        layouts = [(config.placement.kind, training.ranks, config.generation.ranks)]
    if pinned or not machine.is_gpu:
        recomputes = (training.recompute,)
    for kind, trainers, generators in layouts:
        free = machine.is_gpu and not pinned
        sizes = _sizes(config, work, trainers) if free else [training.micro_batch_tokens]
        offloads = {training.offload_optimizer}
        if trainers == 1 and machine.is_gpu and not pinned:
            offloads.add(True)
        for offload in sorted(offloads):
            for sleep in _sleeps(config, kind, machine):
                for recompute in (r for r in recomputes if r is not Recompute.none or not training.offload_parameters):
                    for micro in sizes:
                        for zero in _stages(config, machine, trainers, pinned):
                            yield Choice(kind, trainers, generators, recompute, offload, sleep, micro, zero)


def _stages(config: Config, machine: Machine, trainers: int, pinned: bool) -> tuple[int, ...]:
    """Of `training.zero`. Where that is auto and nothing is chosen here, the run takes what memory is left."""
    found = stages(config.training, trainers)
    if pinned:
        return found[-1:]
    return found if machine.is_gpu else found[:1]


def _sleeps(config: Config, kind: PlacementKind, machine: Machine) -> tuple[bool, ...]:
    if kind is not PlacementKind.hybrid:
        return (False,)
    wanted = config.placement.sleep
    if wanted is Sleep.auto:
        return (False, True) if machine.is_gpu else (False,)
    return (wanted is Sleep.always,)


def _sizes(config: Config, work: Workload, trainers: int) -> list[int]:
    """Micro-batches: powers of two that hold the longest sequence, and the recipe's own, each lowered to what as many
    micro-batches fill, evened out.

    Lowered here, not only planned for: a step whose responses end early may fill fewer micro-batches, to the limit.
    """
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    sizes = {size for power in range(10, 16) if longest <= (size := 2**power) <= LARGEST_MICRO}
    varied = longest - work.prompt - work.new  # mean lengths need room for longer ones
    sizes |= {config.training.micro_batch_tokens}
    filled = {size: evened(work, config, trainers, size)[1] + varied for size in sizes}
    return sorted({min(size, -(-tokens // STEP) * STEP) for size, tokens in filled.items()})


def _candidate(estimator: Estimator, choice: Choice, work: Workload) -> Candidate:
    config, spec, machine = estimator.config, estimator.spec, estimator.machine
    memory = estimator.of(choice)
    choice = replace(choice, kv_tokens=memory.kv_tokens)
    plan, train, card = estimator.generation(), estimator.train(choice), machine.card
    hybrid = choice.placement is PlacementKind.hybrid
    replicas = choice.generation_ranks // config.generation.tensor_parallel
    length = work.prompt + work.new
    batch = min(-(-work.rollouts // replicas), config.generation.max_running, max(1, memory.kv_tokens // length))
    trained = sum(
        p.numel()
        for p in estimator.training(choice.training_ranks, choice.recompute, choice.offload, choice.zero).trained
    )
    seconds = {
        "generation": generation_seconds(
            spec, card, work, replicas=replicas, batch=batch, weights=plan.weights,
            token_bytes=plan.block // config.generation.block_size,
        ),
        "training": training_seconds(
            spec, card, work, config, ranks=choice.training_ranks, micro=choice.micro, recompute=choice.recompute,
            zero=choice.zero, state_bytes=train.held + train.gradients,
            host_bytes=12 * trained if choice.offload else 0,
        ),
        "publication": _publication(estimator, choice),
        "sleep": 2 * memory.moving / card.bus,
    }  # fmt: skip
    apart = machine.devices > 1 or not machine.is_gpu  # ranks on a CPU have cores of their own
    overlap = not hybrid and config.rollout.max_staleness > 0 and apart
    phases = seconds["generation"], seconds["training"]
    step = (max(phases) if overlap else sum(phases)) + seconds["publication"] + seconds["sleep"]
    return Candidate(choice, memory, seconds, step)


def _publication(estimator: Estimator, choice: Choice) -> float:
    """Seconds to bring new weights to generation: merged on the card, gathered over links, or through the host."""
    spec, card, ranks = estimator.spec, estimator.machine.card, choice.training_ranks
    size = spec.num_parameters * estimator.decode_dtype.itemsize
    if choice.placement is PlacementKind.hybrid:
        merged = 30 * estimator.adapted() / card.bandwidth  # read and written in float32 on the way
        return merged + size * (ranks - 1) / ranks / card.link
    return size / ranks / card.bus + size / card.bus


def _others(best: Candidate, found: list[Candidate]) -> Iterator[tuple[str, str, Candidate]]:
    """Of each other value of each choice, the best candidate that has it; layouts first, then within the chosen one."""
    knobs: dict[str, Callable[[Choice], object]] = {
        "placement": lambda c: c.layout,
        "recompute": lambda c: c.recompute.name,
        "offload_optimizer": lambda c: c.offload,
        "sleep": lambda c: c.sleep,
        "micro_batch_tokens": lambda c: c.micro,
        "zero": lambda c: c.zero,
    }
    for knob, value in knobs.items():
        pool = [c for c in found if knob == "placement" or c.choice.layout == best.choice.layout]
        for other in dict.fromkeys(value(c.choice) for c in pool):
            if other != value(best.choice):
                yield knob, str(other).lower(), min((c for c in pool if value(c.choice) == other), key=_rank)


def _rank(candidate: Candidate) -> tuple[int, float]:
    """Fitting ones by their cost, before others by what they lack."""
    return candidate.memory.short, candidate.cost


def _reasons(plan: Plan, estimator: Estimator) -> Iterator[str]:
    best, work = plan.best, plan.work
    choice, name = best.choice, best.choice.layout
    phase, size = best.memory.worst()
    yield (
        f"{name}: {best.step:.3g} s a step predicted; the fullest phase, {phase}, takes {size / GIB:.2f} GiB of the "
        f"{plan.limit / GIB:.2f} of generation.memory_fraction={estimator.config.generation.memory_fraction:g}"
    )
    length = work.prompt + work.new
    replicas = max(1, choice.generation_ranks // estimator.config.generation.tensor_parallel)
    share = min(-(-work.rollouts // replicas), estimator.config.generation.max_running)
    at_once = min(share, choice.kv_tokens // length)
    yield (
        f"kv_tokens={choice.kv_tokens:,}: {at_once} of {share} rollouts of {length} tokens decode together on a replica"
        + ("" if at_once == share else ", as many as there is room for")
    )
    if choice.sleep:
        pool = best.memory.phases["generation"]["kv"]
        yield (
            f"sleep: {pool / GIB:.2f} GiB of KV give way while training runs, and {best.memory.moving / GIB:.2f} GiB "
            f"of states and copies lie in the host's memory while not used: {best.seconds['sleep']:.2g} s a step"
        )
    for knob, value, other in plan.others:
        yield f"not {knob}={value}: {why_not(other, best, plan.limit)}"


def why_not(other: Candidate, best: Candidate, limit: int) -> str:
    """Why a candidate was not chosen, with its numbers."""
    c = other.choice
    way = f"recompute={c.recompute.name}, {c.micro:,} tokens a micro-batch"
    way += ", offloaded" * c.offload + ", asleep" * c.sleep
    if not other.fits:
        phase, size = other.memory.worst()
        return f"does not fit: {phase} needs {size / GIB:.2f} GiB of {limit / GIB:.2f} ({way})"
    if other.step > best.step:
        return f"{other.step:.3g} s a step against {best.step:.3g} ({way})"
    return f"{other.step:.3g} s a step, no 1 % less for each complication ({way})"


def _nothing_fits(
    config: Config,
    spec: ModelSpec,
    machine: Machine,
    work: Workload,
    estimator: Estimator,
    found: list[Candidate],
    pinned: bool,
) -> str:
    nearest = min(found, key=lambda candidate: candidate.memory.short)
    phase, size = nearest.memory.worst()
    roles = sorted(nearest.memory.phases[phase].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{role} {amount / GIB:.2f}" for role, amount in roles if amount > GIB // 100)
    micro, recompute = nearest.choice.micro, nearest.choice.recompute.name
    return (
        f"nothing fits on {machine}: the nearest, {nearest.choice.layout} with recompute={recompute} and {micro} "
        f"tokens a micro-batch, needs {size / GIB:.2f} GiB in {phase} ({parts}), and generation.memory_fraction="
        f"{config.generation.memory_fraction:g} allows {estimator.limit / GIB:.2f}: "
        f"{_remedy(config, spec, machine, work, pinned)}"
    )


def _remedy(config: Config, spec: ModelSpec, machine: Machine, work: Workload, pinned: bool) -> str:
    """Changes of the recipe under which something fits: each is tried."""

    def eight_bit(c: Config) -> None:
        c.training.optimizer = Optimizer.adamw8bit

    def streamed(c: Config) -> None:
        c.training.offload_optimizer = c.training.offload_parameters = True

    def half(c: Config) -> None:
        c.training.master = Master.bfloat16_stochastic

    def lora(c: Config) -> None:
        c.training.lora.rank = 16

    def quantized(c: Config) -> None:
        lora(c)
        c.training.lora.base = "nf4"

    tried: dict[str, Callable[[Config], None]] = {
        "training.optimizer=adamw8bit": eight_bit,
        "training.master=bfloat16_stochastic": half,
        "training.offload_optimizer=true training.offload_parameters=true": streamed,
        "training.lora.rank=16": lora,
        "training.lora.rank=16 training.lora.base=nf4": quantized,
    }
    fits = []
    for name, change in tried.items():
        changed = deepcopy(config)
        change(changed)
        estimator = Estimator(changed, spec, machine)
        if any(estimator.of(choice).short == 0 for choice in _choices(changed, machine, work, pinned)):
            fits.append(name)
            if changed.training.lora.rank > 0:
                break
    if fits:
        return f"{' or '.join(fits)} would fit"
    return "use more GPUs or larger ones, a smaller model, or shorter prompts and responses"
