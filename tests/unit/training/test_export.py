"""Exported folders: transformers loads them and computes what the trained model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_helpers import make_samples

from asystem.config import CheckpointConfig, LoraConfig, ModelConfig, TrainingConfig
from asystem.data.packing import pack
from asystem.data.tokenizer import byte_tokenizer
from asystem.errors import ModelError
from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights, load_model, save_model
from asystem.models.lora import LoraLinear
from asystem.training import Saver, TrainEngine, describe_model, export_checkpoint, supervised_loss
from asystem.training.checkpoint import Describe


def describe(spec: ModelSpec, path: Path | None = None, lora: LoraConfig | None = None) -> Describe:
    return describe_model(spec, byte_tokenizer(), ModelConfig(path=str(path) if path else None), lora or LoraConfig())


def trained(folder: Path, *, described: bool = True, **changes: object) -> Decoder:
    """A model after two steps, with a checkpoint of it."""
    spec = ModelSpec("qwen3", 259, 16, 24, 2, 4, 2, 4, qk_norm=True, **changes)  # type: ignore[arg-type]
    model = Decoder(spec)
    init_weights(model, 0, std=0.2)
    engine = TrainEngine(model, TrainingConfig(lr=1e-2), device="cpu", total_steps=10)
    for _ in range(2):
        engine.step(pack(make_samples([4, 9]), budget=100), supervised_loss)
    saver = Saver(engine, CheckpointConfig(), describe(spec) if described else None)
    saver.save(folder)
    saver.wait()
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_equal_logits(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = trained(tmp_path / "step-000002", tie_embeddings=tied)
    assert export_checkpoint(tmp_path / "step-000002", tmp_path / "out") == "float32"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "sort 4213: 1234<|im_end|>"
    tokens = torch.tensor(byte_tokenizer().encode(text))
    assert tokenizer.encode(text, add_special_tokens=False) == tokens.tolist()
    length = len(tokens)
    attend = PackedAttention(torch.tensor([0, length], dtype=torch.int32), length)
    with torch.no_grad():
        ours, expected = model.logits(model(tokens, torch.arange(length), attend)), theirs(tokens[None]).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_dtype_is_the_base_folders_unless_asked_otherwise(tmp_path: Path) -> None:
    model = trained(tmp_path / "step-000002", dtype="bfloat16")
    assert export_checkpoint(tmp_path / "step-000002", tmp_path / "half") == "bfloat16"
    assert export_checkpoint(tmp_path / "step-000002", tmp_path / "half", "float32") == "float32"  # replaces it
    whole = load_model(tmp_path / "half")
    assert export_checkpoint(tmp_path / "step-000002", tmp_path / "half", "bfloat16") == "bfloat16"
    half = load_model(tmp_path / "half", dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert torch.equal(whole.get_parameter(name), p), name
        assert torch.equal(half.get_parameter(name), p.to(torch.bfloat16)), name


def test_a_value_head_stays_behind(tmp_path: Path) -> None:
    spec = ModelSpec("qwen3", 259, 16, 24, 2, 4, 2, 4, qk_norm=True)
    engine = TrainEngine(Decoder(spec), TrainingConfig(), device="cpu", total_steps=10, value_head=True)
    init_weights(engine.model, 0)
    saver = Saver(engine, CheckpointConfig(), describe(spec))
    saver.save(tmp_path / "step-000001")
    saver.wait()
    export_checkpoint(tmp_path / "step-000001", tmp_path / "out")
    for name, p in load_model(tmp_path / "out").named_parameters():
        assert torch.equal(p, engine.model.get_parameter(name)), name


def test_what_cannot_be_exported_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    trained(tmp_path / "step-000001", described=False)
    with pytest.raises(ModelError, match=r"step-000001 does not describe its model"):
        export_checkpoint(tmp_path / "step-000001", tmp_path / "out")
    trained(tmp_path / "step-000002")
    shard = next((tmp_path / "step-000002").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"{shard.name} has \d+ of \d+ bytes"):
        export_checkpoint(tmp_path / "step-000002", tmp_path / "out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    trained(tmp_path / "step-000003")
    with pytest.raises(ModelError, match=r"it holds 1 other file\(s\), mine\.txt first"):
        export_checkpoint(tmp_path / "step-000003", tmp_path / "notes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", ["auto", "nf4"])
def test_adapters_are_merged_into_the_weights_beside_which_they_were_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    spec, lora = ModelSpec("qwen3", 259, 16, 24, 2, 4, 2, 4, qk_norm=True), LoraConfig(rank=4, alpha=8.0, base=kept)
    model = Decoder(spec)
    init_weights(model, 0, std=0.2)
    save_model(model, spec, tmp_path / "base", byte_tokenizer())
    (tmp_path / "latest").symlink_to("base")  # as a later run would move it
    engine = TrainEngine(model, TrainingConfig(lr=1e-2, lora=lora), device="cpu", total_steps=10)
    for _ in range(2):
        engine.step(pack(make_samples([4, 9]), budget=100), supervised_loss)
    for name, path in (("step-000001", tmp_path / "latest"), ("step-000002", None)):
        saver = Saver(engine, CheckpointConfig(keep_last=2), describe(spec, path, lora))
        saver.save(tmp_path / name)
        saver.wait()
    (tmp_path / "latest").unlink()
    monkeypatch.chdir("/")
    assert export_checkpoint(tmp_path / "step-000001", tmp_path / "out") == "float32"
    base = load_model(tmp_path / "base").state_dict()
    adapted = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    expected = base | {name: base[name] + layer.delta() for name, layer in adapted.items()}
    for name, p in load_model(tmp_path / "out").named_parameters():
        assert torch.equal(p, expected[name]), name
        assert torch.equal(p, base[name]) == ("_proj" not in name), name
    with pytest.raises(ModelError, match="step-000002 holds adapters to random weights"):
        export_checkpoint(tmp_path / "step-000002", tmp_path / "out")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"step-000001 holds adapters to .*base: .*config\.json does not exist"):
        export_checkpoint(tmp_path / "step-000001", tmp_path / "out")
