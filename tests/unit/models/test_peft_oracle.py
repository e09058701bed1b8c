"""Adapter folders against PEFT's own: written here and opened there, and the other way round."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asystem.config import LoraConfig
from asystem.errors import ModelError
from asystem.models import (
    Decoder,
    ModelSpec,
    PackedAttention,
    adapter_state,
    add_lora,
    check_lora,
    init_weights,
    load_adapter,
    merge,
    save_adapter,
    save_model,
    to_hf_state,
)

# PEFT asks transformers for a name that transformers renames.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SPEC = ModelSpec("qwen3", 61, 24, 40, 2, 4, 2, 10, qk_norm=True, tie_embeddings=True)
TOKENS = torch.arange(12) * 7 % 61


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**({"rank": 4, "alpha": 12.0} | changes))


def make_model(cfg: LoraConfig, seed: int = 1) -> Decoder:
    """Random base of seed 0; adapters of ``seed`` that do something."""
    model = Decoder(SPEC)
    init_weights(model, 0, std=0.2)
    add_lora(model, cfg, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    attend = PackedAttention(torch.tensor([0, 12], dtype=torch.int32), 12)
    return model.logits(model(TOKENS, torch.arange(12), attend))


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=TOKENS[None]).logits[0]
    return result


@pytest.fixture
def base(tmp_path: Path) -> Path:
    plain = Decoder(SPEC)
    init_weights(plain, 0, std=0.2)
    save_model(plain, SPEC, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def their_base(base: Path) -> Any:
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj", "up_proj"]])
def test_peft_opens_what_is_saved_with_equal_logits(
    their_base: Any, base: Path, tmp_path: Path, targets: list[str] | None
) -> None:
    peft = pytest.importorskip("peft")
    cfg = config() if targets is None else config(targets=targets)
    model = make_model(cfg)
    save_adapter(adapter_state(model), cfg, tmp_path / "adapter", str(base))
    theirs = peft.PeftModel.from_pretrained(their_base, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), their_logits(theirs), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == str(base)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in to_hf_state(SPEC, merge(model)).items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-5, msg=name)


def test_what_peft_saved_is_loaded_with_equal_logits(their_base: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    cfg = config(targets=["k_proj", "o_proj", "gate_proj", "down_proj"])
    theirs = peft.get_peft_model(
        their_base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=cfg.targets, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "adapter")
    model = make_model(cfg)
    check_lora(SPEC, config(targets=cfg.targets, adapter=str(tmp_path / "adapter")))
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), their_logits(theirs), atol=1e-5, rtol=1e-5)


def test_saving_replaces_an_older_folder_whole(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_adapter(adapter_state(make_model(config(), seed)), config(), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    model = make_model(config(), 1)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), logits(make_model(config(), 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"r=4, but training\.lora\.rank=8"),
        ({"alpha": 4.0}, r"lora_alpha=12\.0, but training\.lora\.alpha=4"),
        ({"targets": ["q_proj"]}, r"target_modules=.*, but training\.lora\.targets=\['q_proj'\]"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_adapter(adapter_state(make_model(config())), config(), tmp_path)
    with pytest.raises(ModelError, match=message):
        check_lora(SPEC, config(**({"adapter": str(tmp_path)} | changes)))


def test_other_kinds_of_adapters_and_broken_folders_are_refused(tmp_path: Path) -> None:
    cfg = config(adapter=str(tmp_path))
    with pytest.raises(ModelError, match=r"adapter_config\.json does not exist; training\.lora\.adapter must be"):
        check_lora(SPEC, cfg)
    save_adapter(adapter_state(make_model(config())), config(), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"use_dora": True}))
    with pytest.raises(ModelError, match="use_dora=True is not supported; only use_dora=False is"):
        check_lora(SPEC, cfg)
    with pytest.raises(ModelError, match=r"has unexpected 16 of 12 tensors, base_model\.model\.model\.layers\.0\.mlp"):
        load_adapter(make_model(config(targets=["q_proj", "k_proj", "v_proj"])), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is truncated or corrupt"):
        load_adapter(make_model(LoraConfig(**asdict(config()))), tmp_path)
