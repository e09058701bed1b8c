"""Two torchrun processes on this machine, as two nodes of one Ray cluster, each with its own ports and folders."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("torchrun_program.py")
ROOT = PROGRAM.parents[2]


def start(command: list[str], **variables: str) -> list[subprocess.Popen[str]]:
    """One process a node, as two machines would have it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        variables["MASTER_PORT"] = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{environment.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    environment |= {"NNODES": "2", "PYTHON": sys.executable} | variables
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"NODE_RANK": str(node)},
        )
        for node in range(2)
    ]


def finish(nodes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    end, texts = time.monotonic() + seconds, []
    try:
        for node in nodes:
            texts.append(node.communicate(timeout=max(end - time.monotonic(), 1))[0])
    finally:
        for node in nodes:
            node.kill()
    return texts


def ray_processes(folder_of: Path) -> list[str]:
    """Command lines of Ray processes whose parent was one of the nodes' processes (their environment names it)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"ASYSTEM_TEST={folder_of}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASYSTEM_TEST", str(tmp_path))
    return tmp_path


def test_five_steps_with_generation_on_one_node_and_training_on_the_other(folder: Path) -> None:
    run = folder / "the run"
    overrides = ["recipe=quickstart", "placement.spread=true", "steps=5", "training.warmup.steps=2", "tracking=none"]
    overrides += ["tracking.timeline=true", "evaluation.prompts=16", "rollout.token_budget=200", f"run_dir='{run}'"]
    nodes = start([str(ROOT / "launch" / "torchrun.sh"), *overrides])
    texts = finish(nodes, 240)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(texts)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    names = _thread_names(run / "timeline.json")
    assert names["trainers"].endswith("(node 1)")
    assert names["generators"].endswith("(node 0)")
    assert ray_processes(folder) == []


def _thread_names(timeline: Path) -> dict[str, str]:
    events = json.loads(timeline.read_text())["traceEvents"]
    named = [event for event in events if event["ph"] == "M"]
    groups = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    return {groups[event["pid"]]: event["args"]["name"] for event in named if event["name"] == "thread_name"}


def test_all_nodes_end_when_one_is_killed(folder: Path) -> None:
    output = folder / "output.json"
    options = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    command = f'exec "$PYTHON" -m torch.distributed.run {" ".join(options)} '
    command += f'--master-port=$MASTER_PORT --node-rank=$NODE_RANK "{PROGRAM}" "{output}"'
    nodes = start(["sh", "-c", command])
    try:
        end = time.monotonic() + 120
        while not output.exists() and time.monotonic() < end:
            time.sleep(0.2)
        os.kill(int((folder / "pid1").read_text()), signal.SIGKILL)
    finally:
        texts = finish(nodes, 120)
    assert all(node.returncode not in (0, None) for node in nodes), "\n".join(texts)
    assert "WorkerError" in texts[0]
    seen = json.loads(output.read_text())
    assert seen["sums"] == [[3.0, 3.0], [3.0, 3.0]]
    trainers, generators = seen["nodes"]
    assert len(set(trainers)) == len(set(generators)) == 1  # a group stays together
    assert trainers[0] != generators[0]
    assert ray_processes(folder) == []
