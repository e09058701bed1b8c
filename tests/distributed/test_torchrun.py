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


def torchrun(output: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{environment.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [
        subprocess.Popen(
            [*command, f"--node-rank={node}", str(PROGRAM), str(output), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
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
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASYSTEM_TEST", str(tmp_path))
    return tmp_path / "output.json"


def test_two_nodes_form_a_cluster_and_groups_are_spread_over_them(output: Path) -> None:
    nodes = torchrun(output)
    texts = finish(nodes, 120)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(texts)
    seen = json.loads(output.read_text())
    assert seen["sums"] == [[3.0, 3.0], [3.0, 3.0]]
    trainers, generators = seen["nodes"]
    assert len(set(trainers)) == len(set(generators)) == 1  # a group stays together
    assert trainers[0] != generators[0]
    assert ray_processes(output.parent) == []


def test_all_nodes_end_when_one_is_killed(output: Path) -> None:
    nodes = torchrun(output, "stay")
    try:
        end = time.monotonic() + 90
        while not output.exists() and time.monotonic() < end:
            time.sleep(0.2)
        os.kill(int((output.parent / "pid1").read_text()), signal.SIGKILL)
    finally:
        texts = finish(nodes, 90)
    assert all(node.returncode not in (0, None) for node in nodes), "\n".join(texts)
    assert "WorkerError" in texts[0]
    assert ray_processes(output.parent) == []
