"""Log-probabilities and entropies of the head: against plain torch, in chunks, and by kernels in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asystem.generation.runner import head_logits
from asystem.models import Decoder, ModelSpec
from asystem.training import head
from asystem.training.head import chunk_rows, token_logprobs

V, D = 37, 16
Head = Callable[..., tuple[Tensor, Tensor]]


def _inputs(tokens: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weight, hidden = torch.randn(V, D, generator=draw), torch.randn(tokens, D, generator=draw)
    return weight.requires_grad_(), hidden.requires_grad_(), torch.randint(V, (tokens,), generator=draw)


def _plain(weight: Tensor, hidden: Tensor, labels: Tensor, temperature: float, **_: Any) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T / temperature).log_softmax(dim=-1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=-1)


def _results(function: Head, tokens: int, temperature: float, *, with_entropy: bool, **options: Any) -> list[Tensor]:
    weight, hidden, labels = _inputs(tokens)
    logprobs, entropy = function(weight, hidden, labels, temperature, entropy_gradient=with_entropy, **options)
    loss = (logprobs * torch.arange(1, tokens + 1)).sum()
    loss = loss + (entropy * torch.linspace(-2, 3, tokens)).sum() if with_entropy else loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and hidden.grad is not None
    return [logprobs.detach(), entropy.detach(), weight.grad, hidden.grad]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_elements", [10**6, 3 * V])  # all at once; three rows at a time
def test_values_and_gradients_are_those_of_plain_torch(
    chunk_elements: int, temperature: float, with_entropy: bool
) -> None:
    expected = _results(_plain, 7, temperature, with_entropy=with_entropy)
    found = _results(token_logprobs, 7, temperature, with_entropy=with_entropy, chunk_elements=chunk_elements)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_elements", [10**6, 3 * V])
def test_a_float32_head_rounds_no_logit(chunk_elements: int) -> None:
    weight, hidden, labels = ((x.detach() * 3).bfloat16() if x.is_floating_point() else x for x in _inputs(50))
    found = {}
    for exact in (True, False):
        inputs = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
        options: dict[str, Any] = {"exact": exact, "entropy_gradient": True, "chunk_elements": chunk_elements}
        logprobs, entropy = token_logprobs(*inputs, labels, 0.7, **options)
        (logprobs.sum() - 2 * entropy.sum()).backward()  # type: ignore[no-untyped-call]
        found[exact] = logprobs.detach(), entropy.detach(), *(x.grad for x in inputs)
    doubles = weight.double().requires_grad_(), hidden.double().requires_grad_()
    logprobs, entropy = _plain(*doubles, labels, 0.7)
    (logprobs.sum() - 2 * entropy.sum()).backward()  # type: ignore[no-untyped-call]
    for part, want in enumerate((logprobs, entropy)):
        errors = {exact: (results[part] - want).abs().max().item() for exact, results in found.items()}
        assert errors[True] < 1e-4 and errors[False] > 1e-2
    for part, exact_input in zip((2, 3), doubles, strict=True):
        gradient = found[True][part]
        assert gradient is not None and exact_input.grad is not None and gradient.dtype is torch.bfloat16
        assert (gradient - exact_input.grad).norm() < 5e-3 * exact_input.grad.norm()
    model = Decoder(ModelSpec("llama", V, D, 8, 1, 2, 1, 2))  # generation's own float32 head
    assert model.head is not None
    model.head.weight = torch.nn.Parameter(weight, requires_grad=False)
    logp = (head_logits(model, hidden, exact=True) / 0.7).log_softmax(-1)
    torch.testing.assert_close(logp.gather(1, labels[:, None]).squeeze(1), found[True][0], atol=1e-5, rtol=1e-6)


def test_the_entropy_has_a_gradient_only_where_asked_for() -> None:
    weight, hidden, labels = _inputs(3)
    assert not token_logprobs(weight, hidden, labels)[1].requires_grad
    assert token_logprobs(weight, hidden, labels, entropy_gradient=True)[1].requires_grad


def test_a_frozen_head_passes_the_gradient_on() -> None:
    weight, hidden, labels = _inputs(5)
    token_logprobs(weight.detach(), hidden, labels)[0].sum().backward()  # type: ignore[no-untyped-call]
    found, hidden.grad = hidden.grad, None
    _plain(weight, hidden, labels, 1.0)[0].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, hidden.grad, atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_fails_instead_of_being_wrong() -> None:
    loss = token_logprobs(*_inputs(5))[0].sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_chunks_are_whole_tiles() -> None:
    assert chunk_rows(151_936) == 768  # of 883 that fit
    assert chunk_rows(1000, 50_500) == 50


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("chunk_elements", [10**6, 3 * V])
def test_kernels_give_the_same(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"with_entropy": True, "chunk_elements": chunk_elements}
    expected = _results(token_logprobs, 7, 0.6, **options)
    monkeypatch.setattr(head, "_has_kernels", lambda logits: True)
    for ours, theirs in zip(_results(token_logprobs, 7, 0.6, **options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
