"""What a configuration may name is what there is."""

from asystem.algorithms.advantages import ADVANTAGES
from asystem.algorithms.corrections import CORRECTIONS
from asystem.algorithms.surrogates import SURROGATES
from asystem.checks import algorithm as checks


def test_the_checked_names_are_the_functions() -> None:
    assert tuple(ADVANTAGES) == checks.ADVANTAGES
    assert tuple(SURROGATES) == checks.SURROGATES
    assert tuple(CORRECTIONS) == checks.CORRECTIONS
