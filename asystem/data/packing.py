"""Packed sequences: many samples on one token axis, cut into micro-batches by a token budget, never padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(slots=True)
class Sample:
    """A prompt and its response, with what the loss needs of each response token.

    Attributes:
        prompt_tokens [P], tokens [T]: int32. logprobs [T]: float32 of the inference engine; zeros when supervised.
        weight: of each of its tokens in the loss; the normaliser's business, made from counts of the whole batch.
    """

    prompt_tokens: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    weight: float
    advantage: float = 0.0
    rollout: int = -1

    @property
    def length(self) -> int:
        return len(self.prompt_tokens) + len(self.tokens)


@dataclass(slots=True)
class PackedBatch:
    """Samples one after another on a token axis of length T. What stands at t is about the token at t + 1.

    Attributes:
        tokens, positions: [T] int64. cu_seqlens: [N + 1] int32. max_seqlen: tokens of the longest sample.
        labels: [T] int64, the next token of the same sample; 0 where there is none.
        mask: [T] bool, True where the label is a response token. Prompts carry no loss.
        logprobs, advantages, weights: [T] float32, 0 outside the mask.
        rollouts: N rollout numbers.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    rollouts: list[int]

    def to(self, device: torch.device) -> PackedBatch:
        """Itself on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "positions", "cu_seqlens", "labels", "mask", "logprobs", "advantages", "weights")
        }
        return PackedBatch(max_seqlen=self.max_seqlen, rollouts=self.rollouts, **moved)

    def per_sample(self, values: Tensor) -> list[Tensor]:
        """Cuts values [T] into the response parts of each sample, each [its response's length]."""
        starts = self.cu_seqlens.tolist()
        spans = zip(starts[:-1], starts[1:], strict=True)
        return [values[start:end][self.mask[start:end]] for start, end in spans]


def pack(samples: Sequence[Sample], max_tokens: int) -> list[PackedBatch]:
    """First-fit by falling length into micro-batches of at most ``max_tokens``, the fullest first.

    The fullest first, so that memory fails at the first micro-batch or never. A sample that is longer than the budget
    has a micro-batch of its own. Samples keep their order within a micro-batch.
    """
    bins: list[list[int]] = []
    filled: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: (-samples[i].length, i)):
        length = samples[index].length
        fit = next((b for b, tokens in enumerate(filled) if tokens + length <= max_tokens), None)
        if fit is None:
            bins.append([])
            filled.append(0)
            fit = len(bins) - 1
        bins[fit].append(index)
        filled[fit] += length
    order = sorted(range(len(bins)), key=lambda b: (-filled[b], b))
    return [_packed([samples[index] for index in sorted(bins[b])]) for b in order]


def placeholder() -> PackedBatch:
    """One token without loss: what a rank computes while others still have micro-batches and collectives to share."""
    nothing = np.zeros(0, dtype=np.int32)
    return _packed([Sample(np.zeros(2, dtype=np.int32), nothing, np.zeros(0, dtype=np.float32), 0.0)])


def _packed(samples: list[Sample]) -> PackedBatch:
    lengths = [sample.length for sample in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([part for sample in samples for part in (sample.prompt_tokens, sample.tokens)])
    total = len(tokens)
    mask, logprobs, advantages, weights = (np.zeros(total, dtype=t) for t in (bool, *(np.float32,) * 3))
    labels = np.zeros(total, dtype=np.int64)
    for start, sample in zip(starts, samples, strict=False):
        first = start + len(sample.prompt_tokens) - 1  # predicts the first response token
        response = slice(first, first + len(sample.tokens))
        labels[start : start + sample.length - 1] = tokens[start + 1 : start + sample.length]
        mask[response] = True
        logprobs[response] = sample.logprobs
        advantages[response] = sample.advantage
        weights[response] = sample.weight
    return PackedBatch(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=max(lengths),
        labels=torch.from_numpy(labels),
        mask=torch.from_numpy(mask),
        logprobs=torch.from_numpy(logprobs),
        advantages=torch.from_numpy(advantages),
        weights=torch.from_numpy(weights),
        rollouts=[sample.rollout for sample in samples],
    )
