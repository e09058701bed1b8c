"""The native generation engine: continuous batching over a paged KV cache, for rollouts of reinforcement learning.

One loop (`Engine.decode`): admit and prefill what fits into one batch, then draw tokens for each running sequence. It
stops after any step, so that a token budget cuts rollouts wherever they stand; they stay here, or are exported, and
continue exactly there. `scheduler` decides, `runner` computes, `rows` is the state between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from asystem.config import BudgetCounts, GenerationConfig, KVOnUpdate
from asystem.errors import ConfigError, DataError
from asystem.generation.blocks import BlockPool
from asystem.generation.cpu import CpuRunner, is_supported
from asystem.generation.kv_cache import KVCache, Memory
from asystem.generation.memory import MemoryPlan, card_capacity, plan_memory
from asystem.generation.routing import RoutingCache
from asystem.generation.rows import FINISH, RUNNING, Rows
from asystem.generation.runner import EagerRunner, Runner, StepContext
from asystem.generation.scheduler import Scheduler
from asystem.generation.sequence import EngineRequest, Sequence, State, Unfinished
from asystem.models.decoder import Decoder
from asystem.types import Trajectory


@dataclass(slots=True)
class Decoded:
    """What one call of `Engine.decode` did.

    Attributes:
        finished: rollouts that ended. generated: new response tokens, the first one after a prefill included.
        completed: tokens of the finished responses, whichever call drew them. steps: decode steps.
        prefilled: tokens of prompts (and of responses, where their KV was lost) computed before drawing.
    """

    finished: list[Trajectory] = field(default_factory=list)
    generated: int = 0
    completed: int = 0
    steps: int = 0
    prefilled: int = 0


class Engine:
    """Generates rollouts with a model whose parameters somebody else may change between two calls.

    Args:
        model: in its final dtype, on its device.
        stop_ids: tokens that end a response, unless its request ignores them; the token itself is kept.
        seed: of all sampling; equal seeds draw equal tokens for equal rollout numbers.
        max_length: prompt and response tokens of the longest sequence.
        device: default is the model's.
        memory: where the KV pool is to lie, as `KVCache` takes it.

    Raises:
        CapacityError: the KV pool does not hold one sequence of `max_length`, or does not fit on the GPU.
        ConfigError: a stop token beyond the vocabulary.
    """

    def __init__(
        self,
        model: Decoder,
        config: GenerationConfig,
        *,
        stop_ids: Collection[int],
        seed: int,
        max_length: int,
        device: torch.device | str | None = None,
        memory: Memory | None = None,
    ) -> None:
        spec, weight = model.spec, next(model.parameters())
        self.model, self.config, self.max_length, self.vocab_size = model, config, max_length, spec.vocab_size
        self.device = torch.device(device) if device is not None else weight.device
        beyond = [token for token in stop_ids if not 0 <= token < spec.vocab_size]
        if beyond:
            raise ConfigError(f"stop tokens {beyond} are beyond the model's vocabulary of {spec.vocab_size}")
        self.version = 0
        self._plan = _plan(model, config, max_length, self.device)
        pool = BlockPool(self._plan.num_blocks, config.block_size)
        self.cache = KVCache(
            spec.num_layers, pool.num_blocks, spec.num_kv_heads, config.block_size, spec.head_dim,
            weight.dtype, self.device, memory,
        )  # fmt: skip
        self.rows = Rows(
            config.max_running, max_length, pool.blocks_for(max_length), spec.vocab_size, seed, self.device
        )
        self.scheduler = Scheduler(pool, config.max_running, config.prefill_tokens)
        self.routing: RoutingCache | None = None
        if config.return_routing and spec.moe is not None:
            self.routing = RoutingCache(model, pool.num_blocks, config.block_size, self.device)
        self.runner = _runner(config, model, self.cache, self.rows, stop_ids, self.routing)
        self._arrivals = 0
        self._truncated = False  # some running sequence samples with top-k or top-p
        self._cut = False  # the last prefill batch left something to compute

    # --- rollouts in and out -------------------------------------------------------------------------------------

    def submit(self, requests: Iterable[EngineRequest]) -> None:
        """Queues rollouts. The samples of one group share their prompt's KV; adjacent, its computation too.

        Raises:
            DataError: an empty prompt, or a token beyond the vocabulary.
            ConfigError: a prompt and response longer than `max_length`, or no token to generate.
        """
        for request in requests:
            self._check(request)
            self._enqueue(Sequence(request, self._arrivals))

    def restore(self, unfinished: Iterable[Unfinished]) -> None:
        """Takes over rollouts that were exported, from this engine or another: they continue where they stood."""
        for u in unfinished:
            self._check(u.request)
            self._enqueue(
                Sequence(u.request, self._arrivals, tokens=u.tokens, logprobs=u.logprobs, versions=u.versions)
            )

    def export(self, rollouts: Collection[int] | None = None) -> list[Unfinished]:
        """Takes unfinished rollouts (default: all) out of the engine, in the order of their arrival."""
        return [sequence.unfinished() for sequence in self._take(rollouts)]

    def drop(self, rollouts: Collection[int]) -> list[int]:
        """Forgets these rollouts and frees their blocks; returns those that were unfinished here."""
        return [sequence.request.rollout for sequence in self._take(rollouts)]

    @property
    def num_unfinished(self) -> int:
        """Rollouts that are running, waiting or paused."""
        scheduler = self.scheduler
        return len(scheduler.waiting) + len(scheduler.running) + len(scheduler.paused)

    def pause(self) -> None:
        """Sets all unfinished rollouts aside with their KV. What is submitted from now on (evaluation) runs."""
        self._leave(range(len(self.scheduler.running)), State.PAUSED)
        for sequence in self.scheduler.waiting:
            sequence.state = State.PAUSED
        self.scheduler.paused += self.scheduler.waiting
        self.scheduler.waiting = []

    def resume(self) -> None:
        """Lets the paused rollouts go on where they stood."""
        paused, self.scheduler.paused = self.scheduler.paused, []
        for sequence in paused:
            self.scheduler.add(sequence)

    def weights_updated(self, version: int) -> None:
        """The model's parameters were changed in place: later tokens are stamped with `version`.

        With `generation.kv_on_update=keep` the KV of unfinished rollouts is kept, so their next tokens attend to keys
        and values of older weights, as in PipelineRL (Piché et al. 2025); with `recompute` prompt and response are
        prefilled again first. Either way, prompts that start later are computed with the new weights alone.
        """
        self.version = version
        if self.config.kv_on_update is KVOnUpdate.recompute:
            self._leave(range(len(self.scheduler.running)), State.WAITING)
        self.scheduler.outdate()
        if self.config.kv_on_update is KVOnUpdate.recompute:
            self.scheduler.free_idle()

    def rest(self) -> bool:
        """Before the memory of its KV pool is taken away until the next call: whether unfinished rollouts need what is
        in it. What nobody uses is forgotten; with `generation.kv_on_update=recompute`, what could be computed too."""
        if self.config.kv_on_update is KVOnUpdate.recompute:
            self._leave(range(len(self.scheduler.running)), State.WAITING)
            self.scheduler.free_idle()
        self.scheduler.pool.forget()
        self.runner.moved()
        return any(sequence.blocks for sequence in self.scheduler.unfinished)

    def plan(self) -> dict[str, int]:
        """Bytes that it takes at most: the model's weights, the KV pool, and what it computes with (workspace)."""
        return {"weights": self._plan.weights, "kv": self._plan.kv, "workspace": self._plan.workspace}

    # --- the loop ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(
        self,
        *,
        max_tokens: int | None = None,
        counts: BudgetCounts = BudgetCounts.generated,
        max_steps: int | None = None,
    ) -> Decoded:
        """Generates until nothing is left to do, or a budget is spent, whichever comes first.

        Sequences that were running wait for one prefill batch at most before their next step. Those that start together
        wait for each other, so that no step decodes a part of what could run.

        Args:
            max_tokens: stop after the step (a prefill or a decode step) in which this many tokens were counted; it is
                overshot by less than one token a running sequence, or by less than one response by `completed`.
            counts: what counts: new tokens, or the whole responses that end (`BudgetCounts`).
            max_steps: decode steps at most.
        """
        done, filling, due = Decoded(), not self.scheduler.running, True
        while (steps := self._steps_allowed(done, max_tokens, counts, max_steps)) > 0:
            if due and self._admit(done):
                due = filling or not self.scheduler.running
            elif self.scheduler.running:
                self._step(done, 1 if self._cut else steps)
                filling, due = False, True
            else:
                break
        return done

    def _steps_allowed(self, done: Decoded, max_tokens: int | None, counts: BudgetCounts, max_steps: int | None) -> int:
        """Decode steps that the runner may make unseen: no budget is reached before the last of them."""
        bounds = [min(self.runner.run_ahead, max(1, self.scheduler.most_steps))]
        if max_steps is not None:
            bounds.append(max_steps - done.steps)
        if max_tokens is not None and counts is BudgetCounts.generated:
            bounds.append(-(-(max_tokens - done.generated) // max(1, len(self.scheduler.running))))
        elif max_tokens is not None:
            bounds.append(min(1, max_tokens - done.completed))
        return min(bounds)

    def _admit(self, done: Decoded) -> bool:
        """Computes one batch of prompts and lets sequences join that are complete; False where there was neither."""
        first = len(self.scheduler.running)
        admission = self.scheduler.admit()
        self._cut = admission.cut
        sequences = admission.sequences
        if sequences:
            self.rows.join(first, sequences)
            self._look_at_params()
        if admission.prefills:
            self.runner.prefill(admission.prefills, self._context(steps=1))
            done.prefilled += admission.num_tokens
            self._collect(done, first + len(admission.ready))
        return bool(sequences or admission.prefills)

    def _step(self, done: Decoded, steps: int) -> None:
        self._grow(steps)
        self.runner.decode(steps, self._context(steps))
        # While the device works: the blocks that the next call would ask for, where nobody loses his by it.
        if self.runner.run_ahead > 1 and self.scheduler.has_room(2 * steps):
            self._grow(2 * steps)
        done.steps += steps
        self._collect(done, 0)

    def _grow(self, steps: int) -> None:
        short = True
        while short:
            growth = self.scheduler.reserve(steps)
            if growth.rows:
                self.rows.extend_tables(growth.rows, growth.places, growth.blocks)
            short = growth.short
            if short:
                (newest,) = self._leave([self.scheduler.newest], State.WAITING)
                self.scheduler.free(newest)

    def _context(self, steps: int) -> StepContext:
        num_rows = len(self.scheduler.running)
        longest = int(self.scheduler.lengths[:num_rows].max(initial=0)) + steps - 1
        return StepContext(num_rows, min(longest, self.max_length), self._truncated, self.version)

    def _collect(self, done: Decoded, first: int) -> None:
        """Looks at what rows from `first` on have drawn, and takes out those that ended."""
        running, lengths = self.scheduler.running, self.scheduler.lengths
        drawn, ended = self.rows.progress(first, len(running))
        prompts = self.scheduler.prompt_lengths[first : len(running)]
        new_lengths = prompts + drawn
        done.generated += int((new_lengths - lengths[first : len(running)]).sum())
        lengths[first : len(running)] = new_lengths
        rows = (np.flatnonzero(ended != RUNNING) + first).tolist()
        finishes = [FINISH[int(ended[row - first])] for row in rows]
        sequences = self._leave(rows, State.FINISHED)
        for sequence, finish in zip(sequences, finishes, strict=True):
            trajectory = sequence.trajectory(finish)
            if self.routing is not None:
                trajectory.routing = self.routing.read(sequence.blocks, sequence.length - 1)
            self.scheduler.free(sequence)
            done.finished.append(trajectory)
            done.completed += len(sequence.tokens)

    # --- bookkeeping ---------------------------------------------------------------------------------------------

    def _check(self, request: EngineRequest) -> None:
        tokens, new = request.prompt_tokens, request.params.max_new_tokens
        if len(tokens) == 0:
            raise DataError(f"prompt {request.prompt} is empty: a rollout needs at least one prompt token")
        beyond = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(beyond):
            raise DataError(
                f"prompt {request.prompt} has token {beyond[0]}, beyond the model's vocabulary of {self.vocab_size}: "
                "does the tokenizer belong to the model?"
            )
        if new < 1:
            raise ConfigError(f"max_new_tokens is {new}: a rollout generates at least 1 token")
        if len(tokens) + new > self.max_length:
            raise ConfigError(
                f"prompt {request.prompt} of {len(tokens)} tokens and {new} new ones exceed the engine's "
                f"max_length of {self.max_length}: shorten data.max_prompt_tokens or rollout.max_new_tokens"
            )

    def _enqueue(self, sequence: Sequence) -> None:
        self._arrivals += 1
        self.scheduler.add(sequence)

    def _take(self, rollouts: Collection[int] | None) -> list[Sequence]:
        """Removes unfinished sequences, whatever their state, with their responses on the host."""
        wanted = None if rollouts is None else set(rollouts)
        chosen = [s for s in self.scheduler.unfinished if wanted is None or s.request.rollout in wanted]
        picked = set(map(id, chosen))
        self._leave([row for row, s in enumerate(self.scheduler.running) if id(s) in picked], State.WAITING)
        self.scheduler.remove(chosen)
        return chosen

    def _leave(self, rows: Iterable[int], state: State) -> list[Sequence]:
        """Takes rows out of the running batch, their responses copied to the host, and files them under `state`."""
        chosen = list(rows)
        if not chosen:
            return []
        sequences = [self.scheduler.running[row] for row in chosen]
        for sequence, response in zip(sequences, self.rows.responses(chosen), strict=True):
            sequence.tokens, sequence.logprobs, sequence.versions = response
            sequence.state = state
            if state is not State.FINISHED:  # the rest of those lies in the cache too, but no prompt continues it
                sequence.computed = sequence.length - 1
        moves = self.scheduler.leave(chosen)
        if moves:
            self.rows.move(moves)
        for sequence in sequences:
            if state is State.WAITING:
                self.scheduler.add(sequence)
            elif state is State.PAUSED:
                self.scheduler.paused.append(sequence)
        self._look_at_params()
        return sequences

    def _look_at_params(self) -> None:
        params = (sequence.request.params for sequence in self.scheduler.running)
        self._truncated = any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params)


def _runner(
    config: GenerationConfig,
    model: Decoder,
    cache: KVCache,
    rows: Rows,
    stop_ids: Collection[int],
    routing: RoutingCache | None,
) -> Runner:
    """Captured decode steps where the device can run them, else eager ones."""
    exact_head = config.head_dtype == "float32"
    if config.graphs and rows.device.type == "cuda" and torch.cuda.get_device_capability(rows.device) >= (8, 0):
        from asystem.generation.captured import CapturedRunner  # needs Triton, which CPU builds of torch lack

        return CapturedRunner(model, cache, rows, stop_ids, exact_head=exact_head, routing=routing)
    if config.graphs and is_supported(model, cache.data.dtype, rows.device):
        return CpuRunner(model, cache, rows, stop_ids)
    return EagerRunner(model, cache, rows, stop_ids, exact_head=exact_head, routing=routing)


def _plan(model: Decoder, config: GenerationConfig, max_length: int, device: torch.device) -> MemoryPlan:
    """What this engine takes of its device, where the model stands already.

    Raises:
        CapacityError: it does not fit.
    """
    weights, capacity = sum(parameter.nbytes for parameter in model.parameters()), None
    if device.type == "cuda":
        capacity = card_capacity(device, config.memory_fraction) + weights
        if model.shard is not None:  # equal pools make equal decisions on all ranks
            capacity = model.shard.least(capacity, device)
    dtype = next(model.parameters()).dtype
    return plan_memory(
        model.spec, config, max_length=max_length, dtype=dtype, device=device.type, weights=weights, capacity=capacity
    )
