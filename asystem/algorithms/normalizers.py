"""Normalisers: the share of one token in the loss of the whole batch.

Made from counts of the global batch, never of a micro-batch, a mini-batch part or a rank; and of all response tokens:
tokens that a correction masks stay in the denominator, as in the Ring-1T report's 1/|y|.
"""

from __future__ import annotations

from asystem.config import Normalizer


def token_weight(
    kind: Normalizer, *, length: int, num_rollouts: int, num_tokens: int, token_budget: int | None
) -> float:
    """Weight of each token of a response of ``length`` tokens.

    response: 1 / (length · rollouts), GRPO and IcePop.  token: 1 / tokens, DAPO.  budget: 1/Φ, C3PO (Ring-lite report,
    §3.2), constant from step to step; without a Φ it is refused by `Config.check`.

    Args:
        num_rollouts, num_tokens: of the global batch.
    """
    if kind is Normalizer.response:
        return 1.0 / (length * num_rollouts)
    if kind is Normalizer.token:
        return 1.0 / num_tokens
    assert token_budget is not None, "the budget normalizer without rollout.token_budget"
    return 1.0 / token_budget
