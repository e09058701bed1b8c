"""A model cut over ranks, looked at in one process: the parts make up the whole, wherever they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asystem.errors import ConfigError, ModelError
from asystem.models import Decoder, ModelSpec, Shard, init_weights, load_model, save_model
from asystem.state import Inbox, Outbox

SPEC = ModelSpec("qwen2", 23, 12, 20, 2, num_heads=8, num_kv_heads=4, head_dim=6, qkv_bias=True)


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


def test_a_folder_is_read_and_published_weights_are_taken_in_part(tmp_path: Path) -> None:
    whole = random_model()
    save_model(whole, SPEC, tmp_path)
    payload = Outbox(whole).write()
    for rank in range(2):
        shard = Shard(rank, 2)
        loaded, cut, sent = load_model(tmp_path, part=shard), shard.cut(whole), shard.cut(random_model())
        with torch.no_grad():
            for parameter in sent.parameters():
                parameter.zero_()
        Inbox(sent).read([payload])
        for name, parameter in cut.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
            assert torch.equal(sent.get_parameter(name), parameter), name
    with pytest.raises(
        ModelError, match=r"qkv_proj\.weight was sent as \(48, 12\), the receiving model's is \(96, 12\)"
    ):
        Inbox(Shard(0, 2).cut(whole)).read([Outbox(Shard(0, 2).cut(whole)).write()])


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel=3 does not divide the model's KV heads, 4: use 2"):
        Shard(0, 3).spec(SPEC)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=4 does not divide the model's intermediate_size, 18: use 2"
    ):
        Shard(0, 4).spec(replace(SPEC, intermediate_size=18))
