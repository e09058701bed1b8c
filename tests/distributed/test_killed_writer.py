"""A process that is killed while it writes checkpoints leaves the last good one, whenever it is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20


def test_a_kill_at_any_moment_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("killed_writer.py")), str(tmp_path), str(KILLS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    kills = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(kills) == KILLS
    for kill in kills:
        assert kill["found"] >= kill["good"]
        assert kill["values"] == [kill["found"]] and kill["step"] == kill["found"]
    assert sum("partial" in kill["left"] for kill in kills) >= 5, "too few were killed in the middle of writing"
    assert len(list(tmp_path.glob(".step-*"))) <= 3, "what killed writers leave is cleared away by the next"
