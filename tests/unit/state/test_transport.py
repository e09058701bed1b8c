"""Weights out of one model and into another."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.state import WeightPayload, export_weights, import_weights


def _model(seed: int = 0, **changes: Any) -> Decoder:
    shape: dict[str, Any] = {"qk_norm": True, "tie_embeddings": True} | changes
    model = Decoder(ModelSpec("qwen3", 23, 16, 24, 2, 4, 2, 4, **shape))
    init_weights(model, seed)
    return model


def _export(model: Decoder, dtype: torch.dtype | None = None) -> WeightPayload:
    payload = export_weights(model, dtype)
    assert payload is not None
    return payload


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_is_bit_equal_in_place_and_sends_a_tied_head_once(tied: bool) -> None:
    source, target = _model(1, tie_embeddings=tied), _model(2, tie_embeddings=tied)
    places = {name: p.data_ptr() for name, p in target.named_parameters()}
    payload = pickle.loads(pickle.dumps(_export(source)))
    import_weights(target, payload)
    for name, p in target.named_parameters():
        assert torch.equal(p, source.get_parameter(name)) and p.data_ptr() == places[name], name
    assert len(payload.places) == len(list(source.parameters()))
    assert payload.num_bytes == payload.buffer.nbytes >= 4 * source.spec.num_parameters


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_the_wire_can_be_half_precision(source_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    source, target = _model(1).to(source_dtype), _model(2).to(target_dtype)
    payload = _export(source, torch.bfloat16)
    assert {place.dtype for place in payload.places} == {"bfloat16"}
    assert payload.num_bytes < 0.6 * _export(_model()).num_bytes
    import_weights(target, payload)
    for name, p in target.named_parameters():
        assert p.dtype is target_dtype
        assert torch.equal(p, source.get_parameter(name).to(torch.bfloat16).to(target_dtype)), name


def test_a_payload_is_a_copy_and_may_be_read_only() -> None:
    source, target = _model(1), _model(2)
    payload = _export(source)
    sent = source.embed.weight.detach().clone()
    with torch.no_grad():
        source.embed.weight.zero_()
    payload.buffer.flags.writeable = False  # as shared memory gives it
    import_weights(target, payload)
    assert torch.equal(target.embed.weight, sent)


def test_tensors_start_aligned_and_do_not_overlap() -> None:
    payload = _export(_model(), torch.bfloat16)
    end = 0
    for place in payload.places:
        assert place.offset % 64 == 0 and place.offset >= end
        end = place.offset + place.num_bytes
    assert end <= payload.num_bytes


def test_a_rank_that_does_not_keep_it_gets_nothing() -> None:
    assert export_weights(_model(), keep=False) is None


def test_what_does_not_fit_is_refused_with_both_sides_named_and_nothing_changed() -> None:
    tied, untied = _model(1), _model(2, tie_embeddings=False)
    before = {name: p.detach().clone() for name, p in untied.named_parameters()}
    with pytest.raises(ModelError, match=r"receiving model has head\.weight, for which no weights were sent"):
        import_weights(untied, _export(tied))
    with pytest.raises(ModelError, match=r"sent for head\.weight, which the receiving model has not"):
        import_weights(tied, _export(untied))
    payload = _export(untied)
    first = replace(payload.places[0], shape=(22, 16))
    with pytest.raises(ModelError, match=r"embed\.weight was sent as \(22, 16\), the receiving model's is \(23, 16\)"):
        import_weights(untied, replace(payload, places=(first, *payload.places[1:])))
    with pytest.raises(ModelError, match=r"embed\.weight ends at byte 1472, but the buffer sent has 100"):
        import_weights(untied, replace(payload, buffer=np.zeros(100, np.uint8)))
    unknown = replace(payload.places[0], dtype="float33")
    with pytest.raises(ModelError, match='unknown dtype "float33"'):
        import_weights(untied, replace(payload, places=(unknown, *payload.places[1:])))
    assert all(torch.equal(p, before[name]) for name, p in untied.named_parameters())
