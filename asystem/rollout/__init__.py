"""C3PO++: which rollouts are in flight, when a window hands over, and what is purged. Pure Python: no torch, no Ray."""

from asystem.rollout.budget import TokenBudget
from asystem.rollout.curriculum import CURRICULA, Chance
from asystem.rollout.lengths import drawn_length
from asystem.rollout.pool import Group, Pool, Window
from asystem.rollout.prompts import PromptOrder

__all__ = ["CURRICULA", "Chance", "Group", "Pool", "PromptOrder", "TokenBudget", "Window", "drawn_length"]
