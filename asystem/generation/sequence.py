"""A rollout as the engine sees it: what was asked, what was drawn so far, and where it stands.

    WAITING ──admit──> RUNNING ──stop or length──> FINISHED
       ^  ^               │ │
       │  └──preempt──────┘ └──pause──> PAUSED ──resume──┐
       └─────────────────────────────────────────────────┘

A sequence that keeps its KV blocks while it waits (after a resume) joins without a prefill; one without blocks is
prefilled over its prompt and all it has generated, so that nothing is lost. A long prefill is cut into chunks, and the
sequence waits between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from asystem.types import Finish, SamplingParams, Trajectory


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sample of one prompt, with its tokens. `prompt` is the dataset row; `prompt_tokens` is kept as [P] int32."""

    rollout: int
    group: int
    prompt: int
    prompt_tokens: npt.NDArray[np.int32]
    params: SamplingParams

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_tokens", np.asarray(self.prompt_tokens, np.int32))


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A rollout taken out of an engine, to be continued in another one. The arrays are [T], its response so far."""

    request: EngineRequest
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


def _name(before: list[bytes], tokens: npt.NDArray[np.int32]) -> bytes:
    return blake2b(b"".join(before) + tokens.tobytes(), digest_size=16).digest()


def _empty_int() -> npt.NDArray[np.int32]:
    return np.empty(0, np.int32)


def _empty_float() -> npt.NDArray[np.float32]:
    return np.empty(0, np.float32)


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's record of a rollout.

    Attributes:
        order: place in the order of arrival; the newest is preempted first.
        blocks: its KV blocks in order of position, the first ones maybe shared with others.
        computed: tokens whose keys and values are in them, as of the last prefill or of leaving the running batch.
        outdated: some of them were computed with older weights than the present ones: nobody else may share them.
        tokens, logprobs, versions: [T], the response so far. While RUNNING the truth is in `rows.Rows`.
    """

    request: EngineRequest
    order: int
    state: State = State.WAITING
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    outdated: bool = False
    tokens: npt.NDArray[np.int32] = field(default_factory=_empty_int)
    logprobs: npt.NDArray[np.float32] = field(default_factory=_empty_float)
    versions: npt.NDArray[np.int32] = field(default_factory=_empty_int)
    _names: list[bytes] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def length(self) -> int:
        """Prompt and response tokens (as of the last time that it left the running batch)."""
        return self.prompt_length + len(self.tokens)

    @property
    def fresh(self) -> bool:
        """Nothing was generated yet: its next token comes from the prompt, as for its siblings."""
        return len(self.tokens) == 0

    def all_tokens(self) -> npt.NDArray[np.int32]:
        """Prompt and response: what a prefill after preemption computes."""
        return np.concatenate([self.request.prompt_tokens, self.tokens])

    def names(self, num_tokens: int, block_size: int) -> list[bytes]:
        """Names of the blocks that its first `num_tokens` tokens fill, the last one maybe in part.

        A name is a digest of all tokens up to the end of its block: equal names, equal keys and values.
        """
        full, rest = divmod(num_tokens, block_size)
        if rest or len(self._names) < full:
            tokens = self.all_tokens()
            for start in range(len(self._names) * block_size, full * block_size, block_size):
                self._names.append(_name(self._names[-1:], tokens[start : start + block_size]))
        names = self._names[:full]
        if rest:
            names.append(_name(names[-1:], tokens[full * block_size : num_tokens]))
        return names

    def unfinished(self) -> Unfinished:
        return Unfinished(self.request, self.tokens, self.logprobs, self.versions)

    def trajectory(self, finish: Finish) -> Trajectory:
        request = self.request
        return Trajectory(
            rollout=request.rollout,
            group=request.group,
            prompt=request.prompt,
            prompt_tokens=request.prompt_tokens,
            tokens=self.tokens,
            logprobs=self.logprobs,
            versions=self.versions,
            finish=finish,
        )
