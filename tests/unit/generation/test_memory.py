"""The memory plan, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asystem.config import GenerationConfig
from asystem.errors import CapacityError
from asystem.generation.memory import MemoryPlan, peak_bytes, plan_memory
from asystem.models import Decoder, ModelSpec

SPEC = ModelSpec("qwen3", 1000, 64, 192, 3, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True)
CONFIG = GenerationConfig(max_running=8, block_size=16, prefill_tokens=512)
TOKEN = 3 * 2 * 32 * 2  # bytes of KV a token: layers, k and v, their width, bf16


def plan(capacity: int | None = None, **changes: object) -> MemoryPlan:
    config = replace(CONFIG, **changes)
    return plan_memory(SPEC, config, max_length=100, dtype=torch.bfloat16, capacity=capacity)


def test_weights_and_pool_are_shapes_times_sizes() -> None:
    model = Decoder(SPEC).bfloat16()
    got = plan()
    assert got.weights == sum(p.nbytes for p in model.parameters())
    assert (got.num_blocks, got.kv) == (8 * 7, 8 * 7 * 16 * TOKEN)
    assert (plan(kv_tokens=128).num_blocks, plan(kv_tokens=128).kv) == (8, 128 * TOKEN)
    assert got.total == got.weights + got.kv + got.workspace


def test_the_workspace_grows_with_the_prefill_batch_and_the_running_batch() -> None:
    base, longer, wider = plan(kv_tokens=4096), plan(kv_tokens=4096, prefill_tokens=1024), plan(max_running=16)
    # A token of a prefill holds at most its MLP (gate and up, silu, product; input, residual, result) and its queries,
    # keys and values twice, in bf16; or its queries' rotation in float32.
    each = (longer.workspace - base.workspace) / 512
    assert 2 * (4 * 192 + 2 * 64 + 128) < each < 2 * (4 * 192 + 5 * 64 + 4 * 128)
    # A row holds its logits, its responses and its block table.
    assert (wider.workspace - plan().workspace) / 8 > 2 * 1000 + 3 * 4 * 100 + 8 * 7


def test_a_pool_takes_what_is_left() -> None:
    whole = plan()
    assert plan(capacity=whole.total) == whole
    less = plan(capacity=whole.total - 1)
    assert less.num_blocks == whole.num_blocks - 1
    least = whole.total - (whole.num_blocks - 7) * 16 * TOKEN
    assert plan(capacity=least).num_blocks == 7
    with pytest.raises(CapacityError, match=r"one sequence of 100 tokens needs 0\.00 GiB; raise memory_fraction"):
        plan(capacity=least - 1)


def test_a_given_pool_is_refused_where_it_does_not_fit() -> None:
    fits = plan(kv_tokens=160)
    assert plan(kv_tokens=160, capacity=fits.total) == fits
    with pytest.raises(CapacityError, match=r"generation.kv_tokens=160 needs .* or the pool, to 144 tokens"):
        plan(kv_tokens=160, capacity=fits.total - 1)
    with pytest.raises(CapacityError, match=r"holds 6 blocks of 16 tokens, but .* 100 tokens needs 7: .* at least 112"):
        plan(kv_tokens=111)


def test_the_peak_is_of_what_is_alive_together() -> None:
    def work() -> None:
        first = torch.empty(1000, device="meta")
        second = first + 1
        del first
        third = second.view(10, 100)[:5] * 2.0  # a view is no memory of its own
        del second
        third.double()

    assert peak_bytes(work) == 8000
    assert peak_bytes(lambda: torch.empty(7).mul_(2)) == 28  # nor is an operation in place


def test_shapes_without_memory_weigh_what_real_tensors_do() -> None:
    peaks = []
    for device in ("meta", "cpu"):
        model, tokens = Decoder(SPEC).to(device), torch.zeros(300, dtype=torch.int64, device=device)
        peaks.append(
            peak_bytes(lambda m=model, t=tokens: m(t, t, lambda layer, q, k, v: torch.empty_like(q)))  # type: ignore[misc]
        )
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)
