"""Weights out of one model and into another."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from asystem.errors import ModelError, PublicationError
from asystem.models import Decoder, ModelSpec, Shard, init_weights, quantize
from asystem.spmd import Buffer
from asystem.state import Inbox, Outbox, WeightPayload


def _model(seed: int = 0, **changes: Any) -> Decoder:
    shape: dict[str, Any] = {"qk_norm": True, "tie_embeddings": True} | changes
    model = Decoder(ModelSpec("qwen3", 23, 16, 24, 2, 4, 2, 4, **shape))
    init_weights(model, seed)
    return model


def _sent(model: Decoder, dtype: torch.dtype | None = None, **options: Any) -> WeightPayload:
    return Outbox(model, dtype, **options).write()


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_is_bit_equal_in_place_and_sends_a_tied_head_once(tied: bool) -> None:
    source, target = _model(1, tie_embeddings=tied), _model(2, tie_embeddings=tied)
    places = {name: p.data_ptr() for name, p in target.named_parameters()}
    payload = pickle.loads(pickle.dumps(_sent(source)))
    Inbox(target).read([payload])
    for name, p in target.named_parameters():
        assert torch.equal(p, source.get_parameter(name)) and p.data_ptr() == places[name], name
    assert len(payload.places) == len(list(source.parameters()))
    assert payload.num_bytes == payload.buffer.nbytes >= 4 * source.spec.num_parameters


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_the_wire_can_be_half_precision(source_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    source, target = _model(1).to(source_dtype), _model(2).to(target_dtype)
    payload = _sent(source, torch.bfloat16)
    assert {place.dtype for place in payload.places} == {"bfloat16"}
    assert payload.num_bytes < 0.6 * _sent(_model()).num_bytes
    Inbox(target).read([payload])
    for name, p in target.named_parameters():
        assert p.dtype is target_dtype
        assert torch.equal(p, source.get_parameter(name).to(torch.bfloat16).to(target_dtype)), name


def test_a_payload_is_a_copy_that_may_be_read_only_and_the_next_one_replaces_it() -> None:
    source, target = _model(1), _model(2)
    outbox, inbox = Outbox(source), Inbox(target)
    payload = outbox.write()
    sent = source.embed.weight.detach().clone()
    with torch.no_grad():
        source.embed.weight.zero_()
    payload.buffer.array.flags.writeable = False  # as shared memory gives it
    inbox.read([payload])
    assert torch.equal(target.embed.weight, sent)
    payload.buffer.array.flags.writeable = True
    again = outbox.write()
    assert again.buffer is payload.buffer and again.places is payload.places
    inbox.read([again])
    assert not target.embed.weight.any()


def test_blocks_start_aligned_and_do_not_overlap() -> None:
    payload = _sent(_model(), torch.bfloat16)
    end = 0
    for place in payload.places:
        assert place.offset % 64 == 0 and place.offset >= end
        end = place.end
    assert end <= payload.num_bytes


def test_what_does_not_fit_is_refused_with_both_sides_named_and_nothing_changed() -> None:
    tied, untied = _model(1), _model(2, tie_embeddings=False)
    before = {name: p.detach().clone() for name, p in untied.named_parameters()}
    with pytest.raises(ModelError, match=r"receiving model has head\.weight, for which no weights were sent"):
        Inbox(untied).read([_sent(tied)])
    with pytest.raises(ModelError, match=r"sent for head\.weight, which the receiving model has not"):
        Inbox(tied).read([_sent(untied)])
    payload = _sent(untied)
    first = replace(payload.places[0], shape=(22, 16))
    with pytest.raises(ModelError, match=r"embed\.weight was sent as \(22, 16\), the receiving model's is \(23, 16\)"):
        Inbox(untied).read([replace(payload, places=(first, *payload.places[1:]))])
    with pytest.raises(
        ModelError, match=r"embed\.weight ends at byte 1472, but the buffer that rank 0 of training sent has 100"
    ):
        Inbox(untied).read([replace(payload, buffer=Buffer(100))])
    unknown = replace(payload.places[0], dtype="float33")
    with pytest.raises(ModelError, match='unknown dtype "float33"'):
        Inbox(untied).read([replace(payload, places=(unknown, *payload.places[1:]))])
    assert all(torch.equal(p, before[name]) for name, p in untied.named_parameters())


@pytest.mark.parametrize("target", ["whole", "half", "int8", "bfloat16"])
def test_a_bit_that_changed_on_the_way_is_found_and_named(target: str) -> None:
    model = Shard(1, 2).cut(_model(2)) if target == "half" else _model(2)
    if target == "int8":
        quantize(model, torch.int8)
    if target == "bfloat16":
        model.to(torch.bfloat16)
    payload, inbox = _sent(_model(1)), Inbox(model)
    inbox.read([payload])
    place = next(place for place in payload.places if place.name == "layers.1.mlp.down_proj.weight")
    payload.buffer.array[place.offset + 50] ^= 16  # within the second half of a row: both halves read the row's place
    with pytest.raises(PublicationError, match=r"layers\.1\.mlp\.down_proj\.weight changed on its way from rank 0"):
        inbox.read([payload])
    inbox.read([replace(payload, checksums=())])  # nobody looks


def test_a_layer_left_out_and_two_that_changed_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    payload, inbox = _sent(_model(1)), Inbox(_model(2))
    inbox.read([payload])
    moves, inbox._views = inbox._moves, ((), [])
    one, two = "layers.0.attn.o_proj.weight", "layers.1.attn.o_proj.weight"
    inbox._moves = moves | {one: moves[two], two: moves[one]}
    with pytest.raises(PublicationError, match=r"o_proj\.weight is not what was sent"):
        inbox.read([payload])
    model = _model(2)
    inbox = Inbox(model)
    inbox.read([payload])
    init_weights(model, 3)
    monkeypatch.setattr("asystem.state.inbox._copy", lambda pairs: None)
    with pytest.raises(PublicationError, match=r"embed\.weight is not what was sent: it was written wrongly"):
        inbox.read([payload])


def test_checksums_come_with_the_first_of_so_many_publications() -> None:
    outbox = Outbox(_model(), verify_every=3)
    assert [bool(outbox.write().checksums) for _ in range(7)] == [True, False, False, True, False, False, True]
    assert not Outbox(_model(), verify_every=0).write().checksums
