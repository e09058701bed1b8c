"""Training adapters: what learns, what is saved, and what recomputing activations may not change."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from training_helpers import make_engine, make_model, make_samples, weights

from asystem.config import Compile, LoraConfig, Recompute, TrainingConfig
from asystem.data.packing import pack
from asystem.errors import ModelError
from asystem.models import Block, add_lora
from asystem.training import TrainEngine, supervised_loss
from asystem.training.blocks import prepare_blocks
from asystem.training.policy import Policy

BATCH = pack(make_samples([4, 1, 9]), budget=12)


def engine_with_lora(rank: int = 4, **changes: Any) -> TrainEngine:
    lora = LoraConfig(rank=rank, alpha=2.0 * rank, **{k: changes.pop(k) for k in ("dropout", "base") if k in changes})
    return make_engine(lora=lora, **changes)


@pytest.mark.parametrize("base", ["auto", "int8", "nf4"])
def test_adapters_learn_and_the_base_stays(base: str) -> None:
    engine = engine_with_lora(base=base)
    before = weights(engine.model)
    losses = [engine.step(BATCH, supervised_loss).to_dict()["train/loss"] for _ in range(20)]
    assert losses[-1] < 0.6 * losses[0]
    for name, value in weights(engine.model).items():
        assert torch.equal(value, before[name]) != name.endswith(("lora_A", "lora_B")), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_and_checkpoints_hold_adapters_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    engine = engine_with_lora(dtype=dtype)
    engine.step(BATCH, supervised_loss)
    assert engine.optimizer.tensors().keys() == {"optimizer.steps"} | {
        f"{kind}.{name}"
        for name, _ in engine.model.named_parameters()
        if "lora_" in name
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    }
    assert {p.dtype for p in engine.model.parameters()} == {dtype}
    engine.save(tmp_path / "step-000001")
    expected = engine.step(BATCH, supervised_loss).to_dict()
    resumed = engine_with_lora(dtype=dtype)
    resumed.load(tmp_path / "step-000001")
    assert resumed.step(BATCH, supervised_loss).to_dict() == expected
    with pytest.raises(ModelError, match=r"model\.layers\.0\.attn\.qkv_proj\.lora_A is \(12, 16\), the model's is"):
        engine_with_lora(rank=2).load(tmp_path / "step-000001")


def test_training_starts_from_a_saved_adapter(tmp_path: Path) -> None:
    engine = engine_with_lora()
    for _ in range(3):
        engine.step(BATCH, supervised_loss)
    engine.save_adapter(tmp_path / "adapter", "base")
    lora = LoraConfig(rank=4, alpha=8.0, adapter=str(tmp_path / "adapter"))
    started = make_engine(lora=lora)
    assert torch.equal(started.logprobs(BATCH)[0], engine.logprobs(BATCH)[0])


def test_old_logprobs_are_without_dropout() -> None:
    engine, plain = engine_with_lora(dropout=0.5), engine_with_lora()
    for other in (engine, plain):
        for name, p in other.model.named_parameters():
            if name.endswith("lora_B"):
                p.data.fill_(0.1)
    assert torch.equal(engine.logprobs(BATCH)[0], plain.logprobs(BATCH)[0])
    assert engine.step(BATCH, supervised_loss).to_dict() != plain.step(BATCH, supervised_loss).to_dict()


def gradients(recompute: Recompute, rank: int, dropout: float) -> tuple[dict[str, Tensor], int]:
    """Of one micro-batch; and how many bytes waited for the backward pass."""
    model, cfg = make_model(), TrainingConfig(recompute=recompute, lora=LoraConfig(rank=rank, dropout=dropout))
    if rank:
        add_lora(model, cfg.lora)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.data.fill_(0.1)
    prepare_blocks(model, cfg, torch.device("cpu"))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.numel() > 0:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = Policy(model)(BATCH[0])
    waiting = sum(kept.values())
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, waiting


@pytest.mark.parametrize(("rank", "dropout"), [(0, 0.0), (3, 0.0), (3, 0.3)])
def test_recomputing_changes_what_waits_and_no_gradient(rank: int, dropout: float) -> None:
    expected, most = gradients(Recompute.none, rank, dropout)
    waiting = [most]
    for recompute in (Recompute.selective, Recompute.full):
        found, kept = gradients(recompute, rank, dropout)
        waiting.append(kept)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
    assert waiting[0] > 1.3 * waiting[1] > 1.3 * waiting[2]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it while tracing
def test_compiled_blocks_share_few_graphs_among_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(Block, "compile_parts", partialmethod(Block.compile_parts, backend=counter))
    torch._dynamo.reset()
    compiled = engine_with_lora(compile=Compile.always, recompute=Recompute.selective)
    eager = engine_with_lora()
    for lengths in ([4, 1, 9], [30], [2, 2], [17, 3]):
        batch = pack(make_samples(lengths), budget=100)
        expected = eager.step(batch, supervised_loss).to_dict()
        assert compiled.step(batch, supervised_loss).to_dict() == pytest.approx(expected, abs=1e-5)
    # Two halves; once for the first block, whose input has no gradient since embeddings are frozen, once for the rest.
    assert counter.frame_count == 4


@pytest.mark.parametrize(("base", "dtype"), [("auto", torch.float32), ("int8", torch.float32), ("nf4", torch.bfloat16)])
def test_the_reference_shares_the_frozen_base(base: str, dtype: torch.dtype) -> None:
    engine = engine_with_lora(base=base, dtype=dtype)
    engine.step(BATCH, supervised_loss)
    before = engine.logprobs(BATCH)[0]
    engine.keep_reference()
    for _ in range(3):
        engine.step(BATCH, supervised_loss)
    assert torch.equal(engine.logprobs(BATCH, reference=True)[0], before)
    assert not torch.equal(engine.logprobs(BATCH)[0], before)
    assert engine.reference is not None
    kept = dict(engine.reference.decoder.named_parameters())
    for name, p in engine.model.named_parameters():
        assert (kept[name].data_ptr() == p.data_ptr()) is not p.requires_grad, name
    assert engine.reference is not None
    for name, p in engine.reference.decoder.named_parameters():
        present = engine.model.get_parameter(name)
        assert (p.data_ptr() == present.data_ptr()) == (not present.requires_grad), name


def test_a_base_in_4_bits_resumes_bit_for_bit(tmp_path: Path) -> None:
    engine = engine_with_lora(base="nf4", dtype=torch.bfloat16)
    engine.step(BATCH, supervised_loss)
    assert not any("codes" in name or "scale" in name for name in engine.optimizer.tensors())
    engine.save(tmp_path / "step-000001")
    expected = engine.step(BATCH, supervised_loss).to_dict()
    resumed = engine_with_lora(base="nf4", dtype=torch.bfloat16)
    resumed.load(tmp_path / "step-000001")
    assert resumed.step(BATCH, supervised_loss).to_dict() == expected
