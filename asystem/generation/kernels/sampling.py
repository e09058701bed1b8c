"""Sampling in two launches, by the same rule and random numbers as `sampler.sample`, and the end of a step.

The first cuts each row's logits into chunks and sums each; the second finds the chunk and the token in which the
cumulative distribution passes the row's uniform number, and writes all that a step changes in `rows.Rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asystem.generation.rows import Rows

_CHUNK = 4096


@triton.jit
def _chunk_kernel(
    logits, temperature, lengths, peaks, sums, vocab, chunks, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(1), tl.program_id(0)
    if tl.load(lengths + row) == 0:
        return
    heat = tl.load(temperature + row)
    heat = tl.where(heat == 0, 1.0, heat)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = (
        tl.load(logits + row.to(tl.int64) * vocab + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        / heat
    )
    peak = tl.max(x, 0)
    total = tl.sum(tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak)), 0)
    tl.store(peaks + row * chunks + chunk, peak)
    tl.store(sums + row * chunks + chunk, total)


@triton.jit
def _uniform(key, counter):
    """`sampler.uniform` of one number."""
    x = key.to(tl.uint64, bitcast=True) + (counter + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 14).to(tl.int64, bitcast=True).to(tl.float64) + 0.5) * 8.881784197001252e-16


@triton.jit
def _draw_kernel(
    logits, temperature, lengths, peaks, sums, control, stops,
    key, drawn, done, last_token, position, limit, heeds_stop, tokens, logprobs, versions,
    vocab, chunks, width, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(lengths + row) == 0:
        return
    raw_heat = tl.load(temperature + row)
    greedy = raw_heat == 0
    heat = tl.where(greedy, 1.0, raw_heat)
    counter = tl.load(drawn + row)
    index = tl.arange(0, CHUNKS)
    peak = tl.load(peaks + row * chunks + index, mask=index < chunks, other=-float("inf"))
    part = tl.load(sums + row * chunks + index, mask=index < chunks, other=0.0)
    top = tl.max(peak, 0)
    mass = tl.where(index < chunks, (part * tl.exp(peak - top)).to(tl.float64), 0.0)
    cumulative = tl.cumsum(mass, 0)
    total = tl.sum(mass, 0)
    target = _uniform(tl.load(key + row), counter) * total
    # Rounding may leave the target beyond the last mass: then the last chunk, and token, that has any.
    passed = tl.sum((cumulative <= target).to(tl.int32), 0)
    chunk = tl.minimum(passed, tl.max(tl.where(mass > 0, index, 0), 0))
    chunk = tl.where(greedy, tl.min(tl.where(peak == top, index, chunks - 1), 0), chunk)
    before = tl.sum(tl.where(index < chunk, mass, 0.0), 0)

    offset = tl.arange(0, CHUNK)
    token = chunk * CHUNK + offset
    line = logits + row.to(tl.int64) * vocab
    x = tl.load(line + token, mask=token < vocab, other=-float("inf")).to(tl.float32) / heat
    p = tl.exp(x - top).to(tl.float64)
    within = tl.cumsum(p, 0)
    place = tl.sum((before + within <= target).to(tl.int32), 0)
    place = tl.minimum(place, tl.max(tl.where(p > 0, offset, 0), 0))
    place = tl.where(greedy, tl.min(tl.where(x == top, offset, CHUNK - 1), 0), place)
    choice = tl.minimum(chunk * CHUNK + place, vocab - 1)  # NaN logits: any token of the vocabulary
    chosen = tl.load(line + choice).to(tl.float32) / heat
    logprob = chosen - top - tl.log(total.to(tl.float32))

    cell = row.to(tl.int64) * width + counter
    tl.store(tokens + cell, choice.to(tl.int32))
    tl.store(logprobs + cell, logprob)
    tl.store(versions + cell, tl.load(control + 1).to(tl.int32))
    tl.store(last_token + row, choice.to(tl.int64))
    tl.store(position + row, tl.load(position + row) + 1)
    tl.store(drawn + row, counter + 1)
    stopped = (tl.load(stops + choice) != 0) & (tl.load(heeds_stop + row) == 1)
    full = counter + 1 >= tl.load(limit + row)
    tl.store(done + row, tl.where(stopped, 1, tl.where(full, 2, 0)).to(tl.int64))


def draw(rows: Rows, logits: Tensor, lengths: Tensor, control: Tensor, stops: Tensor) -> None:
    """Draws one token for each row whose length is not 0, and records it: what `sample` and `Rows.record` do.

    Args:
        logits: [B, V] in the model's dtype; rows 0..B-1 of `rows`. Neither top-k nor top-p is applied.
        lengths: [B] int32; 0 = the row stands still. control: [2] int64: rows in use, version of the weights.
        stops: [V] uint8, 1 for stop tokens.
    """
    batch, vocab = logits.shape
    chunks = triton.cdiv(vocab, _CHUNK)
    peaks, sums = torch.empty(2, batch, chunks, dtype=torch.float32, device=logits.device).unbind()
    _chunk_kernel[(chunks, batch)](
        logits, rows.temperature, lengths, peaks, sums, vocab, chunks, CHUNK=_CHUNK, num_warps=8
    )
    _draw_kernel[(batch,)](
        logits, rows.temperature, lengths, peaks, sums, control, stops,
        rows.key, rows.drawn, rows.done, rows.last_token, rows.position, rows.limit, rows.heeds_stop,
        rows.tokens, rows.logprobs, rows.versions, vocab, chunks, rows.tokens.shape[1],
        CHUNKS=triton.next_power_of_2(chunks), CHUNK=_CHUNK, num_warps=8,
    )  # fmt: skip
