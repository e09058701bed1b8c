"""What a router is taught beside the policy's loss, and what is measured of it.

balance loss   E sum_i f_i P_i            f_i: share of the choices that went to expert i; P_i: its mean probability,
                                          of scores made to sum to 1 (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6;
                                          of several choices a token: Lepikhin et al. 2020, arXiv:2006.16668)
z-loss         mean logsumexp(logits)^2   Zoph et al. 2022, arXiv:2202.08906, eq. 5
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asystem.models import Routed

SUMS = 5  # of a `RouterWatch`: balance loss and z-loss times tokens, tokens, choices replaced, choices given


def balance_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """1 at equal load, E / top_k where all tokens choose alike with all their probability.

    transformers' ``load_balancing_loss_func`` is top_k times this for one layer. The gradient is by the scores alone.

    Args:
        scores: [T, E], not negative. chosen: [T, top_k].
    """
    experts = scores.shape[1]
    share = scores.new_zeros(experts).index_add(0, chosen.flatten(), scores.new_ones(chosen.numel())) / chosen.numel()
    return experts * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """logits [T, E] -> the mean over tokens; keeps logits small, where their exponentials are exact."""
    return logits.logsumexp(-1).square().mean()


class RouterWatch:
    """Measures what one router does and hangs its losses on the gradient of its weights.

    So nothing but gradients passes through the blocks, compiled or computed again. The losses are means over a
    micro-batch's tokens; ``scale`` times its tokens is what each counts.

    Args:
        scale: a number on the device, set before each step. balance, z: coefficients; 0 = neither added nor measured.

    Attributes:
        row: [E + SUMS], choices of each expert, then the sums; of all calls since it was last 0.
    """

    def __init__(self, num_experts: int, scale: Tensor, balance: float, z: float) -> None:
        self.scale, self.balance, self.z = scale, balance, z
        self.row = torch.zeros(num_experts + SUMS, device=scale.device)

    def __call__(self, weights: Tensor, routed: Routed) -> Tensor:
        chosen, given = routed.chosen, routed.given
        self.row.index_add_(0, chosen.flatten(), self.row.new_ones(chosen.numel()))
        tokens, zero = self.row.new_ones(len(chosen)).sum(), self.row.new_zeros(())
        balance = balance_loss(routed.scores, chosen) if self.balance else zero
        z = z_loss(routed.logits) if self.z else zero
        replaced = count = zero
        if given is not None:
            is_new = (given[:, :, None] != routed.own[:, None, :]).all(-1) & (given >= 0)
            replaced, count = is_new.sum(), (given >= 0).sum()
        sums = [balance.detach() * tokens, z.detach() * tokens, tokens, replaced, count]
        self.row[-SUMS:].add_(torch.stack([value.to(self.row.dtype) for value in sums]))
        if not self.balance and not self.z:
            return weights
        loss = (self.balance * balance + self.z * z) * (self.scale * tokens)
        attached: Tensor = _Attach.apply(weights, loss)  # type: ignore[no-untyped-call]
        return attached


class _Attach(torch.autograd.Function):
    """The weights as they are; the backward pass that reaches them begins the loss's too."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())
