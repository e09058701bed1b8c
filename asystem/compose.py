"""From a command line to a checked `Config`: the only module, with `cli`, that knows Hydra.

`configs/` are Hydra's groups. `recipe=NAME` is a group too, although a recipe is a folder: `RecipeSource` shows Hydra
`recipes/NAME/config.yaml` (of the working directory first, then the shipped ones) or any folder as `recipe/NAME`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, version
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
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


def register() -> Path:
    """Tells Hydra of the schema and of recipes; returns the folder of the main configuration. May be called again."""
    version.setbase("1.3")
    ConfigStore.instance().store(name="schema", node=Config)
    SourcesRegistry.instance().register(RecipeSource)
    return shipped("configs").resolve()


def load_config(overrides: Sequence[str]) -> Config:
    """Composes, converts and checks a configuration.

    Args:
        overrides: as on the command line: ``recipe=quickstart``, ``training.lr=1e-4``, ``runtime=inline``.

    Raises:
        ConfigError: in one line, with the nearest valid name for an unknown one.
    """
    config_dir = register()
    _check_names(overrides)
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    return to_config(composed)


def to_config(composed: Any) -> Config:
    """Hydra's composition as the dataclass that everything below the command line sees, checked."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
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
        content = OmegaConf.load(folder / "config.yaml")
        merged = OmegaConf.merge(content, {"recipe": folder.name, "recipe_dir": str(folder)})
        header = {"package": "_global_"}  # a recipe speaks of the whole configuration
        return ConfigResult(provider=self.provider, path=str(folder), config=merged, header=header)

    @staticmethod
    def _folder(config_path: str) -> Path | None:
        if not config_path.startswith("recipe/"):
            return None
        return recipe_folder(config_path.removeprefix("recipe/").removesuffix(".yaml"))


def _check_names(overrides: Sequence[str]) -> None:
    """Refuses unknown recipes, groups' options and keys with the nearest valid one, before Hydra's longer messages."""
    names = [override.lstrip("+~").split("=", 1)[0] for override in overrides]
    if "recipe" not in names:
        raise ConfigError(f"which recipe? add recipe=NAME (known: {', '.join(recipe_names())})")
    known = set(_keys(Config))
    for override, name in zip(overrides, names, strict=True):
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f'"{override}" is no override: write key=value')
        value = override.split("=", 1)[-1].strip("'\"")
        if name == "recipe":
            if recipe_folder(value) is None:
                raise ConfigError(f'unknown recipe "{value}"{nearest(value, recipe_names())}')
        elif name in GROUPS:
            options = [file.stem for file in (shipped("configs") / name).glob("*.yaml")]
            if value not in options and not value.startswith("{"):
                raise ConfigError(f'unknown option "{value}" of {name}{nearest(value, options)}')
        elif name not in known and not name.startswith("hydra"):
            raise ConfigError(f'unknown key "{name}"{_nearest_key(name, known)}')


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


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages, which run over several lines, as one that names the key."""
    text = str(error).partition("ConfigKeyError raised while composing config:\n")[2] or str(error)
    cause = error.__cause__ or error.__context__
    if cause is not None and "full_key" in str(cause):
        text = str(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    first = lines[0].rstrip(".") if lines else type(error).__name__
    if unknown := re.match(r"Key '(\w+)' (?:not in|is not in)", first):
        name = key or unknown.group(1)
        return f'unknown key "{name}"{_nearest_key(name, set(_keys(Config)))}'
    if (kind := _wanted(key)) and key and "could not be converted" in first + text:
        return f"{key}: {first[0].lower()}{first[1:]}; wanted {kind}"
    return f"{key}: {first}" if key and key not in first else first


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
