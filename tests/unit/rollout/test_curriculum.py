"""The order of prompts that learns: chances by hand, orders that repeat, state that goes through JSON."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from asystem.rollout import CURRICULA, Pool, PromptOrder, Window
from asystem.rollout.pool import Group


@pytest.mark.parametrize(
    ("name", "visits", "chance"),
    [
        ("unsolved", [1.0, 1.0], 0.0),
        ("unsolved", [0.75, 1.0], 1.0),
        ("unsolved", [0.0, 0.0], 1.0),
        ("pass_rate", [0.5, 0.5], 1.0),
        ("pass_rate", [0.25, 0.25], 0.75),
        ("pass_rate", [1.0, 0.5], 0.75),
        ("pass_rate", [1.0, 1.0], 0.1),
        ("pass_rate", [0.0, 0.0], 0.1),
        ("pass_rate", [-3.0, 7.0], 0.1),
    ],
)
def test_chances(name: str, visits: list[float], chance: float) -> None:
    assert CURRICULA[name](visits) == pytest.approx(chance)


def order(name: str = "unsolved", rows: int = 4) -> PromptOrder:
    return PromptOrder(rows, seed=0, shuffle=False, chance=CURRICULA[name], memory=2)


def test_solved_rows_are_left_out_until_they_fail_again() -> None:
    prompts = order()
    assert [next(prompts) for _ in range(4)] == [0, 1, 2, 3]
    prompts.learn(1, 1.0)
    assert [next(prompts) for _ in range(4)] == [0, 1, 2, 3], "one visit is too few to tell"
    for row in (1, 2, 2):
        prompts.learn(row, 1.0)
    assert [next(prompts) for _ in range(4)] == [0, 3, 0, 3]
    prompts.learn(2, 0.5)
    assert [next(prompts) for _ in range(3)] == [0, 2, 3]


def test_training_goes_on_where_everything_is_solved() -> None:
    prompts = order()
    for row in (0, 1, 2, 3) * 2:
        prompts.learn(row, 1.0)
    assert [next(prompts) for _ in range(3)] == [0, 1, 2]


def test_the_chance_is_that_of_being_asked_in_a_turn() -> None:
    prompts = order("pass_rate", rows=2)
    for reward in (0.25, 0.25):
        prompts.learn(0, reward)
    asked = Counter(next(prompts) for _ in range(1400))
    assert 0.68 < asked[0] / asked[1] < 0.82  # 4 x 0.25 x 0.75


def test_an_order_goes_on_from_its_state() -> None:
    prompts = PromptOrder(50, seed=3, chance=CURRICULA["pass_rate"], memory=2)
    for _ in range(60):
        row = next(prompts)
        prompts.learn(row, row / 50)
        prompts.learn(row, row / 50)
    again = PromptOrder(50, seed=3, chance=CURRICULA["pass_rate"], memory=2)
    again.load(json.loads(json.dumps(prompts.state())))
    assert again.visits == prompts.visits
    assert [next(again) for _ in range(80)] == [next(prompts) for _ in range(80)]


def test_without_a_curriculum_nothing_is_remembered() -> None:
    prompts = PromptOrder(3, seed=0)
    prompts.learn(1, 1.0)
    assert prompts.state() == {"position": 0, "visits": []}


def test_windows_join_in_their_order() -> None:
    groups = [Group(i, i, [i], replica=0) for i in range(4)]
    first, second = Window(4, groups[:1], groups[1:2], carried=3), Window(5, groups[2:3], groups[3:], carried=1)
    assert first.join(second) == Window(5, [groups[0], groups[2]], [groups[1], groups[3]], carried=1, count=2)


def test_the_pool_asks_in_the_order_of_prompts() -> None:
    prompts = order()
    for row in (0, 0, 2, 2):
        prompts.learn(row, 1.0)
    pool = Pool(prompts, group_size=1, capacity=4, retention=0)
    assert [request.prompt for request in pool.ask(0)] == [1, 3, 1, 3]
