"""How tokens are weighed against each other in a batch: the denominators of the loss."""

from __future__ import annotations

from collections.abc import Sequence

from asystem.config import Normalizer
from asystem.errors import ConfigError


def token_weights(
    normalizer: Normalizer,
    lengths: Sequence[int],
    *,
    num_rollouts: int,
    num_tokens: int,
    token_budget: int | None = None,
    max_new_tokens: int = 1,
    minibatches: int = 1,
) -> list[float]:
    """The weight of each token of each response; the loss is the weighted sum over the whole batch.

        response   1 / (num_rollouts |y_i|)   mean over each response, then over responses (GRPO, IcePop)
        token      1 / num_tokens             mean over all tokens of the batch (DAPO, arXiv 2503.14476)
        constant   1 / (num_rollouts L)       sum over the longest possible response, L = max_new_tokens: no bias to
                                              short right, long wrong answers (Dr. GRPO, arXiv 2503.20783 §3.1)
        budget     1 / Φ                      sum over a constant, so that a step's scale does not follow the lengths
                                              that happened to finish in it (C3PO; Ring-lite, arXiv 2506.14731 §3.2)

    Counts are those of the global batch, over all ranks and micro-batches: however the batch is cut, the parts' losses
    add up to the same. Tokens that a correction masks stay in |y_i| and in the counts, as in equation 1 of the Ring-1T
    report. A batch cut into several optimizer steps gives each its share of the denominator, so that their mean is the
    whole batch's loss.

    Args:
        lengths: response tokens |y_i| of the responses at hand, any part of the batch.

    Raises:
        ConfigError: ``budget`` without a token budget.
    """
    if normalizer is Normalizer.response:
        return [minibatches / (num_rollouts * length) for length in lengths]
    if normalizer is Normalizer.token:
        return [minibatches / num_tokens] * len(lengths)
    if normalizer is Normalizer.constant:
        return [minibatches / (num_rollouts * max_new_tokens)] * len(lengths)
    if token_budget is None:
        raise ConfigError(
            "algorithm.normalizer=budget divides by rollout.token_budget, which is null; "
            "set it, or use normalizer=token or response"
        )
    return [minibatches / token_budget] * len(lengths)
