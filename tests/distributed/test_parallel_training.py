"""Layers cut over gloo ranks, experts spread over them, and their mixes with FSDP2, against one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from asystem.config import AlgorithmConfig, Recompute, TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack
from asystem.models import Decoder, ModelSpec, MoESpec, init_weights, load_model, save_model
from asystem.state import Inbox, Outbox
from asystem.stats import merge
from asystem.training import Ranks, TrainEngine, TrainingPlan, supervised_loss, with_token_advantages
from asystem.training.states import local

VOCAB, STEPS, ALL = 23, 5, [0, 1, 2, 3, 4]
MOE = MoESpec(4, 2, 8, 8, (0,), score="sigmoid", groups=2, top_groups=1, has_bias=True)
SPECS = {
    "dense": ModelSpec("qwen3", VOCAB, 16, 24, 2, 4, 2, 4, qk_norm=True, qkv_bias=True, tie_embeddings=True),
    "experts": ModelSpec("bailing_moe_v2", VOCAB, 16, 24, 2, 4, 2, 4, rotary_factor=0.5, qk_norm=True, moe=MOE),
}
# Which of the samples each rank that has its own rows gets, by their number; the last of four idles.
SHARES = {1: [ALL], 2: [[0, 2, 4], [1, 3]], 4: [[0, 2], [1], [3, 4], []]}


@dataclass(frozen=True)
class Case:
    world: int
    kind: str
    choices: dict[str, Any] = field(default_factory=dict)


CASES = {
    "fsdp": Case(4, "dense"),
    "tensor x fsdp": Case(4, "dense", {"tensor_parallel": 2, "recompute": Recompute.selective}),
    "expert x fsdp": Case(4, "experts", {"expert_parallel": 2}),
    "expert x tensor": Case(4, "experts", {"expert_parallel": 2, "tensor_parallel": 2}),
    "expert of four": Case(4, "experts", {"expert_parallel": 4, "recompute": Recompute.full}),
    "tensor": Case(2, "dense", {"tensor_parallel": 2}),
    "tensor, experts": Case(2, "experts", {"tensor_parallel": 2}),
    "expert": Case(2, "experts", {"expert_parallel": 2}),
}


def _model(kind: str) -> Decoder:
    model = Decoder(SPECS[kind])
    init_weights(model, 0, std=0.2)
    with torch.no_grad():  # so that parts of them differ
        for number, (name, p) in enumerate(model.named_parameters()):
            if p.ndim == 1 and not name.endswith("router.bias"):
                p.add_(0.3 * torch.randn(len(p), generator=torch.Generator().manual_seed(number)))
    return model


def _engine(case: Case, world: int, *, value_head: bool = False, saved: Path | None = None) -> TrainEngine:
    experts = {"expert_bias_rate": 0.02, "router_z_coefficient": 0.1} if case.kind == "experts" else {}
    choices = experts | (case.choices if world > 1 else {})
    cfg = TrainingConfig(lr=1e-2, eps=1e-3, clip_norm=0.5, **choices)
    ranks = Ranks.of(cfg, world)
    model = _model(case.kind) if saved is None else load_model(saved, part=ranks.shard)
    options: dict[str, Any] = {"world_size": world, "value_head": value_head, "ranks": ranks}
    return TrainEngine(model, cfg, device="cpu", total_steps=10, **options)


def _micro(rows: list[int], moe: MoESpec | None = None) -> list[PackedBatch]:
    """With experts, some of the samples bring along which are to compute them."""
    rng, lengths = np.random.default_rng(0), [4, 1, 9, 6, 3]
    samples = [
        Sample(rng.integers(0, VOCAB, 2), rng.integers(0, VOCAB, n), 1 / sum(lengths), float(i % 2), rollout=i)
        for i, n in enumerate(lengths)
    ]
    if moe is not None:
        chosen = [rng.integers(0, 2, (sample.length - 1, 1, 2)) * 2 + [0, 1] for sample in samples]
        samples = [replace(sample, routing=chosen[i] if i % 3 else None) for i, sample in enumerate(samples)]
    return pack([samples[row] for row in rows], budget=12)


def _train(engine: TrainEngine, rows: list[int], checkpoint: Path | None) -> dict[str, Any]:
    engine.keep_reference()
    micro = _micro(rows, engine.spec.moe)
    stats = [engine.step(micro, supervised_loss) for _ in range(STEPS)]
    if checkpoint is not None:
        engine.save(checkpoint)
    payload = Outbox(engine.model, rank=engine.rank).write()
    logprobs, reference = (engine.logprobs(micro, reference=r) for r in (False, True))
    first = engine.ranks.is_first
    return {"stats": stats, "payload": payload, "logprobs": logprobs, "reference": reference, "first": first}


def _scenario(case: Case, checkpoint: Path) -> dict[str, Any]:
    engine = _engine(case, case.world)
    rows = SHARES[engine.ranks.data][engine.ranks.data_rank]
    states = [t for name, t in engine.optimizer.tensors().items() if ".exp_avg" in name]
    held = [sum(local(t).nbytes for t in tensors) for tensors in (engine.model.parameters(), states)]
    return _train(engine, rows, checkpoint) | {"rows": rows, "held": held}


def _resumed(case: Case, checkpoint: Path) -> dict[str, Any]:
    engine = _engine(case, case.world)
    engine.load(checkpoint)
    return {"payload": Outbox(engine.model, rank=engine.rank).write()}


def _from_folder(case: Case, saved: Path) -> dict[str, Any]:
    """Each rank reads its part alone."""
    engine = _engine(case, case.world, saved=saved)
    rows = SHARES[engine.ranks.data][engine.ranks.data_rank]
    for _ in range(STEPS):
        engine.step(_micro(rows, engine.spec.moe), supervised_loss)
    return {"payload": Outbox(engine.model, rank=engine.rank).write()}


def _advantages(rank: int | None) -> list[Tensor]:
    case = CASES["tensor"]
    engine = _engine(case, 1 if rank is None else case.world, value_head=True)
    micro, _ = with_token_advantages(engine, _micro(ALL), AlgorithmConfig(advantage="gae"))
    return [packed.advantages for packed in micro]


def _rank(rank: int, folder: Path) -> None:
    """All cases in four processes, which take longer to start than to train; two of them go on alone."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for world in (4, 2):
        if rank >= world:
            break
        store = dist.FileStore(str(folder / f"store{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        results |= {name: _scenario(case, folder / name) for name, case in CASES.items() if case.world == world}
        if world == 4:
            results["from folder"] = _from_folder(CASES["expert x tensor"], folder / "saved")
        else:
            results["to fsdp"] = _resumed(Case(2, "experts"), folder / "expert x tensor")
            results["to tensor"] = _resumed(CASES["tensor, experts"], folder / "expert x fsdp")
            results["advantages"] = _advantages(rank)
        dist.destroy_process_group()
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel")
    save_model(_model("experts"), SPECS["experts"], path / "saved")
    mp.spawn(_rank, (path,), nprocs=4)  # type: ignore[no-untyped-call]
    return path


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[TrainEngine, dict[str, Any]]]:
    """Each model trained in one process."""
    engines = {kind: _engine(Case(1, kind), 1) for kind in SPECS}
    return {kind: (engine, _train(engine, ALL, None)) for kind, engine in engines.items()}


def _results(folder: Path, name: str, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False)[name] for rank in range(world)]


def _assert_sent(ranks: list[dict[str, Any]], engine: TrainEngine) -> None:
    found = Decoder(engine.spec)
    Inbox(found).read([rank["payload"] for rank in ranks])
    for name, p in engine.model.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), p, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(folder: Path, alone: dict[str, Any], name: str) -> None:
    case = CASES[name]
    ranks, (engine, expected) = _results(folder, name, case.world), alone[case.kind]
    for step, stats in enumerate(expected["stats"]):
        found = merge(rank["stats"][step] for rank in ranks if rank["first"]).to_dict()
        assert found == pytest.approx(stats.to_dict(), rel=1e-5, abs=1e-5)
    _assert_sent(ranks, engine)
    for rank in ranks:
        for key in ("logprobs", "reference"):
            wanted = engine.logprobs(_micro(rank["rows"], engine.spec.moe), reference=key == "reference")
            for found, value in zip(rank[key], wanted, strict=True):
                torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_ranks_resumes_in_one_process(folder: Path, alone: dict[str, Any], name: str) -> None:
    expected = alone[CASES[name].kind][0].state()
    engine = _engine(CASES[name], 1)
    engine.load(folder / name)
    found = engine.state()
    assert found[1] == expected[1]
    for key, held in expected[0].items():
        torch.testing.assert_close(found[0][key].blocks[0][1], held.blocks[0][1], atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("name", ["to fsdp", "to tensor"])
def test_a_checkpoint_resumes_under_another_sharding(folder: Path, alone: dict[str, Any], name: str) -> None:
    _assert_sent(_results(folder, name, 2), alone["experts"][0])


def test_ranks_that_read_their_parts_of_a_folder_equal_one_process(folder: Path, alone: dict[str, Any]) -> None:
    _assert_sent(_results(folder, "from folder", 4), alone["experts"][0])


def test_advantages_count_rows_once_that_ranks_share(folder: Path) -> None:
    for rank in _results(folder, "advantages", 2):
        for found, wanted in zip(rank, _advantages(None), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_what_is_planned(folder: Path, name: str) -> None:
    case = CASES[name]
    plan = TrainingPlan(
        SPECS[case.kind], TrainingConfig(**case.choices), dtype=torch.float32, ranks=case.world, device="cpu"
    )
    planned = plan.of(64)
    assert _results(folder, name, case.world)[0]["held"] == [planned.weights, planned.moments]
