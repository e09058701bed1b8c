"""Whole runs over Ray, as a user starts and ends them: with the command, with Ctrl-C, with a killed rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Run, metrics

from asystem.tracking import is_timing
from asystem.training.checkpoint import read_manifest

ROOT = Path(__file__).resolve().parents[2]
LONG = ("steps=10000", "training.warmup.steps=0")


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = outside | {"PYTHONPATH": str(ROOT), "ASYSTEM_TEST": str(tmp_path), "OMP_NUM_THREADS": "1"}
    yield found
    for pid in left_over(found):  # of a test that failed: else they would slow down all others
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start(recipe: Path, environment: dict[str, str], *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "asystem", "train", "recipe=larger", "runtime=ray", *overrides]
    return subprocess.Popen(
        command,
        cwd=recipe.parent.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_as_from_a_terminal,
    )


def _as_from_a_terminal() -> None:
    """Ctrl-C counts, even where these tests run in the background of a shell, which has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def left_over(environment: dict[str, str]) -> dict[int, str]:
    """Processes of the test and their command lines, by the variable that it put into their environment."""
    mark = f"ASYSTEM_TEST={environment['ASYSTEM_TEST']}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return {pid: line for pid, line in found.items() if line}


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took longer than {seconds} s"
        time.sleep(0.2)


def steps_done(recipe: Path) -> int:
    path = recipe.parent.parent / "runs" / "larger" / "latest" / "metrics.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def summary(recipe: Path) -> dict[str, object]:
    path = recipe.parent.parent / "runs" / "larger" / "latest" / "summary.json"
    result: dict[str, object] = json.loads(path.read_text())
    return result


def test_ray_gives_the_metrics_of_inline_in_lockstep_though_two_trainers_share_each_layer(run: Run) -> None:
    overrides = ("rollout=sync", "rollout.capacity=64", "training.warmup.steps=2", "steps=3")
    inline_dir, _ = run(*overrides)
    ray_dir, _ = run(*overrides, "runtime=ray", "training.ranks=2", "training.tensor_parallel=2")
    for a, b in zip(metrics(inline_dir), metrics(ray_dir), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert is_timing(name) or a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    one, two = (sorted(path.name for path in (each / "rollouts").iterdir()) for each in (inline_dir, ray_dir))
    assert one == two, "ranks that have the same rows write them once"


def test_an_asynchronous_run_overlaps_repeats_and_leaves_nothing_behind(
    recipe: Path, environment: dict[str, str]
) -> None:
    options = ("steps=20", "rollout.max_staleness=2", "tracking.console=true", "training.warmup.steps=20")
    process = start(recipe, environment, *options)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "held-out accuracy" in out.splitlines()[-1]
    result = summary(recipe)
    assert result["status"] == "finished"
    assert result["steps"] == 20
    trace = json.loads((recipe.parent.parent / "runs" / "larger" / "latest" / "timeline.json").read_text())
    assert {e["name"] for e in trace["traceEvents"] if e["ph"] == "X"} >= {"decode", "update", "score", "load_weights"}
    wait_for(lambda: not left_over(environment), 15, "the end of Ray's processes")
    command = [sys.executable, "-m", "asystem", "replay", "runs/larger/latest"]
    repeated = subprocess.run(
        command, cwd=recipe.parent.parent, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert repeated.returncode == 0, repeated.stderr
    assert "all metrics of 21 steps are equal" in repeated.stdout.splitlines()[-1]


def test_ctrl_c_ends_everything_and_keeps_the_run(recipe: Path, environment: dict[str, str]) -> None:
    process = start(recipe, environment, *LONG)
    wait_for(lambda: steps_done(recipe) >= 2, 90, "the second step")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "asystem: interrupted"
    assert summary(recipe)["status"] == "interrupted"
    saved = err.splitlines()[-2].removeprefix("asystem: what was trained is in ")
    assert read_manifest(recipe.parent.parent / "runs" / "larger" / "latest" / saved)
    wait_for(lambda: not left_over(environment), 15, "the end of Ray's processes")


def test_a_killed_rank_ends_the_run_with_its_name(recipe: Path, environment: dict[str, str]) -> None:
    process = start(recipe, environment, *LONG)
    wait_for(lambda: steps_done(recipe) >= 2, 90, "the second step")
    trace = subprocess.run(
        ["pgrep", "-f", "ray::.*RankActor"], capture_output=True, text=True, check=False
    ).stdout.split()
    ours = [pid for pid in map(int, trace) if environment["ASYSTEM_TEST"] in environ_of(pid)]
    os.kill(ours[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    line = err.splitlines()[-1]
    assert line.startswith("asystem: error: ")
    assert "rank 0 on" in line
    assert line.split()[2] in ("trainers", "generators", "rewarders")
    assert summary(recipe)["status"] == "failed"


def environ_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
