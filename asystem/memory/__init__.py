"""AMem: the machines that memory is planned for, what each phase holds of it, and how the rest sleeps."""

from asystem.memory.machine import CARDS, GIB, Card, Machine, card_named, machine_of, this_machine
from asystem.memory.mapped import MappedRegion, can_map
from asystem.memory.sleep import AMem, Moved

__all__ = [
    "AMem",
    "CARDS",
    "Card",
    "GIB",
    "Machine",
    "MappedRegion",
    "Moved",
    "can_map",
    "card_named",
    "machine_of",
    "this_machine",
]
