"""Two gloo ranks against one process: losses, weights, checkpoints and exported weights are the same."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from asystem.algorithms import value_loss
from asystem.config import AlgorithmConfig, CheckpointConfig, TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack, pack_one
from asystem.errors import TrainingError
from asystem.models import Decoder, ModelSpec, MoESpec, init_weights
from asystem.state import Inbox, Outbox
from asystem.stats import Stats, merge
from asystem.training import Saver, TrainEngine, supervised_loss, with_token_advantages
from asystem.training.checkpoint import read_manifest

WORLD, VOCAB, STEPS = 2, 23, 4

# Which of the five samples each rank has: about half, one micro-batch against several, all and none.
SHARES = {"even": [[0, 2, 4], [1, 3]], "uneven": [[0, 1, 2, 3], [4]], "empty": [[0, 1, 2, 3, 4], []]}
SHARES["experts"] = SHARES["uneven"]
SCENARIOS = [("even", "tied"), ("uneven", "untied"), ("empty", "tied"), ("experts", "experts")]  # share, model
ALL = [0, 1, 2, 3, 4]
ZERO = {"even": "1", "uneven": "2", "empty": "3", "experts": "auto"}


MOE = MoESpec(6, 2, 8, 8, (0,), score="sigmoid", groups=3, top_groups=2, has_bias=True)
SPECS = {
    "tied": ModelSpec("qwen3", VOCAB, 16, 24, 2, 4, 2, 4, qk_norm=True, qkv_bias=True, tie_embeddings=True),
    "untied": ModelSpec("qwen3", VOCAB, 16, 24, 2, 4, 2, 4, qk_norm=True, qkv_bias=True),
    "experts": ModelSpec("bailing_moe_v2", VOCAB, 16, 24, 2, 4, 2, 4, rotary_factor=0.5, qk_norm=True, moe=MOE),
}


def _model(kind: str) -> Decoder:
    model = Decoder(SPECS[kind])
    init_weights(model, 0, std=0.2)
    return model


def _engine(kind: str, world_size: int, *, value_head: bool = False, **changes: Any) -> TrainEngine:
    experts = {"expert_bias_rate": 0.02, "router_z_coefficient": 0.1} if kind == "experts" else {}
    changes = {"eps": 1e-3, "clip_norm": 0.5, "max_bad_steps": 3} | experts | changes
    cfg = TrainingConfig(**({"lr": 1e-2} | changes))
    return TrainEngine(_model(kind), cfg, device="cpu", world_size=world_size, total_steps=10, value_head=value_head)


def _samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    lengths = [4, 1, 9, 6, 3]
    return [
        Sample(rng.integers(0, VOCAB, 2), rng.integers(0, VOCAB, n), 1 / sum(lengths), rollout=i)
        for i, n in enumerate(lengths)
    ]


def _micro(rows: list[int]) -> list[PackedBatch]:
    samples = _samples()
    return pack([samples[row] for row in rows], budget=12)


def _train(engine: TrainEngine, rows: list[int]) -> tuple[list[Stats], list[Tensor]]:
    stats = [engine.step(_micro(rows), supervised_loss) for _ in range(STEPS)]
    logprobs = engine.logprobs(_micro(rows))
    # A step after a pass without gradients must see the new weights again.
    stats.append(engine.step(_micro(rows), supervised_loss))
    return stats, logprobs


def _scenario(rank: int, folder: Path, share: str, kind: str) -> dict[str, Any]:
    """Trains, saves, loads into a second engine, and trains that on."""
    engine = _engine(kind, WORLD, zero=ZERO[share])
    assert all(isinstance(p, DTensor) for p in engine.model.parameters())
    engine.keep_reference()
    stats, logprobs = _train(engine, SHARES[share][rank])
    reference = engine.logprobs(_micro(SHARES[share][rank]), reference=True)
    payload = Outbox(engine.model).write()
    engine.save(folder / share)
    resumed = _engine(kind, WORLD)
    resumed.load(folder / share)
    resumed.step(_micro(SHARES[share][rank]), supervised_loss)
    after = Outbox(resumed.model).write()
    return {"stats": stats, "logprobs": logprobs, "reference": reference, "payload": payload, "resumed": after}


def _bad_gradient_on_rank_1(rank: int) -> dict[str, Any]:
    engine = _engine("tied", WORLD)
    first = Outbox(engine.model).write()

    def loss_fn(packed: PackedBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Stats]:
        return logprobs.sum() * (math.nan if rank == 1 else 1.0), Stats()

    stats = [engine.step(_micro([rank]), loss_fn) for _ in range(2)]
    after = Outbox(engine.model).write()
    error = ""
    try:
        engine.step(_micro([rank]), loss_fn)
    except TrainingError as raised:
        error = str(raised)
    return {"stats": stats, "before": first, "after": after, "error": error}


def _one_saved_and_two_load(rank: int, folder: Path) -> dict[str, Any]:
    engine = _engine("tied", WORLD)
    engine.load(folder / "alone")
    return {"payload": Outbox(engine.model).write(), "steps": engine.steps}


def _critic(rank: int | None) -> dict[str, Any]:
    """Values learn the rewards, of which the second rank has fewer micro-batches, and weightless ones."""
    engine = _engine("tied", 1 if rank is None else WORLD, value_head=True)
    cfg = AlgorithmConfig(advantage="gae", value_coefficient=1.0)

    def loss_fn(packed: PackedBatch, logprobs: Tensor, entropy: Tensor, values: Tensor) -> tuple[Tensor, Stats]:
        assert packed.old_values is not None and packed.returns is not None
        common = {"token_weights": packed.token_weights, "rows": packed.label_rows, "cfg": cfg}
        loss, stats = value_loss(values, old_values=packed.old_values, returns=packed.returns, **common)  # type: ignore[arg-type]
        return loss - (packed.token_weights * packed.advantages * logprobs).sum(), stats

    samples = [replace(s, advantage=s.rollout % 2, token_weight=s.token_weight * (s.rollout != 3)) for s in _samples()]
    rows = ALL if rank is None else SHARES["uneven"][rank]
    found = []
    for _ in range(STEPS):
        micro, stats = with_token_advantages(engine, pack([samples[row] for row in rows], budget=12), cfg)
        found.append(stats + engine.step(micro, loss_fn))
    return {"stats": found, "payload": Outbox(engine.model).write()}


def _replayed(rank: int | None) -> dict[str, Any]:
    """Experts that no router would choose."""
    engine, rng = _engine("experts", 1 if rank is None else WORLD), np.random.default_rng(5)
    samples = [replace(s, routing=rng.integers(0, 3, (s.length - 1, 1, 2)) * 2 + [0, 1]) for s in _samples()]
    rows = ALL if rank is None else SHARES["uneven"][rank]
    micro = pack([samples[row] for row in rows], budget=12)
    stats = [engine.step(micro, supervised_loss) for _ in range(2)]
    return {"stats": stats, "payload": Outbox(engine.model).write()}


def _saved_beside_training(rank: int, folder: Path) -> dict[str, Any]:
    """Collectives of training and of the writing threads run at the same time."""
    engine = _engine("tied", WORLD)
    saver = Saver(engine, CheckpointConfig(keep_last=2), lambda path: (path / "note").write_text("written once"))
    for step in range(1, 4):
        engine.step(_micro(SHARES["even"][rank]), supervised_loss)
        saver.save(folder / "beside" / f"step-{step:06d}", score=float(step))
    for _ in range(3):
        engine.step(_micro(SHARES["even"][rank]), supervised_loss)
    saver.wait()
    return {}


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _collectives(rank: int) -> dict[str, tuple[int, int]]:
    """Gathers of weights and scatters of gradients in a step of three micro-batches, by stage."""
    found = {}
    for zero in ("1", "2", "3", "auto"):
        engine = _engine("tied", WORLD, zero=zero)
        micro = [pack_one([_samples()[row]]) for row in ([0, 1, 2], [3, 4])[rank]]
        engine.step(micro, supervised_loss)
        with _Calls() as calls:
            engine.step(micro, supervised_loss)
        gathers, scatters = (sum(word in name for name in calls.names) for word in ("allgather", "reduce_scatter"))
        found[zero] = gathers, scatters
    return found


def _rank(rank: int, folder: Path) -> None:
    """All scenarios in one pair of processes, which take longer to start than to train."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results = {share: _scenario(rank, folder, share, kind) for share, kind in SCENARIOS}
    results["alone"] = _one_saved_and_two_load(rank, folder)
    results["critic"] = _critic(rank)
    results["replayed"] = _replayed(rank)
    results["beside"] = _saved_beside_training(rank, folder)
    results["collectives"] = _collectives(rank)
    results["bad"] = _bad_gradient_on_rank_1(rank)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks left their results and checkpoints."""
    path = tmp_path_factory.mktemp("ranks")
    alone = _engine("tied", 1)
    alone.step(_micro(ALL), supervised_loss)
    alone.save(path / "alone")
    mp.spawn(_rank, (path,), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return path


def _results(folder: Path, share: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False)[share] for rank in range(WORLD)]


def _assert_weights(ranks: list[dict[str, Any]], key: str, engine: TrainEngine) -> None:
    found = Decoder(engine.model.spec)
    Inbox(found).read([rank[key] for rank in ranks])
    for name, p in engine.model.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), p, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("share", "kind"), SCENARIOS)
def test_two_ranks_equal_one_process(folder: Path, share: str, kind: str) -> None:
    ranks = _results(folder, share)
    alone = _engine(kind, 1)
    expected, _ = _train(alone, ALL)
    for step, stats in enumerate(expected):
        found = merge(rank["stats"][step] for rank in ranks).to_dict()
        assert found == pytest.approx(stats.to_dict(), rel=1e-5, abs=1e-5)
    assert sum(block.numel() for rank in ranks for block in rank["payload"].blocks()) == alone.model.spec.num_parameters
    _assert_weights(ranks, "payload", alone)


def test_values_and_advantages_of_two_ranks_are_those_of_one_process(folder: Path) -> None:
    ranks, alone = _results(folder, "critic"), _critic(None)
    for step, expected in enumerate(alone["stats"]):
        stats = merge(rank["stats"][step] for rank in ranks).to_dict()
        assert stats == pytest.approx(expected.to_dict(), rel=1e-4, abs=1e-4)
    assert stats["value/explained_variance"] > 0.01
    found, wanted = _model("tied"), _model("tied")
    Inbox(found).read([rank["payload"] for rank in ranks])
    Inbox(wanted).read([alone["payload"]])
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, wanted.get_parameter(name), atol=1e-4, rtol=0, msg=name)


def test_two_ranks_replay_experts_as_one_process_does(folder: Path) -> None:
    ranks, alone = _results(folder, "replayed"), _replayed(None)
    for step, expected in enumerate(alone["stats"]):
        stats = merge(rank["stats"][step] for rank in ranks).to_dict()
        assert stats == pytest.approx(expected.to_dict(), rel=1e-5, abs=1e-5)
    assert stats["routing/replaced_fraction"] > 0.3
    found, wanted = _model("experts"), _model("experts")
    Inbox(found).read([rank["payload"] for rank in ranks])
    Inbox(wanted).read([alone["payload"]])
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, wanted.get_parameter(name), atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("share", "kind"), SCENARIOS)
def test_the_reference_of_two_ranks_stays_where_training_began(folder: Path, share: str, kind: str) -> None:
    alone = _engine(kind, 1)
    for rank, rows in zip(_results(folder, share), SHARES[share], strict=True):
        for found, wanted in zip(rank["reference"], alone.logprobs(_micro(rows)), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("share", "kind"), SCENARIOS)
def test_logprobs_of_two_ranks_equal_one_process(folder: Path, share: str, kind: str) -> None:
    alone = _engine(kind, 1)
    for _ in range(STEPS):
        alone.step(_micro(ALL), supervised_loss)
    for rank, rows in zip(_results(folder, share), SHARES[share], strict=True):
        for found, wanted in zip(rank["logprobs"], alone.logprobs(_micro(rows)), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("share", "kind"), SCENARIOS)
def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_one(folder: Path, share: str, kind: str) -> None:
    alone = _engine(kind, 1)
    alone.load(folder / share)
    saved = _results(folder, share)
    _assert_weights(saved, "payload", alone)
    alone.step(_micro(ALL), supervised_loss)
    _assert_weights(saved, "resumed", alone)


def test_a_checkpoint_of_one_process_resumes_on_two_ranks(folder: Path) -> None:
    alone = _engine("tied", 1)
    alone.step(_micro(ALL), supervised_loss)
    ranks = _results(folder, "alone")
    assert [rank["steps"] for rank in ranks] == [1, 1]
    _assert_weights(ranks, "payload", alone)


def test_two_ranks_save_beside_training(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "beside").iterdir()) == ["step-000002", "step-000003"]
    alone = _engine("tied", 1)
    alone.load(folder / "beside" / "step-000003")
    expected = _engine("tied", 1)
    for _ in range(3):
        expected.step(_micro(ALL), supervised_loss)
    assert alone.steps == 3
    for name, p in expected.model.named_parameters():
        torch.testing.assert_close(alone.model.get_parameter(name), p, atol=1e-5, rtol=0, msg=name)
    manifest = read_manifest(folder / "beside" / "step-000003")
    assert manifest["score"] == 3.0 and manifest["files"]["note"] == len("written once")
    assert sum(name.endswith(".distcp") for name in manifest["files"]) == WORLD


def test_lower_stages_gather_and_scatter_once_a_step(folder: Path) -> None:
    # Two blocks and the rest: a block's weights twice a micro-batch, those of the rest once.
    expected = {"1": (3, 3), "2": (3, 9), "3": (15, 9), "auto": (3, 3)}
    assert _results(folder, "collectives") == [expected] * WORLD


def test_a_bad_gradient_on_one_rank_is_skipped_by_all(folder: Path) -> None:
    ranks = _results(folder, "bad")
    assert merge(part for rank in ranks for part in rank["stats"]).to_dict()["train/skipped"] == 2
    for number, rank in enumerate(ranks):
        assert np.array_equal(rank["before"].buffer.array, rank["after"].buffer.array)
        assert "3 steps in a row had a NaN or infinite gradient" in rank["error"]
        assert f"trained rollouts {number}." in rank["error"]
