"""The run's folder, and files in it that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from asystem.config import Config
from asystem.errors import ConfigError
from asystem.tracking.wandb_run import check_wandb


def new_run_dir(config: Config) -> Path:
    """Makes `config.run_dir`, or runs/<recipe>/<date-time>/ with runs/<recipe>/latest pointing to it.

    Returns:
        An absolute path: workers have working directories of their own.

    Raises:
        ConfigError: `run_dir` holds a run already, or W&B is asked for and cannot be had; nothing is made then.
    """
    check_wandb(config.tracking.wandb)
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
        if (run_dir / "metrics.jsonl").exists():
            raise ConfigError(f"run_dir={run_dir} holds a run already: name another folder, or remove that one")
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir.resolve()
    parent = Path("runs") / recipe_name(config)
    parent.mkdir(parents=True, exist_ok=True)
    run_dir = _make_unique(parent, datetime.now().strftime("%Y%m%d-%H%M%S"))
    link = parent / f".latest-{run_dir.name}"
    link.symlink_to(run_dir.name, target_is_directory=True)
    link.replace(parent / "latest")
    return run_dir.resolve()


def recipe_name(config: Config) -> str:
    """The recipe's name, also where the recipe was given as a path."""
    return Path(config.recipe).name or "run"


def _make_unique(parent: Path, now: str) -> Path:
    for name in (now, *(f"{now}-{attempt}" for attempt in range(1, 1000))):
        try:
            (parent / name).mkdir()
        except FileExistsError:  # another run began in this second
            continue
        return parent / name
    raise ConfigError(f"{parent / now} and 999 more of that name exist: set run_dir")


def plain(value: Any) -> Any:
    """A configuration as dicts, lists and plain values; enums become their values, paths text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def finite(value: Any) -> Any:
    """The same without NaN and infinity, for which JSON has no words: they become null."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_config(config: Config, path: Path) -> None:
    """The whole configuration as plain YAML, in the order of the schema."""
    write_whole(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Valid JSON: NaN and infinity become null."""
    write_whole(path, json.dumps(finite(value), indent=indent, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
