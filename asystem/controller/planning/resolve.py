"""What a run takes of the plan: all of it with `placement=auto`, the sleep and the pool of a hybrid one."""

from __future__ import annotations

from asystem.config import Config, PlacementKind, Sleep
from asystem.controller.planning.plan import Plan, make_plan
from asystem.controller.planning.predict import Workload
from asystem.errors import CapacityError
from asystem.memory import Machine, this_machine
from asystem.workers.build import check_model


def plan_run(
    config: Config, machine: Machine | None = None, *, prompt: int | None = None, new: int | None = None
) -> Plan:
    """The plan of a recipe.

    Args:
        machine: None = this one. prompt, new: mean tokens of prompts and responses; None = as long as they may be.

    Raises:
        CapacityError: nothing fits.
        DataError, ModelError: the model folder or its tokenizer cannot be used.
    """
    spec, _ = check_model(config)
    return make_plan(config, spec, machine or this_machine(config.device), Workload.of(config, prompt, new))


def resolve(config: Config) -> tuple[Config, list[str]]:
    """The configuration that a run starts with, and why. A hybrid one on a GPU gets a pool that leaves room for
    training, and sleeps if that is quicker; where nothing fits it is left to the engines' own checks, asleep.

    Raises:
        CapacityError: nothing fits, with `placement=auto`.
    """
    kind = config.placement.kind
    if kind is PlacementKind.auto:
        plan = plan_run(config)
        return plan.apply(config), plan.reasons[:3]
    if kind is not PlacementKind.hybrid or not (machine := this_machine(config.device)).is_gpu:
        return config, []
    try:
        plan = make_plan(config, check_model(config)[0], machine, pinned=True)
    except CapacityError as error:
        config.placement.sleep = Sleep.always if config.placement.sleep is Sleep.auto else config.placement.sleep
        return config, [str(error)]
    return plan.apply(config), plan.reasons[:3]
