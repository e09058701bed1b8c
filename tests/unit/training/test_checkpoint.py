"""Checkpoints: resuming is bit-equal, and incomplete ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_helpers import make_engine, make_model, make_samples, weights

from asystem.config import Schedule
from asystem.data.packing import pack
from asystem.errors import ModelError
from asystem.training import prune_checkpoints, supervised_loss
from asystem.training.checkpoint import MANIFEST

BATCH = pack(make_samples([4, 1, 9]), budget=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_after_loading_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    engine = make_engine(dtype=dtype, schedule=Schedule.cosine)
    for _ in range(3):
        engine.step(BATCH, supervised_loss)
    engine.save(tmp_path / "step-000003")
    expected = [engine.step(BATCH, supervised_loss).to_dict() for _ in range(2)]
    resumed = make_engine(make_model(seed=9), dtype=dtype)
    resumed.load(tmp_path / "step-000003")
    assert [resumed.step(BATCH, supervised_loss).to_dict() for _ in range(2)] == expected
    for name, value in weights(engine.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    engine = make_engine()
    engine.save(tmp_path / "step-000001")
    engine.step(BATCH, supervised_loss)
    engine.save(tmp_path / "step-000001")
    other = make_engine(make_model(seed=9))
    other.load(tmp_path / "step-000001")
    assert other.steps == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_truncated_and_missing_files_are_named_and_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    make_engine().save(folder)
    engine = make_engine(make_model(seed=9))
    before = weights(engine.model)
    shard = next(folder.glob("*.distcp"))
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    with pytest.raises(ModelError, match=rf"step-000001: {shard.name} has {size // 2} of {size} bytes"):
        engine.load(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name} is missing"):
        engine.load(folder)
    (folder / MANIFEST).write_text('{"files": ')
    with pytest.raises(ModelError, match=r"manifest\.json cannot be read"):
        engine.load(folder)
    with pytest.raises(ModelError, match="no complete checkpoint"):
        engine.load(tmp_path / "step-000002")
    assert all(torch.equal(value, before[name]) for name, value in weights(engine.model).items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    make_engine(make_model(tie_embeddings=False)).save(tmp_path / "untied")
    make_engine(make_model(tie_embeddings=True)).save(tmp_path / "tied")
    with pytest.raises(ModelError, match=r"has model\.head\.weight, which the model has not"):
        make_engine(make_model(tie_embeddings=True)).load(tmp_path / "untied")
    with pytest.raises(ModelError, match=r"has no model\.head\.weight"):
        make_engine(make_model(tie_embeddings=False)).load(tmp_path / "tied")
    manifest = json.loads((tmp_path / "tied" / MANIFEST).read_text())
    manifest["tensors"]["model.embed.weight"] = [99, 16]
    (tmp_path / "tied" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"model\.embed\.weight is \(99, 16\), the model's is \(23, 16\)"):
        make_engine().load(tmp_path / "tied")


def test_pruning_keeps_the_last_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / MANIFEST).write_text("{}")
    (tmp_path / "step-000011").mkdir()  # without a manifest it is none of ours
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010", "step-000011"]
