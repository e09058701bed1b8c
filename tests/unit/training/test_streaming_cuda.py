"""Weights streamed from the host's memory on a GPU: as good as weights that stay, in less memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import make_samples

from asystem.config import Compile, LoraConfig, Master, Optimizer, Recompute, TrainingConfig
from asystem.data.packing import pack
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.state import Outbox
from asystem.training import TrainEngine, supervised_loss, train_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = ModelSpec("qwen3", 23, 256, 512, 6, 4, 2, 64, qk_norm=True, tie_embeddings=True)
DEEP = ModelSpec("qwen3", 32_000, 1024, 3072, 12, 16, 4, 64, qk_norm=True, tie_embeddings=True)
MICRO = [[40, 3, 90, 61, 17], [120, 5], [33] * 4]
CHOICES: dict[str, dict[str, Any]] = {
    "float32": {},
    "compiled": {"compile": Compile.always, "recompute": Recompute.selective},
    "8 bits": {"optimizer": Optimizer.adamw8bit},
    "stochastic": {"master": Master.bfloat16_stochastic},
    "lora": {"lora": LoraConfig(rank=8)},
}


def _engine(spec: ModelSpec = SMALL, seed: int = 0, *, streamed: bool, **changes: Any) -> TrainEngine:
    model = Decoder(spec)
    init_weights(model, seed, std=0.05)
    cfg = TrainingConfig(
        **({"lr": 3e-3, "compile": Compile.never, "recompute": Recompute.full} | changes),
        offload_optimizer=True,
        offload_parameters=streamed,
    )
    return TrainEngine(model, cfg, device="cuda", dtype=torch.bfloat16, total_steps=100)


def _losses(engine: TrainEngine, steps: int) -> list[float]:
    batches = [pack(make_samples(lengths), budget=100) for lengths in MICRO]
    return [engine.step(batches[turn % 3], supervised_loss).to_dict()["train/loss"] for turn in range(steps)]


@pytest.mark.parametrize("name", CHOICES)
def test_losses_are_those_of_weights_that_stay(tmp_path: Path, name: str) -> None:
    here, there = (_engine(streamed=on, **CHOICES[name]) for on in (False, True))
    # Sums of stochastic masters are bfloat16 where they stay, and float32 on the host.
    found, expected = _losses(there, 9), _losses(here, 9)
    assert found[:5] == pytest.approx(expected[:5], rel=0.02 if name == "stochastic" else 2e-3, abs=2e-3)
    assert found == pytest.approx(expected, rel=0.02)  # a last bit that differs grows at this rate
    assert all(p.device.type == "cpu" and p.is_pinned() for p in there.model.layers.parameters())
    there.save(tmp_path / "step-000009")
    resumed = _engine(seed=9, streamed=True, **CHOICES[name])
    resumed.load(tmp_path / "step-000009")
    if name == "lora":  # the frozen base is in no checkpoint
        resumed.model.load_state_dict(there.model.state_dict())
    assert _losses(resumed, 3) == pytest.approx(_losses(there, 3), rel=1e-3, abs=1e-4)
    payloads = [Outbox(engine.model).write() for engine in (there, resumed)]
    for one, other in zip(*(payload.blocks() for payload in payloads), strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=5e-3, rtol=2e-2)


def test_a_reference_is_streamed_too() -> None:
    here, there = (_engine(streamed=on) for on in (False, True))
    micro, found = pack(make_samples([40, 3, 90]), budget=100), []
    for engine in (here, there):
        engine.keep_reference()
        _losses(engine, 3)
        found.append(torch.cat(engine.logprobs(micro, reference=True)))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [0, 16])
def test_the_peak_is_as_planned_and_below_that_of_weights_that_stay(lora: int) -> None:
    peaks, norms = {}, []
    tokens = 4096
    for streamed in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        engine = _engine(DEEP, streamed=streamed, micro_batch_tokens=tokens, lora=LoraConfig(rank=lora))
        batches = pack(make_samples([2045] * 4), budget=tokens)  # two micro-batches
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            norms.append(engine.step(batches, supervised_loss).to_dict()["train/grad_norm"])
        peaks[streamed] = torch.cuda.max_memory_allocated() - before
        plan = train_memory(DEEP, engine.cfg, dtype=torch.bfloat16)
        assert peaks[streamed] == pytest.approx(plan.total, rel=0.1), f"planned {plan}, measured {peaks[streamed]}"
        del engine
    assert norms[2] == pytest.approx(norms[0], rel=5e-5)  # of matrices so large that a CPU's norm is 2e-4 too small
    blocks = DEEP.num_parameters - 32_000 * 1024
    saved = 2 * blocks if lora else 6 * blocks  # weights; and where they train, sums of gradients
    assert peaks[False] - peaks[True] > 0.6 * saved
