"""Weights & Biases, the only place that imports it. A run never waits for it and never dies of it."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from asystem.config import WandbMode
from asystem.errors import ConfigError

INIT_SECONDS = 30.0  # for reaching the server
FINISH_SECONDS = 120.0  # for uploading what is left at the end; `wandb sync` uploads what was too slow
PUBLIC_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # one server; `wandb login` wrote either, by its release


def check_wandb(mode: WandbMode) -> None:
    """Refuses a mode that needs W&B where it is missing, or needs a key where there is none.

    Raises:
        ConfigError: with the remedy.
    """
    if mode in (WandbMode.offline, WandbMode.online) and not is_installed():
        raise ConfigError(f"tracking.wandb={mode.value} needs W&B: pip install wandb, or set tracking=none")
    if mode is WandbMode.online and not has_key():
        raise ConfigError("tracking.wandb=online needs a key: set WANDB_API_KEY, or run wandb login")


def is_installed() -> bool:
    """Whether wandb can be imported."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None  # a folder wandb/ beside the run is no package


def has_key() -> bool:
    """Whether a key is set: `WANDB_API_KEY`, or the server's line in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc  # with its port, as W&B writes it
    hosts = PUBLIC_HOSTS if not host or host in PUBLIC_HOSTS else (host,)
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        keys = netrc.netrc(str(path))
        return any(keys.authenticators(host) for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def choose(mode: WandbMode) -> str:
    """What `auto` means here: W&B's own `WANDB_MODE` where it is set, else online with a key, offline without."""
    if mode is not WandbMode.auto:
        return mode.name
    asked = os.environ.get("WANDB_MODE", "")
    return asked if asked in ("online", "offline", "disabled") else "online" if has_key() else "offline"


class WandbRun:
    """One W&B run, or none: after `disabled`, or once something has failed, its methods do nothing."""

    def __init__(self, mode: WandbMode, run_dir: Path, *, recipe: str, project: str, config: Mapping[str, Any]) -> None:
        """Begins the run. ``config`` is shown beside it; ``recipe`` is its group and part of its name.

        Raises:
            ConfigError: W&B was asked for by name (`offline`, `online`) and cannot start.
        """
        self._run: Any = None
        if choose(mode) == "disabled":
            return
        check_wandb(mode)
        if mode is WandbMode.auto and not is_installed():
            _warn("not installed, metrics stay in metrics.jsonl (pip install wandb, or set tracking=none)")
            return
        facts = {"name": f"{recipe}-{run_dir.name}", "group": recipe, "project": project, "config": dict(config)}
        chosen = choose(mode)
        for attempt in (chosen, "offline") if mode is WandbMode.auto and chosen == "online" else (chosen,):
            try:
                self._run = _begin(attempt, run_dir, facts)
                return
            except Exception as error:
                if mode is not WandbMode.auto:
                    raise ConfigError(f"tracking.wandb={mode.value}: W&B did not start: {error}") from error
                _warn(f"did not start {attempt}: {error}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of every curve."""
        self._guard(lambda run: run.log(dict(metrics), step=step))

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Puts the summary beside the curves and ends the run."""
        self._guard(lambda run: run.summary.update(dict(summary)))
        self._guard(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _guard(self, use: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            use(self._run)
        except Exception as error:
            self._run = None
            _warn(f"failed, the run goes on without it: {error}")


def _begin(mode: str, run_dir: Path, facts: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        mode=cast(Any, mode),
        silent=True,
        console="off",
        x_disable_meta=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    wandb.setup(settings)  # for the process: its telemetry would ask the network whatever the run's own mode is
    return wandb.init(dir=run_dir, settings=settings, reinit="create_new", **facts)


def _warn(text: str) -> None:
    logging.getLogger("asystem").warning("W&B %s", " ".join(text.split()))
