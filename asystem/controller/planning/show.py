"""A plan for people and for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from asystem.config import Config
from asystem.controller.planning.plan import Plan, why_not
from asystem.memory import GIB

ROLES = (
    "weights", "decoding weights", "reference", "masters", "moments", "gathered", "gradients", "activations", "kv",
    "workspace", "context",
)  # fmt: skip


def settings(config: Config, plan: Plan) -> dict[str, str | int | bool]:
    """The chosen values by their configuration keys: as overrides they make the same run without `placement=auto`."""
    chosen = plan.apply(config)
    found: dict[str, str | int | bool] = {
        "placement": chosen.placement.kind.value,
        "placement.sleep": chosen.placement.sleep.value,
        "training.ranks": chosen.training.ranks,
        "generation.ranks": chosen.generation.ranks,
        "training.micro_batch_tokens": chosen.training.micro_batch_tokens,
        "training.recompute": chosen.training.recompute.value,
        "training.offload_optimizer": chosen.training.offload_optimizer,
    }
    if chosen.training.ranks > 1:
        found["training.zero"] = chosen.training.zero
    if chosen.generation.kv_tokens is not None:
        found["generation.kv_tokens"] = chosen.generation.kv_tokens
    if chosen.device != config.device:
        found["device"] = chosen.device
    return found


def overrides(config: Config, plan: Plan) -> str:
    """`settings` as they stand on a command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in settings(config, plan).items())


def as_json(config: Config, plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    best, card = plan.best, plan.machine.card
    return {
        "recipe": config.recipe,
        "machine": {
            "card": card.name,
            "devices": plan.machine.devices,
            "is_gpu": plan.machine.is_gpu,
            "memory": card.memory,
            "flops": card.flops,
            "bandwidth": card.bandwidth,
            "bus": card.bus,
        },
        "work": {"rollouts": plan.work.rollouts, "prompt_tokens": plan.work.prompt, "new_tokens": plan.work.new},
        "settings": settings(config, plan),
        "memory": {phase: {**roles, "total": sum(roles.values())} for phase, roles in best.memory.phases.items()},
        "limit": plan.limit,
        "seconds": best.seconds | {"step": best.step},
        "why": plan.reasons,
        "others": [
            {
                "differs": knob,
                "value": value,
                "fits": other.fits,
                "peak": other.memory.worst()[1],
                "seconds": other.step,
                "why_not": why_not(other, best, plan.limit),
            }
            for knob, value, other in plan.others
        ],
    }


def show(config: Config, plan: Plan, console: Console | None = None) -> None:
    """Prints tables of memory and time, the reasons, and the choice as overrides."""
    console = console or Console()
    work = plan.work
    console.print(
        f"[bold]{config.recipe}[/] on {plan.machine}: {_count(plan.spec.num_parameters)} parameters, a step of "
        f"{work.rollouts} rollouts of {work.prompt} + {work.new} tokens",
        highlight=False,
    )
    console.print(_memory(plan))
    console.print(_time(plan))
    for reason in plan.reasons:
        console.print(f"· {reason}", highlight=False, markup=False)
    console.print(f"\n{overrides(config, plan)}", highlight=False, markup=False, soft_wrap=True)


def _memory(plan: Plan) -> Table:
    phases = plan.best.memory.phases
    table = Table(title=f"GiB a device, of {plan.limit / GIB:.2f} that may be used")
    table.add_column("role")
    for phase in phases:
        table.add_column(phase, justify="right")
    for role in ROLES:
        if any(role in roles for roles in phases.values()):
            table.add_row(role, *(_gib(roles.get(role, 0)) for roles in phases.values()))
    table.add_section()
    table.add_row("total", *(_gib(sum(roles.values())) for roles in phases.values()))
    return table


def _time(plan: Plan) -> Table:
    table = Table(title="seconds, predicted")
    for phase in (*plan.best.seconds, "step"):
        table.add_column(phase, justify="right")
    table.add_row(*(f"{value:.2f}" for value in (*plan.best.seconds.values(), plan.best.step)))
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _count(number: int) -> str:
    """Of parameters: 0.43 M, 596 M, 8.19 B."""
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
