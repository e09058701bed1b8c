"""AState: how weights travel from training to generation."""

from asystem.state.inbox import Inbox
from asystem.state.outbox import Outbox
from asystem.state.payload import Place, WeightPayload
from asystem.state.plan import Layout, Move, plan_moves
from asystem.state.receiving import StreamInbox
from asystem.state.sending import StreamOutbox
from asystem.state.stream import Announced, Terms
from asystem.state.topology import choose_transport

Published = WeightPayload | Announced
"""What a rank of training hands over at a publication."""

__all__ = [
    "Announced",
    "Inbox",
    "Layout",
    "Move",
    "Outbox",
    "Place",
    "Published",
    "StreamInbox",
    "StreamOutbox",
    "Terms",
    "WeightPayload",
    "choose_transport",
    "plan_moves",
]
