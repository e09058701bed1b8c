"""Blocks that compute from two places in turn: the same bits as blocks that stay. On a CPU, where nothing overlaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from training_helpers import VOCAB, make_samples, weights

from asystem.config import LoraConfig, Recompute, TrainingConfig
from asystem.data.packing import pack
from asystem.models import Decoder, ModelSpec, MoESpec, init_weights
from asystem.training import TrainEngine, supervised_loss
from asystem.training.streaming import StreamedBlocks

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "lora": {"lora": LoraConfig(rank=3)},
    "experts": {"moe": MoESpec(6, 2, 8, dense_layers=(1,)), "balance_coefficient": 0.1},
}


def make_engine(recompute: Recompute, *, streamed: bool, moe: MoESpec | None = None, **changes: Any) -> TrainEngine:
    family = "qwen3" if moe is None else "qwen3_moe"
    model = Decoder(ModelSpec(family, VOCAB, 16, 24, 5, 4, 2, 4, qk_norm=True, tie_embeddings=True, moe=moe))
    init_weights(model, 0, std=0.2)
    cfg = TrainingConfig(lr=1e-2, recompute=recompute, offload_parameters=streamed, **changes)
    return TrainEngine(model, cfg, device="cpu", total_steps=9)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("kind", MODELS)
def test_streamed_blocks_give_the_same_bits(kind: str, recompute: Recompute) -> None:
    stay, streamed = (make_engine(recompute, streamed=on, **MODELS[kind]) for on in (False, True))
    host = {name: p.data_ptr() for name, p in streamed.model.named_parameters()}
    micro = pack(make_samples([9, 4, 12, 3, 7]), budget=20)
    assert len(micro) > 1
    for engine in (stay, streamed):
        engine.keep_reference()
    for _ in range(3):
        (stream, reference) = streamed._streams
        for place in (*stream._places, *reference._places):
            place.fill_(255)  # NaN: nothing is left there that anybody could use
        for found, expected in zip(streamed.logprobs(micro), stay.logprobs(micro), strict=True):
            assert torch.equal(found, expected)
        assert streamed.step(micro, supervised_loss).to_dict() == stay.step(micro, supervised_loss).to_dict()
        for name, value in weights(stay.model).items():
            assert torch.equal(streamed.model.get_parameter(name), value), name
    assert {name: p.data_ptr() for name, p in streamed.model.named_parameters()} == host, "all are at home again"
    for found, expected in zip(*(e.logprobs(micro, reference=True) for e in (streamed, stay)), strict=True):
        assert torch.equal(found, expected)


class _Spy(nn.Module):
    """Notes where its weight lies, and which blocks are copied at each call."""

    def __init__(self, value: float, seen: list[tuple[float, int]]) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.full((64,), value)), seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((float(self.weight.detach()[0]), self.weight.data_ptr()))
        return x + 1


def test_each_block_is_fetched_once_and_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []
    blocks = [_Spy(float(i), seen) for i in range(4)]
    stream = StreamedBlocks(blocks, torch.device("cpu"))
    fetched: list[tuple[int, int]] = []
    plain = stream._fetch
    monkeypatch.setattr(stream, "_fetch", lambda index: (fetched.append((index, len(seen))), plain(index))[1])
    x = torch.ones(3, requires_grad=True)
    for block in blocks:
        x = block(x)
    x.sum().backward()  # type: ignore[no-untyped-call]
    places = [place.data_ptr() for place in stream._places]
    assert [value for value, _ in seen] == [0.0, 1.0, 2.0, 3.0]
    assert [places.index(at) for _, at in seen] in ([0, 1, 0, 1], [1, 0, 1, 0])
    # (block, blocks that had been called by then): each before the one before it computes; backward likewise.
    assert fetched == [(0, 0), (1, 0), (2, 1), (3, 2), (2, 4), (1, 4), (0, 4)]
    stream.leave()
    assert all(block.weight.data_ptr() not in places for block in blocks)
