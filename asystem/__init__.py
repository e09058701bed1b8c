"""asystem: a single controller that orchestrates SPMD worker groups for asynchronous reinforcement learning."""

__version__ = "0.1.0"
