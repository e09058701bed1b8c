"""Checkpoints beside training: what they hold, when they are complete, and what becomes of failures."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from training_helpers import make_engine, make_model, make_samples, weights

from asystem.config import CheckpointConfig
from asystem.data.packing import pack
from asystem.errors import CapacityError, TrainingError
from asystem.training import Saver, supervised_loss
from asystem.training.checkpoint import find_checkpoint, read_manifest, write_checkpoint

BATCH = pack(make_samples([4, 1, 9]), budget=12)


def test_training_goes_on_while_the_state_of_its_step_is_written(tmp_path: Path) -> None:
    engine = make_engine()
    engine.step(BATCH, supervised_loss)
    wanted = weights(engine.model)
    go_on = threading.Event()
    saver = Saver(engine, CheckpointConfig(), lambda folder: go_on.wait(10))
    saver.save(tmp_path / "step-000001", score=0.5)
    for _ in range(3):
        engine.step(BATCH, supervised_loss)  # while the writer stands still
    assert not (tmp_path / "step-000001").exists()
    go_on.set()
    saver.wait()
    saved = make_engine(make_model(seed=9))
    saved.load(tmp_path / "step-000001")
    assert saved.steps == 1
    assert read_manifest(tmp_path / "step-000001")["score"] == 0.5
    for name, value in weights(saved.model).items():
        assert torch.equal(value, wanted[name]), name
        assert not torch.equal(value, weights(engine.model)[name]), name


def test_the_disk_holds_what_is_to_be_kept(tmp_path: Path) -> None:
    engine = make_engine()
    saver = Saver(engine, CheckpointConfig(keep_last=1, keep_best=1))
    for step, score in enumerate((0.1, 0.9, 0.5, None), start=1):
        engine.step(BATCH, supervised_loss)
        saver.save(tmp_path / f"step-{step:06d}", score)
    saver.save(tmp_path / "step-000004", None)  # a run's last step is saved for itself and as the last one: once
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]
    assert find_checkpoint(tmp_path, best=True).name == "step-000002"


def test_a_write_that_fails_is_told_and_leaves_the_one_before(tmp_path: Path) -> None:
    engine = make_engine()
    saver = Saver(engine, CheckpointConfig())
    saver.save(tmp_path / "step-000001")
    saver.wait()
    saver.save(tmp_path / "step-000002")
    saver.wait()

    def lose_the_disk(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(engine, CheckpointConfig(), lose_the_disk)
    saver.save(tmp_path / "step-000003")
    with pytest.raises(TrainingError, match=r"step-000003 was not written: .*No space left on device"):
        saver.save(tmp_path / "step-000004")
    assert find_checkpoint(tmp_path).name == "step-000002"
    (tmp_path / ".step-000005.partial").write_text("a file where the folder should be")
    with pytest.raises(TrainingError, match=r"step-000005 was not written: rank 0: .*File exists"):
        write_checkpoint(tmp_path / "step-000005", *engine.state(), world_size=1)


def test_a_run_whose_checkpoints_do_not_fit_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    size = sum(held.num_bytes for held in engine.state()[0].values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3 * size - 1}))
    Saver(engine, CheckpointConfig(every=0, keep_last=2)).check_space(tmp_path)  # one, at the end
    with pytest.raises(CapacityError, match=r"3 checkpoint\(s\) of"):  # two are kept while a third is written
        Saver(engine, CheckpointConfig(every=5, keep_last=2)).check_space(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    Saver(engine, CheckpointConfig(at_end=False)).check_space(tmp_path)  # none is written
