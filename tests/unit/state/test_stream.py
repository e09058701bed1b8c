"""Weights sent in buckets over gloo, both sides at the same time: here each rank is a thread with its own end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from asystem.config import LoraConfig
from asystem.errors import AsystemError, ModelError, PublicationError
from asystem.models import Decoder, ModelSpec, Piece, Shard, add_lora, init_weights, merge, quantize
from asystem.state import StreamInbox, StreamOutbox, Terms
from asystem.state.parcels import Step, cut, rounds
from asystem.state.plan import Layout, plan_moves
from asystem.state.receiving import _Arriving

SPEC = ModelSpec("qwen3", 23, 16, 24, 2, 4, 2, 4, qk_norm=True, tie_embeddings=True)
TERMS = Terms(1, 1, torch.device("cpu"), seconds=20.0, bucket_bytes=8192)


def model_of(seed: int, spec: ModelSpec = SPEC) -> Decoder:
    model = Decoder(spec)
    init_weights(model, seed)
    return model


class Pair:
    """One sender and some receivers, each read in a thread of its own."""

    def __init__(self, source: Decoder, targets: list[Decoder], dtype: torch.dtype | None = None, **terms: Any) -> None:
        self.terms = replace(TERMS, receivers=len(targets), **terms)
        self.outbox = StreamOutbox(source, dtype, 1, 0, self.terms)
        self.inboxes = [StreamInbox(target, rank, self.terms) for rank, target in enumerate(targets)]

    def publish(self, reads: Callable[[StreamInbox, Any], None] | None = None) -> int:
        """Bytes of the publication; raises what a receiver raised."""
        announced, errors = self.outbox.write(), []

        def run(inbox: StreamInbox) -> None:
            try:
                (reads or (lambda inbox, payload: inbox.read([payload])))(inbox, announced)
            except AsystemError as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(inbox,)) for inbox in self.inboxes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        if errors:
            raise errors[0]
        self.outbox.settle()
        return announced.nbytes


@pytest.mark.parametrize("bucket_bytes", [4096, 1 << 20])
def test_publications_are_bit_equal_in_place_whatever_the_bucket(bucket_bytes: int) -> None:
    source, target = model_of(1), model_of(2)
    pair, places = Pair(source, [target], bucket_bytes=bucket_bytes), [p.data_ptr() for p in target.parameters()]
    for turn in range(3):
        with torch.no_grad():
            source.embed.weight.add_(turn)
        assert pair.publish() == 4 * sum(p.numel() for p in source.parameters())
        for name, p in target.named_parameters():
            assert torch.equal(p, source.get_parameter(name)), name
    assert [p.data_ptr() for p in target.parameters()] == places


def test_parts_of_a_model_and_a_replica_of_another_dtype_get_what_they_hold() -> None:
    source = model_of(1)
    halves = [Shard(rank, 2).cut(model_of(2)) for rank in range(2)]
    coarse, whole = quantize(model_of(3), torch.int8), model_of(4)
    Pair(source, [*halves, coarse, whole], torch.bfloat16).publish()
    half = model_of(1).bfloat16().float()
    for rank, target in enumerate(halves):
        for name, p in Shard(rank, 2).cut(half).named_parameters():
            assert torch.equal(target.get_parameter(name), p), name
    for name, p in quantize(model_of(1).bfloat16(), torch.int8).named_parameters():
        assert torch.equal(coarse.get_parameter(name), p.to(coarse.get_parameter(name).dtype)), name
    assert all(torch.equal(p, half.get_parameter(name)) for name, p in whole.named_parameters())


def test_under_adapters_the_rest_is_sent_once() -> None:
    source, target = model_of(1), model_of(2)
    add_lora(source, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), seed=0)
    pair = Pair(source, [target])
    names = [f"layers.{i}.{leaf}.weight" for i in (0, 1) for leaf in ("attn.qkv_proj", "mlp.down_proj")]
    adapted = sum(target.get_parameter(name).numel() for name in names)
    assert pair.publish() == 4 * sum(p.numel() for p in target.parameters())
    for _ in range(2):
        with torch.no_grad():
            source.get_parameter("layers.1.mlp.down_proj.lora_B").normal_()
        assert pair.publish() == 4 * adapted
        for name, tensor in merge(source).items():
            assert torch.equal(target.get_parameter(name), tensor), name


def test_a_bit_that_changes_on_the_way_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(model_of(1), [model_of(2)])
    pair.publish()
    unpack = _Arriving.unpack

    def corrupted(self: _Arriving, step: Step, views: Any) -> None:
        for move, block in step.moves:
            if move.name == "layers.1.attn.o_proj.weight":
                block.view(torch.int32)[-1, -1] ^= 1 << 7
        unpack(self, step, views)

    monkeypatch.setattr(_Arriving, "unpack", corrupted)
    with pytest.raises(PublicationError, match=r"layers\.1\.attn\.o_proj\.weight is not what training sent"):
        pair.publish()


def test_models_that_differ_are_refused_on_both_sides_and_nothing_hangs() -> None:
    target = model_of(2, replace(SPEC, intermediate_size=32))
    before = target.embed.weight.clone()
    pair, began = Pair(model_of(1), [target]), time.monotonic()
    with pytest.raises(ModelError, match=r"gate_up_proj\.weight was sent as \(48, 16\), the receiving model's is \(64"):
        pair.publish()
    with pytest.raises(PublicationError, match=r"gate_up_proj\.weight was sent as \(48, 16\)"):
        pair.outbox.write()
    assert torch.equal(target.embed.weight, before) and time.monotonic() - began < TERMS.seconds / 2


def test_who_does_not_come_is_named_by_all_who_waited_and_training_goes_on() -> None:
    pair = Pair(model_of(1), [model_of(2), model_of(3)], seconds=3.0)
    pair.publish()

    def only_first(inbox: StreamInbox, payload: Any) -> None:
        if inbox.rank == 0:
            inbox.read([payload])

    with pytest.raises(PublicationError, match=r"waited 3 s for generators rank 1 \(publication 1 from trainers to"):
        pair.publish(only_first)
    with pytest.raises(PublicationError, match="waited 3 s for generators rank 1"):
        pair.outbox.settle()
    assert torch.equal(pair.outbox.model.get_parameter("embed.weight"), model_of(1).embed.weight)


def test_who_is_lost_between_two_buckets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(model_of(1), [model_of(2)], seconds=3.0)
    pair.publish()

    def dies(*_: Any) -> None:
        raise PublicationError("killed here")

    monkeypatch.setattr("asystem.state.receiving._Arriving.unpack", dies)
    with pytest.raises(PublicationError, match="killed here"):
        pair.publish()
    with pytest.raises(PublicationError, match=r"trainers rank 0 lost generators rank 0|generators rank 0: killed"):
        pair.outbox.settle()


def test_parcels_hold_each_number_once_and_no_more_than_a_bucket() -> None:
    shapes = {"a": (100, 7), "b": (5,), "c": (3, 4, 6), "d": (1, 5000)}
    sides = [{name: Layout(shape, [Piece.whole(shape)]) for name, shape in shapes.items()}]
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    parcels = cut(plan_moves(sides, sides), dtypes, 512)
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for parcel in parcels:
        flat = torch.zeros(parcel.nbytes, dtype=torch.uint8)
        for move, block in parcel.blocks(flat):
            move.box.of(counts[move.name], (0,) * len(shapes[move.name])).add_(1)
            block.view(torch.int16).fill_(1)  # no two blocks share a byte
        assert not parcel.checksums(flat).any() and len(parcel.checksums(flat)) == len(parcel.moves)
        assert parcel.nbytes - 8 * len(parcel.moves) <= 512 or parcel.moves[0][0].name == "d"
    assert all(bool((count == 1).all()) for count in counts.values())
    assert [[peer for peer, _ in each] for each in rounds({3: parcels[:2], 1: parcels[:1]})] == [[1, 3], [3]]
