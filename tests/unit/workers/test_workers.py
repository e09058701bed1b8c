"""The worker programs by themselves: no groups, no runtime, real engines."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asystem.config import Config, ExpertsConfig
from asystem.data.batch import Batch, BatchRow
from asystem.errors import DataError, ModelError
from asystem.models import QuantizedLinear, merge
from asystem.rollout import drawn_length
from asystem.spmd import store
from asystem.types import FinishedRollout, Ref, RolloutRequest
from asystem.workers import GenerateWorker, HybridWorker, RewardWorker, TrainWorker

TASK = """
def train(): return [{"prompt": "ab", "answer": "x"}, {"prompt": "cde", "answer": "y"}]
def evaluation(): return [{"prompt": "q", "answer": "z"}, {"prompt": "rs", "answer": "z"}]
def demonstrations(): return [{"prompt": "ab", "response": "xx"}]
def reward(row, response):
    if row["prompt"] == "cde": raise ValueError("no c")
    return float("nan") if row["prompt"] == "q" else 0.5
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "task.py").write_text(TASK)
    config = Config(recipe_dir=str(tmp_path), device="cpu", steps=4)
    config.model.num_layers, config.model.hidden_size, config.model.intermediate_size = 1, 32, 64
    config.model.head_dim = 8
    config.data.task, config.data.max_prompt_tokens = "task.py", 8
    config.rollout.max_new_tokens, config.rollout.slice_steps = 6, 3
    config.training.lr = 1e-2
    config.training.warmup.steps = 4
    return config


def ready(worker: GenerateWorker | RewardWorker | TrainWorker) -> None:
    asyncio.run(worker.setup())


def decode(worker: GenerateWorker, requests: list[RolloutRequest], slices: int = 5) -> list[FinishedRollout]:
    finished = []
    for _ in range(slices):
        finished += asyncio.run(worker.decode(requests, None)).finished
        requests = []
    return sorted(finished, key=lambda rollout: rollout.rollout)


def batch_of(finished: list[FinishedRollout]) -> Batch:
    rows = [
        BatchRow(f.ref, f.row, f.rollout, f.group, f.prompt, f.prompt_length, f.length, 1.0, (-1.0) ** f.rollout, None)
        for f in finished
    ]
    return Batch(rows, version=0, num_tokens=sum(row.length for row in rows), num_rollouts=len(rows))


def test_a_slice_ends_after_its_steps_and_describes_what_finished(config: Config) -> None:
    worker = GenerateWorker(config)
    ready(worker)
    report = asyncio.run(worker.decode([RolloutRequest(0, 0, 0), RolloutRequest(1, 0, 0)], None))
    assert (report.steps, report.unfinished + len(report.finished)) == (3, 2)
    finished = decode(worker, [])
    trajectory = store.get(finished[0].ref)[finished[0].row]
    assert trajectory.prompt_tokens.tolist() == [ord("a"), ord("b")]
    assert len(trajectory.tokens) == finished[0].length <= 6


def test_a_study_gives_rollouts_their_lengths(config: Config) -> None:
    config.rollout.lengths.median, config.rollout.max_new_tokens = 4.0, 6
    worker = GenerateWorker(config)
    ready(worker)
    finished = decode(worker, [RolloutRequest(i, i, 0) for i in range(20)])
    expected = [drawn_length(4.0, 1.0, 6, seed=0, rollout=i) for i in range(20)]
    assert [rollout.length for rollout in finished] == expected
    assert len(set(expected)) > 3


def test_evaluation_leaves_rollouts_in_flight_alone(config: Config) -> None:
    plain, disturbed = GenerateWorker(config), GenerateWorker(config)
    requests = [RolloutRequest(i, 0, 0) for i in range(4)]
    tokens = []
    for worker in (plain, disturbed):
        ready(worker)
        finished = asyncio.run(worker.decode(requests, None)).finished
        if worker is disturbed:
            held_out = asyncio.run(worker.evaluate([0, 1]))
            assert [rollout.prompt for rollout in held_out] == [0, 1]
        finished += decode(worker, [])
        tokens.append({f.rollout: store.get(f.ref)[f.row].tokens.tolist() for f in finished})
    assert tokens[0] == tokens[1]


def test_prompts_that_are_too_long_are_named(config: Config) -> None:
    config.data.max_prompt_tokens = 2
    worker = GenerateWorker(config)
    ready(worker)
    with pytest.raises(DataError, match=r"prompt 1 has 3 tokens; data\.max_prompt_tokens is 2"):
        asyncio.run(worker.decode([RolloutRequest(0, 0, 1)], None))


def test_weights_travel_and_versions_do_not_go_back(config: Config, tmp_path: Path) -> None:
    trainer, generator = TrainWorker(config, tmp_path), GenerateWorker(config)
    ready(trainer)
    ready(generator)
    asyncio.run(trainer.warm_up(4))
    asyncio.run(generator.load_weights(asyncio.run(trainer.export_weights()), 3))
    for name, parameter in generator.engine.model.named_parameters():
        assert torch.equal(parameter, trainer.trainer.model.get_parameter(name)), name
    assert asyncio.run(generator.decode([], None)).version == 3
    with pytest.raises(ModelError, match="published weights of version 2, and generators rank 0 has version 3 already"):
        asyncio.run(generator.load_weights(asyncio.run(trainer.export_weights()), 2))


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_a_probe_shows_whether_both_sides_compute_one_model(config: Config, tmp_path: Path, dtype: str) -> None:
    config.generation.dtype = dtype
    trainer, generator = TrainWorker(config, tmp_path), GenerateWorker(config)
    ready(trainer)
    ready(generator)
    asyncio.run(trainer.warm_up(4))
    unfinished = asyncio.run(generator.decode([RolloutRequest(0, 0, 0)], 2)).unfinished
    probe = asyncio.run(generator.load_weights(asyncio.run(trainer.export_weights()), 1, probe=True))
    assert probe is not None
    assert [len(t.tokens) <= 16 and set(t.versions.tolist()) == {1} for t in store.get(probe)] == [True] * 2
    assert asyncio.run(generator.decode([], 1)).unfinished == unfinished, "rollouts in flight have waited"
    gap, worst = asyncio.run(trainer.score_probe(probe))
    assert gap <= worst and gap < (0.01 if dtype == "int8" else 1e-5)
    with torch.no_grad():  # as a wrong idea of what a tensor means would: no checksum sees it
        generator.engine.model.get_submodule("layers.0.mlp.down_proj").weight.neg_()  # type: ignore[operator]
    generator.engine.weights_updated(2)
    assert asyncio.run(trainer.score_probe(generator.probe()))[0] > 2 * gap + 1e-5


def test_8_bit_weights_are_quantised_at_the_start_and_when_weights_come(config: Config, tmp_path: Path) -> None:
    config.generation.dtype = "int8"
    trainer, generator = TrainWorker(config, tmp_path), GenerateWorker(config)
    ready(trainer)
    ready(generator)
    linear = generator.engine.model.get_submodule("layers.0.mlp.down_proj")
    assert isinstance(linear, QuantizedLinear) and linear.weight.dtype is torch.int8
    before = linear.weight.clone()
    asyncio.run(trainer.warm_up(4))
    asyncio.run(generator.load_weights(asyncio.run(trainer.export_weights()), 1))
    want = QuantizedLinear(trainer.trainer.model.layers[0].mlp.down_proj, torch.int8)
    assert torch.equal(linear.weight, want.weight) and not torch.equal(linear.weight, before)
    assert len(decode(generator, [RolloutRequest(i, 0, 0) for i in range(4)])) == 4
    config.generation.dtype = "fp8"
    ready(coarser := GenerateWorker(config))
    linear = coarser.engine.model.get_submodule("layers.0.mlp.down_proj")
    assert isinstance(linear, QuantizedLinear) and linear.weight.dtype is torch.float8_e4m3fn


def test_hybrid_shares_storage_and_sees_each_update(config: Config, tmp_path: Path) -> None:
    worker = HybridWorker(config, tmp_path)
    ready(worker)
    finished = decode(worker, [RolloutRequest(i, 0, 0) for i in range(4)])
    before = {name: p.data_ptr() for name, p in worker.engine.model.named_parameters()}
    old = worker.engine.model.embed.weight.clone()
    stats = asyncio.run(worker.update(batch_of(finished))).to_dict()
    assert asyncio.run(worker.export_weights()) == [], "nothing is copied"
    assert {name: p.data_ptr() for name, p in worker.trainer.model.named_parameters()} == before
    assert not torch.equal(worker.engine.model.embed.weight, old)
    assert stats["mismatch/logprob_diff_max"] < 1e-4
    assert stats["train/grad_norm"] > 0


@pytest.mark.parametrize("updates", [1, 2])
def test_training_replays_the_experts_that_generation_chose(config: Config, tmp_path: Path, updates: int) -> None:
    config.model.family, config.model.experts = "bailing_moe_v2", ExpertsConfig(8, 2, 16, groups=2)
    config.generation.return_routing = config.algorithm.routing_replay = True
    config.training.minibatches = updates  # more than one take log-probabilities from before the first, replayed too
    worker = HybridWorker(config, tmp_path)
    ready(worker)
    requests = [RolloutRequest(i, i, i % 2) for i in range(4)]
    batch = batch_of(decode(worker, requests))
    with torch.no_grad():  # the trainer's routers now choose otherwise, and weigh as before
        worker.trainer.model.get_parameter("layers.0.mlp.router.bias").copy_(torch.linspace(-1, 1, 8))
    assert asyncio.run(worker.score_probe(batch.rows[0].ref))[1] < 1e-4
    stats = asyncio.run(worker.update(batch)).to_dict()
    assert stats["mismatch/logprob_diff_max"] < 1e-4
    assert 0.3 < stats["routing/replaced_fraction"] <= 1
    assert stats["train/expert_load_max"] > 1
    config.algorithm.routing_replay = False
    with torch.no_grad():
        worker.trainer.model.get_parameter("layers.0.mlp.router.bias").copy_(torch.linspace(-1, 1, 8))
    stats = asyncio.run(worker.update(batch)).to_dict()
    assert "routing/replaced_fraction" not in stats and stats["mismatch/logprob_diff_max"] > 1e-3


def test_what_a_hybrid_worker_samples_after_an_update_carries_the_new_version(config: Config, tmp_path: Path) -> None:
    """A slice of decoding may come between the update and its publication: it reads the new weights already."""
    worker = HybridWorker(config, tmp_path)
    ready(worker)
    batch = batch_of(decode(worker, [RolloutRequest(i, 0, 0) for i in range(4)]))
    asyncio.run(worker.update(batch))
    between = decode(worker, [RolloutRequest(9, 1, 0)])
    asyncio.run(worker.load_weights(asyncio.run(worker.export_weights()), 1))
    assert store.get(between[0].ref)[between[0].row].versions.tolist() == [1] * between[0].length
    for wanted in (worker.engine.model.embed.weight, worker.trainer.model.embed.weight):
        assert wanted.untyped_storage().data_ptr() == worker.trainer.optimizer.params["embed.weight"].data_ptr()
    assert worker.shares_weights


@pytest.mark.parametrize("base", ["auto", "int8"])
def test_adapters_reach_a_generator_merged(config: Config, tmp_path: Path, base: str) -> None:
    config.training.lora.rank, config.training.lora.base = 4, base
    trainer, generator = TrainWorker(config, tmp_path), GenerateWorker(config)
    ready(trainer)
    ready(generator)
    old = generator.engine.model.layers[0].attn.qkv_proj.weight.clone()
    asyncio.run(trainer.warm_up(4))
    asyncio.run(generator.load_weights(asyncio.run(trainer.export_weights()), 1))
    for name, tensor in merge(trainer.trainer.model).items():
        assert torch.equal(generator.engine.model.get_parameter(name), tensor), name
    assert not torch.equal(generator.engine.model.layers[0].attn.qkv_proj.weight, old)
    asyncio.run(trainer.save(4, None))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("base", ["auto", "nf4"])
def test_hybrid_decodes_with_merged_adapters(config: Config, tmp_path: Path, base: str) -> None:
    config.training.lora.rank, config.training.lora.base = 4, base
    worker = HybridWorker(config, tmp_path)
    ready(worker)
    asyncio.run(worker.warm_up(4))
    asyncio.run(worker.load_weights(asyncio.run(worker.export_weights()), 1))
    assert worker.engine.model.embed.weight is worker.trainer.model.embed.weight
    stats = asyncio.run(worker.update(batch_of(decode(worker, [RolloutRequest(i, 0, 0) for i in range(4)])))).to_dict()
    assert stats["mismatch/logprob_diff_max"] < 1e-4  # the engine sampled from what the adapters had learnt
    before = worker.engine.model.layers[0].mlp.down_proj.weight.clone()
    asyncio.run(worker.load_weights(asyncio.run(worker.export_weights()), 2))
    assert not torch.equal(worker.engine.model.layers[0].mlp.down_proj.weight, before)


def test_a_reward_that_raises_or_is_nan_is_an_error_not_a_zero(config: Config) -> None:
    generator, rewarder = GenerateWorker(config), RewardWorker(config)
    ready(generator)
    ready(rewarder)
    finished = decode(generator, [RolloutRequest(0, 0, 0), RolloutRequest(1, 1, 1)])
    scores = asyncio.run(rewarder.score(finished))
    assert [(score.reward, score.error) for score in scores] == [(0.5, None), (0.0, "ValueError: no c")]
    held_out = asyncio.run(rewarder.score(asyncio.run(generator.evaluate([0])), held_out=True))
    assert held_out[0].error == "the reward was nan"


def test_references_of_failed_rewards_weigh_nothing(config: Config, tmp_path: Path) -> None:
    worker = HybridWorker(config, tmp_path)
    ready(worker)
    batch = batch_of(decode(worker, [RolloutRequest(0, 0, 0)]))
    failed = [BatchRow(Ref(row.ref.handle), *row_values(row)) for row in batch.rows]
    old = worker.trainer.model.embed.weight.clone()
    config.training.weight_decay = 0.0
    asyncio.run(worker.update(Batch(failed, 0, num_tokens=0, num_rollouts=0)))
    assert torch.allclose(worker.trainer.model.embed.weight, old, atol=1e-6, rtol=2e-4)


def row_values(row: BatchRow) -> tuple[object, ...]:
    return (row.row, row.rollout, row.group, row.prompt, row.prompt_length, row.length, 0.0, 0.0, "broken")


def test_a_process_that_shards_and_compiles_nothing_does_not_wait_for_those_imports() -> None:
    """Each takes a second of every rank's start."""
    slow = {"torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"}
    program = f"import sys, asystem.controller.run, asystem.workers; print(sorted({slow} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(("coefficient", "is_kept"), [(0.0, False), (0.1, True)])
def test_a_reference_is_loaded_only_where_the_loss_measures_to_it(
    config: Config, tmp_path: Path, coefficient: float, is_kept: bool
) -> None:
    config.algorithm.kl_coefficient, config.training.warmup.steps = coefficient, 0
    worker = TrainWorker(config, tmp_path)
    ready(worker)
    assert (worker.trainer.reference is not None) == is_kept
