"""A model cut over ranks, looked at in one process: the parts make up the whole, wherever they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asystem.errors import ConfigError, ModelError, PublicationError
from asystem.models import Decoder, ModelSpec, MoESpec, Shard, check_parallel, init_weights, load_model, save_model
from asystem.state import Inbox, Outbox

MOE = MoESpec(6, 2, 8, 8, score="sigmoid", groups=3, top_groups=2, has_bias=True)
EXPERTS = ModelSpec("bailing_moe_v2", 23, 12, 20, 2, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, moe=MOE)
SPEC = ModelSpec("qwen2", 23, 12, 20, 2, num_heads=8, num_kv_heads=4, head_dim=6, qkv_bias=True)


# All parts that make up a model.
CUTS = {
    "halves": [Shard(rank, 2) for rank in range(2)],
    "spread": [Shard(0, 1, expert_rank=rank, expert_size=3) for rank in range(3)],
    "both": [Shard(rank % 2, 2, expert_rank=rank // 2, expert_size=3) for rank in range(6)],
}


def random_model(spec: ModelSpec = SPEC) -> Decoder:
    model = Decoder(spec)
    init_weights(model, 0, std=0.3)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.dim() == 1):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_a_layer_add_up_to_it(size: int) -> None:
    whole = random_model()
    parts = [Shard(rank, size).cut(whole) for rank in range(size)]
    block, pieces = whole.layers[1], [part.layers[1] for part in parts]
    x, (cos, sin) = torch.randn(5, 12), whole.rotary(torch.arange(5))
    heads = [block.project(x, cos, sin)] + [piece.project(x, cos, sin) for piece in pieces]
    for one, *others in zip(*heads, strict=True):  # q, k, v
        torch.testing.assert_close(torch.cat(others, 1), one)
    queries = heads[0][0].chunk(size, 1)
    summed = sum(piece.attn.o_proj(q.flatten(1)) for piece, q in zip(pieces, queries, strict=True))
    torch.testing.assert_close(summed, block.attn.o_proj(heads[0][0].flatten(1)))
    torch.testing.assert_close(sum(piece.mlp(x) for piece in pieces), block.mlp(x))
    assert all(torch.equal(part.embed.weight, whole.embed.weight) for part in parts)


def test_the_parts_of_a_mixture_add_up_to_it() -> None:
    whole, x = random_model(EXPERTS), torch.randn(5, 12)
    parts = [Shard(rank, 2).cut(whole).layers[1].mlp(x) for rank in range(2)]
    torch.testing.assert_close(sum(parts), whole.layers[1].mlp(x))


@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["dense", "experts"])
def test_a_folder_is_read_and_published_weights_are_taken_in_part(tmp_path: Path, spec: ModelSpec) -> None:
    whole = random_model(spec)
    save_model(whole, spec, tmp_path)
    payload = Outbox(whole).write()
    shards = CUTS["both"] if spec.moe is not None else CUTS["halves"]
    for shard in shards:
        assert shard.whole(shard.spec(spec)) == spec
        loaded, cut, sent = load_model(tmp_path, part=shard), shard.cut(whole), shard.cut(random_model(spec))
        with torch.no_grad():
            for parameter in sent.parameters():
                parameter.zero_()
        Inbox(sent).read([payload])
        for name, parameter in cut.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
            assert torch.equal(sent.get_parameter(name), parameter), name


@pytest.mark.parametrize(("spec", "kind"), [(SPEC, "halves"), *((EXPERTS, kind) for kind in CUTS)])
def test_what_cut_models_send_makes_up_the_whole_or_other_cuts(spec: ModelSpec, kind: str) -> None:
    whole, parts = random_model(spec), CUTS[kind]
    payloads = [Outbox(shard.cut(whole), rank=rank).write() for rank, shard in enumerate(parts)]
    found = Decoder(spec)
    Inbox(found).read(payloads)
    for name, parameter in whole.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    half = Shard(1, 2).cut(random_model(spec))
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.zero_()
    Inbox(half).read(payloads)
    for name, parameter in Shard(1, 2).cut(whole).named_parameters():
        assert torch.equal(half.get_parameter(name), parameter), name
    with pytest.raises(ModelError, match=r"no rank of training holds layers.*, which generation needs"):
        Inbox(found).read(payloads[1:])


def test_a_block_that_changed_on_the_way_is_named_with_its_rank() -> None:
    payloads = [Outbox(Shard(rank, 2).cut(random_model()), rank=rank).write() for rank in range(2)]
    inbox = Inbox(random_model())
    inbox.read(payloads)
    place = [place for place in payloads[1].places if place.name == "layers.0.attn.qkv_proj.weight"][2]  # v
    payloads[1].buffer.array[place.offset] ^= 1
    with pytest.raises(PublicationError, match=r"qkv_proj\.weight changed on its way from rank 1 of training"):
        inbox.read(payloads)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expert_parallel=4 does not divide the 6 experts: use 3"):
        Shard(0, 1, expert_size=4).spec(EXPERTS)
    with pytest.raises(ConfigError, match=r"expert_parallel=2 needs a model with experts; qwen2 has none: use 1"):
        Shard(0, 1, expert_size=2).spec(SPEC)
    olmoe = replace(EXPERTS, family="olmoe", moe=MoESpec(6, 2, 8), qk_norm_whole=True, num_heads=2)
    with pytest.raises(ConfigError, match=r"training\.tensor_parallel=2: olmoe norms all heads together"):
        check_parallel(olmoe, 2, "training.tensor_parallel")
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 does not divide the model's experts' width, 7: use 1"):
        Shard(0, 2).spec(replace(EXPERTS, moe=replace(MOE, intermediate_size=7)))
    with pytest.raises(ConfigError, match=r"tensor_parallel=3 does not divide the model's KV heads, 4: use 2"):
        Shard(0, 3).spec(SPEC)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=4 does not divide the model's intermediate_size, 18: use 2"
    ):
        Shard(0, 4).spec(replace(SPEC, intermediate_size=18))
