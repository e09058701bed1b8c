"""The load of experts: measured, taught to be equal by losses (`router_losses`), or moved there by biases.

    bias += rate * sign(mean load - load)        load: tokens of the step's batch that chose the expert, over all ranks

No loss pulls at the router for the biases (Wang et al. 2024, arXiv:2408.15664, algorithm 1). Prompts count too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asystem.config import TrainingConfig
from asystem.models import Router, local_piece
from asystem.stats import Stats
from asystem.training.optimizer import MasterOptimizer
from asystem.training.ranks import Ranks
from asystem.training.router_losses import SUMS, RouterWatch


class ExpertBalance:
    """Watches a model's routers over one step after another; nothing to do for a dense one.

    Args:
        model: not yet sharded. device: that it computes on.
    """

    def __init__(self, model: nn.Module, cfg: TrainingConfig, device: torch.device, ranks: Ranks) -> None:
        routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        self.cfg, self.ranks = cfg, ranks
        self._biases = [f"{name}.bias" if router.bias is not None else None for name, router in routers.items()]
        self._watches: list[RouterWatch] = []
        for router in routers.values():  # a layer's loss counts for its part of the mean over layers
            if not self._watches:
                self._scale = torch.zeros((), device=device)
            balance, z = cfg.balance_coefficient / len(routers), cfg.router_z_coefficient / len(routers)
            router.watch = watch = RouterWatch(router.moe.num_experts, self._scale, balance, z)
            self._watches.append(watch)
        self._total: Tensor | None = None

    def start(self, tokens: int) -> None:
        """Before a step's first micro-batch; ``tokens``: of all this rank's micro-batches.

        A loss is multiplied as the policy's is, because FSDP takes the mean over ranks that have rows of their own; and
        divided among those that share rows, whose routers' gradients are added up as parts (`ranks.RankGradients`).
        """
        if not self._watches:
            return
        self._total = None
        torch._foreach_zero_([watch.row for watch in self._watches])
        if self.cfg.balance_coefficient or self.cfg.router_z_coefficient:
            self._scale.fill_(tokens)
            if self.ranks.world > 1:
                dist.all_reduce(self._scale, group=self.ranks.data_group)
            sharing = self.ranks.world // self.ranks.data
            self._scale.copy_(self.ranks.data / sharing / self._scale.clamp(min=1.0))

    def mute(self) -> None:
        """Before micro-batches that only keep ranks in step: they have no losses."""
        if self._watches:
            self._scale.zero_()

    def collect(self, *, counted: bool) -> None:
        """After each micro-batch; one that only keeps ranks in step does not count."""
        if self._watches:
            rows = [watch.row for watch in self._watches]
            seen = torch.stack(rows) * counted
            self._total = seen if self._total is None else self._total + seen
            torch._foreach_zero_(rows)

    @torch.no_grad()
    def finish(self, optimizer: MasterOptimizer, stats: Stats, *, good: bool) -> None:
        """After the optimizer's step: moves the biases, unless that was skipped, and reports.

        Args:
            stats: gets `train/expert_load_max`, the most loaded expert over the mean, in the worst layer; the losses
                that have a coefficient, means over tokens and layers: `train/balance_loss`, `train/router_z_loss`; and
                `routing/replaced_fraction`, the share of given choices that the router would not have made.
        """
        if self._total is None:
            return
        if self.ranks.world > 1:
            dist.all_reduce(self._total, group=self.ranks.data_group)
        loads, sums = self._total[:, :-SUMS], self._total[:, -SUMS:].sum(0).tolist()
        for name, load in zip(self._biases, loads, strict=True):
            if name is not None and good and self.cfg.expert_bias_rate > 0:
                self._move(optimizer, name, load)
        stats.add_max("train/expert_load_max", float((loads.amax(1) / loads.mean(1)).max()))
        self._report(stats, sums)

    def _move(self, optimizer: MasterOptimizer, name: str, load: Tensor) -> None:
        _, param = local_piece(optimizer.params[name])
        box, master = local_piece(optimizer.masters[name])
        move = self.cfg.expert_bias_rate * (load.mean() - load).sign()
        master += box.of(move, (0,)).to(master.device)
        param.copy_(master)

    def _report(self, stats: Stats, sums: list[float]) -> None:
        """All ranks report the same, so that adding them up leaves it right."""
        balance, z, tokens, replaced, given = sums
        if self.cfg.balance_coefficient:
            stats.add_mean("train/balance_loss", balance, tokens)
        if self.cfg.router_z_coefficient:
            stats.add_mean("train/router_z_loss", z, tokens)
        if given:
            stats.add_mean("routing/replaced_fraction", replaced, given)
