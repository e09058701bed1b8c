"""The functions that a recipe names: ours by name, its own by file.

`algorithm.surrogate=ppo` is one of ours; `algorithm.surrogate=mine.py:soft_clip` is the function `soft_clip` in
`mine.py` of the recipe's folder, with the same arguments and results as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from asystem.algorithms.advantages import ADVANTAGES, AdvantageFn
from asystem.algorithms.corrections import CORRECTIONS, CorrectionFn
from asystem.algorithms.surrogates import SURROGATES, SurrogateFn
from asystem.config import AlgorithmConfig
from asystem.errors import ConfigError, nearest
from asystem.plugin import is_plugin, load_function

F = TypeVar("F")


@dataclass(frozen=True)
class Algorithm:
    """A recipe's choice, ready to be called."""

    cfg: AlgorithmConfig
    advantage: AdvantageFn
    surrogate: SurrogateFn
    correction: CorrectionFn


def choose(cfg: AlgorithmConfig, recipe_dir: str) -> Algorithm:
    """The functions that ``cfg`` names.

    Raises:
        ConfigError: an unknown name, or a file or function that is not there.
    """
    return Algorithm(
        cfg,
        _find("advantage", cfg.advantage, ADVANTAGES, recipe_dir),
        _find("surrogate", cfg.surrogate, SURROGATES, recipe_dir),
        _find("correction", cfg.correction, CORRECTIONS, recipe_dir),
    )


def _find(key: str, name: str, table: Mapping[str, F], recipe_dir: str) -> F:
    if is_plugin(name):
        function: F = load_function(name, recipe_dir, key=f"algorithm.{key}")
        return function
    if name not in table:
        raise ConfigError(f'algorithm.{key}="{name}" is unknown{nearest(name, table)}')
    return table[name]
