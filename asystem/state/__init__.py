"""AState: how weights travel from training to generation."""

from asystem.state.plan import Layout, Move, plan_moves
from asystem.state.transport import Inbox, Outbox, Place, WeightPayload

__all__ = ["Inbox", "Layout", "Move", "Outbox", "Place", "WeightPayload", "plan_moves"]
