"""Training: packed micro-batches, FSDP2 over ranks, checkpoints. `engine.TrainEngine` is the way in."""

from asystem.training.checkpoint import prune_checkpoints
from asystem.training.engine import TrainEngine
from asystem.training.losses import LossFn, supervised_loss

__all__ = ["LossFn", "TrainEngine", "prune_checkpoints", "supervised_loss"]
