"""Configuration: everything shipped composes, and everything that cannot work is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from asystem.compose import GROUPS, load_config, recipe_names, shipped
from asystem.config import BudgetCounts, Config, Correction, RuntimeKind
from asystem.errors import ConfigError

OPTIONS = sorted(f"{group}={file.stem}" for group in GROUPS for file in (shipped("configs") / group).glob("*.yaml"))


@pytest.mark.parametrize("recipe", recipe_names())
def test_each_recipe_composes(recipe: str) -> None:
    config = load_config([f"recipe={recipe}"])
    assert config.recipe == recipe
    assert Path(config.recipe_dir, "config.yaml").is_file()


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_composes(option: str) -> None:
    load_config(["recipe=quickstart", option])


def test_values_arrive_as_the_schema_types() -> None:
    config = load_config(
        ["recipe=quickstart", "runtime=inline", "training.lr=1e-4", "rollout.budget_counts=completed", "seed=7"]
    )
    assert config.runtime.kind is RuntimeKind.inline
    assert config.algorithm.correction is Correction.icepop
    assert (config.algorithm.icepop_alpha, config.algorithm.icepop_beta) == (0.5, 5.0)
    assert (config.training.lr, config.rollout.budget_counts, config.seed) == (1e-4, BudgetCounts.completed, 7)


def test_a_recipe_may_be_any_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("steps: 3\ndata: {train: rows.jsonl}\n")
    config = load_config([f"recipe={tmp_path / 'mine'}"])
    assert (config.recipe, config.recipe_dir, config.steps) == ("mine", str(tmp_path / "mine"), 3)


def test_a_key_that_a_recipe_misspells_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {learning_rate: 3}\ndata: {train: rows.jsonl}\n")
    with pytest.raises(ConfigError, match=r'unknown key "training\.learning_rate"'):
        load_config([f"recipe={tmp_path}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe=quikstart", 'unknown recipe "quikstart" (did you mean "quickstart"?)'),
        ("rollout.capasity=64", 'unknown key "rollout.capasity" (did you mean "rollout.capacity"?)'),
        ("lr=1", 'unknown key "lr" (did you mean "training.lr"?)'),
        ("model=tinny", 'unknown option "tinny" of model (did you mean "tiny"?)'),
        ("steps", '"steps" is no override: write key=value'),
        ("steps=many", "steps: value 'many' of type 'str' could not be converted to Integer; wanted int"),
        ("training.betas=3", "training.betas"),
        ("steps=0", "steps=0 is below 1"),
        ("device=tpu", 'device="tpu": choose auto, cpu or cuda'),
        ("rollout.max_staleness=-1", "rollout.max_staleness=-1 (η) is below 0"),
        ("rollout.token_budget=0", "rollout.token_budget=0 (Φ) must be above 0"),
        ("rollout.token_budget=-5", "rollout.token_budget=-5 (Φ) must be above 0"),
        ("rollout.retention=-1", "rollout.retention=-1 (σ) is below 0"),
        ("rollout.capacity=4", "rollout.capacity=4 (Ω) is below one group of 8"),
        ("rollout.capacity=60", "use 56 or 64"),
        ("algorithm.group_size=1", "group advantages compare the samples of a prompt and need at least 2"),
        ("algorithm.icepop_alpha=6", "IcePop's band [6, 5] needs"),
        ("rollout.top_p=0", "rollout.top_p=0 must lie in (0, 1]"),
        ("rollout.top_p=0.9", "truncated sampling would bias every ratio"),
        ("rollout.temperature=0", "rollout.temperature=0"),
        ("training.lr=0", "training.lr=0 must be above 0"),
        ("rollout.max_new_tokens=2000", "raise token_budget to 5334 or retention to 6"),
        ("algorithm.normalizer=mean", "expected one of [response, token, budget]"),
        ("generation.dtype=float8", 'generation.dtype="float8": choose auto, float32 or bfloat16'),
        ("reward.max_error_share=2", "reward.max_error_share=2 must lie between 0 and 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(["recipe=quickstart", override] if not override.startswith("recipe=") else [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "which recipe?"),
        (["recipe=quickstart", "runtime=inline", "training.ranks=2"], "use runtime=ray, or training.ranks=1"),
        (["recipe=quickstart", "placement=hybrid", "generation.ranks=2"], "use placement=split"),
        (
            ["recipe=quickstart", "algorithm.normalizer=budget", "rollout.token_budget=null"],
            "divides by rollout.token_budget, which is null",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(overrides)


def test_a_config_without_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="no dataset"):
        Config().check()
