"""Advantages, surrogates, mismatch corrections, normalisers, penalties, preferences: pure functions of tensors."""

from asystem.algorithms.advantages import advantages
from asystem.algorithms.choose import Algorithm, choose
from asystem.algorithms.corrections import correction_weights
from asystem.algorithms.loss import policy_loss
from asystem.algorithms.normalizers import token_weights
from asystem.algorithms.penalties import overlong_penalty
from asystem.algorithms.preference import preference_losses
from asystem.algorithms.values import gae, value_loss

__all__ = [
    "Algorithm",
    "advantages",
    "choose",
    "correction_weights",
    "gae",
    "overlong_penalty",
    "policy_loss",
    "preference_losses",
    "token_weights",
    "value_loss",
]
