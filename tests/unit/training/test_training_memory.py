"""The memory plan against the tensors that training really holds, and micro-batches that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import make_engine, make_samples

from asystem.config import Compile, LoraConfig, Master, Optimizer, Recompute, TrainingConfig
from asystem.data.packing import pack, pack_one, plan_bins
from asystem.errors import CapacityError
from asystem.models import Decoder, ModelSpec, add_lora, decoder, moe
from asystem.models.moe_spec import MoESpec
from asystem.training import TrainingPlan, engine, supervised_loss, train_memory
from asystem.training.blocks import prepare_blocks

GIB = 2**30
HALF = torch.bfloat16
STOCHASTIC = {"master": Master.bfloat16_stochastic, "dtype": HALF}
SHAPE = ModelSpec("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, qk_norm=True, tie_embeddings=True)
CHOICES: dict[str, dict[str, Any]] = {
    "float32": {},
    "half": {"dtype": HALF},
    "8 bits": {"dtype": HALF, "optimizer": Optimizer.adamw8bit},
    "stochastic": STOCHASTIC,
    "stochastic, 8 bits": STOCHASTIC | {"optimizer": Optimizer.adamw8bit},
    "lora": {"dtype": HALF, "lora": LoraConfig(rank=3)},
    "lora, int8 base": {"dtype": HALF, "lora": LoraConfig(rank=3, base="int8")},
    "lora, nf4 base": {"dtype": HALF, "lora": LoraConfig(rank=3, base="nf4")},
    "lora, 8 bits": {"dtype": HALF, "lora": LoraConfig(rank=3), "optimizer": Optimizer.adamw8bit},
}


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", CHOICES)
def test_states_take_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = make_engine(**CHOICES[name])
    plan = TrainingPlan(trained.model.spec, trained.cfg, dtype=trained.dtype, device="cpu").of(64)
    optimizer, step = trained.optimizer, trained.optimizer.step
    sums: list[int] = []
    monkeypatch.setattr(optimizer, "step", lambda *a: sums.append(nbytes(optimizer._gradients.values())) or step(*a))
    trained.step(pack(make_samples([4, 6]), 8), supervised_loss)
    parameters = list(trained.model.parameters())
    own = {p.data_ptr() for p in parameters}
    assert plan.weights == nbytes(parameters)
    assert plan.masters == nbytes(t for t in optimizer.masters.values() if t.data_ptr() not in own)
    assert plan.moments == nbytes(t for key, t in optimizer.tensors().items() if ".exp_avg" in key)
    passing = max(p.nbytes for p in parameters if p.requires_grad) if trained.dtype is HALF else 0
    assert plan.gradients - passing == sums[0]
    assert plan.held == plan.weights + plan.masters + plan.moments


class Norm(torch.autograd.Function):
    """What CUDA's fused norm keeps; on other devices norms are made of many operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)


class Grouped(torch.autograd.Function):
    """What the grouped product keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return x.new_empty(len(x), weight.shape[1])


class Flash(torch.autograd.Function):
    """What the variable-length kernel keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out


def kept_by_autograd(model: Decoder, tokens: int) -> int:
    """Bytes of all distinct tensors that wait for the backward pass through the blocks, but for weights and angles."""
    x = torch.empty(tokens, model.spec.hidden_size, dtype=HALF, device="meta", requires_grad=True)
    angles = [torch.empty(tokens, 1, model.spec.head_dim // 2, device="meta") for _ in range(2)]
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *angles)}
    seen: dict[int, Any] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in known:
            seen[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        for block in model.layers:
            x = block(x, *angles, lambda layer, q, k, v: Flash.apply(q, k, v))
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("recompute", Recompute)
def test_activations_take_what_is_planned(recompute: Recompute, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.F, "rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight))
    spec = ModelSpec("qwen3", 211, 64, 96, 3, 4, 2, 32, qk_norm=True, tie_embeddings=True)
    cfg = TrainingConfig(recompute=recompute, compile=Compile.never, lora=LoraConfig(rank=rank))
    with torch.device("meta"):
        model = Decoder(spec)
        if rank > 0:
            add_lora(model, cfg.lora)
    prepare_blocks(model.to(HALF), cfg, torch.device("cpu"))
    plan = TrainingPlan(spec, cfg, dtype=HALF).of(1000)
    planned = plan.activations - 3 * 1000 * spec.hidden_size * HALF.itemsize  # around the final norm
    assert kept_by_autograd(model, 1000) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("recompute", Recompute)
def test_activations_of_experts_take_what_is_planned(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.F, "rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight))
    monkeypatch.setattr(moe, "grouped_linear", Grouped.apply)
    experts = MoESpec(16, 4, 48, shared_size=96, dense_layers=(0,), score="sigmoid", has_bias=True)
    spec = ModelSpec("bailing_moe_v2", 211, 64, 256, 3, 4, 2, 32, qk_norm=True, moe=experts)
    cfg = TrainingConfig(recompute=recompute, compile=Compile.never)
    with torch.device("meta"):
        model = Decoder(spec)
    prepare_blocks(model.to(HALF), cfg, torch.device("cpu"))
    plan = TrainingPlan(spec, cfg, dtype=HALF).of(1000)
    planned = plan.activations - 3 * 1000 * spec.hidden_size * HALF.itemsize
    assert kept_by_autograd(model, 1000) == pytest.approx(planned, rel=0.02)
    assert (plan.weights, plan.masters) == (2 * spec.num_parameters, 4 * spec.num_parameters)


def test_the_plan_of_a_model_of_0_6_billion() -> None:
    """Worked by hand: 596,049,920 parameters."""
    plan = train_memory(SHAPE, TrainingConfig(micro_batch_tokens=16_384), dtype=HALF)
    count = 596_049_920
    assert (plan.weights, plan.masters, plan.moments) == (2 * count, 4 * count, 8 * count)
    assert plan.gradients == 4 * count + 2 * 151_936 * 1024
    token = 2 * (4 * 1024 + 3 * 2048 + 3 * 1024 + 3 * 3072) + 4 * (2 + 16 + 24)
    assert plan.activations == 16_384 * (28 * token + 3 * 2 * 1024)
    assert plan.head == 2 * 768 * 151_936 + 2 * 151_936 * 1024
    assert plan.total == plan.held + plan.gradients + plan.activations + plan.head
    exact = train_memory(SHAPE, TrainingConfig(micro_batch_tokens=16_384, head_dtype="float32"), dtype=HALF)
    assert exact.head - plan.head == 4 * 768 * 151_936


FULL, LORA = {"recompute": Recompute.full}, {"lora": LoraConfig(rank=16)}
LARGE = replace(SHAPE, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32)
MEASURED: dict[str, tuple[ModelSpec, dict[str, Any], int, int, int, float]] = {
    # sequences, their tokens, the limit of a micro-batch; GiB of tensors at the peak
    "W1": (SHAPE, {"keep_logits": True}, 256, 640, 16_384, 32.03),
    "W1, logits again": (SHAPE, {}, 256, 640, 16_384, 28.77),
    "W1, 8k a micro-batch": (SHAPE, {}, 256, 640, 8192, 19.79),
    "W1, recompute full": (SHAPE, FULL, 256, 640, 16_384, 12.01),
    "W3": (SHAPE, FULL, 2, 16_384, 16_384, 12.11),
    "W3, recompute selective": (SHAPE, {"recompute": Recompute.selective}, 2, 16_384, 16_384, 19.70),
    "W3, LoRA": (SHAPE, FULL | LORA, 2, 16_384, 16_384, 3.20),
    "W3, 4B LoRA": (LARGE, FULL | LORA, 2, 16_384, 16_384, 13.56),
}


@pytest.mark.parametrize("name", MEASURED)
def test_peaks_of_an_h200_are_as_planned_for_the_largest_micro_batch(name: str) -> None:
    """benchmarks/results/training-nvidia-h200.json: no more than planned, no less than 94 % of it."""
    spec, choices, count, length, limit, peak = MEASURED[name]
    largest = length * max(map(len, plan_bins([length] * count, limit)))
    plan = TrainingPlan(spec, TrainingConfig(**choices), dtype=HALF).of(largest)
    assert 0.94 < peak * GIB / plan.total < 1


def test_streamed_blocks_leave_two_of_them_on_the_device() -> None:
    cfg = TrainingConfig(offload_optimizer=True, offload_parameters=True, recompute=Recompute.full)
    plan, root = train_memory(SHAPE, cfg, dtype=HALF), 151_936 * 1024 + 1024
    block = (SHAPE.num_parameters - root) // 28
    assert plan.held == 2 * root
    assert plan.gradients == 4 * root + 2 * 151_936 * 1024
    places = 3 * (2**24 // 1024 * 1024) * 12  # master and moments of the embedding's rows, whose gradients stay
    assert plan.gathered == places + 2 * 2 * block
    leaving = 2 * 2 * block + 8 * 6144 * 1024
    held = train_memory(SHAPE, replace(cfg, offload_parameters=False), dtype=HALF)
    assert plan.block == held.block + leaving
    assert train_memory(SHAPE, replace(cfg, offload_parameters=False), dtype=HALF).held == 2 * SHAPE.num_parameters


@pytest.mark.parametrize(
    ("changes", "per_parameter"),
    [
        ({}, 18.0),
        ({"optimizer": Optimizer.adamw8bit}, 12.0 + 8 / 256),
        ({"master": Master.bfloat16_stochastic}, 8.0),
        ({"master": Master.bfloat16_stochastic, "optimizer": Optimizer.adamw8bit}, 6.0 + 8 / 256),
        ({"offload_optimizer": True}, 6.0),
    ],
)
def test_each_rung_takes_its_bytes_a_parameter(changes: dict[str, Any], per_parameter: float) -> None:
    plan = train_memory(SHAPE, TrainingConfig(**changes), dtype=HALF)
    states = plan.held + plan.gradients - 2 * 151_936 * 1024
    assert states / SHAPE.num_parameters == pytest.approx(per_parameter, rel=1e-3)


def test_ranks_share_states_and_gather_weights() -> None:
    alone, four = (train_memory(SHAPE, TrainingConfig(), dtype=HALF, ranks=ranks) for ranks in (1, 4))
    assert four.held == pytest.approx(alone.held / 4 * 12 / 14, rel=1e-3)  # float32 shards are the masters
    block = SHAPE.num_parameters - 151_936 * 1024 - 1024
    assert four.gathered == 2 * (151_936 * 1024 + 1024) + block // 28 * (2 * 2 + 4 + 2)
    assert four.activations == alone.activations
    weights, gradients = (
        train_memory(SHAPE, TrainingConfig(zero=zero), dtype=HALF, ranks=4).gathered for zero in ("2", "1")
    )
    assert weights == 2 * SHAPE.num_parameters + block // 28 * (4 + 2)
    assert gradients == weights + 4 * SHAPE.num_parameters


@pytest.mark.parametrize("recompute", Recompute)
def test_the_size_that_is_proposed_fits_and_the_next_does_not(recompute: Recompute) -> None:
    plan = TrainingPlan(SHAPE, TrainingConfig(recompute=recompute, micro_batch_tokens=65_536), dtype=HALF)
    with pytest.raises(CapacityError, match=r"training\.micro_batch_tokens=(\d+) or lower") as raised:
        plan.check(65_536, 8 * GIB)
    largest = int(str(raised.value).rsplit("=", 1)[1].split()[0])
    plan.check(largest, 8 * GIB)
    assert 0 < largest < 65_536
    with pytest.raises(CapacityError, match=r"set training\.micro_batch_tokens="):
        plan.check(largest + 64, 8 * GIB)
    with pytest.raises(CapacityError, match=r"none fits; try training\.recompute=full"):
        plan.check(65_536, GIB)


def test_a_batch_that_does_not_fit_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = make_engine(micro_batch_tokens=4096)
    plan = TrainingPlan(trained.model.spec, trained.cfg, dtype=torch.float32, device="cpu")
    free: Callable[[int], int] = lambda tokens: plan.of(tokens).total - plan.of(tokens).held  # noqa: E731
    before = [p.clone() for p in trained.model.parameters()]
    micro = pack(make_samples([30] * 6), 128)
    monkeypatch.setattr(engine, "free_memory", lambda device: free(1024))
    with pytest.raises(CapacityError, match=r"of 4096 tokens .* set training\.micro_batch_tokens=1024 or lower"):
        trained.step(micro, supervised_loss)  # small, but a later one may have 4096
    assert all(torch.equal(p, old) for p, old in zip(trained.model.parameters(), before, strict=True))
    trained.step([pack_one(make_samples([30] * 4))], supervised_loss)  # all there is of a batch
    monkeypatch.setattr(engine, "free_memory", lambda device: free(4096))
    trained.step(micro, supervised_loss)
