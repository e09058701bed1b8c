"""The reward program: texts out of trajectories, and the recipe's verifier on each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from asystem.config import Config
from asystem.data.task import Row, load_task
from asystem.data.tokenizer import load_tokenizer
from asystem.rewards import exact_match
from asystem.spmd import Dispatch, Worker, remote, store
from asystem.types import FinishedRollout, Score
from asystem.workers.build import tokenizer_path


class RewardWorker(Worker):
    """Scores finished rollouts. Stateless, so any rank may score any of them."""

    collective = False

    def __init__(self, config: Config) -> None:
        self.config = config

    async def setup(self) -> None:
        self.task = load_task(self.config.data, self.config.recipe_dir)
        self.tokenizer = load_tokenizer(tokenizer_path(self.config.model))
        self.reward = self.task.reward or exact_match

    @remote(Dispatch.ROUTE)
    async def score(self, rollouts: Sequence[FinishedRollout], held_out: bool = False) -> list[Score]:
        """One score a rollout, in order. A reward that raises or is not finite becomes a score with an error."""
        rows = self.task.evaluation if held_out else self.task.train
        responses = store.get_many([rollout.ref for rollout in rollouts])
        return [
            self._score(
                rollout.rollout, rows[rollout.prompt], self.tokenizer.decode(trajectories[rollout.row].tokens.tolist())
            )
            for rollout, trajectories in zip(rollouts, responses, strict=True)
        ]

    def _score(self, rollout: int, row: Row, response: str) -> Score:
        try:
            reward = float(self.reward(row, response))
        except Exception as error:  # the user's code may raise anything: the rollout is masked, the run goes on
            return Score(rollout, 0.0, f"{type(error).__name__}: {error}")
        if not math.isfinite(reward):
            return Score(rollout, 0.0, f"the reward was {reward}")
        return Score(rollout, reward)
