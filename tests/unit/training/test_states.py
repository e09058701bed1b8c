"""States in fewer bits: rounding that is right on average, bounds of 8-bit codes, and models that learn with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import make_engine, make_samples, weights

from asystem.config import Master, Optimizer
from asystem.data.packing import pack
from asystem.errors import ConfigError
from asystem.training import TrainEngine, optimizer, supervised_loss
from asystem.training.states import Dynamic8Bit, block_size, dynamic_table, stochastic_round_

BATCH = pack(make_samples([4, 1, 9, 6]), budget=14)


def test_stochastic_rounding_is_exact_on_average_and_of_what_bfloat16_holds() -> None:
    noise = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0 + 2**-10, -3.001, 1e-30, 0.0, 257.0, 1.5])
    rounded = torch.empty(20_000, 6, dtype=torch.bfloat16)
    stochastic_round_(rounded, values.expand(20_000, 6).contiguous(), noise)
    step = torch.tensor([2**-7, 2**-6, 2**-107, 0.0, 2.0, 0.0])  # between the two neighbours in bfloat16
    error = rounded.double().mean(dim=0) - values.double()
    # The mean of n draws of p (1 - p) <= 1/4 is within 5 standard deviations.
    assert (error.abs() <= 5 * step * 0.5 / 20_000**0.5).all()
    assert ((rounded.double() - values.double()).abs() <= step).all()
    assert torch.equal(rounded[:, 5].float(), torch.full((20_000,), 1.5))


def test_updates_below_the_last_bit_add_up() -> None:
    noise = torch.Generator().manual_seed(0)
    nearest = torch.ones(2000, dtype=torch.bfloat16)
    stochastic = nearest.clone()
    for _ in range(64):  # of 2^-12, a thirty-second of the distance between neighbours
        nearest += 2**-12
        stochastic_round_(stochastic, stochastic.float() + 2**-12, noise)
    assert (nearest == 1).all()
    assert float(stochastic.float().mean()) == pytest.approx(1 + 64 * 2**-12, abs=5e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_has_256_values_dense_near_one(signed: bool) -> None:
    table = dynamic_table(signed, torch.device("cpu"))
    assert len(table) == 256 and (table.diff() > 0).all() and table[-1] == 1
    assert float(table[0]) == pytest.approx(-1 + 0.45 / 64 if signed else 1e-7)
    assert float(table[-2]) == pytest.approx(1 - 0.45 / (64 if signed else 128))
    assert (0.0 in table.tolist()) == signed


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_keep_the_size_of_values_over_decades(signed: bool) -> None:
    kind, noise = Dynamic8Bit(signed=signed), torch.Generator()
    values = 10.0 ** -(torch.arange(3 * 512).view(3, 512) % 256 / 256 * 4)  # from 1 down to 1e-4 in each block
    values = values * (torch.tensor([1.0, -1.0]).repeat(256) if signed else 1.0) * torch.tensor([[1.0], [1e3], [1e-9]])
    kept = kind.zeros(values)
    kind.write(kept, values, noise)
    assert [tuple(tensor.shape) for tensor in kept] == [(3, 512), (3, 2)]
    error = (kind.read(kept) - values).abs() / values.abs()
    assert float(error[values.abs() > 0.1 * values.abs().amax(dim=1, keepdim=True)].max()) < (0.07 if signed else 0.04)
    assert float(error.max()) < 0.4
    # The largest of each block is exact, and zeros stay so where a whole block is 0.
    assert torch.equal(kind.read(kept).view(3, 2, 256).abs().amax(-1), values.view(3, 2, 256).abs().amax(-1))
    kind.write(kept, torch.zeros(3, 512), noise)
    assert not kind.read(kept).any()


def test_second_moments_do_not_vanish_beside_a_large_one() -> None:
    kind = Dynamic8Bit(signed=False)
    values = torch.tensor([[1.0, *[1e-12] * 31]])
    kept = kind.zeros(values)
    kind.write(kept, values, torch.Generator())
    assert float(kind.read(kept).min()) == pytest.approx(1e-7)


@pytest.mark.parametrize(("width", "size"), [(1024, 256), (896, 224), (2560, 256), (40, 40), (37, 37), (514, 514)])
def test_blocks_divide_the_last_axis(width: int, size: int) -> None:
    assert (block_size(width) == size) or (width == 514 and block_size(width) == 514)


CHOICES: dict[str, dict[str, Any]] = {
    "8 bits": {"optimizer": Optimizer.adamw8bit},
    "stochastic": {"master": Master.bfloat16_stochastic, "dtype": torch.bfloat16},
    "both": {"optimizer": Optimizer.adamw8bit, "master": Master.bfloat16_stochastic, "dtype": torch.bfloat16},
}


def losses(engine: TrainEngine, steps: int = 15) -> list[float]:
    return [engine.step(BATCH, supervised_loss).to_dict()["train/loss"] for _ in range(steps)]


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_learns_as_with_float32_states(name: str) -> None:
    expected, found = losses(make_engine()), losses(make_engine(**CHOICES[name]))
    assert expected[-1] < 0.6 * expected[0]
    assert found == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", CHOICES)
def test_the_step_after_loading_is_bit_equal(tmp_path: Path, name: str) -> None:
    engine = make_engine(**CHOICES[name])
    losses(engine, 2)
    engine.save(tmp_path / "step-000002")
    resumed = make_engine(**CHOICES[name])
    resumed.load(tmp_path / "step-000002")
    assert losses(resumed, 2) == losses(engine, 2)
    for name, value in weights(engine.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name


def test_pieces_are_updated_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(optimizer=Optimizer.adamw8bit)
    expected = losses(engine, 3)
    monkeypatch.setattr(optimizer, "PIECE", 40)  # two rows of 16
    cut = make_engine(optimizer=Optimizer.adamw8bit)
    assert losses(cut, 3) == expected
    for name, value in weights(engine.model).items():
        assert torch.equal(weights(cut.model)[name], value), name


def test_stochastic_masters_of_another_dtype_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs training\.dtype=bfloat16, and it is torch\.float32"):
        make_engine(master=Master.bfloat16_stochastic)
