"""Biases of experts, moved after each step towards equal load (Wang et al. 2024, arXiv:2408.15664, algorithm 1).

    bias += rate * sign(mean load - load)        load: tokens of the step's batch that chose the expert, over all ranks

No loss pulls at the router for it. Prompts count too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asystem.models import Router, local_piece
from asystem.training.optimizer import MasterOptimizer


class ExpertBalance:
    """Counts what routers with a bias choose; with a rate of 0 nothing is counted.

    Args:
        model: on its device, not yet sharded.
        group: of the ranks that have rows of their own; None = all.
    """

    def __init__(self, model: nn.Module, rate: float, group: Any = None) -> None:
        modules = model.named_modules() if rate > 0 else ()
        routers = {f"{name}.bias": module for name, module in modules if isinstance(module, Router)}
        self.rate, self.group = rate, group
        self._routers = {name: router for name, router in routers.items() if router.bias is not None}
        self._loads: dict[str, Tensor] = {}
        for name, router in self._routers.items():
            router.load = torch.zeros(router.moe.num_experts, device=router.weight.device)
            self._loads[name] = torch.zeros_like(router.load)

    def collect(self, *, counted: bool) -> None:
        """After each micro-batch; one that only keeps ranks in step does not count."""
        for name, router in self._routers.items():
            assert router.load is not None, "made with the balance"
            self._loads[name] += router.load * counted
            router.load.zero_()

    @torch.no_grad()
    def finish(self, optimizer: MasterOptimizer, world_size: int, *, good: bool) -> None:
        """After the optimizer's step: moves the biases, unless that was skipped, and starts to count anew."""
        for name, load in self._loads.items():
            if world_size > 1:
                dist.all_reduce(load, group=self.group)
            if good:
                _, param = local_piece(optimizer.params[name])
                box, master = local_piece(optimizer.masters[name])
                move = self.rate * (load.mean() - load).sign()
                master += box.of(move, (0,)).to(master.device)
                param.copy_(master)
            load.zero_()
