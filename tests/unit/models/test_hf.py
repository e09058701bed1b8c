"""Folders written and read back, and every way in which one can be broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asystem.data.tokenizer import byte_tokenizer, load_tokenizer
from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, from_hf_state, init_weights, load_model, save_model, to_hf_state

SPEC = ModelSpec("qwen2", 259, 12, 20, 2, 3, 1, 4, qkv_bias=True, rope_theta=1e5)
TIED = replace(SPEC, family="qwen3", qkv_bias=False, qk_norm=True, tie_embeddings=True)
INDEX = "model.safetensors.index.json"


def random_model(spec: ModelSpec = SPEC) -> Decoder:
    model = Decoder(spec)
    init_weights(model, 0)
    with torch.no_grad():  # zeros and ones would hide a lost bias or norm
        for number, parameter in enumerate(p for p in model.parameters() if p.dim() == 1):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("spec", [SPEC, TIED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 4000, 1])
def test_round_trip_is_bit_equal(spec: ModelSpec, dtype: torch.dtype, shard_bytes: int, tmp_path: Path) -> None:
    model = random_model(spec).to(dtype)
    save_model(model, spec, tmp_path / "m", max_shard_bytes=shard_bytes)
    again = load_model(tmp_path / "m", dtype=dtype)
    assert again.spec == replace(spec, dtype=str(dtype).removeprefix("torch."))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    sizes = [file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors")]
    assert (len(sizes) == 1) == (shard_bytes == 10**9) == (not (tmp_path / "m" / INDEX).exists())


def test_fused_rows_stand_in_order() -> None:
    model = random_model()
    theirs = to_hf_state(SPEC, model.state_dict())
    attn, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    for kind in ("weight", "bias"):
        fused = getattr(model.layers[1].attn.qkv_proj, kind)
        assert torch.equal(torch.cat([theirs[f"{attn}{p}_proj.{kind}"] for p in "qkv"]), fused)
        assert [len(theirs[f"{attn}{p}_proj.{kind}"]) for p in "qkv"] == [12, 4, 4]
    fused = model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(torch.cat([theirs[f"{mlp}gate_proj.weight"], theirs[f"{mlp}up_proj.weight"]]), fused)
    assert theirs["model.embed_tokens.weight"].data_ptr() == model.embed.weight.data_ptr()  # views
    back = from_hf_state(SPEC, theirs)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_states_are_checked() -> None:
    state = dict(random_model().state_dict())
    theirs = to_hf_state(SPEC, state)
    with pytest.raises(ModelError, match=r"lacks 1 of .* norm\.weight"):
        to_hf_state(SPEC, {k: v for k, v in state.items() if k != "norm.weight"})
    with pytest.raises(ModelError, match=r"unexpected 1 of .* lora\.weight"):
        to_hf_state(SPEC, state | {"lora.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"norm\.weight has shape \[11\], the config asks for \[12\]"):
        from_hf_state(SPEC, theirs | {"model.norm.weight": torch.zeros(11)})
    with pytest.raises(ModelError, match=r"unexpected 1 of .* extra"):
        from_hf_state(SPEC, theirs | {"extra": torch.zeros(1)})


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_broken_tensors(tmp_path: Path) -> None:
    def broken(change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
        save_model(random_model(), SPEC, tmp_path / "m")
        rewrite(tmp_path / "m", change)
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / "m")

    q = "model.layers.0.self_attn.q_proj.weight"
    broken(lambda t: t.pop(q), "lacks 1 of .* tensors: " + q)
    broken(lambda t: t.update(more=torch.zeros(2)), "has unexpected 1 of .*: more")
    broken(lambda t: t.update({q: torch.zeros(12, 11)}), r"q_proj\.weight has shape \[12, 11\], .* \[12, 12\]")
    broken(lambda t: t.update({q: t[q].to(torch.int8)}), r"q_proj\.weight is stored as I8")


def test_broken_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_model(random_model(), SPEC, folder, max_shard_bytes=4000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for damaged in (content[:-5], content[:20], b"", b"\xff" * len(content)):
        shard.write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"{shard.name} \({len(damaged)} bytes\) is truncated or corrupt"):
            load_model(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of .* shards: {shard.name}"):
        load_model(folder)
    shard.write_bytes(min(folder.glob("*.safetensors")).read_bytes())
    with pytest.raises(ModelError, match=rf"{shard.name} lacks"):
        load_model(folder)
    for text in ("{", "{}", '{"weight_map": 3}', "[]"):
        (folder / INDEX).write_text(text)
        with pytest.raises(ModelError, match=r"index\.json cannot be read"):
            load_model(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_model(folder)


def test_tied_folder_with_a_head_of_its_own(tmp_path: Path) -> None:
    model = random_model(TIED)
    save_model(model, TIED, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_model(tmp_path).head_weight(), model.embed.weight)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ModelError, match=r"differs from the embedding.*tie_word_embeddings to false"):
        load_model(tmp_path)


def test_old_rotary_buffers_are_left_aside(tmp_path: Path) -> None:
    save_model(random_model(), SPEC, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert load_model(tmp_path).spec == SPEC


def test_a_model_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_model(random_model(), SPEC, folder, byte_tokenizer(), max_shard_bytes=4000)
    assert load_tokenizer(folder).eos_id == 258
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 258
    save_model(random_model(TIED).state_dict(), TIED, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]  # nothing temporary stays
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777


def test_what_is_no_model_s_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ModelError, match=r"holds 1 other file\(s\), thesis\.tex first"):
        save_model(random_model(), SPEC, tmp_path)
    with pytest.raises(ModelError, match="a file is there"):
        save_model(random_model(), SPEC, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_failed_save_leaves_the_old_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_model(random_model(), SPEC, folder)
    with pytest.raises(ModelError, match="lacks"):
        save_model({}, SPEC, folder)
    assert load_model(folder).spec == SPEC
