"""The memory ladder on a GPU: states in the host's memory, blocks recomputed and compiled. Skipped without one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import make_samples

from asystem.config import Compile, LoraConfig, Master, Optimizer, Recompute, TrainingConfig
from asystem.data.packing import pack
from asystem.errors import CapacityError
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.training import TrainEngine, optimizer, supervised_loss, train_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _compiles_all() -> Iterator[None]:
    """Past its limit of eight graphs a function torch.compile runs the next ones eagerly, and would not say so."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


MICRO = [[40, 3, 90, 61, 17], [120, 5], [33] * 4]


def _engine(seed: int = 0, **changes: Any) -> TrainEngine:
    model = Decoder(ModelSpec("qwen3", 23, 256, 512, 3, 4, 2, 64, qk_norm=True, tie_embeddings=True))
    init_weights(model, seed, std=0.05)
    cfg = TrainingConfig(**({"lr": 3e-3, "compile": Compile.never} | changes))
    return TrainEngine(model, cfg, device="cuda", dtype=torch.bfloat16, total_steps=100)


def _losses(engine: TrainEngine, steps: int) -> list[float]:
    batches = [pack(make_samples(lengths), budget=100) for lengths in MICRO]
    return [engine.step(batches[turn % 3], supervised_loss).to_dict()["train/loss"] for turn in range(steps)]


CHOICES: dict[str, dict[str, Any]] = {
    "float32": {},
    "8 bits": {"optimizer": Optimizer.adamw8bit},
    "stochastic": {"master": Master.bfloat16_stochastic},
    "both": {"optimizer": Optimizer.adamw8bit, "master": Master.bfloat16_stochastic},
}


@pytest.mark.parametrize("name", CHOICES)
def test_offloaded_states_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(optimizer, "PIECE", 256 * 40)  # many pieces, and last ones that are shorter
    here, there = _engine(**CHOICES[name]), _engine(**CHOICES[name], offload_optimizer=True)
    assert _losses(there, 6) == pytest.approx(_losses(here, 6), abs=2e-3 if name == "float32" else 0.0)
    there.save(tmp_path / "step-000006")
    resumed = _engine(seed=9, **CHOICES[name], offload_optimizer=True)
    resumed.load(tmp_path / "step-000006")
    _losses(there, 3)
    _losses(resumed, 3)
    for key, tensor in there.optimizer.tensors().items():
        assert torch.equal(resumed.optimizer.tensors()[key], tensor), key
        is_weight = key.startswith("model.") and "master" in CHOICES[name]
        assert tensor.is_pinned() or is_weight or key == "optimizer.steps"


def test_offloading_frees_the_device() -> None:
    taken = []
    for offload in (False, True):
        before = torch.cuda.memory_allocated()
        engine = _engine(offload_optimizer=offload)
        taken.append(torch.cuda.memory_allocated() - before)
        del engine
    parameters = sum(p.numel() for p in _engine().model.parameters())
    assert taken[0] - taken[1] == pytest.approx(12 * parameters, rel=0.02)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "float32"])
def test_fewer_bits_learn_as_float32(name: str) -> None:
    expected, found = _losses(_engine(), 30), _losses(_engine(**CHOICES[name]), 30)
    assert found[:12] == pytest.approx(expected[:12], rel=0.05)  # later on, paths of low loss part
    assert max(found[-3:]) < 0.2 * found[0] and max(expected[-3:]) < 0.2 * expected[0]


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("rank", [0, 8])
def test_recomputed_blocks_follow_kept_ones(recompute: Recompute, rank: int) -> None:
    lora = LoraConfig(rank=rank)
    assert _losses(_engine(lora=lora, recompute=recompute), 9) == pytest.approx(
        _losses(_engine(lora=lora), 9), rel=0.02
    )


@pytest.mark.parametrize(("recompute", "rank"), [(Recompute.none, 0), (Recompute.full, 0), (Recompute.selective, 8)])
def test_compiled_blocks_follow_eager_ones(recompute: Recompute, rank: int) -> None:
    lora = LoraConfig(rank=rank)
    compiled = _engine(lora=lora, recompute=recompute, compile=Compile.always)
    assert _losses(compiled, 9) == pytest.approx(_losses(_engine(lora=lora), 9), rel=0.02)


MIDDLE = ModelSpec("qwen3", 32_000, 768, 2304, 12, 12, 4, 64, qk_norm=True, tie_embeddings=True)
PLANNED: dict[str, dict[str, Any]] = {
    "eager": {"compile": Compile.never},
    "compiled": {},
    "selective": {"recompute": Recompute.selective},
    "full": {"recompute": Recompute.full},
    "8 bits, stochastic": {"optimizer": Optimizer.adamw8bit, "master": Master.bfloat16_stochastic},
    "offloaded": {"offload_optimizer": True, "recompute": Recompute.full},
    "lora": {"lora": LoraConfig(rank=16)},
    "lora, int8 base": {"lora": LoraConfig(rank=16, base="int8"), "recompute": Recompute.full},
}


@pytest.mark.parametrize("name", PLANNED)
def test_the_peak_of_a_step_is_as_planned(name: str) -> None:
    gc.collect()  # what an earlier test has left would be taken off the peak
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    tokens, dtype = 16_384, torch.bfloat16
    cfg = TrainingConfig(**({"micro_batch_tokens": tokens, "compile": Compile.always} | PLANNED[name]))
    with torch.device("cuda"):
        model = Decoder(MIDDLE).to(dtype)
    init_weights(model, 0)
    engine = TrainEngine(model, cfg, device="cuda", dtype=dtype, total_steps=100)
    batches = pack(make_samples([2045] * 16), budget=tokens)  # two micro-batches
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        engine.step(batches, supervised_loss)
    plan = train_memory(MIDDLE, cfg, dtype=dtype)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(plan.total, rel=0.1), f"planned {plan}, measured {peak}"


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_adapters_above_fewer_bits_learn_compiled_as_eager(base: str) -> None:
    lora = LoraConfig(rank=8, base=base)
    compiled = _losses(_engine(lora=lora, compile=Compile.always), 9)
    assert compiled == pytest.approx(_losses(_engine(lora=lora), 9), rel=0.02)
    assert compiled == pytest.approx(_losses(_engine(lora=LoraConfig(rank=8)), 9), rel=0.1)


def test_a_micro_batch_above_the_limit_of_the_process_is_refused() -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**31) / total)  # 2 GiB from here
    try:
        with torch.device("cuda"):
            model = Decoder(MIDDLE).to(torch.bfloat16)
        init_weights(model, 0)
        engine = TrainEngine(model, TrainingConfig(), device="cuda", dtype=torch.bfloat16, total_steps=1)
        with pytest.raises(CapacityError, match=r"beside 1\.\d+ GiB of weights and optimizer states"):
            engine.step(pack(make_samples([2045] * 16), budget=8192), supervised_loss)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
