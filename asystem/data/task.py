"""A task: prompts to train on, held-out prompts, demonstrations for the warm-up, and a reward.

A recipe's `task.py` is plain Python, with no registration. It may define any of::

    def train() -> list[dict]: ...            # each {"prompt": text or chat messages, ...whatever the reward needs}
    def evaluation() -> list[dict]: ...       # held out: none of these prompts may occur in the other two
    def demonstrations() -> list[dict]: ...   # each {"prompt": ..., "response": text}
    def reward(row: dict, response: str) -> float: ...

and JSONL or Parquet files (`data.train`, `data.evaluation`, `data.demonstrations`) stand in for the first three. Every
worker loads the task by itself, so the functions must give the same rows every time (seed what is random): requests
name a row by its number and no text passes through the controller.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from asystem.config import DataConfig
from asystem.data.files import Located, read_rows
from asystem.errors import DataError
from asystem.plugin import load_module, resolve

Row = dict[str, Any]
RewardFunction = Callable[[Row, str], float]


@dataclass(frozen=True)
class Task:
    """What a recipe trains on. ``reward`` is None when the recipe names none and the default verifier applies."""

    name: str
    train: Sequence[Row]
    evaluation: Sequence[Row]
    demonstrations: Sequence[Row]
    reward: RewardFunction | None

    def fingerprint(self) -> str:
        """Equal on all workers, or their row numbers would not mean the same prompts."""
        rows = json.dumps([self.train, self.evaluation], sort_keys=True, default=repr)
        return hashlib.sha256(rows.encode()).hexdigest()[:16]


def load_task(config: DataConfig, recipe_dir: str) -> Task:
    """Reads the recipe's task and datasets, and checks every row.

    Raises:
        DataError: a missing or failing task file, a malformed line (with its number), no prompts, or a held-out prompt
            that training would see.
    """
    module = load_module(resolve(config.task, recipe_dir), key="data.task") if config.task else None
    train = _rows("train", config.train, recipe_dir, module, ("prompt",))
    evaluation = _rows("evaluation", config.evaluation, recipe_dir, module, ("prompt",))
    demonstrations = _rows("demonstrations", config.demonstrations, recipe_dir, module, ("prompt", "response"))
    if not train:
        raise DataError(
            "no training prompts: define train() in the recipe's task.py or set data.train to a JSONL file"
            + (f" ({config.task or config.train} gave none)" if config.task or config.train else "")
        )
    _check_held_out(evaluation, {"train": train, "demonstrations": demonstrations})
    return Task(config.name, train, evaluation, demonstrations, getattr(module, "reward", None))


def prompt_key(row: Row) -> str:
    """A prompt as one string, for comparing prompts."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def locate_rows(name: str, path: str | None, recipe_dir: str, module: ModuleType | None) -> list[Located]:
    """The rows of a file (or folder), else what the task's function of that name returns, each with where it stands.

    Raises:
        DataError: the file cannot be read, or the function fails.
    """
    if path is not None:
        return read_rows(resolve(path, recipe_dir))
    if module is None or not hasattr(module, name):
        return []
    try:
        rows = list(getattr(module, name)())
    except Exception as error:
        raise DataError(f"{module.__file__}: {name}() failed: {type(error).__name__}: {error}") from error
    return [(f"{module.__file__}: {name}() row {number}", row) for number, row in enumerate(rows)]


def _rows(
    name: str, path: str | None, recipe_dir: str, module: ModuleType | None, required: Sequence[str]
) -> list[Row]:
    return [_checked(row, required, where) for where, row in locate_rows(name, path, recipe_dir, module)]


def _checked(row: Any, required: Sequence[str], where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {' and '.join(required)}, got {type(row).__name__}")
    for key in required:
        value = row.get(key)
        if not value or not isinstance(value, str if key == "response" else (str, list)):
            raise DataError(f'{where}: "{key}" is missing or empty' if not value else f'{where}: "{key}" is not text')
    return cast(Row, row)


def _check_held_out(evaluation: Sequence[Row], others: dict[str, Sequence[Row]]) -> None:
    held_out = {prompt_key(row) for row in evaluation}
    for name, rows in others.items():
        seen = [key for row in rows if (key := prompt_key(row)) in held_out]
        if seen:
            raise DataError(f"{len(seen)} held-out prompts occur in {name} too, the first is {seen[0]!r}; remove them")
