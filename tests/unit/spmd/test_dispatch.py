from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from asystem.errors import ConfigError
from asystem.spmd.dispatch import cut, gather
from asystem.spmd.remote import Collect


@dataclass
class Pages:
    """Splits itself as it likes: round robin, and pads."""

    items: list[int]

    def split(self, parts: int) -> "list[Pages]":
        return [Pages([*self.items[part::parts], -1]) for part in range(parts)]


def test_even_sequences_arrays_and_tensors_are_cut_in_order() -> None:
    assert cut([1, 2, 3, 4], 2, even=True) == [[1, 2], [3, 4]]
    assert cut((1, 2), 2, even=True) == [(1,), (2,)]
    assert [part.tolist() for part in cut(np.arange(6), 3, even=True)] == [[0, 1], [2, 3], [4, 5]]
    assert [part.tolist() for part in cut(torch.arange(4).view(2, 2), 2, even=True)] == [[[0, 1]], [[2, 3]]]


def test_what_does_not_divide_is_refused_with_numbers_or_shared_out() -> None:
    with pytest.raises(ConfigError, match="cannot split 5 items over 4 ranks: make it a multiple of 4"):
        cut([1, 2, 3, 4, 5], 4, even=True)
    assert cut([1, 2, 3, 4, 5], 4, even=False) == [[1, 2], [3], [4], [5]]
    assert cut([1], 3, even=False) == [[1], [], []]


def test_objects_split_themselves() -> None:
    assert cut(Pages([1, 2, 3]), 2, even=True) == [Pages([1, 3, -1]), Pages([2, -1])]
    with pytest.raises(TypeError, match="cannot split a dict over 2 ranks"):
        cut({"a": 1}, 2, even=False)
    with pytest.raises(TypeError, match="cannot split a str"):
        cut("abcd", 2, even=False)


@pytest.mark.parametrize(
    ("collect", "answers", "together"),
    [
        (Collect.ALL, [1, 2], [1, 2]),
        (Collect.FIRST, [[1], [2]], [1]),
        (Collect.CONCAT, [[1, 2], [], [3]], [1, 2, 3]),
        (Collect.CONCAT, [(1,), (2,)], (1, 2)),
        (Collect.SUM, [1.5, 2.0], 3.5),
        (Collect.SUM, [{"loss": 1.0, "tokens": 3}, {"loss": 2.0, "nan": 1}], {"loss": 3.0, "tokens": 3, "nan": 1}),
    ],
)
def test_answers_are_put_together(collect: Collect, answers: list[Any], together: Any) -> None:
    assert gather(answers, collect) == together


def test_arrays_and_tensors_are_joined() -> None:
    assert gather([np.array([1, 2]), np.array([3])], Collect.CONCAT).tolist() == [1, 2, 3]
    assert gather([torch.tensor([[1]]), torch.tensor([[2]])], Collect.CONCAT).tolist() == [[1], [2]]
    with pytest.raises(TypeError, match="cannot join answers of type dict"):
        gather([{}, {}], Collect.CONCAT)
