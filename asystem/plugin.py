"""A user's own Python beside a recipe: files loaded by path, functions found by name."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from asystem.errors import ConfigError, DataError, nearest


def resolve(path: str, recipe_dir: str) -> Path:
    """``path`` as it stands if it is absolute, else within the recipe's folder."""
    return Path(path) if Path(path).is_absolute() else Path(recipe_dir) / path


def load_module(path: Path, *, key: str) -> ModuleType:
    """Runs a Python file.

    Raises:
        DataError: there is none (``key`` names it), or it failed.
    """
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"asystem_{path.stem}_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"{key}: {path} failed to import: {type(error).__name__}: {error}") from error
    return module


def is_plugin(name: str) -> bool:
    """Whether a name means a function in a file: `file.py:function`."""
    return ".py:" in name


@lru_cache  # so that a file runs once a process, whatever it holds
def load_function(name: str, recipe_dir: str, *, key: str) -> Any:
    """The function of `file.py:function`.

    Raises:
        ConfigError: the file has no such function. DataError: the file is missing or failed.
    """
    file, _, function = name.rpartition(":")
    path = resolve(file, recipe_dir)
    module = load_module(path, key=key)
    found = getattr(module, function, None)
    if not callable(found):
        names = [known for known, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{key}: {path} has no function {function}{nearest(function, names)}")
    return found
