from collections.abc import Iterator

import pytest

from asystem.config import PlacementConfig, RuntimeConfig
from asystem.spmd import make_runtime


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray cluster for a module's tests: runtimes made meanwhile join it, and leave it standing."""
    with make_runtime(RuntimeConfig(), PlacementConfig()):
        yield
