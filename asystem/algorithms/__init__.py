"""Advantages, mismatch corrections and policy losses: pure functions of tensors."""

from asystem.algorithms.advantages import group_advantages
from asystem.algorithms.corrections import correction_weights
from asystem.algorithms.loss import policy_loss
from asystem.algorithms.normalizers import token_weights
from asystem.algorithms.surrogates import clipped_surrogate

__all__ = ["clipped_surrogate", "correction_weights", "group_advantages", "policy_loss", "token_weights"]
