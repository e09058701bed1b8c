"""From a checked configuration to a finished run folder: what `asystem train` calls."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from asystem.algorithms import choose
from asystem.config import Config, PlacementKind, RuntimeKind, Transport
from asystem.controller.loop import Controller
from asystem.controller.planning import resolve
from asystem.data.task import load_task
from asystem.errors import WorkerError
from asystem.plugin import is_plugin, load_function
from asystem.rollout import CURRICULA, Chance, Pool, PromptOrder
from asystem.spmd import Runtime, make_runtime, spawn
from asystem.state import choose_transport
from asystem.tracking import Tracker, new_run_dir
from asystem.workers import GenerateWorker, HybridWorker, RewardWorker, TrainWorker
from asystem.workers.build import check_model, training_environment


def train(config: Config, make_controller: Callable[..., Controller] = Controller) -> dict[str, Any]:
    """Runs RL as configured and returns the run's summary, which also stands in its `summary.json`.

    Args:
        make_controller: takes what `Controller` takes.

    Raises:
        DataError, ModelError: before anything starts, if the dataset or the model folder cannot be used.
        CapacityError: no placement fits this machine.
        AsystemError: what ended the run; its folder is complete up to then.
    """
    task = load_task(config.data, config.recipe_dir)
    choose(config.algorithm, config.recipe_dir)
    if config.algorithm.group_filter is not None:
        load_function(config.algorithm.group_filter, config.recipe_dir, key="algorithm.group_filter")
    pool = make_pool(config, len(task.train))
    check_model(config)
    config, reasons = resolve(config)
    run_dir = new_run_dir(config)
    tracker = Tracker(config, run_dir)
    if config.tracking.console:
        for reason in reasons:
            print(f"plan: {reason}")
    controller: Controller | None = None
    with (
        ending(tracker, lambda: summarize(controller)),
        make_runtime(config.runtime, config.placement, on_call=tracker.call) as runtime,
    ):
        trainers, generators, rewarders = spawn_groups(config, runtime, run_dir)
        controller = make_controller(config, trainers, generators, rewarders, pool, tracker)
        asyncio.run(_until_first_failure(controller))
    return tracker.finish("finished", {})


@contextmanager
def ending(tracker: Tracker, figures: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Ends the run's tracking when the block ends, however it does: finished, failed or interrupted."""
    status, started = "failed", time.time()
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        tracker.finish(status, {"wall_seconds": time.time() - started} | figures())


def make_pool(config: Config, num_prompts: int) -> Pool:
    """The rollout pool that the configuration asks for.

    Raises:
        ConfigError, DataError: the recipe has no such curriculum.
    """
    data, name = config.data, config.data.curriculum
    chance: Chance | None = CURRICULA.get(name)
    if is_plugin(name):
        chance = load_function(name, config.recipe_dir, key="data.curriculum")
    return Pool(
        PromptOrder(num_prompts, seed=config.seed, shuffle=data.shuffle, chance=chance, memory=data.curriculum_visits),
        group_size=config.algorithm.group_size,
        capacity=config.rollout.capacity,
        retention=config.rollout.retention,
        replicas=config.generation.ranks // config.generation.tensor_parallel,
        refill=config.rollout.token_budget is not None,
    )


def spawn_groups(config: Config, runtime: Runtime, run_dir: Path) -> tuple[TrainWorker, GenerateWorker, RewardWorker]:
    """The three worker groups; in hybrid placement the first two are one."""
    training, generation, gpus = config.training, config.generation, gpus_of_a_rank(config, runtime.num_gpus)
    rewarders = spawn(RewardWorker, config, name="rewarders", ranks=config.reward.ranks, runtime=runtime)
    if config.placement.kind is PlacementKind.hybrid:
        hybrid = spawn(HybridWorker, config, run_dir, name="hybrid", ranks=training.ranks, runtime=runtime, gpus=gpus)
        return hybrid, hybrid, rewarders
    transport = choose_transport(config, gpus=gpus if runtime.num_gpus else 0.0, one_host=runtime.one_host)
    config = replace(config, weights=replace(config.weights, transport=transport))
    shared = transport is Transport.ipc or config.runtime.kind is RuntimeKind.inline
    trainers = spawn(
        TrainWorker,
        config,
        run_dir,
        name="trainers",
        ranks=training.ranks,
        runtime=runtime,
        replica_ranks=training.tensor_parallel,
        gpus=gpus,
        environment=training_environment(config, shared=shared),
    )
    generators = spawn(
        GenerateWorker,
        config,
        name="generators",
        ranks=generation.ranks,
        runtime=runtime,
        collective=generation.tensor_parallel > 1,
        replica_ranks=generation.tensor_parallel,
        gpus=gpus,
    )
    return trainers, generators, rewarders


def gpus_of_a_rank(config: Config, num_gpus: float) -> float:
    """GPUs that each rank of training and generation owns: one, or half of an only one that two such ranks share."""
    if config.device == "cpu":
        return 0.0
    two_ranks = config.placement.kind is PlacementKind.split and config.training.ranks == config.generation.ranks == 1
    return 0.5 if two_ranks and num_gpus == 1 else 1.0


def summarize(controller: Controller | None) -> dict[str, Any]:
    """The figures of `summary.json` that the controller knows."""
    if controller is None:
        return {"steps": 0}
    accuracy = list(controller.accuracy.values())
    return {
        "steps": controller.version,
        "eval_first": accuracy[0] if accuracy else None,
        "eval_last": accuracy[-1] if accuracy else None,
        "tokens_generated": controller.generated,
        "tokens_trained": controller.trained,
    }


async def _until_first_failure(controller: Controller) -> None:
    """Task groups wrap what ended them, group in group; a user wants the first cause alone, and what was trained."""
    try:
        await controller.run()
    except (Exception, BaseExceptionGroup) as raised:
        error: BaseException = raised
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, Exception):
            error = _with_both_sides(error, controller, await _rescue(controller))
        raise error from None
    except asyncio.CancelledError:  # Ctrl-C; a second one waits for nothing
        if (saved := await _rescue(controller)) is not None:
            print(f"asystem: what was trained is in checkpoints/step-{saved:06d}", file=sys.stderr)
        raise


async def _rescue(controller: Controller) -> int | None:
    """Saves training where its ranks still stand and have trained; returns the step, None = nothing was saved."""
    config = controller.config
    if config.checkpoint.at_end and (controller.version or config.training.warmup.steps):
        with suppress(Exception):  # of two failures the first one counts
            return await controller.trainers.save(None, None)
    return None


def _with_both_sides(error: Exception, controller: Controller, saved: int | None) -> Exception:
    """A rank that was lost when it took weights over: whose weights these were, and where they still are."""
    if not isinstance(error, WorkerError) or error.method != "load_weights":
        return error
    ranks = range(controller.config.training.ranks)
    reason = f"{error.reason}; it was to take version {controller.version} over from trainers "
    reason += f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    reason += "" if saved is None else f", which saved checkpoints/step-{saved:06d}"
    found = type(error)(error.group, error.rank, error.host, error.method, reason)
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found
