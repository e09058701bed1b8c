"""AdamW over float32 master weights, whatever dtype the model computes in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from asystem.config import TrainingConfig


class MasterOptimizer:
    """Master weights and moments of a model's parameters.

    A float32 parameter (whole, or FSDP's shard) is its own master. One of lower precision has a float32 copy: gradients
    of micro-batches add up there, and after a step the copy is rounded back into the very tensor that the model
    holds, which others may read too.

    Args:
        params: the model's parameters by name.
        exact: the values to start from where the parameters have already been rounded.
    """

    def __init__(self, params: dict[str, nn.Parameter], exact: dict[str, Tensor], cfg: TrainingConfig) -> None:
        self.params = params
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype is torch.float32 else exact[name].detach().float().requires_grad_()
            for name, p in params.items()
        }
        decayed = [p for p in self.masters.values() if p.ndim >= 2]
        others = [p for p in self.masters.values() if p.ndim < 2]  # norms and biases
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True
        )
        self.reset()

    def reset(self) -> None:
        """Moments of zero: a new phase of training. Made here, not at the first step, so that loading can fill them."""
        for p in self.masters.values():
            step = torch.zeros((), device=p.device)
            self._adamw.state[p] = {
                "step": step,
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
            }

    def collect_gradients(self) -> None:
        """After each backward: moves gradients of lower precision into the masters' float32 ones."""
        for name, master in self.masters.items():
            param = self.params[name]
            if master is param or param.grad is None:
                continue
            grad = param.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            param.grad = None

    @torch.no_grad()
    def step(self, lr: float, clip_norm: float) -> float:
        """Clips to ``clip_norm`` (0 = no clipping) and updates, or leaves all as it is if the gradient is not finite.

        Returns:
            the norm of the whole gradient before clipping, the same on all ranks; NaN or infinity = no update was made.
        """
        grads = [p.grad for p in self.masters.values() if p.grad is not None]
        total = get_total_norm(grads)
        total = total.full_tensor() if isinstance(total, DTensor) else total
        norm = float(total)
        if math.isfinite(norm):
            if clip_norm > 0:
                clip_grads_with_norm_(list(self.masters.values()), clip_norm, total)
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
            self.publish()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the model's parameters, in place."""
        for name, master in self.masters.items():
            if master is not self.params[name]:
                self.params[name].copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to be saved, by name; loading writes into these tensors, then `publish`."""
        named: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            named[f"model.{name}"] = master.detach()
            named |= {f"optimizer.{kind}.{name}": value for kind, value in self._adamw.state[master].items()}
        return named
