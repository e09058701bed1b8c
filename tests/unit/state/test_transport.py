"""Weights out of one model and into another."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from asystem.config import LoraConfig, Transport
from asystem.errors import ModelError, PublicationError
from asystem.models import Box, Decoder, ModelSpec, MoESpec, Shard, add_lora, init_weights, merge, quantize
from asystem.spmd import Buffer, store
from asystem.state import Inbox, Outbox, WeightPayload
from asystem.state.checksum import checksum
from asystem.state.inbox import _Ready
from asystem.state.payload import lay_out


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
    assert payload.nbytes == payload.buffer.nbytes >= 4 * source.spec.num_parameters


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_the_wire_can_be_half_precision(source_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    source, target = _model(1).to(source_dtype), _model(2).to(target_dtype)
    payload = _sent(source, torch.bfloat16)
    assert {place.dtype for place in payload.places} == {"bfloat16"}
    assert payload.nbytes < 0.6 * _sent(_model()).nbytes
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
    assert end <= payload.nbytes


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
    moves, inbox._ready = inbox._moves, _Ready()
    one, two = "layers.0.attn.o_proj.weight", "layers.1.attn.o_proj.weight"
    inbox._moves = moves | {one: moves[two], two: moves[one]}
    with pytest.raises(PublicationError, match=r"o_proj\.weight is not what was sent"):
        inbox.read([payload])
    model = _model(2)
    inbox = Inbox(model)
    inbox.read([payload])
    init_weights(model, 3)
    monkeypatch.setattr("asystem.state.inbox.copy_all", lambda pairs: None)
    with pytest.raises(PublicationError, match=r"embed\.weight is not what was sent: it was written wrongly"):
        inbox.read([payload])


def test_checksums_come_with_the_first_of_so_many_publications() -> None:
    outbox = Outbox(_model(), verify_every=3)
    assert [bool(outbox.write().checksums) for _ in range(7)] == [True, False, False, True, False, False, True]
    assert not Outbox(_model(), verify_every=0).write().checksums


def _shards(payload: WeightPayload) -> list[WeightPayload]:
    """What two ranks of training would have sent: the first dimension cut in halves."""
    found = []
    for rank in range(2):
        blocks = []
        for place, block in zip(payload.places, payload.blocks(), strict=True):
            low, high = (len(block) * rank // 2, len(block) * (rank + 1) // 2)
            box = Box((low, *place.box.start[1:]), (high, *place.box.stop[1:]))
            blocks.append((place.name, place.shape, box, block[low:high]))
        places = lay_out([(name, shape, box, block.dtype) for name, shape, box, block in blocks])
        buffer = Buffer(places[-1].end)
        for place, (_, _, _, block) in zip(places, blocks, strict=True):
            place.of(buffer.flat()).copy_(block)
        sums = tuple(checksum(block, box, shape) for _, shape, box, block in blocks)
        found.append(WeightPayload(places, buffer, sums, rank))
    return found


def test_a_corrupted_shard_is_named_with_the_rank_that_sent_it() -> None:
    target = _model(2)
    inbox, shards = Inbox(target), _shards(_sent(_model(1)))
    inbox.read(shards)
    assert all(torch.equal(p, _model(1).get_parameter(name)) for name, p in target.named_parameters())
    place = next(place for place in shards[1].places if place.name == "layers.0.attn.qkv_proj.weight")
    shards[1].buffer.flat()[place.end - 3] ^= 1
    with pytest.raises(PublicationError, match=r"layers\.0\.attn\.qkv_proj\.weight changed on its way from rank 1"):
        inbox.read(shards)


def test_two_experts_that_changed_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec("qwen3_moe", 23, 16, 24, 2, 4, 2, 4, qk_norm=True, moe=MoESpec(6, 2, 8))
    source, target = Decoder(spec), Decoder(spec)
    init_weights(source, 1)
    inbox = Inbox(target)
    inbox.read([_sent(source)])
    name = next(name for name, p in target.named_parameters() if p.ndim == 3)
    experts = target.get_parameter(name)

    def swapping(pairs: Any) -> None:
        for into, block in pairs:
            into.copy_(block[[0, 4, 2, 3, 1, 5]] if into.data_ptr() == experts.data_ptr() else block)

    monkeypatch.setattr("asystem.state.inbox.copy_all", swapping)
    with pytest.raises(
        PublicationError, match=name.replace(".", r"\.") + " is not what was sent: it was written wrong"
    ):
        inbox.read([_sent(source)])


def test_under_adapters_what_is_frozen_is_sent_and_verified_once() -> None:
    source, target = _model(1), _model(2)
    add_lora(source, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), seed=0)
    outbox, inbox = Outbox(source, transport=Transport.shared_memory), Inbox(target)
    adapted = [f"layers.{i}.{leaf}.weight" for i in (0, 1) for leaf in ("attn.qkv_proj", "mlp.down_proj")]
    first = outbox.write()
    assert first.frozen is not None and {place.name for place in first.places} == set(adapted)
    assert {p.name for part in first.parts() for p in part.places} == {name for name, _ in target.named_parameters()}
    assert all(len(part.checksums) == len(part.places) for part in first.parts())
    handed = pickle.dumps(first)
    frozen = first.frozen.nbytes
    del first
    inbox.read([pickle.loads(handed)])  # the sender has kept what it handed over
    for _ in range(2):
        with torch.no_grad():
            source.get_parameter("layers.1.mlp.down_proj.lora_B").normal_()
        later = outbox.write()
        assert (
            later.nbytes
            == store.put(later).num_bytes
            == 4 * sum(target.get_parameter(name).numel() for name in adapted)
        )
        assert later.nbytes + frozen >= 4 * sum(p.numel() for p in target.parameters()) > later.nbytes
        inbox.read([later])
        assert all(torch.equal(target.get_parameter(name), tensor) for name, tensor in merge(source).items())
    with pytest.raises(ModelError, match=r"receiving model has embed\.weight, for which no weights were sent"):
        Inbox(_model(2)).read([later])  # it has missed the first


def test_a_second_publication_copies_through_the_views_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = _model(1), _model(2)
    outbox, inbox = Outbox(source, transport=Transport.shared_memory), Inbox(target)
    inbox.read([outbox.write()])
    views = inbox._ready.pairs
    assert len(views) == len(list(target.parameters()))
    with torch.no_grad():
        source.embed.weight.mul_(2)
    inbox.read([pickle.loads(pickle.dumps(outbox.write()))])
    assert torch.equal(target.embed.weight, source.embed.weight)
    mapped, again = inbox._ready.pairs, pickle.loads(pickle.dumps(outbox.write()))
    assert mapped is not views, "this process had the buffer itself, another has a map of it"
    inbox.read([again])
    assert inbox._ready.pairs is mapped
    assert again.places is pickle.loads(pickle.dumps(again)).places, "known places are not compared one by one"
    target.embed.weight.data = torch.zeros_like(target.embed.weight)  # as a memory that was put to sleep comes back
    inbox.read([again])
    assert torch.equal(target.embed.weight, source.embed.weight)


def test_parameters_live_in_the_buffer_from_the_first_publication_on(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = _model(1), _model(2)
    outbox, inbox = Outbox(source, transport=Transport.shared_memory), Inbox(target)
    first = outbox.write()
    flat = first.buffer.flat()
    assert all(flat.data_ptr() <= p.data_ptr() < flat.data_ptr() + flat.nbytes for p in source.parameters())
    copied: list[int] = []
    monkeypatch.setattr("asystem.state.outbox.copy_all", lambda pairs: copied.append(len(pairs)))
    optimizer = torch.optim.AdamW(source.parameters(), lr=0.1)
    for _ in range(2):
        source(torch.tensor([1, 2]), torch.arange(2), _no_attention).square().sum().backward()
        optimizer.step()  # type: ignore[no-untyped-call]
        inbox.read([pickle.loads(pickle.dumps(outbox.write()))])
        assert all(torch.equal(target.get_parameter(name), p) for name, p in source.named_parameters())
    assert copied == [0, 0]


def test_a_parameter_that_moved_out_of_the_buffer_is_copied_into_it_again() -> None:
    source, target = _model(1), _model(2)
    outbox, inbox = Outbox(source, transport=Transport.shared_memory), Inbox(target)
    outbox.write()
    source.embed.weight.data = torch.ones_like(source.embed.weight)
    inbox.read([outbox.write()])
    assert bool((target.embed.weight == 1).all())
    half = Outbox(_model(), torch.bfloat16, transport=Transport.shared_memory)
    half.write()
    assert next(half.model.parameters()).dtype is torch.float32, "what is rounded on its way is copied"


def test_a_parameter_that_was_replaced_is_sent_and_one_that_moved_is_verified_where_it_is() -> None:
    source, target = _model(1), _model(2)
    outbox, inbox = Outbox(source, transport=Transport.shared_memory), Inbox(target)
    for _ in range(2):
        inbox.read([outbox.write()])
    source.get_submodule("layers.1.attn.o_proj").weight = torch.nn.Parameter(torch.full((16, 16), 3.0))
    source.norm.weight.data = torch.full((16,), 5.0)
    inbox.read([outbox.write()])
    assert bool((target.get_parameter("layers.1.attn.o_proj.weight") == 3).all())
    assert bool((target.norm.weight == 5).all())
    moved = {name: parameter.detach().clone() for name, parameter in target.named_parameters()}
    for name, parameter in target.named_parameters():
        parameter.data = moved[name]
    with torch.no_grad():
        source.norm.weight.fill_(7)
    inbox.read([outbox.write()])
    assert bool((moved["norm.weight"] == 7).all())
    source.layers[0] = _model(4).layers[0]  # a whole layer
    inbox.read([outbox.write()])
    assert all(torch.equal(p, source.get_parameter(name)) for name, p in target.named_parameters())


@pytest.mark.parametrize("shard", [None, Shard(1, 2)])
def test_sums_that_stand_ready_show_what_was_corrupted_later(
    shard: Shard | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = _model(1), _model(2) if shard is None else shard.cut(_model(2))
    outbox, inbox = Outbox(source, transport=Transport.shared_memory), Inbox(target)
    for _ in range(3):
        with torch.no_grad():
            source.embed.weight.add_(1)
        payload = outbox.write()
        inbox.read([payload])
    ledger = inbox._ready.ledger
    place = next(place for place in payload.places if place.name == "layers.1.attn.o_proj.weight")
    block = place.of(payload.buffer.flat())
    block[-1, -1] += 1  # after its checksum was taken
    with pytest.raises(PublicationError, match=r"layers\.1\.attn\.o_proj\.weight changed on its way from rank 0"):
        inbox.read([payload])
    again = outbox.write()  # the parameter lives there, so that this is what it is from now on
    assert again.checksums != payload.checksums
    inbox.read([again])
    assert ledger is not None and inbox._ready.ledger is ledger
    with torch.no_grad():
        source.embed.weight.add_(1)
    monkeypatch.setattr("asystem.state.inbox.copy_all", lambda pairs: None)
    with pytest.raises(PublicationError, match=r"embed\.weight is not what was sent: it was written wrongly"):
        inbox.read([outbox.write()])


def test_what_is_copied_on_its_way_is_verified_as_it_is_now() -> None:
    """Merged matrices and parameters of another dtype are made anew for each publication."""
    source, target = _model(1), _model(2).bfloat16()
    add_lora(source, LoraConfig(rank=2, targets=["q_proj"]), seed=0)
    outbox = Outbox(source, torch.bfloat16, transport=Transport.shared_memory)
    inboxes = [Inbox(target), Inbox(_model(3))]  # the second keeps float32
    for turn in range(3):
        with torch.no_grad():
            source.get_parameter("layers.1.attn.qkv_proj.lora_B").fill_(turn)
        payload = outbox.write()
        for inbox in inboxes:
            inbox.read([payload])
    for name, tensor in merge(source).items():
        for inbox in inboxes:
            found = inbox.model.get_parameter(name)
            assert torch.equal(found, tensor.bfloat16().to(found.dtype)), name
    place = payload.places[0]
    place.of(payload.buffer.flat())[0, 0] += 1
    for inbox in inboxes:
        with pytest.raises(PublicationError, match=r"layers\.0\.attn\.qkv_proj\.weight changed on its way from rank 0"):
            inbox.read([payload])


def _no_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q
