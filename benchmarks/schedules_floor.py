"""What the arithmetic of a schedule allows on W2: the real pool, with rollouts that only count their tokens.

A decode step of n rows with c cached tokens takes ``fixed + row n + token c`` seconds, training a token ``trained``.
The constants are a device's; everything else is `asystem.rollout`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from curves import table, write_table
from schedules_page import PAGE
from schedules_runs import GPU, Schedule, Workload

from asystem.rollout import Pool, PromptOrder, TokenBudget, Window, drawn_length
from asystem.types import Finish, FinishedRollout, Ref, RolloutRequest


@dataclass(frozen=True)
class Device:
    """Seconds. ``trained`` is a token's, of prompt or response, forward and backward."""

    name: str
    fixed: float
    row: float
    token: float
    trained: float


# An H200, 4.2 TB/s and 790 TFLOP/s. fixed: 1.19 GB of weights, and some 250 kernels (0.77 ms were seen with one row);
# row: 1.2 GFLOP at 60 %; token: 114,688 bytes of keys and values; trained: 115,000 tokens/s.
H200 = Device("H200", 0.8e-3, 2.5e-6, 114_688 / 4.2e12, 1 / 115_000)


@dataclass
class Decoding:
    """One replica of so many rows: its clock, and what stands in it."""

    device: Device
    workload: Workload
    clock: float = 0.0
    steps: int = 0
    running: dict[int, tuple[RolloutRequest, int, int]] = field(default_factory=dict)  # request, first step, length

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        w = self.workload
        for one in requests:
            length = drawn_length(w.median, 1.0, w.longest, seed=0, rollout=one.rollout)
            self.running[one.rollout] = (one, self.steps, length)

    def step(self) -> list[FinishedRollout]:
        """One decode step; the samples of a group read their prompt once."""
        rows, device = len(self.running), self.device
        cached = sum(self.steps - first for _, first, _ in self.running.values())
        cached += rows * self.workload.prompt_tokens // self.workload.samples
        self.clock += device.fixed + device.row * rows + device.token * cached
        self.steps += 1
        done = [r for r, (_, first, length) in self.running.items() if self.steps - first == length]
        return [self._finished(*self.running.pop(r)) for r in done]

    def _finished(self, request: RolloutRequest, first: int, length: int) -> FinishedRollout:
        prompt, tokens = request.prompt, self.workload.prompt_tokens
        return FinishedRollout(
            request.rollout, request.group, prompt, tokens, length, first, self.steps, Finish.LENGTH, Ref(None), 0
        )


def window(pool: Pool, decoding: Decoding, tokens: int | None, slice_steps: int) -> tuple[Window, int]:
    """One rollout window, as the controller drives it; returns what it hands over and what it generated."""
    budget = TokenBudget(tokens)
    while not budget.exhausted:
        decoding.submit(pool.ask(0))
        if not decoding.running:
            break
        lease, spent, done = budget.lease(1), 0, []
        for _ in range(slice_steps):
            if not decoding.running or (lease is not None and spent >= lease):
                break
            spent += len(decoding.running)
            done += decoding.step()
        budget.settle(lease, spent)
        pool.finish(done)
    closed = pool.close_window()
    for rollouts in closed.to_drop().values():
        for rollout in rollouts:
            del decoding.running[rollout]
    return closed, budget.spent


def simulate(
    schedule: Schedule, workload: Workload, device: Device, skip: int = 10, count: int = 20
) -> dict[str, float]:
    """Generation and training in turn; figures as `schedules_runs.speed_figures` has them, means of windows."""
    pool = Pool(
        PromptOrder(4096, seed=0),
        group_size=workload.samples,
        capacity=workload.capacity,
        retention=schedule.sigma,
        refill=schedule.budget,
    )
    decoding, seconds, steps = Decoding(device, workload), [], []
    generated, trained, prompts = [], [], []
    for _ in range(skip + count):
        before = decoding.clock, decoding.steps
        closed, spent = window(pool, decoding, workload.budget if schedule.budget else None, 32)
        seconds.append(decoding.clock - before[0])
        steps.append(decoding.steps - before[1])
        generated.append(spent)
        trained.append(sum(rollout.length for group in closed.groups for rollout in group.finished))
        prompts.append(len(closed.groups) * workload.samples * workload.prompt_tokens)
    seconds, steps, generated, trained, prompts = (x[skip:] for x in (seconds, steps, generated, trained, prompts))
    training = (sum(trained) + sum(prompts)) * device.trained
    return {
        "decode_steps": statistics.fmean(steps),
        "window_seconds": statistics.fmean(seconds),
        "useful": sum(trained) / sum(seconds),
        "wasted": max(0.0, 1 - sum(trained) / sum(generated)),
        "trained": sum(trained) / (sum(seconds) + training),
        "tokens_std": statistics.pstdev(trained) / statistics.fmean(trained),
    }


def write(schedules: Sequence[Schedule]) -> None:
    """The table of docs/schedules.md."""
    found = {s.name: simulate(s, GPU, H200) for s in schedules}
    base, lines = found[schedules[0].name], []
    for name, f in found.items():
        cells = [f"{f['decode_steps']:,.0f}", f"{f['window_seconds']:.2f}", f"{f['wasted']:.0%}"]
        cells += [f"{f[key] / base[key]:.2f}×" for key in ("useful", "trained")]
        lines.append([name, *cells, f"{f['tokens_std']:.0%}"])
    heads = ["", "decode steps", "rollout window, s", "of its tokens wasted", "rollout phase", "whole step",
             "tokens a step vary by"]  # fmt: skip
    text = table(heads, lines)
    write_table(PAGE, "floor", text)
    print(text)
