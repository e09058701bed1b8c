"""Sleep and wake: every bit comes back, and what sleeps takes nothing."""

from __future__ import annotations

import torch

from asystem.memory import AMem, Moved
from asystem.memory.sleep import CHUNK

CPU = torch.device("cpu")


def test_what_sleeps_is_gone_and_comes_back_bit_for_bit() -> None:
    memory, big = AMem(CPU), torch.randn(CHUNK // 4 + 1000)  # more than one piece
    odd = torch.tensor([float("nan"), -0.0, 1e-42, float("inf")])
    half = torch.randn(7, 5).bfloat16()
    view = big[5:9]
    before = [x.view(torch.uint8).clone() for x in (big, odd, half)]
    memory.add("states", [big, odd, half, view])
    moved = memory.enter([])
    size = big.nbytes + odd.nbytes + half.nbytes
    assert (moved.slept, moved.woken, memory.held()) == (size, 0, {"states": 0}), "a view is no memory of its own"
    assert [x.untyped_storage().nbytes() for x in (big, odd, half)] == [0, 0, 0]
    assert memory.enter(["states"]).woken == size and memory.held() == {"states": size}
    for tensor, bits in zip((big, odd, half), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), bits)
    assert torch.equal(view, big[5:9]), "views follow"


def test_phases_take_turns() -> None:
    memory, states, pool = AMem(CPU), torch.arange(100.0), torch.ones(1000)
    memory.add("states", [states])
    memory.add("kv", [pool])
    assert memory.enter(["kv"]).slept == 400
    assert memory.held() == {"states": 0, "kv": 4000}
    moved = memory.enter(["states"])
    assert (moved.slept, moved.woken) == (4000, 400)
    assert memory.held() == {"states": 400, "kv": 0} and states.sum() == 4950
    assert memory.enter(["states"]) == Moved(), "already so"
    memory.enter(["kv"])
    assert pool.sum() == 1000


def test_what_is_dropped_costs_nothing_and_wakes_as_zeros() -> None:
    memory, pool = AMem(CPU), torch.full((1000,), float("nan"))
    memory.add("kv", [pool])
    moved = memory.enter([], drop=["kv"])
    assert (moved.slept, moved.dropped) == (0, 4000)
    moved = memory.enter(["kv"])
    assert moved.woken == 0 and torch.equal(pool, torch.zeros(1000))
    pool.fill_(2.0)
    memory.enter([])  # this time it is kept
    memory.enter(["kv"])
    assert pool.sum() == 2000


def test_shared_storages_stay() -> None:
    memory, weight, moment = AMem(CPU), torch.ones(10), torch.ones(20)
    memory.add("states", [weight, moment], apart_from=[weight[3:5]])
    assert memory.enter([]).slept == 80
    assert weight.sum() == 10 and moment.untyped_storage().nbytes() == 0


def test_moves_add_up() -> None:
    assert Moved(1, 2, 3, 4.0) + Moved(10, 20, 30, 40.0) == Moved(11, 22, 33, 44.0)
