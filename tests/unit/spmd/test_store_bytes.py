import numpy as np
import torch

from asystem.spmd import store
from asystem.types import Finish, Trajectory


def test_arrays_are_counted_wherever_they_are() -> None:
    tokens = np.zeros(5, np.int32)
    rollout = Trajectory(1, 1, 1, tokens, tokens, np.zeros(5, np.float32), tokens, Finish.STOP)
    assert store.put([rollout, rollout]).num_bytes == 2 * 4 * 20
    assert store.put({"w": torch.zeros(3, 2, dtype=torch.bfloat16)}).num_bytes == 12
    assert store.put("text").num_bytes == 0
