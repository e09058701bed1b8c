"""The run's folder, and files in it that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from asystem.config import Config


def new_run_dir(config: Config) -> Path:
    """Makes `config.run_dir`, or runs/<recipe>/<date-time>/ with runs/<recipe>/latest pointing to it."""
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir.resolve()
    parent = Path("runs") / config.recipe
    parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = now
    for attempt in range(1, 1000):
        try:
            (parent / name).mkdir()
            break
        except FileExistsError:  # another run began in this second
            name = f"{now}-{attempt}"
    link = parent / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(name, target_is_directory=True)
    link.replace(parent / "latest")
    return (parent / name).resolve()


def plain(value: Any) -> Any:
    """A configuration as dicts, lists and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def write_config(config: Config, path: Path) -> None:
    write_whole(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
