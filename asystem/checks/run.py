"""The run itself, its model, and what belongs nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asystem.checks.rules import Rule, above, at_least
from asystem.errors import nearest

if TYPE_CHECKING:
    from asystem.config import Config

DENSE_FAMILIES = ("llama", "qwen2", "qwen3")
MOE_FAMILIES = ("qwen3_moe", "olmoe", "bailing_moe_v2")

CURRICULA = ("none", "unsolved", "pass_rate")
RAY_LEAST_STORE = 75 * 2**20  # bytes; Ray refuses a smaller object store


def run(config: Config) -> Iterator[Rule]:
    yield at_least("steps", config.steps, 1)
    yield at_least("seed", config.seed, 0)
    yield config.device not in ("auto", "cpu", "cuda"), f'device="{config.device}": choose auto, cpu or cuda'
    yield above("runtime.deadline_seconds", config.runtime.deadline_seconds, 0)
    yield above("runtime.start_seconds", config.runtime.start_seconds, 0)
    yield at_least("runtime.threads_per_rank", config.runtime.threads_per_rank, 1)
    yield at_least("runtime.object_store_bytes", config.runtime.object_store_bytes, RAY_LEAST_STORE)


def model(config: Config) -> Iterator[Rule]:
    model = config.model
    if model.path is not None:
        return
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        yield at_least(f"model.{name}", getattr(model, name), 1)
    yield (
        model.num_heads % model.num_kv_heads != 0,
        f"model.num_heads={model.num_heads} is no multiple of model.num_kv_heads={model.num_kv_heads}",
    )
    yield at_least("model.head_dim", model.head_dim, 2)
    yield model.head_dim % 2 != 0, f"model.head_dim={model.head_dim} is odd; rotary embedding pairs its halves"
    yield above("model.rope_theta", model.rope_theta, 0)
    known = (*DENSE_FAMILIES, *MOE_FAMILIES)
    yield model.family not in known, f'model.family="{model.family}" is unknown{nearest(model.family, known)}'
    yield (
        model.experts.count > 0 and model.family not in MOE_FAMILIES,
        f"model.experts.count={model.experts.count} needs a family with experts, and model.family={model.family}: use "
        f"one of {', '.join(MOE_FAMILIES)}",
    )
    yield (
        model.experts.count == 0 and model.family in MOE_FAMILIES,
        f"model.family={model.family} has experts, and model.experts.count=0: set how many",
    )


def positions(config: Config) -> Iterator[Rule]:
    model, longest = config.model, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    yield (
        model.path is None and longest > model.max_positions,
        f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} exceed model.max_positions={model.max_positions}: raise it to {longest}",
    )


def others(config: Config) -> Iterator[Rule]:
    generation, longest = config.generation, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    yield (
        generation.kv_tokens is not None and generation.kv_tokens < longest,
        f"generation.kv_tokens={generation.kv_tokens} does not hold one sequence of data.max_prompt_tokens + "
        f"rollout.max_new_tokens = {longest} tokens: raise it, or null for what generation.max_running needs",
    )
    yield (
        not 0 < generation.memory_fraction <= 1,
        f"generation.memory_fraction={generation.memory_fraction:g} must lie in (0, 1]: a share of the GPU's memory",
    )
    yield at_least("generation.max_running", generation.max_running, 1)
    yield at_least("generation.block_size", generation.block_size, 1)
    yield at_least("generation.prefill_tokens", generation.prefill_tokens, 1)
    yield (
        not 0 <= config.reward.max_error_share <= 1,
        (f"reward.max_error_share={config.reward.max_error_share:g} must lie between 0 and 1"),
    )
    yield at_least("evaluation.every", config.evaluation.every, 0)
    yield at_least("evaluation.prompts", config.evaluation.prompts, 1)
    yield at_least("evaluation.temperature", config.evaluation.temperature, 0)
    yield at_least("checkpoint.every", config.checkpoint.every, 0)
    yield at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    yield at_least("checkpoint.keep_best", config.checkpoint.keep_best, 0)
    yield (
        config.checkpoint.keep_best > 0 and config.evaluation.every == 0,
        f"checkpoint.keep_best={config.checkpoint.keep_best} needs evaluations to choose by: set evaluation.every",
    )
    yield at_least("data.max_prompt_tokens", config.data.max_prompt_tokens, 1)
    curriculum = config.data.curriculum
    yield (
        ".py:" not in curriculum and curriculum not in CURRICULA,
        f'data.curriculum="{curriculum}" is unknown{nearest(curriculum, CURRICULA)}',
    )
    yield at_least("data.curriculum_visits", config.data.curriculum_visits, 1)
    yield (
        config.data.task is None and config.data.train is None,
        "no dataset: set data.task to the recipe's task.py or data.train to a JSONL file",
    )
