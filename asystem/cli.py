"""The command line: `asystem train recipe=NAME [key=value ...]`.

Only overrides, and the configuration is composed and checked here, in words of ours; with flags (--multirun, --cfg,
--help, --shell-completion) Hydra takes over. Nothing heavy is imported before the configuration has been checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from asystem import __version__
from asystem.config import Command, Config
from asystem.errors import AsystemError, ConfigError, DataError, ModelError, ReplayError, nearest

USAGE = f"""asystem {__version__}: asynchronous reinforcement learning of language models

  asystem train recipe=NAME [group=option ...] [key=value ...]    reinforcement learning
  asystem sft recipe=NAME [...]                                   supervised fine-tuning
  asystem dpo recipe=NAME [...]                                   learning from preferences (DPO)
      --multirun   one run for each combination of comma-separated values
      --cfg job    show the configuration and start nothing
      --help       Hydra's help: groups, options and flags
  asystem plan recipe=NAME [...] [--gpus N] [--memory GIB] [--card NAME] [--prompt N] [--new N] [--json]
                                                                  memory and time by phase, and what would be chosen
  asystem export RUN_OR_CHECKPOINT OUT [best] [dtype=DTYPE]       write a Hugging Face folder
  asystem report RUN_FOLDER                                       write its report.html anew
  asystem replay RUN_FOLDER                                       repeat a run, act by act, and compare every metric

A recipe is a folder with a config.yaml: recipes/NAME here, a shipped one, or any path."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a failed run, 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-sc", "--shell_completion"):
        arguments.insert(0, "train")  # what a shell's completion asks
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    return _one_line(lambda: _run(arguments[0], arguments[1:]))


def _run(command: str, arguments: list[str]) -> None:
    if command not in COMMANDS:
        raise ConfigError(f'unknown command "{command}"{nearest(command, COMMANDS)}')
    COMMANDS[command](arguments)


def _train(command: str, arguments: list[str]) -> None:
    from asystem.compose import load_config

    arguments = [*arguments, f"command={command}"]
    if any(argument.startswith("-") for argument in arguments):
        _with_hydra(command, arguments)
        return
    _start(load_config(arguments))


def _start(config: Config) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _control(config)
        return
    from asystem.spmd import bootstrap  # one process a node: node 0 controls, the others lend their ranks

    with bootstrap(config.runtime) as is_controller:
        if is_controller:
            _control(config)


def _control(config: Config) -> None:
    if config.command is Command.train:
        from asystem.controller.run import train

        train(config)
    else:
        from asystem.controller.finetune import finetune

        finetune(config)


def _with_hydra(command: str, arguments: list[str]) -> None:
    from hydra._internal.utils import _run_hydra, get_args_parser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from asystem.compose import combinations, complete_overrides, load_config, load_job_config, one_line, register

    parser = get_args_parser()
    parser.error = _refuse_flag
    args = parser.parse_intermixed_args(arguments)
    if args.multirun and args.cfg:
        raise ConfigError("--cfg shows one run's configuration: leave --multirun out")
    if args.multirun:  # every run's configuration is checked before the first run starts
        for overrides in combinations(args.overrides):
            load_config(overrides)
    elif args.cfg:
        load_config(args.overrides)
        args.overrides = complete_overrides(args.overrides)
    if "COMP_LINE" in os.environ:  # Hydra completes what follows the program's name, which for it is `asystem train`
        os.environ["COMP_LINE"] = re.sub(r" (train|sft|dpo|plan) ", " ", os.environ["COMP_LINE"], count=1)
    sys.argv = ["asystem", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, instead of a traceback to the screen
    try:
        _run_hydra(
            args=args,
            args_parser=parser,
            task_function=lambda _: _start(load_job_config()),
            config_path=str(register()),
            config_name="config",
        )
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error


def _refuse_flag(message: str) -> NoReturn:
    raise ConfigError(f"{message}; see asystem train --help")


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1 or not (Path(arguments[0]) / "metrics.jsonl").is_file():
        raise ConfigError(f"asystem report RUN_FOLDER: {' '.join(arguments) or 'nothing'} is no run's folder")
    from asystem.tracking import write_report

    print(write_report(Path(arguments[0])))


def _replay(arguments: list[str]) -> None:
    if len(arguments) != 1 or not (Path(arguments[0]) / "config.yaml").is_file():
        raise ConfigError(f"asystem replay RUN_FOLDER: {' '.join(arguments) or 'nothing'} is no run's folder")
    from asystem.compose import read_config

    run = Path(arguments[0]).resolve()
    config = read_config(run / "config.yaml")
    from asystem.controller.replay import replay

    folder, steps, different = replay(config, run)
    if different:
        raise ReplayError(
            f"{len(different)} metrics of {steps} steps differ, first {different[0]}; replayed in {folder}"
        )
    print(f"replay of {run.name}: all metrics of {steps} steps are equal; {folder}")


def _export(arguments: list[str]) -> None:
    options = [argument for argument in arguments if argument == "best" or argument.startswith("dtype=")]
    paths = [argument for argument in arguments if argument not in options]
    dtype = next((option.removeprefix("dtype=") for option in options if option != "best"), None)
    if len(paths) != 2:
        raise ConfigError("asystem export RUN_OR_CHECKPOINT OUT [best] [dtype=DTYPE]: name two folders")
    if dtype not in (None, *EXPORTED_DTYPES):
        raise ConfigError(f"dtype={dtype}: choose {', '.join(EXPORTED_DTYPES)}")
    from asystem.training import export_checkpoint, find_checkpoint

    checkpoint = find_checkpoint(Path(paths[0]), best="best" in options)
    print(f"{checkpoint} -> {paths[1]} ({export_checkpoint(checkpoint, Path(paths[1]), dtype)})")


def _plan(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="asystem plan", add_help=False, allow_abbrev=False)
    parser.error = _refuse_plan_flag  # type: ignore[method-assign]
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--memory", type=float, metavar="GIB")
    parser.add_argument("--card")
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--json", action="store_true")
    options, recipe = parser.parse_known_args(arguments)
    if unknown := [argument for argument in recipe if argument.startswith("-")]:
        _refuse_plan_flag(f"unrecognized arguments: {' '.join(unknown)}")
    from asystem.compose import load_config

    config = load_config(recipe)
    from asystem.controller.planning import as_json, plan_run, show
    from asystem.memory import machine_of

    named = options.gpus is not None or options.memory is not None or options.card is not None
    gpus = 1 if options.gpus is None else options.gpus
    machine = machine_of(gpus, options.memory, options.card) if named else None
    plan = plan_run(config, machine, prompt=options.prompt, new=options.new)
    if options.json:
        print(json.dumps(as_json(config, plan), indent=2))
    else:
        show(config, plan)


def _refuse_plan_flag(message: str) -> NoReturn:
    raise ConfigError(f"{message}; asystem plan takes --gpus N, --memory GIB, --card NAME, --prompt N, --new N, --json")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": partial(_train, "train"),
    "sft": partial(_train, "sft"),
    "dpo": partial(_train, "dpo"),
    "plan": _plan,
    "export": _export,
    "report": _report,
    "replay": _replay,
}
EXPORTED_DTYPES = ("float32", "bfloat16", "float16")


def _one_line(run: Callable[[], None]) -> int:
    """Errors of ours as one line; ASYSTEM_DEBUG=1 shows where they come from."""
    try:
        run()
    except AsystemError as error:
        if os.environ.get("ASYSTEM_DEBUG"):
            raise
        print(f"asystem: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, DataError, ModelError)) else 1
    except KeyboardInterrupt:
        print("asystem: interrupted", file=sys.stderr)
        return 130
    return 0
