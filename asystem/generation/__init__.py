"""The native generation engine. `engine.Engine` is the way in; `runner.Runner` the seam for faster ways to compute."""

from asystem.generation.engine import Decoded, Engine
from asystem.generation.sequence import EngineRequest, Unfinished

__all__ = ["Decoded", "Engine", "EngineRequest", "Unfinished"]
