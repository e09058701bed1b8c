"""Seconds of a step by phase, from operations and bytes over a card's rates: an estimate to compare choices by.

    generation   steps · max(bytes read / bandwidth, operations / rate), and the prompts' pass
    training     micro-batches · max(operations / rate with what recompute adds, what FSDP2 sends, the host's time for
                 their blocks), and the optimizer's traffic
    publication  bytes that move over the bus or the link
    sleep        what goes to the host's memory and comes back

Responses are taken to be as long as they may be, and prompts too, unless the caller knows better.
"""

from __future__ import annotations

from dataclasses import dataclass

from asystem.config import Config, Recompute
from asystem.memory import Card
from asystem.models import ModelSpec
from asystem.training.flops import pass_flops

MATH, COPY = 0.45, 0.7  # parts of a card's rates that are reached: training's products, decoding's reads
DECODE_OVERHEAD = 0.5e-3  # seconds of a step beside reading: sampling, launches, the host
MICRO_OVERHEAD = 30e-3  # seconds of a micro-batch beside its products: copies, losses, sums of gradients
# The host's seconds for one block of a micro-batch, forward and backward, however few its tokens: launches, hooks,
# compiled graphs. On an H200's host 22 micro-batches of 7.4k tokens through 28 blocks took 2.03 s ("W1 0.6B, 8k a
# micro-batch"), and with adapters 22 of 1.9k tokens through 36 blocks 4.1 s ("4B LoRA, 24 GB card", without waking up).
HOST_BLOCK = 3.3e-3
HOST_BLOCK_LORA = 5.2e-3


@dataclass(frozen=True, slots=True)
class Workload:
    """One step's rollouts: how many, in groups of how many, and their tokens each."""

    rollouts: int
    group: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        return self.rollouts * (self.prompt + self.new)

    @staticmethod
    def of(config: Config, prompt: int | None = None, new: int | None = None) -> Workload:
        """What the recipe asks of a step; a window without a budget finishes all of Ω."""
        rollout = config.rollout
        new = new or rollout.max_new_tokens
        budget = rollout.token_budget
        count = rollout.capacity if budget is None else max(1, budget // new)
        return Workload(count, config.algorithm.group_size, prompt or config.data.max_prompt_tokens, new)


def generation_seconds(
    spec: ModelSpec, card: Card, work: Workload, *, replicas: int, batch: int, weights: int, token_bytes: int
) -> float:
    """Of one replica's share, decoding ``batch`` rollouts together.

    Args:
        weights: bytes read a step. token_bytes: of KV.
    """
    rollouts = -(-work.rollouts // replicas)
    steps = rollouts * work.new / batch
    read = weights + batch * (work.prompt / work.group + work.new / 2) * token_bytes  # a group's prompt is read once
    flops = batch * pass_flops(spec, 1, work.prompt + work.new / 2, 1, backward=False)
    step = max(read / (COPY * card.bandwidth), flops / (MATH * card.flops)) + DECODE_OVERHEAD
    prompts = -(-rollouts // work.group)
    prefill = pass_flops(spec, work.prompt, work.prompt**2 / 2, 1, backward=False) * prompts / (MATH * card.flops)
    return steps * step + prefill


def training_seconds(
    spec: ModelSpec,
    card: Card,
    work: Workload,
    config: Config,
    *,
    ranks: int,
    micro: int,
    recompute: Recompute,
    zero: int,
    state_bytes: int,
    host_bytes: int,
) -> float:
    """Of one rank's share of a batch.

    Args:
        state_bytes: weights, masters, moments and gradients on the rank, each read and written once an update.
        host_bytes: states in the host's memory, which come and go.
    """
    rollouts = work.rollouts / ranks
    length, frozen = work.prompt + work.new, config.training.lora.rank > 0
    shape = rollouts * length, rollouts * length**2 / 2, rollouts * work.new
    flops = pass_flops(spec, *shape, frozen=frozen)
    once = pass_flops(spec, *shape, backward=False)
    flops += once * _extra_passes(config)
    if recompute is not Recompute.none:
        again = shape if recompute is Recompute.full else (shape[0], 0.0, 0.0)
        flops += pass_flops(spec, *again, backward=False)
    passes, _ = evened(work, config, ranks, micro)
    updates = config.training.minibatches
    gathered, scattered = 2 * passes if zero == 3 else updates, updates if zero == 1 else passes
    each = 2 * gathered + (0 if frozen else 4 * scattered)  # gradients in float32; adapters' are few
    sent = each * spec.num_parameters * (ranks - 1) / ranks
    device = max(flops / (MATH * card.flops), sent / card.link) + passes * MICRO_OVERHEAD
    host = passes * spec.num_layers * (HOST_BLOCK_LORA if frozen else HOST_BLOCK)
    return max(device, host) + updates * (2 * state_bytes / (COPY * card.bandwidth) + host_bytes / card.bus)


def evened(work: Workload, config: Config, ranks: int, micro: int) -> tuple[int, int]:
    """How many micro-batches a step has on each of ``ranks``, and the tokens of the largest, where all rollouts are
    equally long: as few as ``micro`` tokens allow, evened out (`data.packing`)."""
    length, updates = work.prompt + work.new, config.training.minibatches
    rows = -(-work.rollouts // (ranks // config.training.tensor_parallel * updates))
    passes = -(-rows // max(1, micro // length))
    return updates * passes, -(-rows // passes) * length


def _extra_passes(config: Config) -> int:
    """Forward passes beside the one that trains: of the weights before the batch, and of the reference."""
    old = config.training.minibatches > 1 or config.algorithm.advantage == "gae"
    return int(old) + int(config.algorithm.kl_coefficient > 0)
