"""The folder of a run: `runs/<recipe>/<date-time>/`, the link `latest` beside it, and files written whole or not."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from asystem.config import Config
from asystem.errors import ConfigError
from asystem.tracking.wandb_run import check_installed


def new_run_dir(config: Config) -> Path:
    """Makes the run's folder: `run_dir`, or `runs/<recipe>/<date-time>`, which `runs/<recipe>/latest` then names.

    Raises:
        ConfigError: `run_dir` holds a run already, or W&B is asked for and missing; nothing has been made then.
    """
    check_installed(config.tracking.wandb)
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
        if (run_dir / "metrics.jsonl").exists():
            raise ConfigError(f"run_dir={run_dir} holds a run already: name another folder, or remove it")
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir
    parent = Path("runs") / Path(config.recipe).name
    run_dir = _make_unique(parent, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    _point(parent / "latest", run_dir.name)
    return run_dir


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that no reader ever sees a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_config(config: Config, run_dir: Path) -> None:
    """`config.yaml`: the whole configuration as plain YAML, in the order of the schema."""
    import yaml

    write_whole(run_dir / "config.yaml", yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True))


def plain(value: Any) -> Any:
    """Enums become their values, tuples lists, paths text; dicts and lists are walked."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _make_unique(parent: Path, name: str) -> Path:
    """Two runs that begin in one second get two folders: mkdir decides who was first."""
    for attempt in range(1, 1000):
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"{parent / name} and 998 more of that name exist: set run_dir")


def _point(link: Path, target: str) -> None:
    partial = link.with_name(f".latest.{target}")
    partial.symlink_to(target)
    os.replace(partial, link)
