"""Hybrid placement on two ranks: shards that train, whole copies that decode, and each asleep while the other works."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run, metrics

from asystem.tracking import is_timing
from asystem.tracking.rollouts import read_rollouts

LOCKSTEP = ("rollout=sync", "rollout.capacity=64", "training.warmup.steps=2", "placement=hybrid")
TWO = ("runtime=ray", "training.ranks=2", "generation.ranks=2", "weights.probe_every=2", "placement.sleep=always")


def test_two_hybrid_ranks_learn_what_one_does(run: Run) -> None:
    one_dir, _ = run(*LOCKSTEP, "evaluation.prompts=17")
    two_dir, _ = run(*LOCKSTEP, *TWO, "evaluation.prompts=17")
    one, two = metrics(one_dir), metrics(two_dir)
    for a, b in zip(one, two, strict=True):
        same = {key: value for key, value in a.items() if not is_timing(key)}
        assert {key: value for key, value in b.items() if key in same} == pytest.approx(same, rel=1e-3, abs=1e-4)
    assert _tokens(one_dir) == _tokens(two_dir), "both decode the same rollouts, whichever rank does"
    assert two[-1]["mismatch/logprob_diff_max"] < 1e-4, "the copies are what the shards are"


def _tokens(run_dir: Path) -> dict[int, list[int]]:
    return {row["rollout"]: row["tokens"] for row in read_rollouts(run_dir / "rollouts")}
