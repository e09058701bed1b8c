"""Each kernel against its oracle in plain PyTorch, on random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from asystem.generation.kernels import reference
from asystem.generation.kernels.attention import CROWD, Crowds, Tiling, decode_attention, divide
from asystem.generation.kernels.chosen import can_route, chosen_experts, route
from asystem.generation.kernels.grouped import grouped_tiles
from asystem.generation.kernels.layers import add_rms_norm, embed, rotary_write, swiglu
from asystem.generation.kernels.linear import linear, norm_linear
from asystem.generation.kernels.sampling import draw
from asystem.generation.rows import FULL, RUNNING, STOPPED, Rows
from asystem.generation.sampler import sample, stream_key, uniform
from asystem.models import MoESpec, init_weights
from asystem.models.moe import MoE, Router, grouped_linear

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def dtypes() -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


@dataclass
class Paged:
    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor


def paged(
    lengths: list[int], kv_heads: int, head: int, block: int, dtype: torch.dtype, device: torch.device, shared: int = 0
) -> Paged:
    """Random keys and values in scattered blocks; all rows share their first `shared` blocks."""
    generator = torch.Generator().manual_seed(sum(lengths))
    columns = max(-(-n // block) for n in lengths) + 1
    order = torch.randperm(len(lengths) * columns, generator=generator)
    table = order.view(len(lengths), columns).clone()
    table[:, :shared] = table[0, :shared]
    pool = torch.randn(2, len(order), kv_heads, block, head, generator=generator).to(device, dtype)
    return Paged(pool[0], pool[1], table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))


def assert_close(got: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("head", [64, 80, 96, 128])
@pytest.mark.parametrize(("group", "block", "aim"), [(1, 16, 1), (2, 16, 8), (3, 32, 2), (8, 64, 12)])
def test_attention(dtype: torch.dtype, head: int, group: int, block: int, aim: int, device: torch.device) -> None:
    lengths = [1, block - 1, block, block + 1, 0, 65, 129]
    if device.type == "cuda":
        lengths += [1023, 8192]
    kv_heads = 2
    cache = paged(lengths, kv_heads, head, block, dtype, device)
    q = torch.randn(len(lengths), (group + 2) * kv_heads * head, device=device, dtype=dtype)
    tiling = Tiling(keys=32, stages=2)
    args = (q, cache.keys, cache.values, cache.table, cache.lengths, group * kv_heads)
    parts = divide(cache.lengths, kv_heads, aim=aim, least=16)
    want, real = reference.decode_attention(*args), cache.lengths > 0
    for _ in range(2):  # the second finds what the first has left in `parts`
        got = decode_attention(*args, parts, tiling=tiling)
        assert_close(got[real], want[real])
    assert not parts.arrived.any()


def test_parts_are_of_about_one_length(device: torch.device) -> None:
    lengths = [0, 700, 10, 64, 0, 3000, 65, 1]
    parts = divide(torch.tensor(lengths, dtype=torch.int32, device=device), 2, aim=10, least=64)
    # 3,840 tokens: parts of at most 384.
    assert parts.first.tolist() == [0, 0, 2, 3, 4, 4, 12, 13, 14]
    assert parts.owner[:14].tolist() == [1, 1, 2, 3, *[5] * 8, 6, 7]
    skip = torch.tensor([0, 690, 16, 0, 0, 0, 0, 0], dtype=torch.int32, device=device)
    crowds = Crowds(skip[:0], skip[:0], skip)
    parts = divide(torch.tensor(lengths, dtype=torch.int32, device=device), 2, aim=100, least=64, crowds=crowds)
    # 10 own tokens; none, but a row that goes on has a part; the least is 64.
    assert parts.first.tolist() == [0, 0, 1, 2, 3, 3, 50, 52, 53]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("group", "aim", "crowd_splits"), [(2, 1, 1), (1, 20, 1), (4, 12, 2), (8, 6, 2)])
def test_attention_with_shared_prefixes(
    dtype: torch.dtype, group: int, aim: int, crowd_splits: int, device: torch.device
) -> None:
    block, shared, head, kv_heads = 16, 3, 64, 2
    lengths = [49, 64, 0, 50, 100, 53, 70, 61, 66, 48]  # a row that stands still, one with its whole prompt shared
    cache = paged(lengths, kv_heads, head, block, dtype, device, shared)
    members = torch.full((2, CROWD), -1, dtype=torch.int32)
    members[0, :CROWD] = torch.arange(CROWD)
    skip = torch.tensor([shared * block] * CROWD + [0] * 2, dtype=torch.int32)
    shares = torch.tensor([shared * block, 0], dtype=torch.int32)
    crowds = Crowds(members.to(device), shares.to(device), skip.to(device))
    q = torch.randn(len(lengths), group * kv_heads * head, device=device, dtype=dtype)
    args = (q, cache.keys, cache.values, cache.table, cache.lengths, group * kv_heads)
    parts = divide(cache.lengths, kv_heads, aim=aim, least=16, crowds=crowds)
    got = decode_attention(*args, parts, crowds=crowds, crowd_splits=crowd_splits, tiling=Tiling(keys=32, stages=2))
    want, real = reference.decode_attention(*args), cache.lengths > 0
    assert_close(got[real], want[real])


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("head", "rotated", "num_heads", "kv_heads"), [(64, 64, 4, 2), (80, 80, 3, 1), (96, 96, 8, 8), (64, 32, 4, 1)]
)
def test_rotary_write(
    dtype: torch.dtype, norm: bool, head: int, rotated: int, num_heads: int, kv_heads: int, device: torch.device
) -> None:
    lengths = [1, 16, 17, 0, 31]
    cache = paged(lengths, kv_heads, head, 16, dtype, device)
    qkv = torch.randn(len(lengths), (num_heads + 2 * kv_heads) * head, device=device, dtype=dtype)
    weights = [torch.rand(head, device=device, dtype=dtype) + 0.5 if norm else None for _ in range(2)]
    angles = torch.rand(40, 1, rotated // 2, device=device) * 6
    results = []
    for function in (rotary_write, reference.rotary_write):
        x, keys, values = qkv.clone(), cache.keys.clone(), cache.values.clone()
        function(x, *weights, 1e-6, angles.cos(), angles.sin(), cache.lengths, cache.table, keys, values, num_heads)
        results.append((x[:, : num_heads * head], keys, values))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("size", [64, 200, 1024])
def test_norms_and_swiglu(dtype: torch.dtype, size: int, device: torch.device) -> None:
    x, y, weight = (torch.randn(n, size, device=device, dtype=dtype) for n in (5, 5, 1))
    want_x, got_x = x.clone(), x.clone()
    assert_close(add_rms_norm(got_x, y, weight[0], 1e-6), reference.add_rms_norm(want_x, y, weight[0], 1e-6))
    assert_close(got_x, want_x)
    gate_up = torch.randn(3, 2 * size, device=device, dtype=dtype)
    assert_close(swiglu(gate_up), reference.swiglu(gate_up))


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("counts", [[0, 1, 0], [40, 0, 0, 17, 1, 16], [2] * 33])
@pytest.mark.parametrize(("size", "width"), [(64, 96), (200, 72)])
def test_grouped_tiles(dtype: torch.dtype, counts: list[int], size: int, width: int, device: torch.device) -> None:
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    x = torch.randn(sum(counts), size, device=device, dtype=dtype)
    weight = torch.randn(len(counts), width, size, device=device, dtype=dtype) * size**-0.5
    want = torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(counts), weight, strict=True)])
    assert_close(grouped_tiles(x, weight, ends), want)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(
    "moe",
    [
        MoESpec(5, 2, 8),
        MoESpec(16, 4, 8, normalize=False, scaling=1.5),
        MoESpec(16, 3, 8, score="sigmoid", groups=4, top_groups=2, has_bias=True, scaling=2.5),
    ],
)
def test_route(dtype: torch.dtype, moe: MoESpec, device: torch.device) -> None:
    router = Router(300, moe).to(device, dtype).requires_grad_(False)
    torch.nn.init.normal_(router.weight, std=0.1)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias, std=0.1)
    x = torch.randn(3, 300, device=device, dtype=dtype)
    assert can_route(router)
    for got, want in zip(router(x, kernel=route), router(x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("rows", "top_k"), [(1, 2), (4, 3)])
@pytest.mark.parametrize(("size", "inner"), [(96, 200), (1024, 36)])
def test_experts_of_few_rows(
    dtype: torch.dtype, rows: int, top_k: int, size: int, inner: int, device: torch.device
) -> None:
    moe = MoE(size, MoESpec(5, top_k, inner), None)
    init_weights(moe, 0, std=size**-0.5)
    moe = moe.to(device, dtype).requires_grad_(False)
    x = torch.randn(rows, size, device=device, dtype=dtype)
    shares, chosen = moe.router(x)
    got = chosen_experts(x, shares, chosen, moe.experts.gate_up, moe.experts.down)
    assert_close(got, moe.experts(x, shares, chosen, grouped_linear))


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize(("size", "n"), [(96, 64), (1024, 200), (5000, 36)])
def test_linear_of_few_rows(dtype: torch.dtype, batch: int, size: int, n: int, device: torch.device) -> None:
    x = torch.randn(batch, size, device=device, dtype=dtype)
    weight = torch.randn(n, size, device=device, dtype=dtype) * size**-0.5
    bias = torch.randn(n, device=device, dtype=dtype)
    assert_close(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    want = reference.swiglu(torch.nn.functional.linear(x, weight))
    assert_close(linear(x, weight, swiglu=True), want)
    if size <= 1024:
        y, gain = torch.randn_like(x), torch.rand(size, device=device, dtype=dtype) + 0.5
        total = x.clone()
        hidden = reference.add_rms_norm(total, y, gain, 1e-6)
        got, got_total = norm_linear(x, y, gain, 1e-6, weight, bias)
        assert_close(got, torch.nn.functional.linear(hidden, weight, bias))
        assert_close(got_total, total)
        gated = reference.swiglu(torch.nn.functional.linear(hidden, weight))
        assert_close(norm_linear(x, y, gain, 1e-6, weight, swiglu=True)[0], gated)


def test_embed_masks_rows_that_stand_still(device: torch.device) -> None:
    table, weight = torch.randn(11, 48, device=device), torch.rand(48, device=device)
    tokens, position = torch.tensor([3, 10, 4, 5], device=device), torch.tensor([0, 7, 8, 9], device=device)
    done, control = torch.tensor([0, 1, 0, 0], device=device), torch.tensor([3, 0], device=device)
    lengths = torch.empty(4, dtype=torch.int32, device=device)
    x, normed = embed(tokens, position, done, control, table, weight, 1e-5, lengths)
    assert lengths.tolist() == [1, 0, 9, 0]
    real = lengths > 0
    assert torch.equal(x[real], table[tokens[real]])
    want = torch.nn.functional.rms_norm(table[tokens[real]], (48,), weight, 1e-5)
    assert_close(normed[real], want)


def batch_rows(batch: int, vocab: int, device: torch.device, temperature: list[float]) -> Rows:
    rows = Rows(batch + 1, 8, 4, vocab, 0, device)
    rows.temperature[:batch] = torch.tensor(temperature)
    rows.key[:batch] = torch.tensor([stream_key(7, i) for i in range(batch)])
    rows.drawn[:batch] = torch.arange(batch) % 3
    rows.limit[:] = 5
    rows.top_k[:] = vocab
    rows.heeds_stop[:batch] = torch.arange(batch) % 2
    return rows


@pytest.mark.parametrize("vocab", [37, 4096, 10_000])
def test_draw_is_the_sampler(vocab: int, device: torch.device) -> None:
    batch = 6
    logits = torch.randn(batch, vocab, device=device) * 3
    logits[1, 5] = logits[1, 9] = 40.0  # a tie: the first one wins
    logits[3, vocab // 2 :] = -torch.inf
    want = batch_rows(batch, vocab, device, [1.0, 0.0, 0.7, 1.0, 2.0, 1.0])
    got = batch_rows(batch, vocab, device, [1.0, 0.0, 0.7, 1.0, 2.0, 1.0])
    stops = torch.zeros(vocab, dtype=torch.bool, device=device)
    stops[::2] = True
    used = slice(0, batch)
    u = uniform(want.key[used], want.drawn[used])
    tokens, logprobs = sample(logits, want.temperature[used], u)
    want.record(used, tokens, logprobs, stops, version=4)
    lengths = torch.ones(batch, dtype=torch.int32, device=device)
    draw(got, logits, lengths, torch.tensor([batch, 4], device=device), stops.view(torch.uint8))
    for name in ("drawn", "done", "last_token", "position", "tokens", "versions"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=1e-5)
    assert set(got.done[used].tolist()) <= {RUNNING, STOPPED, FULL}


def test_draw_leaves_still_rows_alone(device: torch.device) -> None:
    rows = batch_rows(3, 37, device, [1.0, 1.0, 1.0])
    before = {name: getattr(rows, name).clone() for name in ("drawn", "tokens", "logprobs", "position", "last_token")}
    lengths = torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
    stops = torch.zeros(37, dtype=torch.uint8, device=device)
    draw(rows, torch.randn(3, 37, device=device), lengths, torch.tensor([3, 1], device=device), stops)
    for name, old in before.items():
        changed = (getattr(rows, name) != old).view(len(old), -1).any(1).tolist()
        assert not changed[0] and not changed[2], name
    assert rows.drawn[1] == before["drawn"][1] + 1


def test_draw_holds_to_the_distribution(device: torch.device) -> None:
    """Pearson's chi-square over 8,192 draws from 12 tokens: below the 99.9 % quantile of 11 degrees of freedom."""
    batch = 8192 if device.type == "cuda" else 512
    line = torch.linspace(-2.0, 1.0, 12, device=device)
    rows = Rows(batch, 8, 1, 12, 0, device)
    rows.temperature[:] = 1.3
    rows.limit[:] = 9
    rows.key[:] = torch.tensor([stream_key(3, i) for i in range(batch)])
    lengths = torch.ones(batch, dtype=torch.int32, device=device)
    stops = torch.zeros(12, dtype=torch.uint8, device=device)
    draw(rows, line.expand(batch, 12).contiguous(), lengths, torch.tensor([batch, 0], device=device), stops)
    seen = np.bincount(rows.tokens[:, 0].cpu().numpy(), minlength=12)
    expected = (line / 1.3).softmax(0).cpu().numpy() * batch
    assert ((seen - expected) ** 2 / expected).sum() < 31.26
