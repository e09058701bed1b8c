"""What is taken off the objective besides the policy's surrogate: KL to a reference, and the length of cut answers."""

from __future__ import annotations

from torch import Tensor

from asystem.config import KLEstimator

MAX_LOG_RATIO = 20.0


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """An estimate of KL(policy || reference) at each token sampled from the policy, [M] with gradient.

        d = log p_ref - log p        k1 = -d        k2 = d^2 / 2        k3 = exp(d) - d - 1

    k1 and k3 have the right mean, k3 with less variance and never below 0; k2 is biased, but its gradient has the right
    mean, which k1's (0) has not and k3's has only to first order.

    Source: Schulman (2020), "Approximating KL divergence"; GRPO uses k3 (arXiv 2402.03300, equation 4).

    Args:
        logprobs: [M] with gradient. ref_logprobs: [M] of the frozen reference.
    """
    d = (ref_logprobs.detach() - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator is KLEstimator.k1:
        return -d
    if estimator is KLEstimator.k2:
        return d.square() / 2
    return d.exp() - d - 1


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft punishment of responses that near the limit, to be added to the reward.

        0 up to limit - buffer, then falling in a line to -1 at the limit

    Source: DAPO (arXiv 2503.14476), equation 13.

    Args:
        length: response tokens. limit: `rollout.max_new_tokens`. buffer: tokens before it in which the punishment
            grows; 0 = none.
    """
    return 0.0 if buffer == 0 else -max(0, length - (limit - buffer)) / buffer
