"""AMem: the machines that memory is planned for, and what each phase holds of it."""

from asystem.memory.machine import CARDS, GIB, Card, Machine, card_named, machine_of, this_machine

__all__ = ["CARDS", "GIB", "Card", "Machine", "card_named", "machine_of", "this_machine"]
