"""`rollouts/`: what is written is what is read, and failures are heard of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from asystem.tracking.rollouts import RolloutWriter, read_rollouts, steps_written


def test_a_file_for_each_step_and_rank(tmp_path: Path) -> None:
    for rank in (1, 0):
        writer = RolloutWriter(tmp_path / "rollouts", rank)
        for step in (12, 3):
            writer.write(step, [{"rollout": 100 * step + rank, "tokens": [1, 2]}])
        writer.close()
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step-000003-rank0.jsonl",
        "step-000003-rank1.jsonl",
        "step-000012-rank0.jsonl",
        "step-000012-rank1.jsonl",
    ]
    assert steps_written(tmp_path) == [3, 12]
    assert [rollout["rollout"] for rollout in read_rollouts(tmp_path)] == [300, 301, 1200, 1201]
    assert next(iter(read_rollouts(tmp_path, [12]))) == {"step": 12, "rollout": 1200, "tokens": [1, 2]}


def test_floats_are_rounded_and_nan_is_null(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path, 0)
    writer.write(
        1, [{"reward": 0.1234567, "infer_logprobs": [-0.1000049, math.nan], "prompt_text": "3é\n", "mask": [1]}]
    )
    writer.flush()
    text = (tmp_path / "step-000001-rank0.jsonl").read_text()
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "step": 1,
        "reward": 0.12346,
        "infer_logprobs": [-0.1, None],
        "prompt_text": "3é\n",
        "mask": [1],
    }
    writer.close()
    writer.close()


def test_what_cannot_be_written_is_raised_by_the_next_call(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path, 0)
    writer.write(1, [{"tokens": object()}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.flush()
    with pytest.raises(TypeError):
        writer.write(2, [])


def test_a_line_cut_off_by_a_crash_ends_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    (folder / "step-000001-rank0.jsonl").write_text('{"rollout": 1}\n{"rollout": 2, "tok')
    (folder / "step-000002-rank0.jsonl").write_text('{"rollout": 3}\n')
    (folder / "notes.txt").write_text("not a rollout")
    assert [rollout["rollout"] for rollout in read_rollouts(tmp_path)] == [1, 3]


def test_no_folder_no_rollouts(tmp_path: Path) -> None:
    assert list(read_rollouts(tmp_path)) == [] and steps_written(tmp_path) == []
