"""From hidden states to log-probabilities and entropies, never with the logits of a whole micro-batch.

For one token with logits x = W h / temperature, label y and p = softmax(x), and with the gradients g of log p_y and e
of the entropy H that the backward pass brings:

    log p_y = x_y - lse        H = lse - sum_j p_j x_j        dx_j = g (1[j = y] - p_j) - e p_j (x_j - lse + H)

So three numbers a token wait for the backward pass, which computes the logits again, some rows at a time, and turns
them into their gradient where they stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**27  # logits held at once: 256 MiB in bfloat16
_TILE = 128  # rows of a matrix product's tile


def token_logprobs(
    weight: Tensor,
    hidden: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
    keep_logits: bool = False,
    exact: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [M] float32 of labels [M] after hidden states [M, D], head's weight [V, D].

    Logits are computed again in the backward pass, unless all fit in ``chunk_elements``.

    Args:
        entropy_gradient: the entropy has a gradient.
        keep_logits: all of them wait for the backward pass instead.
        exact: logits are float32, as the head's product sums them up, from inputs in the model's dtype; else they are
            rounded to that. All after them is float32, and their gradient is rounded to the model's dtype.
    """
    keep = keep_logits and torch.is_grad_enabled()
    rows = max(1, len(labels)) if keep else chunk_rows(weight.shape[0], chunk_elements)
    logprobs, entropy = _Head.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, temperature, rows, entropy_gradient, exact
    )
    return logprobs, entropy


def chunk_rows(vocab_size: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """Tokens whose logits are held at once; whole tiles of a matrix product, if any."""
    rows = max(1, chunk_elements // vocab_size)
    return rows if rows < _TILE else rows // _TILE * _TILE


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        rows: int,
        entropy_gradient: bool,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        result = torch.empty(3, len(labels), device=hidden.device)  # log-probabilities, entropies, log-sum-exps
        ctx.dtype = torch.float32 if exact else hidden.dtype
        logits = hidden.new_empty(min(rows, len(labels)), weight.shape[0], dtype=ctx.dtype)
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            _product(hidden[part], weight, logits[: len(labels[part])])
            _measure(logits[: len(labels[part])], labels[part], temperature, result[:, part])
        logprobs, entropy = result[0].clone(), result[1].clone()
        ctx.save_for_backward(hidden, weight, labels, result, logits if len(labels) <= rows else None)
        ctx.temperature, ctx.rows, ctx.entropy_gradient = temperature, rows, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, result, kept = ctx.saved_tensors
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        shape = min(ctx.rows, len(labels)), weight.shape[0]
        logits = hidden.new_empty(shape, dtype=ctx.dtype) if kept is None else kept
        grads = torch.stack([grad_logprobs, grad_entropy if ctx.entropy_gradient else torch.zeros_like(grad_logprobs)])
        for start in range(0, len(labels), ctx.rows):
            part = slice(start, start + ctx.rows)
            out = logits[: len(labels[part])]
            if kept is None:
                _product(hidden[part], weight, out)
            _differentiate(out, labels[part], ctx.temperature, result[:, part], grads[:, part])
            out = out.to(hidden.dtype)
            if by_hidden is not None:
                torch.mm(out, weight, out=by_hidden[part])
            if by_weight is not None:
                torch.addmm(by_weight, out.T, hidden[part], out=by_weight)
        if kept is not None:  # overwritten: a second backward pass is to fail, not to be wrong
            torch.autograd.graph.increment_version(kept)
        return by_hidden, by_weight, None, None, None, None, None


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden [n, D], weight [V, D] -> out [n, V], of their dtype or float32."""
    if out.dtype is hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.float(), weight.float().T, out=out)


def _measure(logits: Tensor, labels: Tensor, temperature: float, result: Tensor) -> None:
    """Writes log-probability, entropy and log-sum-exp [3, n] of logits [n, V]."""
    if _has_kernels(logits):
        from asystem.training.kernels import measure

        return measure(logits, labels, temperature, result)
    x = logits.float() / temperature
    lse = x.logsumexp(dim=1)
    torch.sub(x.gather(1, labels[:, None]).squeeze(1), lse, out=result[0])
    x -= lse[:, None]
    torch.sum(x.exp().mul_(x), dim=1, out=result[1]).neg_()
    result[2] = lse


def _differentiate(logits: Tensor, labels: Tensor, temperature: float, result: Tensor, grads: Tensor) -> None:
    """Puts the loss's gradient by the logits [n, V] in their place.

    Args:
        result: [3, n] of `_measure`. grads: [2, n] of the loss by log-probability and by entropy.
    """
    if _has_kernels(logits):
        from asystem.training.kernels import differentiate

        return differentiate(logits, labels, temperature, result, grads)
    (_, entropy, lse), (g, e) = result, grads
    logp = logits.float() / temperature
    logp -= lse[:, None]
    gradient = logp.exp()
    gradient *= -(g[:, None] + e[:, None] * (logp + entropy[:, None])) if e.any() else -g[:, None]
    gradient[torch.arange(len(labels), device=labels.device), labels] += g
    logits.copy_(gradient.div_(temperature) if temperature != 1.0 else gradient)


def _has_kernels(logits: Tensor) -> bool:
    return logits.is_cuda
