"""AState: how weights travel from training to generation."""

from asystem.state.inbox import Inbox
from asystem.state.outbox import Outbox
from asystem.state.payload import Place, WeightPayload
from asystem.state.plan import Layout, Move, plan_moves
from asystem.state.topology import choose_transport

__all__ = ["Inbox", "Layout", "Move", "Outbox", "Place", "WeightPayload", "choose_transport", "plan_moves"]
