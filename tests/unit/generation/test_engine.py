from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asystem.config import BudgetCounts, GenerationConfig
from asystem.errors import CapacityError, ConfigError, DataError
from asystem.generation import Engine, EngineRequest
from asystem.generation.runner import EagerRunner, StepContext
from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights
from asystem.types import Finish, SamplingParams, Trajectory

VOCAB, STOP, MAX_LENGTH = 41, 3, 40
LENGTHS = (1, 4, 5, 8, 11, 17)
GREEDY = SamplingParams(max_new_tokens=16, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=16)
TRUNCATED = SamplingParams(max_new_tokens=16, temperature=0.8, top_k=9, top_p=0.9)
MIXED = [GREEDY, SAMPLED, TRUNCATED]


def tiny_model(seed: int = 0) -> Decoder:
    spec = ModelSpec("qwen3", VOCAB, 24, 40, 2, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True)
    model = Decoder(spec)
    init_weights(model, seed, std=0.3)
    return model


MODEL = tiny_model()


def requests(params: list[SamplingParams], group_size: int = 3) -> list[EngineRequest]:
    """One group for each of LENGTHS; its samples take `params` in turn."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, VOCAB, n).astype(np.int32) for n in LENGTHS]
    return [
        EngineRequest(100 * g + i, g, 7 * g, tokens, params[i % len(params)])
        for g, tokens in enumerate(prompts)
        for i in range(group_size)
    ]


def engine(model: Decoder = MODEL, seed: int = 5, **config: Any) -> Engine:
    options: dict[str, Any] = {"max_running": 32, "block_size": 4} | config
    return Engine(model, GenerationConfig(**options), stop_ids=[STOP], seed=seed, max_length=MAX_LENGTH)


def drain(engine: Engine, **budget: Any) -> dict[int, Trajectory]:
    """Decodes to the end, `budget` a call, and checks that nothing is left behind."""
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.decode(**budget).finished
    assert engine.scheduler.pool.num_used == 0
    return {t.rollout: t for t in finished}


def run(wanted: list[EngineRequest], budget: dict[str, Any] | None = None, **config: Any) -> dict[int, Trajectory]:
    e = engine(**config)
    e.submit(wanted)
    return drain(e, **(budget or {}))


def assert_same(got: dict[int, Trajectory], want: dict[int, Trajectory]) -> None:
    assert got.keys() == want.keys()
    for rollout, t in want.items():
        assert got[rollout].tokens.tolist() == t.tokens.tolist(), f"rollout {rollout}"
        np.testing.assert_allclose(got[rollout].logprobs, t.logprobs, atol=1e-5)
        assert got[rollout].finish == t.finish


def full_logits(model: Decoder, trajectory: Trajectory) -> torch.Tensor:
    """[T, V]: logits of each response token, by one forward of the trainer's path."""
    tokens = torch.from_numpy(np.concatenate([trajectory.prompt_tokens, trajectory.tokens])).long()
    attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    with torch.no_grad():
        hidden = model(tokens, torch.arange(len(tokens)), attend)
        return model.logits(hidden[len(trajectory.prompt_tokens) - 1 : -1])


def test_log_probabilities_equal_a_full_forward() -> None:
    finished = run(requests([SAMPLED, GREEDY, replace(SAMPLED, temperature=0.7)]))
    assert len(finished) == 18
    for t in finished.values():
        temperature = [1.0, 1.0, 0.7][t.rollout % 100]
        logprobs = (full_logits(MODEL, t) / temperature).log_softmax(-1)
        want = logprobs.gather(-1, torch.from_numpy(t.tokens).long()[:, None])[:, 0]
        np.testing.assert_allclose(t.logprobs, want.numpy(), atol=1e-4)


def test_truncated_log_probabilities_are_renormalised() -> None:
    for t in run(requests([replace(SAMPLED, top_k=2)])).values():
        best = full_logits(MODEL, t).topk(2)
        chosen = best.indices == torch.from_numpy(t.tokens).long()[:, None]
        assert chosen.any(-1).all()
        np.testing.assert_allclose(t.logprobs, best.values.log_softmax(-1)[chosen].numpy(), atol=1e-4)


def test_ends_by_stop_token_and_by_length() -> None:
    finished = run(requests([SAMPLED], group_size=8))
    ends = {finish: [t for t in finished.values() if t.finish is finish] for finish in Finish}
    assert ends[Finish.STOP] and ends[Finish.LENGTH]
    for t in ends[Finish.STOP]:
        assert t.tokens[-1] == STOP and STOP not in t.tokens[:-1]
    for t in ends[Finish.LENGTH]:
        assert len(t.tokens) == 16 and STOP not in t.tokens
    ignoring = run(requests([replace(SAMPLED, ignore_eos=True)], group_size=8))
    assert all(len(t.tokens) == 16 and t.finish is Finish.LENGTH for t in ignoring.values())
    assert any(STOP in t.tokens for t in ignoring.values())


def test_a_prefill_draws_the_first_token_except_where_a_step_computes_the_only_one_missing() -> None:
    for chosen, steps in ((slice(3, None), 0), (slice(0, 3), 1)):  # prompts of several tokens, prompts of one
        e, wanted = engine(), requests([replace(SAMPLED, max_new_tokens=1)])[chosen]
        e.submit(wanted)
        decoded, count = e.decode(), len(wanted)
        assert (len(decoded.finished), decoded.generated, decoded.completed, decoded.steps) == (*[count] * 3, steps)
        assert decoded.prefilled == (0 if steps else sum(LENGTHS[1:]))


@pytest.mark.parametrize(
    ("budget", "config"),
    [
        ({}, {"max_running": 1}),
        ({}, {"kv_tokens": MAX_LENGTH}),  # a tenth of what 18 sequences need at their longest
        ({}, {"kv_tokens": MAX_LENGTH, "block_size": 1}),
        ({}, {"prefill_tokens": 10, "max_running": 7}),
        ({"max_steps": 3}, {"kv_tokens": 64, "max_running": 5}),
        ({"max_tokens": 5}, {"kv_tokens": 80}),
        ({"max_tokens": 9, "counts": BudgetCounts.completed}, {"max_running": 6}),
    ],
)
def test_tokens_depend_neither_on_the_batch_nor_on_memory(budget: dict[str, Any], config: dict[str, Any]) -> None:
    assert_same(run(requests(MIXED), budget, **config), run(requests(MIXED)))


def test_a_small_pool_does_preempt() -> None:
    e = engine(kv_tokens=MAX_LENGTH)
    prefilled: list[bool] = []
    prefill = e.runner.prefill

    def spy(prefills: Any, context: StepContext) -> None:
        prefilled.extend(not s.fresh for p in prefills for s in p.sequences)
        prefill(prefills, context)

    e.runner.prefill = spy  # type: ignore[method-assign]
    e.submit(requests(MIXED))
    drain(e)
    assert any(prefilled)


def test_seeds_and_rollouts_draw_different_tokens() -> None:
    first, again, other = (run(requests([SAMPLED]), seed=seed) for seed in (5, 5, 6))
    assert_same(again, first)
    assert any(first[r].tokens.tolist() != other[r].tokens.tolist() for r in first)
    assert len({tuple(first[100 * 4 + i].tokens.tolist()) for i in range(3)}) == 3


def test_exported_rollouts_continue_in_another_engine_as_if_never_interrupted() -> None:
    first, second = engine(), engine(block_size=16, max_running=4)
    finished: dict[int, Trajectory] = {}
    first.submit(requests(MIXED))
    finished |= {t.rollout: t for t in first.decode(max_steps=4).finished}
    chosen = [r.rollout for r in requests(MIXED)[3:] if r.rollout not in finished][::4]
    some = first.export([*chosen, 999])
    assert [u.request.rollout for u in some] == chosen != []
    assert all(len(u.tokens) == len(u.logprobs) == len(u.versions) == 5 for u in some)
    second.restore(pickle.loads(pickle.dumps(some)))
    finished |= {t.rollout: t for t in first.decode(max_steps=3).finished}
    second.restore(first.export())
    assert first.num_unfinished == 0 and first.scheduler.pool.num_used == 0
    assert_same(finished | drain(second), run(requests(MIXED)))


@pytest.mark.parametrize("config", [{}, {"kv_tokens": 2 * MAX_LENGTH}, {"max_running": 4}])
def test_paused_rollouts_wait_while_others_run_and_then_continue(config: dict[str, Any]) -> None:
    e, (train, evaluation) = engine(**config), (requests(MIXED), requests([GREEDY], group_size=1))
    evaluation = [replace(r, rollout=-1 - r.rollout, group=-1 - r.group) for r in evaluation]
    e.submit(train)
    finished = {t.rollout: t for t in e.decode(max_steps=5).finished}
    held = e.num_unfinished
    e.pause()
    assert e.decode().generated == 0
    e.submit(evaluation)
    answers = e.decode().finished
    assert {t.rollout for t in answers} == {r.rollout for r in evaluation}
    assert e.num_unfinished == held
    e.resume()
    assert_same(finished | drain(e), run(train))


def test_a_paused_rollout_keeps_its_kv() -> None:
    e = engine()
    e.submit(requests([SAMPLED], group_size=1))
    e.decode(max_steps=2)
    used = e.scheduler.pool.num_used
    e.pause()
    assert e.scheduler.pool.num_used == used > 0
    e.resume()
    e.runner.prefill = None  # type: ignore[method-assign, assignment]
    assert len(drain(e)) > 0


def test_rollouts_carried_over_windows_keep_their_kv_under_new_weights() -> None:
    e = engine()
    e.submit(requests([replace(SAMPLED, ignore_eos=True)], group_size=2))
    windows = []
    for version in range(6):
        windows.append(e.decode(max_tokens=40))
        e.weights_updated(version + 1)
    assert [w.prefilled for w in windows] == [sum(LENGTHS[1:]), 0, 0, 0, 0, 0]
    assert [w.generated > 0 for w in windows] == [True] * 5 + [False]


def test_versions_change_where_the_weights_did() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    e = engine(copy.deepcopy(model))
    wanted = requests([replace(SAMPLED, ignore_eos=True)])[3:]
    e.submit(wanted[:9])
    e.decode(max_steps=4)
    e.model.load_state_dict(other.state_dict())
    e.weights_updated(3)
    e.submit(wanted[9:])
    finished = drain(e)
    for request in wanted[:9]:
        assert finished[request.rollout].versions.tolist() == [0] * 5 + [3] * 11
    for request in wanted[9:]:
        assert finished[request.rollout].versions.tolist() == [3] * 16
    alone = engine(other)
    alone.submit(wanted[9:])
    assert_same({r.rollout: finished[r.rollout] for r in wanted[9:]}, drain(alone))


def test_dropped_rollouts_are_forgotten_and_their_blocks_freed() -> None:
    e = engine(max_running=8)
    e.submit(requests([replace(SAMPLED, ignore_eos=True)]))
    e.decode(max_steps=3)
    assert e.drop([1, 500, 77]) == [1, 500]  # one running, one waiting, one unknown
    finished = drain(e)
    assert len(finished) == 16 and not finished.keys() & {1, 500}
    e.submit(requests([SAMPLED]))
    e.decode(max_steps=3)
    e.drop([r.rollout for r in requests([SAMPLED])])
    assert e.num_unfinished == 0 and e.scheduler.pool.num_used == 0


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 60), st.integers(2, 12), st.sampled_from([None, 80]))
def test_the_budget_is_overshot_by_less_than_one_step(budget: int, max_running: int, kv_tokens: int | None) -> None:
    e, total, lengths = engine(max_running=max_running, kv_tokens=kv_tokens), 0, 0
    e.submit(requests([SAMPLED], group_size=2))
    while e.num_unfinished:
        decoded = e.decode(max_tokens=budget)
        total, lengths = total + decoded.generated, lengths + decoded.completed
        assert decoded.generated - budget < max_running
        assert decoded.generated >= budget or e.num_unfinished == 0
        assert decoded.completed == sum(len(t.tokens) for t in decoded.finished)
    assert total == lengths


def test_completed_lengths_count_when_rollouts_end() -> None:
    e, done = engine(), 0
    e.submit(requests([SAMPLED]))
    decoded = e.decode(max_tokens=1, counts=BudgetCounts.completed)
    assert decoded.completed == sum(len(t.tokens) for t in decoded.finished) > 0
    assert decoded.generated > decoded.completed
    while e.num_unfinished:
        decoded = e.decode(max_tokens=20, counts=BudgetCounts.completed)
        done += decoded.completed
        assert decoded.completed >= 20 or e.num_unfinished == 0
    assert done > 0


def test_max_steps_counts_decode_steps() -> None:
    e = engine()
    e.submit(requests([replace(SAMPLED, ignore_eos=True)])[3:])
    decoded = e.decode(max_steps=4)
    assert (decoded.steps, decoded.generated) == (4, 15 * 5)
    assert e.decode(max_steps=0).generated == e.decode(max_tokens=0).generated == 0


class AheadRunner(EagerRunner):
    """Makes several steps before the engine looks; rows that are done stand still, as `Runner.run_ahead` asks."""

    run_ahead = 5
    calls: list[int]

    def decode(self, steps: int, context: StepContext) -> None:
        self.calls.append(steps)
        state = self.rows._ints[:, : context.num_rows]
        for _ in range(steps):
            before = state.clone()
            super().decode(1, context)
            state.copy_(torch.where(before[1] != 0, before, state))


@pytest.mark.parametrize("kv_tokens", [None, 80])
def test_a_runner_may_run_ahead_of_the_engine(kv_tokens: int | None) -> None:
    e = engine(kv_tokens=kv_tokens)
    e.runner = ahead = AheadRunner(MODEL, e.cache, e.rows, [STOP])
    ahead.calls = []
    e.submit(requests(MIXED))
    finished: dict[int, Trajectory] = {}
    for budget in (40, 30, 200):
        decoded = e.decode(max_tokens=budget)
        assert budget <= decoded.generated < budget + 18 or e.num_unfinished == 0
        finished |= {t.rollout: t for t in decoded.finished}
    assert_same(finished | drain(e, max_steps=7), run(requests(MIXED)))
    assert max(ahead.calls) == 5 and min(ahead.calls) < 5


def test_plan_counts_every_byte_held() -> None:
    e = engine(kv_tokens=400)
    num_parameters = sum(p.numel() for p in MODEL.parameters())
    plan = e.plan()
    assert plan["weights"] == 4 * num_parameters
    assert plan["kv"] == 2 * 2 * 400 * 2 * 6 * 4  # layers, k and v, tokens, heads, head_dim, bytes
    assert plan["workspace"] == 32 * (8 * 8 + 2 * 4 + 10 * 8 + 3 * 4 * MAX_LENGTH)


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(CapacityError, match="one sequence of 40 tokens needs 10: set it to at least 40"):
        engine(kv_tokens=39)


@pytest.mark.parametrize(
    ("tokens", "params", "error", "message"),
    [
        ([], SAMPLED, DataError, "prompt 9 is empty"),
        ([1, 41], SAMPLED, DataError, "token 41, beyond the model's vocabulary of 41"),
        ([-1], SAMPLED, DataError, "token -1, beyond"),
        ([1] * 25, SAMPLED, ConfigError, "25 tokens and 16 new ones exceed the engine's max_length of 40"),
        ([1], replace(SAMPLED, max_new_tokens=0), ConfigError, "max_new_tokens is 0"),
    ],
)
def test_impossible_requests_are_refused(
    tokens: list[int], params: SamplingParams, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine().submit([EngineRequest(1, 1, 9, np.array(tokens, np.int32), params)])


def test_a_stop_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stop tokens \[41\] are beyond"):
        Engine(MODEL, GenerationConfig(), stop_ids=[41], seed=0, max_length=8)
