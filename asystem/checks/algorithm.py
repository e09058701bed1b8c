"""Algorithms, and what would be ignored or count twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asystem.checks.rules import Rule, above, at_least
from asystem.errors import nearest

if TYPE_CHECKING:
    from asystem.config import Config

ADVANTAGES = ("grpo", "rloo", "reinforce", "reinforce++", "reinforce++baseline", "gae")
BATCH_ADVANTAGES = ("reinforce", "reinforce++", "gae")
SURROGATES = ("ppo", "gspo", "cispo", "reinforce")
CORRECTIONS = ("none", "tis", "icepop", "kpop", "mis", "geometric")
TOKEN_CORRECTIONS = ("tis", "icepop", "kpop")


def algorithm(config: Config) -> Iterator[Rule]:
    algorithm = config.algorithm
    least = 1 if algorithm.advantage in BATCH_ADVANTAGES else 2
    yield (
        algorithm.group_size < least,
        f"algorithm.group_size={algorithm.group_size} is below {least}: group advantages compare the samples of a "
        "prompt and need at least 2; advantage=reinforce, reinforce++ and gae compare those of a batch",
    )
    for key, known in (("advantage", ADVANTAGES), ("surrogate", SURROGATES), ("correction", CORRECTIONS)):
        name = getattr(algorithm, key)
        yield ".py:" not in name and name not in known, f'algorithm.{key}="{name}" is unknown{nearest(name, known)}'
    yield (
        not 0 < algorithm.icepop_alpha < algorithm.icepop_beta,
        f"IcePop's band [{algorithm.icepop_alpha:g}, {algorithm.icepop_beta:g}] needs 0 < icepop_alpha < icepop_beta; "
        "Ring-1T used [0.5, 5]",
    )
    band = algorithm.geometric_band
    yield (
        len(band) != 2 or not 0 < band[0] <= 1 <= band[1],
        f"algorithm.geometric_band={list(band)} must be two numbers around 1, the ratio of engines that agree",
    )
    for key in ("tis_cap", "kpop_phi", "mis_cap", "clip_high"):
        yield above(f"algorithm.{key}", getattr(algorithm, key), 0)
    yield not 0 < algorithm.clip_low < 1, f"algorithm.clip_low={algorithm.clip_low:g} must lie between 0 and 1"
    yield (
        algorithm.dual_clip is not None and algorithm.dual_clip <= 1 + algorithm.clip_high,
        f"algorithm.dual_clip={algorithm.dual_clip} must be above 1 + clip_high = {1 + algorithm.clip_high:g}, or null",
    )
    yield not 0 < algorithm.gamma <= 1, f"algorithm.gamma={algorithm.gamma:g} must lie in (0, 1]"
    yield not 0 <= algorithm.gae_lambda <= 1, f"algorithm.gae_lambda={algorithm.gae_lambda:g} must lie between 0 and 1"
    yield (
        algorithm.value_clip is not None and not algorithm.value_clip > 0,
        f"algorithm.value_clip={algorithm.value_clip} must be above 0, or null",
    )
    yield (
        algorithm.group_filter is not None and ".py:" not in algorithm.group_filter,
        f'algorithm.group_filter="{algorithm.group_filter}" is no function of the recipe: name it file.py:function, or '
        "null",
    )
    yield at_least("algorithm.dynamic_sampling", algorithm.dynamic_sampling, 0)
    yield at_least("algorithm.dynamic_windows", algorithm.dynamic_windows, 1)
    yield at_least("algorithm.kl_coefficient", algorithm.kl_coefficient, 0)
    yield at_least("algorithm.entropy_coefficient", algorithm.entropy_coefficient, 0)
    yield (
        not 0 <= algorithm.overlong_buffer <= config.rollout.max_new_tokens,
        f"algorithm.overlong_buffer={algorithm.overlong_buffer} must lie between 0 and rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens}",
    )
    yield (
        algorithm.normalizer.value == "budget" and config.rollout.token_budget is None,
        "algorithm.normalizer=budget divides by rollout.token_budget, which is null; set it, or use response or token",
    )
    yield from combinations(config)


def combinations(config: Config) -> Iterator[Rule]:
    """What would be ignored, or count twice."""
    algorithm = config.algorithm
    yield (
        algorithm.advantage == "gae" and not algorithm.value_coefficient > 0,
        f"algorithm.advantage=gae takes its baseline from a value head, which algorithm.value_coefficient="
        f"{algorithm.value_coefficient:g} does not train: set it above 0, or use a baseline without a head",
    )
    yield (
        algorithm.advantage == "gae" and algorithm.drop_equal_groups,
        "algorithm.drop_equal_groups leaves out groups of equal rewards, which tell a value head as much as others: "
        "with advantage=gae use drop_equal_groups=false",
    )
    yield (
        algorithm.kl_coefficient == 0 and algorithm.kl_estimator.value != "k3",
        f"algorithm.kl_estimator={algorithm.kl_estimator.value} measures a distance that algorithm.kl_coefficient=0 "
        "leaves out, and no reference is held for it: set kl_coefficient above 0, or leave the estimator out",
    )
    yield (
        algorithm.dynamic_sampling > 0 and not algorithm.drop_equal_groups and algorithm.group_filter is None,
        f"algorithm.dynamic_sampling={algorithm.dynamic_sampling} asks for groups in place of those without signal, "
        "which algorithm.drop_equal_groups=false trains all the same: set it to true",
    )
    most = algorithm.dynamic_windows * (config.rollout.capacity // max(1, algorithm.group_size))
    yield (
        algorithm.dynamic_sampling > most,
        f"algorithm.dynamic_sampling={algorithm.dynamic_sampling} groups are more than algorithm.dynamic_windows="
        f"{algorithm.dynamic_windows} windows of rollout.capacity={config.rollout.capacity} rollouts have: lower it to "
        f"{most}, or raise one of those",
    )
    yield (
        algorithm.surrogate == "gspo" and algorithm.correction in TOKEN_CORRECTIONS,
        f"algorithm.surrogate=gspo has one ratio a response, and algorithm.correction={algorithm.correction} masks or "
        "weighs single tokens of it; use correction=none, mis or geometric",
    )
    yield (
        algorithm.anchor.value == "behavior" and algorithm.correction != "none",
        f"algorithm.anchor=behavior has p_train/p_infer in the surrogate's ratio already, and algorithm.correction="
        f"{algorithm.correction} would count it twice; use correction=none or anchor=proximal",
    )
    yield (
        algorithm.routing_replay and not config.generation.return_routing,
        "algorithm.routing_replay=true trains with the experts that generation chose, which it does not bring along: "
        "set generation.return_routing=true",
    )
    yield (
        algorithm.surrogate == "reinforce" and config.training.minibatches > 1,
        f"algorithm.surrogate=reinforce has no ratio that tells training.minibatches={config.training.minibatches} "
        "updates of a batch apart; use minibatches=1 or another surrogate",
    )
