"""What a configuration may not say: a table of rules a section, all looked at before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asystem.checks import algorithm, placement, rollout, run, training
from asystem.errors import ConfigError

if TYPE_CHECKING:
    from asystem.config import Config


TRAIN = (run.positions, algorithm.algorithm, rollout.rollout, rollout.liveness)
FINETUNE = (training.finetune,)
COMMON = (
    training.training,
    training.memory,
    training.streaming,
    training.lora,
    placement.parallel,
    placement.placement,
    placement.weights,
    placement.precision,
    run.others,
)


def check(config: Config) -> None:
    """Raises the first broken rule.

    Raises:
        ConfigError: in one line.
    """
    program = TRAIN if config.command.value == "train" else FINETUNE
    for section in (run.run, run.model, *program, *COMMON):
        for broken, message in section(config):
            if broken:
                raise ConfigError(message)
