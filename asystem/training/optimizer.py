"""AdamW and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from asystem.config import Schedule, TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig, lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); norms and biases do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps)


def schedule_factor(kind: Schedule, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate of step 0, 1, …: a linear rise over ``warmup_steps``, then the schedule to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if kind is Schedule.linear:
            return max(0.0, 1.0 - done)
        if kind is Schedule.cosine:
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    return factor
