"""What a replay reads, and how it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asystem.controller.replay import differences, read_events
from asystem.errors import DataError


def _run(folder: Path, events: str, rows: list[dict[str, Any]] | None = None) -> Path:
    (folder / "rollouts").mkdir(parents=True)
    (folder / "rollouts" / "events.jsonl").write_text(events)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or []))
    return folder


def test_an_event_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", '{"event": "decode", "replica": 0, "lease": null}\n{"event": "dec')
    assert read_events(run) == [{"event": "decode", "replica": 0, "lease": None}]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", '{"event": "decode"}\nnonsense\n{"event": "evaluate"}\n')
    with pytest.raises(DataError, match=r"events\.jsonl, line 2: not JSON"):
        read_events(run)
    with pytest.raises(DataError, match=r"has no rollouts/events\.jsonl"):
        read_events(tmp_path)


def test_all_but_timings_is_compared(tmp_path: Path) -> None:
    row = {"step": 1, "train/loss": 0.5, "time/step": 1.0, "rollout/tokens_per_second": 7.0}
    other = row | {"time/step": 2.0, "rollout/tokens_per_second": 9.0}
    a, b = _run(tmp_path / "a", "", [row, row | {"step": 2}]), _run(tmp_path / "b", "", [other])
    assert differences(a, b) == (1, [])
    c = _run(tmp_path / "c", "", [other | {"train/loss": 0.25}])
    assert differences(a, c) == (1, ["step 1: train/loss 0.5 -> 0.25"])
