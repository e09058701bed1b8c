"""The training engine: packed micro-batches in, one optimizer step out, on one process or under FSDP2."""

from asystem.training.engine import LossFunction, TrainEngine
from asystem.training.losses import supervised_loss

__all__ = ["LossFunction", "TrainEngine", "supervised_loss"]
