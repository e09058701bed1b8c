"""The SPMD programs: what runs on the ranks of each worker group."""

from asystem.workers.finetune import FinetuneWorker
from asystem.workers.generate import GenerateWorker
from asystem.workers.hybrid import HybridWorker
from asystem.workers.reward import RewardWorker
from asystem.workers.train import TrainWorker

__all__ = ["FinetuneWorker", "GenerateWorker", "HybridWorker", "RewardWorker", "TrainWorker"]
