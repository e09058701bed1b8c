"""Prompts cut into chunks beside decoding, content found in the cache again, and KV under new weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import GREEDY, MAX_LENGTH, MIXED, MODEL, SAMPLED, assert_same, drain, engine, full_logits, tiny_model
from test_engine import requests as groups

from asystem.config import KVOnUpdate
from asystem.generation import Engine, EngineRequest
from asystem.generation.runner import StepContext
from asystem.models import Decoder
from asystem.types import SamplingParams, Trajectory

LONG = np.random.default_rng(1).integers(4, 41, 24).astype(np.int32)
FULL = replace(SAMPLED, ignore_eos=True)
OTHER = tiny_model(seed=1)


def request(rollout: int, tokens: Any, params: SamplingParams = GREEDY, group: int | None = None) -> EngineRequest:
    return EngineRequest(rollout, rollout if group is None else group, 0, np.asarray(tokens, np.int32), params)


def spy(e: Engine) -> list[tuple[str, int]]:
    """What the runner is asked from now on: ("prefill", tokens) or ("decode", rows)."""
    calls: list[tuple[str, int]] = []
    prefill, decode = e.runner.prefill, e.runner.decode

    def on_prefill(prefills: Any, context: StepContext) -> None:
        calls.append(("prefill", sum(len(p.tokens) for p in prefills)))
        prefill(prefills, context)

    def on_decode(steps: int, context: StepContext) -> None:
        calls.append(("decode", context.num_rows))
        decode(steps, context)

    e.runner.prefill, e.runner.decode = on_prefill, on_decode  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize(
    "config",
    [
        {"prefill_tokens": 1},
        {"prefill_tokens": 3, "kv_tokens": 60},
        {"prefill_tokens": 7, "max_running": 3, "block_size": 16},
    ],
)
def test_tokens_do_not_depend_on_chunks(config: dict[str, Any]) -> None:
    e, whole, short = engine(**config), engine(), [replace(p, max_new_tokens=8) for p in MIXED]
    for each in (e, whole):
        each.submit(groups(short))
    calls = spy(e)
    assert_same(drain(e), drain(whole))
    assert max(count for name, count in calls if name == "prefill") <= config["prefill_tokens"]


def test_a_long_prompt_stops_the_others_for_one_chunk_at_a_time() -> None:
    e = engine(prefill_tokens=5)
    e.submit(groups([FULL], group_size=1)[:2])
    e.decode(max_steps=2)
    calls = spy(e)
    e.submit([request(900, LONG, FULL)])
    decoded = e.decode(max_steps=6)
    assert calls == [("prefill", 5), ("decode", 2)] * 4 + [("prefill", 4), ("decode", 3), ("decode", 3)]
    assert (decoded.prefilled, decoded.generated) == (24, 4 * 2 + 1 + 2 * 3)


def test_prompts_that_start_together_are_all_computed_first() -> None:
    e = engine(prefill_tokens=5)
    e.submit([request(i, np.roll(LONG, i), FULL) for i in range(3)])
    calls = spy(e)
    e.decode(max_steps=1)
    assert calls[-1] == ("decode", 3)
    assert {name for name, _ in calls[:-1]} == {"prefill"} and sum(tokens for _, tokens in calls[:-1]) == 3 * 24


@pytest.mark.parametrize("interruption", ["pause", "export", "drop", "evict"])
def test_nothing_is_lost_when_a_prefill_is_interrupted(interruption: str) -> None:
    e = engine(prefill_tokens=5, kv_tokens=44)
    e.submit([request(1, LONG[:4], FULL)])
    finished = e.decode(max_steps=1).finished
    e.submit([request(2, LONG)])
    e.decode(max_steps=2)
    (waiting,) = e.scheduler.waiting
    assert (waiting.computed, len(waiting.blocks)) == (14, 6)  # the first block is the other's
    if interruption == "pause":
        e.pause()
        e.submit([request(3, LONG[::-1])])  # needs blocks that the paused ones hold
        (answer,) = e.decode().finished
        assert_same({3: answer}, alone(request(3, LONG[::-1])))
        e.resume()
    elif interruption == "export":
        (unfinished,) = e.export([2])
        assert len(unfinished.tokens) == 0
        e.restore([unfinished])
    elif interruption == "drop":
        assert e.drop([2]) == [2]
        e.submit([request(2, LONG)])
    else:
        e.scheduler.free(waiting)
    finished += drain(e).values()
    by_rollout = {t.rollout: t for t in finished}
    assert_same(by_rollout, alone(request(1, LONG[:4], FULL)) | alone(request(2, LONG)))


def alone(wanted: EngineRequest, model: Decoder = MODEL) -> dict[int, Trajectory]:
    e = engine(model)
    e.submit([wanted])
    return drain(e)


def test_a_purged_prompt_asked_again_and_another_group_with_it_reuse_its_blocks() -> None:
    e = engine()
    e.submit([request(i, LONG, FULL, group=0) for i in range(3)])
    assert e.decode(max_steps=3).prefilled == 24
    e.drop([0, 1, 2])
    assert e.scheduler.pool.num_used == 0
    e.submit([request(10 + i, LONG, FULL, group=1) for i in range(2)])
    # 5 of its 6 blocks are shared; the last token at least is computed to draw from, here with its whole block.
    assert e.decode(max_steps=1).prefilled == 4
    e.submit([request(20, np.append(LONG[:13], 7), FULL)])
    assert e.decode(max_steps=1).prefilled == 14 - 12
    finished = drain(e)
    want = engine()
    want.submit([request(10 + i, LONG, FULL, group=1) for i in range(2)])
    assert_same(finished, drain(want) | alone(request(20, np.append(LONG[:13], 7), FULL)))


def test_a_restored_rollout_finds_what_it_had_computed() -> None:
    e = engine()
    e.submit([request(1, LONG, FULL)])
    e.decode(max_steps=8)  # 24 + 9 tokens, all but the newest in the cache: 8 full blocks
    e.restore(e.export())
    assert e.decode(max_steps=0).prefilled == 0
    assert e.scheduler.pool.num_used == 0
    assert_same(drain(e), alone(request(1, LONG, FULL)))
    e.submit([request(2, LONG, FULL)])
    e.decode(max_steps=7)  # 32 tokens, 31 in the cache
    e.restore(e.export())
    assert e.decode(max_steps=1).prefilled == 32 - 28


def test_later_samples_of_a_prompt_share_nothing_older_than_the_weights() -> None:
    e = engine(tiny_model())
    e.submit([request(1, LONG, FULL, group=0)])
    e.decode(max_steps=3)
    e.model.load_state_dict(OTHER.state_dict())
    e.weights_updated(1)
    e.submit([request(2, LONG, FULL, group=0)])
    assert e.decode(max_steps=1).prefilled == 24
    e.submit([request(3, LONG, FULL, group=0)])
    assert e.decode(max_steps=1).prefilled == 4  # from its sibling of the same version, not from the older one
    finished = drain(e)
    for rollout in (2, 3):
        assert_same({rollout: finished[rollout]}, alone(request(rollout, LONG, FULL), OTHER))


@pytest.mark.parametrize("kv", KVOnUpdate)
def test_kv_on_update(kv: KVOnUpdate) -> None:
    e = engine(tiny_model(), kv_on_update=kv)
    e.submit([request(1, LONG, FULL), request(2, LONG[9:18], FULL)])
    e.decode(max_steps=3)
    e.pause()
    e.submit([request(3, LONG[5:12], FULL)])
    e.decode(max_steps=2)
    e.model.load_state_dict(OTHER.state_dict())
    e.weights_updated(1)
    e.resume()
    prefilled = e.decode(max_steps=1).prefilled
    assert prefilled == {KVOnUpdate.keep: 0, KVOnUpdate.recompute: 24 + 4 + 9 + 4 + 7 + 3}[kv]
    worst = max(error(t) for t in drain(e).values())
    assert worst < 1e-4 if kv is KVOnUpdate.recompute else worst > 0.1


def error(t: Trajectory) -> float:
    """The largest |log-probability as sampled - that of a fresh forward under the version of each token|."""
    logits = torch.stack([full_logits(model, t) for model in (MODEL, OTHER)])
    mixed = logits[torch.from_numpy(t.versions).long() % 2, torch.arange(len(t.tokens))]
    want = mixed.log_softmax(-1).gather(-1, torch.from_numpy(t.tokens).long()[:, None])[:, 0]
    return float(np.abs(t.logprobs - want.numpy()).max())


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 3), st.integers(1, 3)),
    st.tuples(st.just("decode"), st.integers(1, 5)),
    st.tuples(st.sampled_from(["pause", "resume", "move", "update"])),
    st.tuples(st.just("drop"), st.integers(0, 9)),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(ACTIONS, max_size=16), st.sampled_from([MAX_LENGTH, 100, None]), st.integers(3, 30))
def test_whatever_happens_each_token_is_that_of_a_fresh_forward(
    actions: list[tuple[Any, ...]], kv_tokens: int | None, prefill_tokens: int
) -> None:
    """With `recompute` there is an oracle without cache, chunks and sharing: one forward under each token's weights."""
    recompute = KVOnUpdate.recompute
    e = engine(tiny_model(), kv_tokens=kv_tokens, prefill_tokens=prefill_tokens, max_running=6, kv_on_update=recompute)
    finished: list[Trajectory] = []
    submitted = dropped = 0
    for name, *arguments in [*actions, ("resume",)]:
        if name == "submit":
            start, count = arguments
            prompt = np.concatenate([LONG[:11], LONG[start : 3 * start + 2]])  # they share a beginning
            e.submit([request(submitted + i, prompt, [GREEDY, SAMPLED][i % 2]) for i in range(count)])
            submitted += count
        elif name == "decode":
            finished += e.decode(max_steps=arguments[0]).finished
        elif name == "move":
            e.restore(e.export())
        elif name == "update":
            e.model.load_state_dict((OTHER, MODEL)[e.version % 2].state_dict())
            e.weights_updated(e.version + 1)
        elif name == "drop":
            dropped += len(e.drop([arguments[0]]))
        else:
            getattr(e, name)()
    finished += drain(e).values()
    assert len(finished) == submitted - dropped
    assert all(error(t) < 1e-4 for t in finished)
