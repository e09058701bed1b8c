"""The training engine: packed micro-batches in, an optimizer step out; on one process, or on `ranks`.

    micro-batches -> forward -> loss_fn -> backward, adding up -> clip -> AdamW on float32 masters -> model

Losses are already divided by counts of the global batch, so gradients add up, over micro-batches and over ranks, and
are divided by nothing. Ranks run equally many micro-batches, because each forward is a collective: those with fewer add
idle ones, whose gradient is 0. Ranks that share layers are given equal micro-batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asystem.config import Master, Schedule, TrainingConfig
from asystem.data.packing import PackedBatch, Sample, pack_one
from asystem.errors import ConfigError, TrainingError
from asystem.models import Decoder, Held, adapter_state, add_lora, load_adapter, save_adapter
from asystem.stats import Stats
from asystem.training.balance import ExpertBalance
from asystem.training.blocks import prepare_blocks
from asystem.training.checkpoint import load_checkpoint, save_checkpoint
from asystem.training.losses import LossFn
from asystem.training.memory import TrainingPlan, free_memory, stages
from asystem.training.optimizer import MasterOptimizer
from asystem.training.policy import Policy
from asystem.training.ranks import RankGradients, Ranks, gather, reshard, shard_policy
from asystem.training.schedule import LearningRate
from asystem.training.streaming import StreamedBlocks


class TrainEngine:
    """Trains a decoder in place, or this rank's part of it. With several ranks, each makes one, with equal weights, and
    every call is collective.

    Args:
        model: the whole, or this rank's part of it; its parameters become ``dtype`` (one rank) or float32 shards
            (FSDP2, computing in ``dtype``); with ``cfg.lora``, frozen in ``dtype`` beside adapters.
        dtype: of forward and backward; `training.optimizer` says how masters, gradients' sums and moments are kept.
        world_size: ranks of the default process group, which stands already when more than 1.
        total_steps: optimizer steps of the schedule.
        temperature: of the distribution that log-probabilities are taken under; the one rollouts are sampled at.
        entropy_gradient: the loss uses the entropy's gradient.
        value_head: beside log-probabilities and entropies a loss gets values, of a head that trains along.
        seed: of the adapters' first weights.
        ranks: how they share the model; None = as ``cfg`` says.

    Raises:
        ConfigError: the masters are to be of another dtype than the model.
    """

    def __init__(
        self,
        model: Decoder,
        cfg: TrainingConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        world_size: int = 1,
        total_steps: int,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        value_head: bool = False,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.cfg, self.device, self.dtype, self.world_size = cfg, torch.device(device), dtype, world_size
        self.ranks, self.spec = ranks or Ranks.of(cfg, world_size), model.spec
        self.rank = self.ranks.rank
        if cfg.master is Master.bfloat16_stochastic and dtype is not torch.bfloat16:
            raise ConfigError(f"training.master=bfloat16_stochastic needs training.dtype=bfloat16, and it is {dtype}")
        if cfg.lora.rank > 0:
            _adapt(model, cfg, seed, self.device)
        if (shard := self.ranks.shard) is not None:
            model = model if model.shard is not None else shard.cut(model)
            shard.pass_gradients(model)
            self.spec = shard.whole(model.spec)
        self.model = model = _placed(model, cfg, self.device)
        self.balance = ExpertBalance(model, cfg, self.device, self.ranks)
        prepare_blocks(model, cfg, self.device)
        self.policy = Policy(
            model,
            temperature,
            entropy_gradient=entropy_gradient,
            value_head=value_head,
            keep_logits=cfg.keep_logits,
            exact_head=cfg.head_dtype == "float32",
        )
        self.reference: Policy | None = None
        unrounded = {name: p.detach() for name, p in _trained(self.policy).items()}  # before rounding to ``dtype``
        for p in self.policy.parameters():  # FSDP's shards of what trains are the masters
            is_master = p.requires_grad and world_size > 1 and cfg.master is Master.float32
            if p.is_floating_point():
                p.data = p.data.to(torch.float32 if is_master else dtype)
        if world_size > 1:
            shard_policy(self.policy, self.ranks, self.device, dtype)
        self._streams = [StreamedBlocks(list(model.layers), self.device)] if cfg.offload_parameters else []
        params = _trained(self.policy)
        settled = RankGradients(self.ranks, list(params), model.spec) if world_size > 1 else None
        self.optimizer = MasterOptimizer(params, unrounded, cfg, settled, self.device)
        self._fitting = 0  # tokens of a micro-batch that is known to fit in memory
        self._zero = 3  # until memory has been looked at
        self.start_phase(cfg.lr, cfg.schedule, cfg.lr_warmup_steps, total_steps)

    def start_phase(self, lr: float, schedule: Schedule, warmup_steps: int, total_steps: int) -> None:
        """Starts a schedule at its step 0 with fresh moments, as between supervised warm-up and RL."""
        self.lr = LearningRate(lr, schedule, warmup_steps, total_steps)
        self.steps = 0  # of this phase, skipped ones counted
        self.bad_steps = 0  # in a row
        self.optimizer.reset()

    @torch.no_grad()
    def keep_reference(self) -> None:
        """Keeps a frozen copy of the present weights, in the dtype of the forward pass; on one rank it shares what is
        frozen here too."""
        with torch.device("meta"):
            decoder = Decoder(self.spec) if self.ranks.shard is None else self.ranks.shard.decoder(self.spec)
        if self.cfg.lora.rank > 0:
            add_lora(decoder, self.cfg.lora)
        present = dict(self.model.named_parameters())
        if self.world_size == 1:
            state = {name: p.detach().clone() if p.requires_grad else p.detach() for name, p in present.items()}
            decoder.load_state_dict(state, assign=True)
        else:
            decoder.to_empty(device=self.device)
            for name, kept in decoder.named_parameters():
                kept.data = kept.data.to(present[name].dtype)
        self.reference = Policy(decoder, self.policy.temperature, exact_head=self.policy.exact_head)
        if self.world_size > 1:
            shard_policy(self.reference, self.ranks, self.device, self.dtype)
            for kept, p in zip(self.reference.decoder.parameters(), self.policy.decoder.parameters(), strict=True):
                kept.copy_(p)
        self.reference.requires_grad_(False).eval()
        if self.cfg.offload_parameters:
            self._streams.append(StreamedBlocks(list(decoder.layers), self.device))

    def logprobs(self, micro: Sequence[PackedBatch], *, reference: bool = False) -> list[Tensor]:
        """Log-probabilities of the response tokens of each micro-batch, [T] float32 on the device, 0 elsewhere.

        Args:
            reference: under the frozen copy that `keep_reference` made, not under the present weights.
        """
        return [scores[0] for scores in self.scores(micro, reference=reference)]

    @torch.no_grad()
    def scores(self, micro: Sequence[PackedBatch], *, reference: bool = False) -> list[tuple[Tensor, ...]]:
        """All that `Policy` tells of each micro-batch, as `logprobs`."""
        policy = self.reference if reference else self.policy
        assert policy is not None, "keep_reference comes first"
        policy.eval()  # without dropout, as generation
        if reference:  # which chooses its own experts, as it did when it was the model
            micro = [replace(packed, routing=None) for packed in micro]
        if self.world_size > 1 and not reference:
            gather(policy, self._zero, is_last=False)
        results = [policy(packed) for packed in self._padded(micro, self._most(micro)[0])]
        policy.train(not reference)
        self._leave_blocks()
        if self.world_size > 1:
            reshard(policy)
        return results[: len(micro)]

    def step(self, micro: Sequence[PackedBatch], loss_fn: LossFn) -> Stats:
        """One optimizer step over all micro-batches of all ranks.

        A gradient that is NaN or infinite is dropped, counted (`train/skipped`) and logged with the rollouts it may be
        from. Without any micro-batch on any rank nothing happens.

        Returns:
            what ``loss_fn`` reported, `train/loss`, `train/grad_norm` (before clipping), `train/lr`, `train/skipped`
            and `train/tokens` (prompts included); to be added up over ranks.

        Raises:
            TrainingError: ``training.max_bad_steps`` steps in a row had such a gradient; names the rollouts.
            CapacityError: a micro-batch will not fit in the GPU's memory; says which size would.
        """
        count, largest = self._most(micro)
        self._check_fits(count, largest)
        padded = self._padded(micro, count)
        stats = Stats()
        losses: list[Tensor] = []
        self.balance.start(sum(len(packed.tokens) for packed in micro))
        for index, packed in enumerate(padded):
            if index == len(micro):
                self.balance.mute()
            if self.world_size > 1 and index in (0, count - 1):
                gather(self.policy, self._zero, is_last=index + 1 == count)
            loss, part = self._forward(packed, loss_fn if index < len(micro) else _idle_loss)
            (loss * self.ranks.data).backward()  # type: ignore[no-untyped-call]  # FSDP takes the mean over ranks
            self.balance.collect(counted=index < len(micro))
            losses.append(loss.detach())
            stats += part
        self._leave_blocks()
        if padded:
            self._finish_step(stats, torch.stack(losses).tolist(), micro)
        return stats.settled()

    def state(self) -> tuple[dict[str, Held], dict[str, Any]]:
        """What a checkpoint holds: masters and moments, the very tensors; and the schedule's position as JSON. Frozen
        weights are not among them."""
        held = {key: self.ranks.held(name, t, self.model.spec) for key, name, t in self.optimizer.states()}
        schedule = asdict(self.lr) | {"schedule": self.lr.schedule.name}
        return held, {"lr": schedule, "steps": self.steps, "bad_steps": self.bad_steps}

    def save(self, folder: Path) -> None:
        """Writes a checkpoint and waits for it; every rank calls it. `saving.Saver` writes them beside training."""
        tensors, extra = self.state()
        save_checkpoint(Path(folder), tensors, extra, world_size=self.world_size)

    def load(self, folder: Path) -> None:
        """Takes a checkpoint up; the next step is bit-equal to what it would have been.

        Raises:
            ModelError: it is incomplete or of another model.
        """
        extra = load_checkpoint(Path(folder), self.state()[0], world_size=self.world_size)
        self.optimizer.publish()
        self.lr = LearningRate(**(extra["lr"] | {"schedule": Schedule[extra["lr"]["schedule"]]}))
        self.steps, self.bad_steps = extra["steps"], extra["bad_steps"]

    def save_adapter(self, folder: Path, base: str | None) -> None:
        """Writes the adapters as a PEFT folder for ``base``, a model folder; every rank calls it."""
        state = adapter_state(self.model)
        if self.rank == 0:
            save_adapter(state, self.cfg.lora, folder, base)

    def _forward(self, packed: PackedBatch, loss_fn: LossFn) -> tuple[Tensor, Stats]:
        return loss_fn(packed, *self.policy(packed))

    def _leave_blocks(self) -> None:
        """Streamed weights are in the host's memory again, where they may be changed and read."""
        for stream in self._streams:
            stream.leave()

    def _most(self, micro: Sequence[PackedBatch]) -> tuple[int, int]:
        """Micro-batches of the rank with the most, and tokens of the largest one of all."""
        largest = max((len(packed.tokens) for packed in micro), default=0)
        count, tokens = self.ranks.most([len(micro), largest], self.device)
        return count, tokens

    def _check_fits(self, count: int, tokens: int) -> None:
        """Before the first step, so that a run does not end in the middle of a later one; and before larger ones, which
        single sequences above the limit are. Ranks find the same."""
        if tokens <= self._fitting:
            return
        if count > 1:  # the next batch may fill one
            tokens = max(tokens, self.cfg.micro_batch_tokens)
        choices = stages(self.cfg, self.world_size)
        self._zero = choices[0]
        if (free := free_memory(self.device)) is not None:
            (short,) = self.ranks.most([-free], self.device)
            plan = self._fitting_plan(choices, tokens, -short)
            plan.check(tokens, -short)
            self._zero = plan.zero
        self._fitting = tokens

    def _fitting_plan(self, choices: Sequence[int], tokens: int, free: int) -> TrainingPlan:
        """Of the first stage that fits, with a tenth to spare for the allocator, else of the last."""
        for zero in choices:
            cfg = replace(self.cfg, zero=str(zero))
            plan = TrainingPlan(self.spec, cfg, dtype=self.dtype, ranks=self.world_size, device=self.device.type)
            needed = plan.of(tokens)
            if needed.total - needed.held <= 0.9 * free:
                break
        return plan

    def _padded(self, micro: Sequence[PackedBatch], count: int) -> list[PackedBatch]:
        """``count`` micro-batches, as the rank with the most has, on the device. All at once: a later copy would wait
        for the work that is queued before it."""
        idle = [pack_one([Sample(prompt_tokens=[0], tokens=[0], token_weight=0.0)])] * (count - len(micro))
        return [packed.to(self.device) for packed in [*micro, *idle]]

    def _finish_step(self, stats: Stats, losses: list[float], micro: Sequence[PackedBatch]) -> None:
        lr = self.lr.at(self.steps)
        norm = self.optimizer.step(lr, self.cfg.clip_norm)
        is_bad = not math.isfinite(norm)
        self.balance.finish(self.optimizer, stats, good=not is_bad)
        self.steps += 1
        self.bad_steps = self.bad_steps + 1 if is_bad else 0
        # What is the same on all ranks is told by the first, so that adding ranks up leaves it right.
        told = float(self.rank == 0)
        good = told * (not is_bad)
        stats.add_mean("train/loss", 0.0 if is_bad else sum(losses), good)  # ranks' parts add up to the batch's loss
        stats.add_mean("train/grad_norm", norm * good if good else 0.0, good)
        stats.add_mean("train/lr", lr * told, told)
        stats.add_sum("train/skipped", told * is_bad)
        stats.add_sum("train/tokens", float(sum(len(packed.tokens) for packed in micro)))
        if is_bad:
            self._report_bad_step(losses, micro)

    def _report_bad_step(self, losses: list[float], micro: Sequence[PackedBatch]) -> None:
        """Names the rollouts of this rank's micro-batches whose loss was not finite; where all were, all of them."""
        bad = [packed for packed, loss in zip(micro, losses, strict=False) if not math.isfinite(loss)]
        rollouts = _shortened(sorted(rollout for packed in bad or micro for rollout in packed.rollouts))
        logging.getLogger("asystem").warning(
            "rank %d skipped optimizer step %d: NaN or infinite gradient, %d in a row; loss of rollouts %s was %s",
            self.rank, self.steps - 1, self.bad_steps, rollouts or "none", "not finite" if bad else "finite",
        )  # fmt: skip
        if self.bad_steps >= self.cfg.max_bad_steps:
            raise TrainingError(
                f"{self.bad_steps} steps in a row had a NaN or infinite gradient (training.max_bad_steps="
                f"{self.cfg.max_bad_steps}); the last one trained rollouts {rollouts}. "
                "Look at them in rollouts/ and at mismatch/*; a lower training.lr is the usual remedy"
            )


def _adapt(model: Decoder, cfg: TrainingConfig, seed: int, device: torch.device) -> None:
    add_lora(model, cfg.lora, seed=seed, device=device)
    if cfg.lora.adapter is not None:
        load_adapter(model, cfg.lora.adapter)


def _placed(model: Decoder, cfg: TrainingConfig, device: torch.device) -> Decoder:
    """On its device; blocks that are streamed there, in the host's memory."""
    if not cfg.offload_parameters:
        return model.to(device)
    for name, part in model.named_children():
        part.to("cpu" if name == "layers" else device)
    return model


def _trained(policy: Policy) -> dict[str, nn.Parameter]:
    return {name.removeprefix("decoder."): p for name, p in policy.named_parameters() if p.requires_grad}


def _idle_loss(packed: PackedBatch, logprobs: Tensor, entropy: Tensor, *values: Tensor) -> tuple[Tensor, Stats]:
    """A gradient of 0 for every parameter: ranks must agree on which parameters have one."""
    return sum((value.sum() for value in values), logprobs.sum()) * 0.0, Stats()


def _shortened(numbers: Sequence[int], most: int = 20) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
