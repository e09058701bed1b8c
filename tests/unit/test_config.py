"""Configuration: everything shipped composes, and everything that cannot work is refused in one line."""

from __future__ import annotations

from copy import deepcopy
from functools import reduce
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml

from asystem.compose import GROUPS, load_config, recipe_names, shipped
from asystem.config import BudgetCounts, Command, Config, DpoLoss, Normalizer, RuntimeKind
from asystem.errors import ConfigError


def write_recipe(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
    return folder


OPTIONS = [[f"{group}={file.stem}" for file in sorted((shipped("configs") / group).glob("*.yaml"))] for group in GROUPS]
TOGETHER = list(zip_longest(*OPTIONS))


@pytest.mark.parametrize("recipe", recipe_names())
def test_each_recipe_composes(recipe: str) -> None:
    config = load_config([f"recipe={recipe}"])
    assert config.recipe == recipe
    assert Path(config.recipe_dir, "config.yaml").is_file()


def test_a_recipe_may_lie_in_the_folder_of_another() -> None:
    config = load_config(["recipe=icepop_moe/sft"])
    assert (config.recipe, config.data.task) == ("sft", "../task.py")
    assert Path(config.recipe_dir, "../task.py").resolve() == shipped("recipes").resolve() / "icepop_moe" / "task.py"


@pytest.mark.parametrize("options", TOGETHER)
def test_each_option_composes(options: tuple[str | None, ...]) -> None:
    """Those of different groups at once, for composing takes a fifth of a second."""
    load_config(["recipe=quickstart", *filter(None, options)])


def test_values_arrive_as_the_schema_types() -> None:
    config = load_config(
        ["recipe=quickstart", "runtime=inline", "training.lr=1e-4", "rollout.budget_counts=completed", "seed=7"]
    )
    assert config.runtime.kind is RuntimeKind.inline
    assert config.algorithm.correction == "icepop" and config.algorithm.normalizer is Normalizer.response
    assert (config.algorithm.icepop_alpha, config.algorithm.icepop_beta) == (0.5, 5.0)
    assert (config.training.lr, config.rollout.budget_counts, config.seed) == (1e-4, BudgetCounts.completed, 7)


def test_a_recipe_may_be_any_folder(tmp_path: Path) -> None:
    folder = write_recipe(tmp_path / "mine", "steps: 3\ndata: {train: rows.jsonl}\n")
    config = load_config([f"recipe={folder}"])
    assert (config.recipe, config.recipe_dir, config.steps) == ("mine", str(tmp_path / "mine"), 3)


def test_the_working_directory_comes_before_the_shipped_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_recipe(tmp_path / "recipes" / "quickstart", "steps: 3\ndata: {train: rows.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(["recipe=quickstart"]).recipe_dir == str(folder)
    assert load_config(["recipe=recipes/quickstart/"]).recipe_dir == str(folder)


def test_a_recipe_chooses_groups_and_outranks_their_values(tmp_path: Path) -> None:
    write_recipe(
        tmp_path,
        "defaults: [{override /rollout: sync}, {override /algorithm: tis_grpo}]\n"
        "data: {train: rows.jsonl}\nalgorithm: {tis_cap: 3}\n",
    )
    config = load_config([f"recipe={tmp_path}"])
    assert config.rollout.token_budget is None
    assert (config.algorithm.correction, config.algorithm.tis_cap) == ("tis", 3.0)


def test_an_option_of_the_command_line_outranks_the_recipe() -> None:
    shipped_rollout = load_config(["recipe=quickstart"]).rollout
    assert (shipped_rollout.token_budget, shipped_rollout.max_staleness) == (2500, 1)
    config = load_config(["recipe=quickstart", "rollout.retention=3", "rollout=sync"])
    assert (config.rollout.token_budget, config.rollout.max_staleness) == (None, 0)
    assert config.rollout.retention == 3, "a key of the command line outranks its option"


def test_a_recipe_may_build_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path / "recipes" / "longer", "defaults: [quickstart]\nsteps: 7\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(["recipe=longer"])
    assert (config.recipe, config.steps, config.rollout.capacity) == ("longer", 7, 256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\ndata: [1\nb: : 2\n", "config.yaml, line 3: expected"),
        ("- 1\n", "config.yaml must be a mapping of keys to values"),
        ("defaults: [{override /model: tinny}]\n", 'unknown option "tinny" of model (did you mean "tiny"?)'),
        ("defaults: [{override /modle: tiny}]\n", "Could not override 'modle'"),
        ("training: 3\n", "training=3: training is a section of keys"),
        ("training: {lr: fast}\n", "training.lr: value 'fast' of type 'str' could not be converted to Float"),
    ],
)
def test_a_broken_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    write_recipe(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_config([f"recipe={tmp_path}"])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_key_that_a_recipe_misspells_is_named(tmp_path: Path) -> None:
    write_recipe(tmp_path, "training: {learning_rate: 3}\ndata: {train: rows.jsonl}\n")
    with pytest.raises(ConfigError, match=r'unknown key "training\.learning_rate"'):
        load_config([f"recipe={tmp_path}"])


STREAMED = [
    "recipe=quickstart",
    "device=auto",
    "training.offload_parameters=true",
    "training.offload_optimizer=true",
    "training.recompute=full",
]


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
        ("algorithm.normalizer=mean", "expected one of [response, token, constant, budget]"),
        ("seed=1,2", "seed=1,2: several values need --multirun"),
        ("checkpoint=3", "checkpoint=3: checkpoint is a section of keys"),
        ("+foo=1", 'unknown key "foo"'),
        ("data.name='a", "cannot read data.name='a: quote the value twice"),
        ("rollout.max_staleness=-1", "rollout.max_staleness=-1 (η) is below 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(["recipe=quickstart", override] if not override.startswith("recipe=") else [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def quickstart() -> Config:
    return load_config(["recipe=quickstart"])


def changed(config: Config, override: str) -> Config:
    """What composition would make of the override, at none of its cost."""
    key, _, value = override.partition("=")
    copy = deepcopy(config)
    *sections, leaf = key.split(".")
    section = reduce(getattr, sections, copy)
    assert hasattr(section, leaf)
    setattr(section, leaf, yaml.safe_load(value))
    return copy


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps=0 is below 1"),
        ("device=tpu", 'device="tpu": choose auto, cpu or cuda'),
        ("rollout.max_staleness=-1", "rollout.max_staleness=-1 (η) is below 0"),
        ("rollout.token_budget=0", "rollout.token_budget=0 (Φ) must be above 0"),
        ("rollout.token_budget=-5", "rollout.token_budget=-5 (Φ) must be above 0"),
        ("rollout.retention=-1", "rollout.retention=-1 (σ) is below 0"),
        ("rollout.capacity=4", "rollout.capacity=4 (Ω) is below one group of 8"),
        ("rollout.capacity=60", "use 56 or 64"),
        ("algorithm.group_size=1", "group advantages compare the samples of a prompt and need at least 2"),
        ("algorithm.group_size=0", "algorithm.group_size=0 is below 2"),
        ("algorithm.advantage=gpro", 'algorithm.advantage="gpro" is unknown (did you mean "grpo"?)'),
        ("algorithm.surrogate=gps", 'algorithm.surrogate="gps" is unknown (did you mean "gspo"?)'),
        ("algorithm.correction=ice", 'algorithm.correction="ice" is unknown (did you mean "icepop"?)'),
        ("algorithm.surrogate=gspo", "masks or weighs single tokens of it; use correction=none, mis or geometric"),
        ("algorithm.dual_clip=1.1", "algorithm.dual_clip=1.1 must be above 1 + clip_high = 1.2, or null"),
        ("algorithm.geometric_band=[1.1,1.2]", "algorithm.geometric_band=[1.1, 1.2] must be two numbers around 1"),
        ("algorithm.geometric_band=[0.9]", "algorithm.geometric_band=[0.9] must be two numbers around 1"),
        ("algorithm.overlong_buffer=100", "must lie between 0 and rollout.max_new_tokens=10"),
        ("algorithm.gamma=0", "algorithm.gamma=0 must lie in (0, 1]"),
        ("algorithm.gae_lambda=1.1", "algorithm.gae_lambda=1.1 must lie between 0 and 1"),
        ("algorithm.value_clip=0", "algorithm.value_clip=0 must be above 0, or null"),
        ("algorithm.dynamic_sampling=8", "which algorithm.drop_equal_groups=false trains all the same: set it to true"),
        ("algorithm.group_filter=mixed", 'algorithm.group_filter="mixed" is no function of the recipe'),
        ("algorithm.dynamic_windows=0", "algorithm.dynamic_windows=0 is below 1"),
        ("data.curriculum=pass_rat", 'data.curriculum="pass_rat" is unknown (did you mean "pass_rate"?)'),
        ("rollout.lengths.median=0", "rollout.lengths.median=0 must be above 0, or null"),
        ("algorithm.kl_coefficient=-1", "algorithm.kl_coefficient=-1 is below 0"),
        ("algorithm.icepop_alpha=6", "IcePop's band [6, 5] needs"),
        ("rollout.top_p=0", "rollout.top_p=0 must lie in (0, 1]"),
        ("rollout.top_p=0.9", "truncated sampling would bias every ratio"),
        ("rollout.temperature=0", "rollout.temperature=0"),
        ("training.lr=0", "training.lr=0 must be above 0"),
        ("rollout.max_new_tokens=2000", "raise token_budget to 5334 or retention to 6"),
        ("generation.dtype=float8", 'generation.dtype="float8": choose auto, float32, bfloat16, int8 or fp8'),
        ("generation.head_dtype=bfloat16", 'generation.head_dtype="bfloat16": choose auto or float32'),
        ("training.dtype=int8", 'training.dtype="int8": choose auto, float32 or bfloat16'),
        ("training.betas=[0.9]", "training.betas=[0.9] must be two numbers in [0, 1)"),
        ("training.eps=0", "training.eps=0 must be above 0"),
        ("training.weight_decay=-0.1", "training.weight_decay=-0.1 is below 0"),
        ("training.lr=.nan", "training.lr=nan must be above 0"),
        ("algorithm.icepop_alpha=0", "IcePop's band [0, 5] needs"),
        ("algorithm.icepop_beta=0.5", "IcePop's band [0.5, 0.5] needs"),
        ("rollout.top_p=1.5", "rollout.top_p=1.5 must lie in (0, 1]"),
        ("rollout.temperature=-1", "rollout.temperature=-1"),
        ("seed=-1", "seed=-1 is below 0"),
        ("runtime.object_store_bytes=1", "runtime.object_store_bytes=1 is below 78643200"),
        ("model.max_positions=20", "exceed model.max_positions=20: raise it to 22"),
        ("generation.kv_tokens=21", "generation.kv_tokens=21 does not hold one sequence"),
        ("generation.memory_fraction=1.5", "generation.memory_fraction=1.5 must lie in (0, 1]"),
        ("training.offload_optimizer=true", "where device=cpu has them already"),
        ("algorithm.routing_replay=true", "which it does not bring along: set generation.return_routing=true"),
        ("training.head_dtype=bfloat16", 'training.head_dtype="bfloat16": choose auto or float32'),
        ("training.balance_coefficient=-1", "training.balance_coefficient=-1 is below 0"),
        ("training.expert_bias_rate=-1", "training.expert_bias_rate=-1 is below 0"),
        ("training.lora.rank=-1", "training.lora.rank=-1 is below 0"),
        ("training.lora.base=int8", "training.lora.base=int8 keeps matrices that do not train"),
        ("training.lora.base=int4", 'training.lora.base="int4": choose auto, int8 or nf4'),
        ("training.lora.dropout=1", "training.lora.dropout=1 must lie in [0, 1)"),
        ("training.lora.adapter=a/b", "training.lora.adapter=a/b needs adapters to train: set training.lora.rank"),
        ("weights.bucket_bytes=1", "weights.bucket_bytes=1 is below 4096"),
        ("reward.max_error_share=2", "reward.max_error_share=2 must lie between 0 and 1"),
    ],
)
def test_values_that_cannot_work_are_refused(quickstart: Config, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        changed(quickstart, override).check()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.epochs=0", "finetune.epochs=0 must be above 0, or null"),
        ("finetune.batch_size=0", "finetune.batch_size=0 is below 1"),
        ("finetune.max_tokens=1", "finetune.max_tokens=1 is below 2"),
        ("finetune.max_tokens=5000", "finetune.max_tokens=5000 exceeds model.max_positions=4096"),
        ("finetune.held_out=-1", "finetune.held_out=-1 is below 0"),
        ("dpo.beta=0", "dpo.beta=0 must be above 0"),
        ("dpo.label_smoothing=0.5", "dpo.label_smoothing=0.5 must be at least 0 and below 0.5"),
        ("training.lora.rank=4", "training.lora trains adapters to random weights, which cannot be exported"),
        ("checkpoint.keep_best=-1", "checkpoint.keep_best=-1 is below 0"),
        ("checkpoint.keep_best=1", "checkpoint.keep_best=1 needs evaluations to choose by: set evaluation.every"),
        ("training.lr=0", "training.lr=0 must be above 0"),
    ],
)
def test_values_that_fine_tuning_cannot_use_are_refused(quickstart: Config, override: str, message: str) -> None:
    config = changed(changed(quickstart, "evaluation.every=0"), override)
    config.command = Command.sft
    with pytest.raises(ConfigError) as raised:
        config.check()
    assert message in str(raised.value)


def test_fine_tuning_does_not_look_at_rollouts(quickstart: Config) -> None:
    config = changed(quickstart, "rollout.token_budget=-5")
    config.command = Command.sft
    config.check()
    config.dpo.loss, config.dpo.label_smoothing = DpoLoss.ipo, 0.1
    with pytest.raises(ConfigError, match=r"label_smoothing is for dpo\.loss=sigmoid"):
        config.check()
    config.dpo.label_smoothing = 0.0
    config.finetune.held_out, config.data.evaluation = 5, "rows.jsonl"
    with pytest.raises(ConfigError, match=r"finetune\.held_out=5 and data\.evaluation=rows\.jsonl both name"):
        config.check()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "which recipe?"),
        (["recipe=quickstart", "placement=hybrid", "training.ranks=2"], "use placement=split"),
        (["recipe=quickstart", "runtime=inline", "training.ranks=2"], "use runtime=ray, or training.ranks=1"),
        (
            ["recipe=quickstart", "training=lora", "training.ranks=2", "training.lora.base=nf4"],
            "training.lora.base=nf4 works on one rank",
        ),
        (
            ["recipe=quickstart", "training.master=bfloat16_stochastic"],
            "on device=cpu is float32: set training.dtype=bfloat16, or",
        ),
        (
            ["recipe=quickstart", "device=auto", "training.ranks=2", "training.offload_optimizer=true"],
            "training.ranks=2 share the states already",
        ),
        (["recipe=quickstart", "device=cpu", "training.offload_parameters=true"], "and device=cpu has them already"),
        ([*STREAMED, "training.ranks=2", "training.offload_optimizer=false"], "training.ranks=2 share the weights"),
        ([*STREAMED, "training.offload_optimizer=false"], "set training.offload_optimizer=true"),
        ([*STREAMED, "training.recompute=none"], "set training.recompute to selective or full"),
        ([*STREAMED, "placement=hybrid"], "no weights on the GPU that generation could share: use placement=split"),
        (
            ["recipe=quickstart", "training.ranks=4", "training.tensor_parallel=2", "training.expert_parallel=4"],
            "training.ranks=4 is no multiple of training.tensor_parallel=2 x training.expert_parallel=4; use 8",
        ),
        (
            [
                *("recipe=quickstart", "placement=hybrid", "training.ranks=2", "generation.ranks=2"),
                "training.tensor_parallel=2",
            ],
            "ranks have parts of the layers alone: use placement=split",
        ),
        (
            ["recipe=quickstart", "training.ranks=2", "training.tensor_parallel=2", "training.lora.rank=2"],
            "training.tensor_parallel=2 cuts matrices over ranks, and adapters",
        ),
        (
            ["recipe=quickstart", "training.ranks=2", "training.tensor_parallel=2", "training.optimizer=adamw8bit"],
            "training.tensor_parallel=2 cuts rows through the blocks that training.optimizer=adamw8bit scales",
        ),
        (
            [
                *("recipe=quickstart", "training.ranks=2", "training.tensor_parallel=2", "training.dtype=bfloat16"),
                "training.master=bfloat16_stochastic",
            ],
            "needs norms that stay equal on the ranks that share them",
        ),
        (
            ["recipe=quickstart", "generation.ranks=3", "generation.tensor_parallel=2"],
            "the ranks of one replica; use 4",
        ),
        (
            ["recipe=quickstart", "runtime=inline", "generation.ranks=2", "generation.tensor_parallel=2"],
            "generation.tensor_parallel=2 needs a process for each rank: use runtime=ray",
        ),
        (["recipe=quickstart", "placement=hybrid", "generation.ranks=2"], "use placement=split"),
        (["recipe=quickstart", "placement=hybrid", "weights.transport=ipc"], "has one copy of them: use auto"),
        (["recipe=quickstart", "device=cpu", "weights.transport=ipc"], "device=cpu: use shared_memory"),
        (["recipe=quickstart", "runtime=inline", "weights.transport=nccl"], "needs a process for each rank: use"),
        (
            ["recipe=quickstart", "training.expert_bias_rate=0.01", "training.lora.rank=2"],
            "moves weights that training.lora.rank=2 freezes: set one of them to 0",
        ),
        (
            ["recipe=quickstart", "training.expert_bias_rate=0.01", "training.master=bfloat16_stochastic"],
            "too small a step for biases in bfloat16: use training.master=float32",
        ),
        (
            ["recipe=quickstart", "model.experts.count=4"],
            "needs a family with experts, and model.family=qwen3: use one of",
        ),
        (["recipe=quickstart", "model=tiny_moe", "model.experts.count=0"], "model.experts.count=0: set how many"),
        (["recipe=quickstart", "model.family=qwen_moe"], '"qwen_moe" is unknown'),
        (
            ["recipe=quickstart", "placement=hybrid", "generation.dtype=int8"],
            "shares them with training: use placement=split or generation.dtype=auto",
        ),
        (
            ["recipe=quickstart", "algorithm=ppo", "algorithm.value_coefficient=0"],
            "takes its baseline from a value head, which algorithm.value_coefficient=0 does not train",
        ),
        (["recipe=quickstart", "algorithm=ppo", "algorithm.drop_equal_groups=true"], "tell a value head as much"),
        (
            ["recipe=quickstart", "algorithm=dapo", "algorithm.dynamic_sampling=129"],
            "129 groups are more than algorithm.dynamic_windows=4 windows of rollout.capacity=256 rollouts have: lower "
            "it to 128",
        ),
        (
            ["recipe=quickstart", "algorithm.kl_estimator=k1"],
            "algorithm.kl_estimator=k1 measures a distance that algorithm.kl_coefficient=0",
        ),
        (["recipe=quickstart", "algorithm.anchor=behavior"], "would count it twice; use correction=none"),
        (
            ["recipe=quickstart", "algorithm.surrogate=reinforce", "training.minibatches=2"],
            "use minibatches=1 or another surrogate",
        ),
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
