"""The head's kernels on a GPU, over a vocabulary of real size. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from asystem.training.head import token_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("dtype", "exact", "bound", "worst"),
    [
        (torch.float32, False, 1e-4, 1e-4),
        (torch.bfloat16, False, 2e-2, 0.1),  # a logit between 8 and 16 is rounded by up to 1/32
        (torch.bfloat16, True, 1e-4, 1e-4),
    ],
)
@pytest.mark.parametrize("vocab", [151_936, 1000, 32_003])
def test_values_and_gradients_agree_with_float64(
    vocab: int, dtype: torch.dtype, exact: bool, bound: float, worst: float
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(vocab, 64, device="cuda").mul_(0.3).to(dtype).requires_grad_()
    hidden = torch.randn(1500, 64, device="cuda").to(dtype).requires_grad_()
    labels = torch.randint(vocab, (1500,), device="cuda")
    by_logprob, by_entropy = torch.randn(2, 1500, device="cuda").unbind()
    logprobs, entropy = token_logprobs(weight, hidden, labels, 0.8, entropy_gradient=True, exact=exact)
    (logprobs * by_logprob + entropy * by_entropy).sum().backward()  # type: ignore[no-untyped-call]
    doubles = [x.detach().double().requires_grad_() for x in (weight, hidden)]
    logp = (doubles[1] @ doubles[0].T / 0.8).log_softmax(-1)
    want = logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    (want[0] * by_logprob + want[1] * by_entropy).sum().backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip((logprobs, entropy), want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=worst, rtol=worst)
        assert (ours - theirs).abs().mean() < bound
    for tensor, reference in zip((weight, hidden), doubles, strict=True):
        assert tensor.grad is not None and reference.grad is not None
        rounded = 2e-2 if dtype is torch.bfloat16 else bound  # gradients are, by float32 logits too
        assert (tensor.grad.double() - reference.grad).norm() < rounded * reference.grad.norm()
