"""The generation program: one engine a replica, driven slice by slice.

Where a replica has several ranks (`generation.tensor_parallel`), each runs the whole engine over its part of the model:
equal calls and equal sums make equal decisions and tokens, and the first rank's answer counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from asystem.config import Config
from asystem.data.task import Row, load_task
from asystem.errors import DataError, ModelError
from asystem.generation import Engine, EngineRequest
from asystem.models import Decoder
from asystem.rollout import drawn_length
from asystem.spmd import Collect, Dispatch, Worker, remote, store
from asystem.state import Published
from asystem.types import DecodeReport, FinishedRollout, Ref, RolloutRequest, SamplingParams, Trajectory
from asystem.workers.build import (
    build_inbox,
    build_model,
    build_tokenizer,
    pick_device,
    pick_dtype,
    pick_quantized,
    replica_part,
)

PROBE_PROMPTS, PROBE_TOKENS = 4, 16


class GenerateWorker(Worker):
    """Decodes rollouts. Holds the dataset, so that a request is three numbers."""

    collective = False

    def __init__(self, config: Config) -> None:
        self.config = config

    async def setup(self) -> None:
        device = pick_device(self.config)
        generation = self.config.generation
        part = replica_part(self.rank, self.world_size, generation.tensor_parallel)
        dtype, quantized = pick_dtype(generation.dtype, device), pick_quantized(generation.dtype, device)
        self.start_generation(build_model(self.config, device, dtype, part, quantized))

    def begin_generation(self) -> None:
        """Called before decoding: a hybrid worker wakes what it needs."""

    def start_generation(self, model: Decoder, memory: Callable[[int], Tensor] | None = None) -> None:
        """Builds the engine around a model, which a hybrid worker shares with training; ``memory`` of the KV pool."""
        config = self.config
        self.task = load_task(config.data, config.recipe_dir)
        self.tokenizer = build_tokenizer(config, model.spec.vocab_size)
        self.sampling = SamplingParams(
            config.rollout.max_new_tokens, config.rollout.temperature, config.rollout.top_k, config.rollout.top_p
        )
        self.engine = Engine(
            model,
            config.generation,
            stop_ids=self.tokenizer.eos_ids,
            seed=config.seed,
            max_length=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
            memory=memory,
        )
        self._inbox = build_inbox(config, model, pick_device(config), self.rank)

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def num_held_out(self) -> int:
        """Rows of the held-out dataset."""
        return len(self.task.evaluation)

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def decode(self, requests: Sequence[RolloutRequest], lease: int | None) -> DecodeReport:
        """Takes new requests and decodes a slice: at most `rollout.slice_steps` steps, or until the lease is spent."""
        started = time.perf_counter()
        self.begin_generation()
        self.engine.submit([self._request(self.task.train, one, self._sampling_of(one.rollout)) for one in requests])
        rollout = self.config.rollout
        decoded = self.engine.decode(max_tokens=lease, counts=rollout.budget_counts, max_steps=rollout.slice_steps)
        return DecodeReport(
            finished=self._answer(decoded.finished),
            generated=decoded.generated,
            completed=decoded.completed,
            steps=decoded.steps,
            unfinished=self.engine.num_unfinished,
            version=self.engine.version,
            seconds=time.perf_counter() - started,
        )

    @remote(Dispatch.BROADCAST)
    async def drop(self, rollouts: Sequence[int]) -> None:
        """Forgets purged rollouts and frees their KV blocks."""
        self.engine.drop(rollouts)

    @remote(Dispatch.SHARE, Collect.CONCAT)
    async def evaluate(self, rows: Sequence[int]) -> list[FinishedRollout]:
        """Answers held-out prompts under the present weights; rollouts in flight keep their KV and wait."""
        sampling = replace(self.sampling, temperature=self.config.evaluation.temperature, top_k=0, top_p=1.0)
        finished = self._aside(self.task.evaluation, rows, sampling)
        return self._answer(sorted(finished, key=lambda trajectory: trajectory.prompt))

    def probe(self) -> Ref[list[Trajectory]]:
        """A few short samples of the first training prompts under the present weights."""
        rows, new = range(min(PROBE_PROMPTS, len(self.task.train))), min(PROBE_TOKENS, self.sampling.max_new_tokens)
        return store.put(self._aside(self.task.train, rows, replace(self.sampling, max_new_tokens=new)))

    @remote(Dispatch.BROADCAST, Collect.FIRST)
    async def load_weights(
        self, weights: Sequence[Ref[Published]], version: int, probe: bool = False
    ) -> Ref[list[Trajectory]] | None:
        """Swaps the weights, of which each rank of training has sent a part, in place; tokens sampled from now on carry
        ``version``.

        Returns:
            with ``probe``, a few short samples under the new weights, for training to compare (`score_probe`).

        Raises:
            ModelError: the version goes backwards, or the weights do not fit the model.
            PublicationError: they are not those that were sent.
        """
        self.check_version(version)
        self._inbox.read(store.get_many(weights))
        self.engine.weights_updated(version)
        return self.probe() if probe else None

    def _aside(self, dataset: Sequence[Row], rows: Sequence[int], sampling: SamplingParams) -> list[Trajectory]:
        """Answers prompts while rollouts in flight keep their KV and wait."""
        self.begin_generation()
        requests = [RolloutRequest(rollout=-1 - row, group=-1 - row, prompt=row) for row in rows]
        self.engine.pause()
        self.engine.submit([self._request(dataset, request, sampling) for request in requests])
        finished = self.engine.decode().finished
        self.engine.resume()
        return finished

    def _sampling_of(self, rollout: int) -> SamplingParams:
        """How a rollout is sampled: as configured, but for a length that a study gives it."""
        lengths, longest, seed = self.config.rollout.lengths, self.sampling.max_new_tokens, self.config.seed
        if lengths.median is None:
            return self.sampling
        length = drawn_length(lengths.median, lengths.sigma, longest, seed=seed, rollout=rollout)
        return replace(self.sampling, max_new_tokens=length, ignore_eos=True)

    def check_version(self, version: int) -> None:
        """Refuses weights older than those that are loaded."""
        if version < self.engine.version:
            raise ModelError(
                f"training published weights of version {version}, and generators rank {self.rank} has version "
                f"{self.engine.version} already"
            )

    def _request(self, rows: Sequence[Row], request: RolloutRequest, sampling: SamplingParams) -> EngineRequest:
        tokens = self.tokenizer.encode_prompt(rows[request.prompt]["prompt"])
        limit = self.config.data.max_prompt_tokens
        if not 0 < len(tokens) <= limit:
            raise DataError(f"prompt {request.prompt} has {len(tokens)} tokens; data.max_prompt_tokens is {limit}")
        return EngineRequest(request.rollout, request.group, request.prompt, np.array(tokens, dtype=np.int32), sampling)

    def _answer(self, trajectories: list[Trajectory]) -> list[FinishedRollout]:
        """What goes back to the controller, which reads the answer of a replica's first rank alone."""
        return _publish(trajectories) if self.rank % self.config.generation.tensor_parallel == 0 else []


def _publish(trajectories: list[Trajectory]) -> list[FinishedRollout]:
    """Puts the arrays of one slice into the store, as one object, and describes them to the controller."""
    if not trajectories:
        return []
    ref = store.put(trajectories)
    return [
        FinishedRollout(
            rollout=t.rollout,
            group=t.group,
            prompt=t.prompt,
            prompt_length=len(t.prompt_tokens),
            length=len(t.tokens),
            first_version=int(t.versions.min()),
            last_version=int(t.versions.max()),
            finish=t.finish,
            ref=ref,
            row=row,
        )
        for row, t in enumerate(trajectories)
    ]
