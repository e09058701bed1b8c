"""A tiny decoder and samples for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from asystem.config import TrainingConfig
from asystem.data.packing import Sample
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.training import TrainEngine

VOCAB = 23


def make_model(seed: int = 0, **changes: Any) -> Decoder:
    shape: dict[str, Any] = {"qk_norm": True, "tie_embeddings": True} | changes
    family = "qwen3_moe" if "moe" in changes else "qwen3"
    model = Decoder(ModelSpec(family, VOCAB, 16, 24, 2, 4, 2, 4, **shape))
    init_weights(model, seed, std=0.2)
    return model


def make_engine(model: Decoder | None = None, **changes: Any) -> TrainEngine:
    names = ("dtype", "temperature", "world_size", "entropy_gradient", "value_head")
    options = {name: changes.pop(name) for name in names if name in changes}
    cfg = TrainingConfig(**({"lr": 1e-2, "eps": 1e-4} | changes))
    return TrainEngine(model or make_model(), cfg, device="cpu", total_steps=100, **options)


def make_samples(lengths: list[int], seed: int = 0) -> list[Sample]:
    """Samples whose weights are those of a mean over all response tokens."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            rng.integers(0, VOCAB, 1 + index % 3),
            rng.integers(0, VOCAB, length),
            1 / sum(lengths),
            advantage=float(rng.normal()),
            infer_logprobs=rng.normal(-3.0, 0.1, length).astype(np.float32),
            rollout=100 + index,
        )
        for index, length in enumerate(lengths)
    ]


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
