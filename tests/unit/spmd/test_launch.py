"""The launch scripts pass overrides untouched; what they start is stood in for by programs that print it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OVERRIDES = ["recipe=quickstart", "data.name='two words'", "training.betas=[0.9, 0.95]", 'x="$HOME"']


@pytest.fixture
def path(tmp_path: Path) -> str:
    _program(tmp_path / "python", 'for word in "$@"; do printf "%s\\n" "$word"; done')
    _program(tmp_path / "scontrol", 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"')
    _program(tmp_path / "srun", 'shift; for rank in 0 1; do SLURM_PROCID=$rank "$@"; done')
    return f"{tmp_path}:{os.environ['PATH']}"


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _launch(script: str, path: str, **environment: str) -> list[str]:
    variables = {"PATH": path, "PYTHON": "python", "HOME": "/root", **environment}
    done = subprocess.run([ROOT / "launch" / script, *OVERRIDES], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_local(path: str) -> None:
    assert _launch("local.sh", path) == ["-m", "asystem", "train", *OVERRIDES]


def test_torchrun(path: str) -> None:
    words = _launch("torchrun.sh", path, NNODES="4", NODE_RANK="3", MASTER_ADDR="node7", MASTER_PORT="1234")
    assert words[-len(OVERRIDES) - 3 :] == ["-m", "asystem", "train", *OVERRIDES]
    assert words[:7] == [
        "-m", "torch.distributed.run", "--nnodes=4", "--node-rank=3", "--nproc-per-node=1",
        "--master-addr=node7", "--master-port=1234",
    ]  # fmt: skip


def test_slurm_starts_torchrun_once_a_node(path: str) -> None:
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "54321"}
    script = ROOT / "launch" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", script, *OVERRIDES],
        env={"PATH": path, "PYTHON": "python", "SLURM_SUBMIT_DIR": str(ROOT), **job},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert [word for word in words if word.startswith("--node-rank")] == ["--node-rank=0", "--node-rank=1"]
    assert words.count("--master-addr=node7") == words.count("--master-port=34321") == 2
    assert words[-len(OVERRIDES) :] == OVERRIDES
