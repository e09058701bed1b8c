from collections.abc import Iterator
from pathlib import Path

import pytest

from asystem.config import Config, PlacementConfig, RuntimeConfig, WandbMode
from asystem.spmd import make_runtime


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray cluster for a module's tests: runtimes made meanwhile join it, and leave it standing."""
    with make_runtime(RuntimeConfig(), PlacementConfig()):
        yield


TASK = """
def train(): return [{"prompt": "ab", "answer": "x"}, {"prompt": "cde", "answer": "y"}]
def evaluation(): return []
def demonstrations(): return []
def reward(row, response): return float(len(response) % 2)
"""


@pytest.fixture
def small_run(tmp_path: Path) -> Config:
    """A run of few seconds a step, without graphs and evaluation, in the folder `run`."""
    (tmp_path / "task.py").write_text(TASK)
    config = Config(recipe="small", recipe_dir=str(tmp_path), run_dir=str(tmp_path / "run"), device="cpu", steps=9)
    config.model.num_layers, config.model.hidden_size, config.model.intermediate_size = 1, 32, 64
    config.model.head_dim, config.generation.graphs = 8, False
    config.data.task, config.data.max_prompt_tokens = "task.py", 8
    config.rollout.max_new_tokens, config.rollout.capacity, config.algorithm.group_size = 4, 8, 4
    config.tracking.console = config.tracking.report = False
    config.tracking.wandb = WandbMode.disabled
    return config
