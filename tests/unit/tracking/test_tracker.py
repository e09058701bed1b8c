"""What a run's folder holds, on hand-made calls and metrics."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from asystem.config import Config, WandbMode
from asystem.errors import ConfigError
from asystem.tracking import Tracker, is_timing, new_run_dir
from asystem.tracking import tracker as tracker_module
from asystem.tracking.tracker import closing_line
from asystem.tracking.wandb_run import WandbRun, choose, has_key, is_installed
from asystem.types import CallRecord


@pytest.fixture
def config() -> Config:
    config = Config(recipe="demo", steps=12)
    config.tracking.wandb = WandbMode.disabled
    config.tracking.console = False
    return config


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def call(group: str, method: str, start: float, end: float, rank: int = 0) -> CallRecord:
    return CallRecord(group, rank, method, start, end, host="here", queue_seconds=0.0)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_step_version_time_and_sorted_metrics(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    tracker.log(3, 2, {"train/loss": 0.5, "reward/mean": 0.25})
    text = (tmp_path / "metrics.jsonl").read_text()  # before finish(): each line is flushed
    assert list(json.loads(text)) == ["step", "version", "time", "reward/mean", "time/step", "train/loss"]
    assert lines(tmp_path)[0]["step"] == 3
    assert lines(tmp_path)[0]["version"] == 2
    assert lines(tmp_path)[0]["reward/mean"] == 0.25


def test_nan_and_infinity_become_null(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    tracker.log(1, 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [row[name] for name in "abcd"] == [None, None, None, 1.5]


def test_times_are_means_over_ranks_since_the_last_line(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    for record in (
        call("trainers", "update", 10.0, 12.0, rank=0),
        call("trainers", "update", 10.0, 16.0, rank=1),
        call("generators", "decode", 10.0, 11.0),
        call("generators", "decode", 12.0, 13.5),
    ):
        tracker.call(record)
    tracker.log(1, 1, {"rollout/tokens": 1000})
    tracker.call(call("generators", "decode", 20.0, 20.25))
    tracker.log(2, 2, {})
    first, second = lines(tmp_path)
    assert first["time/trainers_update"] == 4.0
    assert first["time/generators_decode"] == 2.5
    assert first["train/tokens_per_second"] == 250.0
    assert second["time/generators_decode"] == 0.25
    assert "time/trainers_update" not in second
    assert "train/tokens_per_second" not in second


def test_publications_are_timed_and_peaks_kept(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    tracker.event("weights", version=1, bytes=3_000_000_000)
    for record in (
        call("trainers", "export_weights", 10.0, 11.0),
        call("generators", "load_weights", 11.0, 11.5, rank=0),
        call("generators", "load_weights", 11.0, 11.5, rank=1),
    ):
        tracker.call(replace(record, peak_bytes=2**30 * (record.rank + 1)))
    tracker.log(1, 1, {})
    tracker.call(replace(call("generators", "decode", 12.0, 13.0), peak_bytes=2**29))
    tracker.log(2, 2, {})
    first, second = lines(tmp_path)
    assert (first["sync/seconds"], first["sync/gigabytes_per_second"]) == (1.5, 2.0)
    assert "sync/seconds" not in second
    for row in (first, second):
        assert (row["memory/trainers_peak_gib"], row["memory/generators_peak_gib"]) == (1.0, 2.0)


def test_generated_tokens_per_second_count_from_the_last_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 101.0, 104.0, 105.0, 106.0, 106.0])
    monkeypatch.setattr(tracker_module.time, "time", lambda: next(now))
    tracker = Tracker(config, tmp_path)  # 100
    tracker.progress(tokens=400, phase="rollouts")  # 101
    tracker.log(1, 1, {})  # 104
    tracker.progress(tokens=500, phase="rollouts")  # 105
    tracker.log(2, 2, {})  # 106
    monkeypatch.undo()
    assert [row["rollout/tokens_per_second"] for row in lines(tmp_path)] == [100.0, 50.0]
    assert [row["time/step"] for row in lines(tmp_path)] == [4.0, 2.0]


def test_what_the_caller_measured_outranks_what_the_tracker_would_add(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    tracker.call(call("trainers", "update", 10.0, 12.0))
    tracker.log(1, 1, {"rollout/tokens": 10, "train/tokens_per_second": 7.0})
    assert lines(tmp_path)[0]["train/tokens_per_second"] == 7.0


@pytest.mark.parametrize(
    "name", ["time", "time/step", "rollout/tokens_per_second", "sync/seconds", "memory/trainers_peak_gib"]
)
def test_what_depends_on_the_clock(name: str) -> None:
    assert is_timing(name)


@pytest.mark.parametrize("name", ["step", "reward/mean", "rollout/tokens", "train/loss", "rollout/staleness_max"])
def test_what_does_not(name: str) -> None:
    assert not is_timing(name)


def test_summary_counts_what_was_logged(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    tracker.log(0, 0, {"eval/sort/accuracy": 0.25})
    tracker.progress(tokens=640, phase="rollouts")
    tracker.log(1, 1, {"eval/sort/accuracy": 0.75, "reward/mean": 0.5})
    tracker.call(call("generators", "decode", 10.0, 14.0))
    tracker.call(call("trainers", "update", 13.0, 15.0))
    summary = tracker.finish("failed", {"tokens_trained": 600, "note": math.nan})
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert {**stored, "wall_seconds": 0, "overlap": 0} == {
        "status": "failed",
        "recipe": "demo",
        "steps": 1,
        "wall_seconds": 0,
        "eval_first": 0.25,
        "eval_last": 0.75,
        "tokens_generated": 640,
        "tokens_trained": 600,
        "note": None,
        "overlap": 0,
    }
    assert stored["overlap"]["generation_training"] == 0.5
    assert summary["wall_seconds"] == stored["wall_seconds"] > 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "timeline.json").is_file()


def test_the_accuracy_of_several_tasks_is_their_mean(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    tracker.log(0, 0, {"eval/sort/accuracy": 0.25, "eval/add/accuracy": 0.0})
    tracker.log(1, 1, {"eval/sort/accuracy": 1.0, "eval/add/accuracy": 0.5})
    summary = tracker.finish("finished", {})
    assert (summary["eval_first"], summary["eval_last"]) == (0.125, 0.75)


def test_the_closing_line_names_the_page_as_seen_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = {"eval_first": 0.25, "eval_last": 0.5, "status": "finished", "steps": 3, "wall_seconds": 1.25}
    summary |= {"tokens_generated": 4321, "overlap": {"generation_training": 0.5, "generation_reward": None}}
    page = tmp_path / "runs" / "report.html"
    assert str(page) in closing_line("r", summary, page)
    monkeypatch.chdir(tmp_path)
    assert closing_line("r", summary, page) == (
        "r finished: held-out accuracy 0.250 -> 0.500, 3 steps, 1.2 s, 4,321 tokens generated, "
        "overlap generation/training 50%; runs/report.html"
    )


def test_finish_is_idempotent(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    first = tracker.finish("interrupted", {"steps": 0})
    assert tracker.finish("finished", {"steps": 9}) == first
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"


def test_the_configuration_is_plain_yaml(config: Config, tmp_path: Path) -> None:
    Tracker(config, tmp_path)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["recipe"] == "demo"
    assert stored["tracking"]["wandb"] == "disabled"
    assert stored["training"]["betas"] == [0.9, 0.999]
    assert stored["rollout"]["token_budget"] is None


def test_neither_timeline_nor_report_unless_wanted(config: Config, tmp_path: Path) -> None:
    config.tracking.timeline = config.tracking.report = False
    Tracker(config, tmp_path).finish("finished", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "rollouts",
        "summary.json",
    ]


def test_a_report_that_fails_hides_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run_dir: Path) -> Path:
        raise ValueError("no ink")

    monkeypatch.setattr(tracker_module, "write_report", broken)
    assert Tracker(config, tmp_path).finish("finished", {})["status"] == "finished"
    assert "report.html was not written: ValueError('no ink')" in capsys.readouterr().err


def test_lines_of_a_console_that_is_no_terminal(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.tracking.console = True
    tracker = Tracker(config, tmp_path)
    tracker.log(7, 7, {"reward/mean": 0.5, "eval/sort/accuracy": 0.75, "train/grad_norm": math.nan})
    tracker.call(call("generators", "decode", 10.0, 14.0))
    tracker.call(call("trainers", "update", 13.0, 15.0))
    tracker.finish("finished", {"wall_seconds": 61.26, "tokens_generated": 12345, "eval_first": 0.25})
    title, step, end = capsys.readouterr().out.splitlines()
    assert title == f"demo: 12 steps, run folder {tmp_path}"
    assert step.startswith("step  7/12  accuracy 0.750  reward 0.500  seconds ")
    assert end == (
        "demo finished: held-out accuracy 0.250 -> 0.750, 7 steps, 61.3 s, 12,345 tokens generated, "
        f"overlap generation/training 50%; {tmp_path / 'report.html'}"
    )


class Terminal(io.StringIO):
    """A standard output on which rich draws."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_the_newest_figures(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.tracking.console = True
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker(config, tmp_path)
    tracker.log(3, 3, {"reward/mean": 0.5, "eval/sort/accuracy": 0.75})
    tracker.progress(tokens=100, phase="rollouts [1]", in_flight=64)  # brackets are text, not markup
    deadline = time.monotonic() + 30  # it draws ten times a second
    while "rollouts [1], 64 in flight" not in terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "rollouts [1], 64 in flight" in terminal.getvalue()
    tracker.finish("interrupted", {})
    shown = terminal.getvalue()
    assert f"demo: 12 steps, run folder {tmp_path}" in re.sub(r"\n", "", shown)
    assert re.search(r" 3/12 .*accuracy 0\.750  reward 0\.500", shown)
    assert "demo interrupted: held-out accuracy 0.750 -> 0.750, 3 steps" in shown.splitlines()[-1]


def test_the_timeline_follows_rewards_and_rollouts_in_flight(config: Config, tmp_path: Path) -> None:
    tracker = Tracker(config, tmp_path)
    tracker.progress(tokens=10, phase="rollouts", in_flight=48)
    tracker.log(1, 1, {"reward/mean": 0.5})
    tracker.log(2, 2, {"reward/mean": math.nan})
    tracker.finish("finished", {})
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    counters = [(event["name"], event["args"]["value"]) for event in events if event["ph"] == "C"]
    assert counters == [("rollouts in flight", 48), ("reward/mean", 0.5)]


def test_folders_of_one_second_differ_and_latest_moves(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "runs" / "demo" / "latest"
    folders = []
    for _ in range(3):
        folders.append(new_run_dir(config))
        assert link.resolve() == folders[-1]
    assert len(set(folders)) == 3
    assert all(folder.is_absolute() and folder.is_dir() for folder in folders)
    assert not Path(link.readlink()).is_absolute()
    assert len(list(link.parent.iterdir())) == 4


def test_a_folder_of_ones_own_is_never_written_twice(config: Config, tmp_path: Path) -> None:
    config.run_dir = str(tmp_path / "mine")
    run_dir = new_run_dir(config)
    Tracker(config, run_dir).log(1, 1, {})
    with pytest.raises(ConfigError, match="mine holds a run already"):
        new_run_dir(config)
    assert len(lines(run_dir)) == 1


OFFLINE_RUN = """
import sys
from dataclasses import replace
from pathlib import Path

def report(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and not isinstance(args[1], str)):
        sys.stderr.write(f"network: {event} {args}")  # a path is a Unix socket, to W&B's own process

sys.addaudithook(report)
from asystem.config import Config, WandbMode
from asystem.tracking import Tracker

for mode in WandbMode.disabled, WandbMode.auto:
    config = Config(recipe="demo")
    config.tracking.wandb, config.tracking.console = mode, False
    tracker = Tracker(config, Path(sys.argv[1], mode.value))
    tracker.log(1, 1, {"reward/mean": 0.125})
    tracker.finish("finished", {})
    sys.stdout.write(f"{sorted({'wandb', 'torch', 'ray'} & set(sys.modules))}")
"""


def test_wandb_writes_its_file_offline_without_a_key_or_network(tmp_path: Path) -> None:
    # A process of its own: W&B's sends what it has to send, and closes its file, when the process ends.
    run = subprocess.run([sys.executable, "-c", OFFLINE_RUN, tmp_path], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert run.stdout == "[]['wandb']"
    assert not (tmp_path / "disabled" / "wandb").exists()
    (stored,) = (tmp_path / "auto" / "wandb").glob("offline-run-*/run-*.wandb")
    data = stored.read_bytes()
    assert data[:4] == b":W&B"
    assert b"reward/mean" in data and b"0.125" in data and b"icepop_alpha" in data


def test_wandb_missing_is_refused_only_where_it_was_asked_for(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    assert not is_installed()
    config.tracking.wandb = WandbMode.offline
    with pytest.raises(ConfigError, match=r"tracking\.wandb=offline needs W&B: pip install wandb"):
        new_run_dir(config)
    assert list(tmp_path.iterdir()) == []
    config.tracking.wandb = WandbMode.auto
    Tracker(config, tmp_path).finish("finished", {})
    assert capsys.readouterr().err.splitlines() == [
        "W&B not installed, metrics stay in metrics.jsonl (pip install wandb, or set tracking=none)"
    ]


def test_wandb_online_needs_a_key(config: Config) -> None:
    config.tracking.wandb = WandbMode.online
    with pytest.raises(ConfigError, match="needs a key: set WANDB_API_KEY"):
        new_run_dir(config)


def test_keys_stand_in_the_environment_or_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_key() and choose(WandbMode.auto) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key() and choose(WandbMode.auto) == "online"
    (tmp_path / "netrc").write_text("machine api.forge.coreweave.com login user password secret\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example.org:8080")
    assert not has_key()
    (tmp_path / "netrc").write_text("machine wandb.example.org:8080 login user password secret\n")
    assert has_key()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose(WandbMode.auto) == "disabled" and choose(WandbMode.online) == "online"


def test_wandb_that_fails_in_the_middle_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        calls = 0

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.calls += 1
            raise OSError("no space\nleft")

    run, broken = WandbRun(WandbMode.disabled, tmp_path, recipe="demo", project="p", config={}), Broken()
    run._run = broken
    run.log(1, {"a": 1.0})
    run.log(2, {"a": 1.0})
    run.finish({}, failed=False)
    assert broken.calls == 1
    assert capsys.readouterr().err == "W&B failed, the run goes on without it: no space left\n"
