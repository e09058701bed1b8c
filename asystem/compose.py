"""From a command line to a checked `Config`: the only module, with `cli`, that knows Hydra.

`configs/` are Hydra's groups. `recipe=NAME` is a group too, although a recipe is a folder: `RecipeSource` shows Hydra
`recipes/NAME/config.yaml` (of the working directory first, then the shipped ones) or any folder as `recipe/NAME`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir, version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import asystem
from asystem.config import Config
from asystem.errors import ConfigError, nearest

GROUPS = ("model", "algorithm", "rollout", "generation", "training", "placement", "runtime", "tracking")


def shipped(name: str) -> Path:
    """The folder `configs` or `recipes`: inside an installed package, or beside it in a checkout."""
    package = Path(asystem.__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


@functools.cache
def register() -> Path:
    """Tells Hydra of the schema and of recipes; returns the folder of the main configuration."""
    version.setbase("1.3")
    ConfigStore.instance().store(name="schema", node=Config)
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)
    return shipped("configs").resolve()


def load_config(overrides: Sequence[str]) -> Config:
    """Composes, converts and checks a configuration.

    Args:
        overrides: as on the command line: ``recipe=quickstart``, ``training.lr=1e-4``, ``runtime=inline``.

    Raises:
        ConfigError: in one line, with the nearest valid name for an unknown one.
    """
    with initialize_config_dir(str(register()), version_base="1.3"):
        return _load(overrides)


def load_job_config() -> Config:
    """The configuration of the job that Hydra is running: one combination of a --multirun."""
    return _load(list(HydraConfig.get().overrides.task))


def _load(overrides: Sequence[str]) -> Config:
    complete = complete_overrides(overrides)
    try:
        composed = compose("config", overrides=complete)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(one_line(error)) from error
    return to_config(composed)


def read_config(path: Path) -> Config:
    """The configuration of a run, from its folder's config.yaml.

    Raises:
        ConfigError: it cannot be read, or is of another version of asystem.
    """
    try:
        return to_config(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error


def to_config(composed: Any) -> Config:
    """Hydra's composition as the dataclass that everything below the command line sees, checked."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(config, Config), f"the schema was lost: {type(config)}"
    config.check()
    return config


def recipe_folder(name: str) -> Path | None:
    """The folder of a recipe, by its name or by its path; None if there is none."""
    candidates = [Path("recipes") / name, Path(name), shipped("recipes") / name]
    return next((path.resolve() for path in candidates if (path / "config.yaml").is_file()), None)


def recipe_names() -> list[str]:
    """Recipes of the working directory and the shipped ones."""
    found = {file.parent.name for root in (Path("recipes"), shipped("recipes")) for file in root.glob("*/config.yaml")}
    return sorted(found)


class RecipeSource(ConfigSource):  # type: ignore[misc]  # Hydra ships no types
    """Shows recipe folders to Hydra as options of the group `recipe`."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "recipe")

    def is_config(self, config_path: str) -> bool:
        return self._folder(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "" and results_filter is not ObjectType.CONFIG:
            return ["recipe"]
        return recipe_names() if config_path == "recipe" and results_filter is not ObjectType.GROUP else []

    def load_config(self, config_path: str) -> ConfigResult:
        folder = self._folder(config_path)
        assert folder is not None, f"Hydra asked for {config_path}, which is_config denied"
        merged = OmegaConf.merge(
            _read_recipe(folder / "config.yaml"), {"recipe": folder.name, "recipe_dir": str(folder)}
        )
        header = {"package": "_global_"}  # a recipe speaks of the whole configuration
        return ConfigResult(provider=self.provider, path=str(folder), config=merged, header=header)

    @staticmethod
    def _folder(config_path: str) -> Path | None:
        if not config_path.startswith("recipe/"):
            return None
        return recipe_folder(config_path.removeprefix("recipe/").removesuffix(".yaml"))


class RecipeSearchPath(SearchPathPlugin):  # type: ignore[misc]  # Hydra ships no types
    """Lets Hydra look for configurations in `RecipeSource` too."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="asystem", path="recipes://")


def _read_recipe(file: Path) -> Any:
    try:
        content = OmegaConf.load(file)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line}: {error.problem}") from error
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"{file} must be a mapping of keys to values")
    return content


def complete_overrides(overrides: Sequence[str]) -> list[str]:
    """Checks the names in overrides, and makes the options among them outrank the recipe.

    A recipe's values come after those of the groups, so `rollout=sync` alone would leave the recipe's own Φ, σ and η
    standing. The values of an option chosen on the command line are therefore put before its other overrides.

    Raises:
        ConfigError: an unknown recipe, option or key, with the nearest valid one.
    """
    parsed = [_parse(override) for override in overrides]
    if "recipe" not in [override.key_or_group for override in parsed]:
        raise ConfigError(f"which recipe? add recipe=NAME (known: {', '.join(recipe_names())})")
    for override in parsed:
        _check_name(override)
    values = [value for override in parsed if override.key_or_group in GROUPS for value in _option_values(override)]
    return [*values, *overrides]


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a --multirun; none where another sweeper of Hydra chooses them as it goes."""
    if any(override.startswith("hydra/sweeper=") for override in overrides):
        return []
    try:
        (runs,) = BasicSweeper.split_arguments([_parse(override) for override in overrides], None)
    except HydraException as error:
        raise ConfigError(one_line(error)) from error
    return list(runs)


def _parse(override: str) -> Override:
    key, equals, _ = override.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(f'"{override}" is no override: write key=value')
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"cannot read {override}: quote the value twice, as in '{key}=\"a value\"'") from error


def _check_name(override: Override) -> None:
    name = override.key_or_group
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line}: several values need --multirun; a list is written [1,2]")
    if name == "recipe":
        if recipe_folder(str(override.value())) is None:
            raise ConfigError(f'unknown recipe "{override.value()}"{nearest(str(override.value()), recipe_names())}')
    elif name in GROUPS:
        if not isinstance(override.value(), dict) and override.value() not in _options(name):
            raise ConfigError(
                f'unknown option "{override.value()}" of {name}{nearest(str(override.value()), _options(name))}'
            )
    elif name not in (known := set(_keys(Config))) and not name.startswith("hydra"):
        raise ConfigError(f'unknown key "{name}"{_nearest_key(name, known)}')


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (shipped("configs") / group).glob("*.yaml"))


def _option_values(chosen: Override) -> list[str]:
    group, option = chosen.key_or_group, chosen.value()
    if option not in _options(group):
        return []
    content = OmegaConf.to_container(OmegaConf.load(shipped("configs") / group / f"{option}.yaml"))
    assert isinstance(content, dict), f"configs/{group}/{option}.yaml is no mapping"
    return [f"{name}={json.dumps(value)}" for name, value in _leaves(group, content)]


def _leaves(prefix: str, values: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(f"{prefix}.{key}", value)
        else:
            yield f"{prefix}.{key}", value


def _nearest_key(name: str, known: set[str]) -> str:
    """A misspelt key of the right section comes first, then the right key in another section."""
    leaf = name.rpartition(".")[2]
    same_leaf = sorted(key for key in known if key.rpartition(".")[2] == leaf)
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75) or same_leaf
    close = close or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f' (did you mean "{close[0]}"?)' if close else "; all keys stand in asystem/config.py"


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        yield prefix + field.name
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _keys(kind, f"{prefix}{field.name}.")


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages, which run over several lines, as one that names the key."""
    text = str(error).partition("ConfigKeyError raised while composing config:\n")[2] or str(error)
    cause = error.__cause__ or error.__context__
    if cause is not None and "full_key" in str(cause):
        text = str(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if missing := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, option = missing.groups()
        return f'a recipe\'s defaults name an unknown option "{option}" of {group}{nearest(option, _options(group))}'
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    first = lines[0].rstrip(".") if lines else type(error).__name__
    if unknown := re.match(r"Key '(\w+)' (?:not in|is not in)", first):
        name = key or unknown.group(1)
        return f'unknown key "{name}"{_nearest_key(name, set(_keys(Config)))}'
    if wrong := re.search(r"\w+ is not a subclass of (\w+)\. value: (.*)", first):
        section = next((name for name, kind in _sections() if kind.__name__ == wrong.group(1)), key)
        return f"{section}={wrong.group(2)}: {section} is a section of keys, such as {section}.KEY=VALUE"
    if (kind := _wanted(key)) and key and "could not be converted" in first + text:
        return f"{key}: {first[0].lower()}{first[1:]}; wanted {kind}"
    return f"{key}: {first}" if key and key not in first else first


def _sections() -> Iterator[tuple[str, type]]:
    for name, kind in typing.get_type_hints(Config).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield name, kind


def _wanted(key: str) -> str:
    """What a key holds, in words."""
    schema: Any = Config
    for part in key.split(".") if key else []:
        if not dataclasses.is_dataclass(schema) or part not in (hints := typing.get_type_hints(schema)):
            return ""
        schema = hints[part]
    if isinstance(schema, types.UnionType):
        return " or ".join("null" if kind is type(None) else kind.__name__ for kind in typing.get_args(schema))
    return getattr(schema, "__name__", str(schema))
