"""Operations of a step against torch's own count of its matrix products."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import make_model, make_samples

from asystem.data.packing import pack_one
from asystem.models import ModelSpec
from asystem.stats import Stats, merge
from asystem.training.flops import Meter, product_rate, train_flops
from asystem.training.policy import Policy


@pytest.mark.parametrize("frozen", [False, True])
def test_products_are_those_that_torch_counts(frozen: bool) -> None:
    model, packed = make_model(), pack_one(make_samples([4, 1, 9]))
    for block in model.layers:
        block.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        logprobs, _ = Policy(model)(packed)
        logprobs.sum().backward()  # type: ignore[no-untyped-call]
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for operation, n in counts.items() if "attention" not in str(operation))
    if frozen:  # the tied embedding trains in this test, so the head has its third product
        products -= 2 * 16 * 23 * len(packed.label_rows)
    pairs = sum(n * (n + 1) / 2 for n in packed.cu_seqlens.diff().tolist())
    assert train_flops(model.spec, [packed], frozen=frozen) == pytest.approx(products + 12 * 2 * 16 * pairs)


def test_a_hand_worked_count() -> None:
    spec = ModelSpec("llama", 10, 4, 8, 1, 2, 1, 2)
    packed = pack_one(make_samples([2]))  # a prompt of 1 and a response of 2: 3 tokens, 6 pairs, 2 labels
    weights = 4 * 4 + 4 * 2 * 2 + 4 * 4 + 3 * 4 * 8  # q, k and v, o, MLP
    expected = 6 * weights * 3 + 6 * 40 * 2 + 12 * 4 * 6
    assert train_flops(spec, [packed]) == expected
    assert torch.equal(packed.cu_seqlens, torch.tensor([0, 3], dtype=torch.int32))


def test_utilisation_adds_up_over_ranks_and_steps() -> None:
    spec = ModelSpec("llama", 10, 4, 8, 1, 2, 1, 2)
    small, large = ([pack_one(make_samples([n]))] for n in (2, 9))
    meter, parts, spent = Meter(spec, torch.device("cpu"), frozen=True, sharing=2), [], 0.0
    for micro, seconds in ((small, 0.02), (large, 0.05), ([], 0.03)):
        started = time.perf_counter()
        parts.append(meter.measure(micro, lambda seconds=seconds: (time.sleep(seconds), Stats())[1]))  # type: ignore[misc]
        spent += time.perf_counter() - started
    needed = train_flops(spec, small, frozen=True) + train_flops(spec, large, frozen=True)
    assert merge(parts).to_dict()["train/mfu"] == pytest.approx(needed / 2 / spent / meter.rate, rel=0.05)


def test_the_rate_of_products_is_measured_once() -> None:
    rate = product_rate(torch.device("cpu"))
    assert 1e8 < rate < 1e14
    assert product_rate(torch.device("cpu")) == rate
