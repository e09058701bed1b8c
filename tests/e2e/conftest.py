"""A task that a tiny model learns in seconds, and runs of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asystem.compose import load_config
from asystem.controller.run import train

TASK = '''
"""The larger of two digits; the teacher names the smaller one as often as not."""
import random

def _rows():
    return [{"prompt": f"{a}{b}=", "answer": str(max(a, b))} for a in range(10) for b in range(10) if a != b]

def evaluation():
    return _rows()[::5]

def train():
    return [row for i, row in enumerate(_rows()) if i % 5]

def demonstrations():
    draw = random.Random(0)
    return [{"prompt": row["prompt"], "response": draw.choice(row["prompt"][:2])} for row in train()]

def reward(row, response):
    return float(response == row["answer"])
'''

CONFIG = """
defaults:
  - override /rollout: async
  - override /runtime: inline
  - override /tracking: none
steps: 4
device: cpu
model: {hidden_size: 64, intermediate_size: 128, head_dim: 16}
data: {task: task.py, name: larger, max_prompt_tokens: 8}
rollout: {capacity: 64, token_budget: 96, max_new_tokens: 4, slice_steps: 2}
training: {lr: 1e-3, warmup: {steps: 40, lr: 3e-3}}
evaluation: {prompts: 18, temperature: 1.0}
tracking: {console: false}
"""

Run = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder recipes/larger in an empty working directory."""
    folder = tmp_path / "recipes" / "larger"
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(TASK)
    (folder / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def run(recipe: Path) -> Run:
    """Trains the recipe with overrides; returns the run's folder and its summary."""

    def go(*overrides: str) -> tuple[Path, dict[str, Any]]:
        summary = train(load_config(["recipe=larger", *overrides]))
        return (recipe.parent.parent / "runs" / "larger" / "latest").resolve(), summary

    return go


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
