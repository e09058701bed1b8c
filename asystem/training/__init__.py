"""Training: packed micro-batches, FSDP2 over ranks, checkpoints. `engine.TrainEngine` is the way in."""

from asystem.training.checkpoint import find_checkpoint
from asystem.training.engine import TrainEngine
from asystem.training.export import describe_model, export_checkpoint
from asystem.training.flops import Meter
from asystem.training.losses import LossFn, supervised_loss
from asystem.training.memory import TrainingPlan, TrainMemory, train_memory
from asystem.training.preferences import PreferenceLoss, sequence_sums
from asystem.training.ranks import Ranks
from asystem.training.saving import Saver
from asystem.training.values import with_token_advantages

__all__ = [
    "LossFn",
    "Meter",
    "PreferenceLoss",
    "Ranks",
    "Saver",
    "TrainEngine",
    "TrainMemory",
    "TrainingPlan",
    "describe_model",
    "export_checkpoint",
    "find_checkpoint",
    "sequence_sums",
    "supervised_loss",
    "train_memory",
    "with_token_advantages",
]
