"""What travels between the controller and the workers.

Control and data are apart: the controller sees the small records (`RolloutRequest`, `FinishedRollout`, `DecodeReport`,
`Ref`), never a token array. `Trajectory` holds the arrays; it stays in the worker that made it, behind a `Ref`, until
the worker that needs it fetches it (`asystem.spmd.store`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from asystem.config import BudgetCounts

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ref(Generic[T]):
    """A handle to an object held by some worker. `spmd.store.put` makes one, `spmd.store.get` opens it."""

    handle: Any
    num_bytes: int = 0


class Finish(StrEnum):
    """Why a rollout ended."""

    STOP = "stop"  # the end token or a stop token was sampled
    LENGTH = "length"  # max_new_tokens were generated


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One sample of one prompt that the controller asks a generation replica for.

    Attributes:
        rollout: unique over the run (a prompt that is asked again gets a new number).
        group: unique over the run; the samples of one group share their prompt's KV blocks.
        prompt: row of the task's dataset; replicas hold the dataset, so that no text passes the controller.
    """

    rollout: int
    group: int
    prompt: int


@dataclass(slots=True)
class Trajectory:
    """A finished rollout with its arrays, each of length T (the response).

    Attributes:
        prompt_tokens: [P] int32. tokens: [T] int32, nothing is ever re-tokenized.
        logprobs: [T] float32, log-probability under the distribution each token was sampled from.
        versions: [T] int32, weight version that sampled each token.
        routing: [P + T - 1, layers with experts, top_k] uint8 (int16 beyond 256 experts), with
            `generation.return_routing`: the experts that computed each token of prompt and response, in no order, but
            for the last token, which nothing was computed for. Each is the choice of the forward pass that wrote the
            keys and values which the token has at the end: of the one that drew the next token from it, unless they
            were computed again (after preemption, export, or `kv_on_update: recompute`), and of a sibling's where they
            are shared.
    """

    rollout: int
    group: int
    prompt: int
    prompt_tokens: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    finish: Finish
    routing: npt.NDArray[np.uint8 | np.int16] | None = None


@dataclass(frozen=True, slots=True)
class FinishedRollout:
    """What the controller knows of a finished rollout: no arrays. Its trajectory is ``ref``'s list at ``row``."""

    rollout: int
    group: int
    prompt: int
    prompt_length: int
    length: int  # response tokens
    first_version: int
    last_version: int
    finish: Finish
    ref: Ref[list[Trajectory]]
    row: int


@dataclass(slots=True)
class DecodeReport:
    """What one slice of decoding did on one replica."""

    finished: list[FinishedRollout] = field(default_factory=list)
    generated: int = 0  # new response tokens, prefill not counted
    completed: int = 0  # tokens of the finished responses
    steps: int = 0  # decode steps
    unfinished: int = 0  # rollouts that the replica still holds, running or waiting
    version: int = 0
    seconds: float = 0.0

    def counted(self, counts: BudgetCounts) -> int:
        """What a token budget takes off for this slice."""
        return self.completed if counts is BudgetCounts.completed else self.generated


@dataclass(frozen=True, slots=True)
class Score:
    """A reward, or why there is none (``error``): such a rollout is masked and counted, never silently zero."""

    rollout: int
    reward: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One remote call on one rank, timed there. Wall-clock seconds since the epoch.

    Attributes:
        start, end: of the call itself; start hooks are calls named ``setup``.
        queue_seconds: between the controller's call and its start: waiting behind earlier calls, and on the way.
        peak_bytes: of memory that the rank had held by then: on its GPU, or without one of its process; 0 = not known.
    """

    group: str
    rank: int
    method: str
    start: float
    end: float
    host: str
    queue_seconds: float
    peak_bytes: int = 0
