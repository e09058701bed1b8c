"""Checkpoints: resuming is bit-equal, and incomplete ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_helpers import make_engine, make_model, make_samples, weights

from asystem.config import Schedule
from asystem.data.packing import pack
from asystem.errors import CapacityError, ModelError
from asystem.training import supervised_loss
from asystem.training.checkpoint import MANIFEST, check_space, find_checkpoint, prune_checkpoints, recover

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


def _checkpoints(parent: Path, scores: dict[int, float | None]) -> None:
    for step, score in scores.items():
        (parent / f"step-{step:06d}").mkdir(parents=True)
        manifest = {"files": {}, "tensors": {}, "extra": {}, "score": score}
        (parent / f"step-{step:06d}" / MANIFEST).write_text(json.dumps(manifest))


def _steps(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_pruning_keeps_the_last_complete_ones(tmp_path: Path) -> None:
    _checkpoints(tmp_path, {1: None, 2: None, 10: None})
    (tmp_path / "step-000011").mkdir()  # without a manifest it is none of ours
    prune_checkpoints(tmp_path, keep_last=2)
    assert _steps(tmp_path) == ["step-000002", "step-000010", "step-000011"]


def test_pruning_keeps_the_best_ones_too(tmp_path: Path) -> None:
    _checkpoints(tmp_path, {1: -0.5, 2: 0.0, 3: None, 4: -0.5, 5: -3.0, 6: None})
    prune_checkpoints(tmp_path, keep_last=1, keep_best=2)
    assert _steps(tmp_path) == ["step-000002", "step-000004", "step-000006"]  # of equal scores the newer


def test_finding_a_checkpoint(tmp_path: Path) -> None:
    _checkpoints(tmp_path / "run" / "checkpoints", {9: 0.7, 10: 0.3, 11: None})
    (tmp_path / "run" / "checkpoints" / ".step-000012.partial").mkdir()
    assert find_checkpoint(tmp_path / "run").name == "step-000011"
    assert find_checkpoint(tmp_path / "run" / "checkpoints", best=True).name == "step-000009"
    assert find_checkpoint(tmp_path / "run" / "checkpoints" / "step-000010").name == "step-000010"
    with pytest.raises(ModelError, match="nowhere holds no complete checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    _checkpoints(tmp_path / "unscored", {1: None})
    with pytest.raises(ModelError, match="has a score: none was written right after an evaluation"):
        find_checkpoint(tmp_path / "unscored", best=True)


def test_what_a_killed_writer_left_is_put_into_order(tmp_path: Path) -> None:
    _checkpoints(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3})
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.old")  # killed while it was replaced
    (tmp_path / "step-000002").rename(tmp_path / ".step-000002.trash")  # while it was deleted
    (tmp_path / ".step-000003.old").mkdir()  # after the new one stood
    (tmp_path / ".step-000004.partial").mkdir()  # while it was written
    recover(tmp_path)
    assert _steps(tmp_path) == ["step-000001", "step-000003"]


def test_too_small_a_disk_is_refused_with_both_sizes(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there" / "yet", needed=1000, count=3)
    with pytest.raises(CapacityError, match=r"3 checkpoint\(s\) of 1.05e\+06 GiB do not fit .* GiB are free"):
        check_space(tmp_path / "not" / "there" / "yet", needed=2**50, count=3)
