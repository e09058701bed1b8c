"""Direct preference optimization: a loss on how much likelier than under a reference the chosen answer became.

    h = log π(chosen) / π_ref(chosen) - log π(rejected) / π_ref(rejected)

    sigmoid   -(1 - ε) log σ(β h) - ε log σ(-β h)      Rafailov et al. 2023, eq. 7; ε label smoothing (Mitchell 2023)
    ipo       (h - 1 / (2 β))²                          Azar et al. 2023, eq. 17, their τ being β

For ipo, h is of log-probabilities averaged over each answer's tokens, as its authors advise: the target, 1 / (2 β), is
the same for short and long answers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from asystem.config import DpoConfig, DpoLoss


def preference_losses(log_ratio: Tensor, cfg: DpoConfig) -> Tensor:
    """Losses [N] of pairs with h = ``log_ratio`` [N]."""
    if cfg.loss is DpoLoss.ipo:
        return (log_ratio - 1 / (2 * cfg.beta)).square()
    scaled = cfg.beta * log_ratio
    return -(1 - cfg.label_smoothing) * F.logsigmoid(scaled) - cfg.label_smoothing * F.logsigmoid(-scaled)
