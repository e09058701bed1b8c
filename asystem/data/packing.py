"""Samples packed one after another into micro-batches, without padding.

    tokens     p0 p1 p2 y0 y1 | p0 y0 y1 y2          two sequences: prompt p, response y
    labels     p1 p2 y0 y1 -- | y0 y1 y2 --          the next token of the same sequence
    mask        .  .  x  x  . |  x  x  x  .          the label is a response token

Everything about a token (advantage, sampled log-probability, weight, version) stands where it is the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asystem.errors import DataError

NO_LABEL = -100  # torch's cross_entropy ignores it


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on.

    Attributes:
        prompt_tokens: [P], at least one. tokens: [R], the response, at least one: these are trained.
        token_weight: each response token's weight in the loss (`algorithms.normalizers`).
        advantage: of the response; unused by the supervised loss.
        infer_logprobs: [R] as sampled; None (a demonstration) reads as 0.
        versions: [R] weight version that sampled each token; None reads as -1.
        rollout: its number; -1 for a demonstration.
        trained: [R] false at response tokens that are context only, as later user turns; None = all are trained.
        routing: [P + R - 1, layers with experts, top_k], the experts that compute each token but the last
            (`Trajectory.routing`); None = those that the trained model chooses.
    """

    prompt_tokens: npt.ArrayLike
    tokens: npt.ArrayLike
    token_weight: float
    advantage: float = 0.0
    infer_logprobs: npt.ArrayLike | None = None
    versions: npt.ArrayLike | None = None
    rollout: int = -1
    trained: npt.ArrayLike | None = None
    routing: npt.NDArray[np.integer[Any]] | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return np.size(self.prompt_tokens) + np.size(self.tokens)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N sequences in T tokens.

    Attributes:
        tokens, positions: [T] int64. cu_seqlens: [N + 1] int32. max_seqlen: tokens of the longest sequence.
        labels: [T] int64, the next token or -100. mask: [T] bool, true where the label is a trained token.
        label_rows: [M] int64, where the mask is true: the rows whose logits are needed.
        infer_logprobs, advantages, token_weights: [T] float32, 0 where masked out. versions: [T] int32, -1 there.
        sequence: [T] int32, the number of the sequence within this batch. rollouts: N numbers.
        starts: `cu_seqlens` on the host.
        old_logprobs: [T] from before the batch's first update, when one batch makes several.
        ref_logprobs: [T] of the frozen reference, where there is one.
        old_values, returns: [T] of the value head from before the first update, and what they should have been.
        routing: [T, layers with experts, top_k] int16, the experts that compute each token; -1 = those that the model
            chooses: at the last token of a sequence, which nothing is read from, and where a sample brings none. None =
            no sample brings any.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    mask: Tensor
    label_rows: Tensor
    infer_logprobs: Tensor
    advantages: Tensor
    token_weights: Tensor
    versions: Tensor
    sequence: Tensor
    rollouts: list[int]
    starts: list[int]
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    routing: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            values[name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        return PackedBatch(**values)


def pack(samples: Sequence[Sample], budget: int) -> list[PackedBatch]:
    """Packs samples into as few micro-batches of at most ``budget`` tokens as first-fit-decreasing finds, evens them
    out, and puts the largest first, so that what does not fit in memory fails at once.

    A sequence longer than the budget gets a micro-batch of its own.

    Raises:
        DataError: an empty prompt or response, or arrays of unequal length, with the rollout's number.
    """
    return pack_groups([[sample] for sample in samples], budget)


def pack_groups(groups: Sequence[Sequence[Sample]], budget: int) -> list[PackedBatch]:
    """The same with groups that stay together, each in its order: what a loss compares must be in one micro-batch."""
    lengths = [sum(_checked_length(sample) for sample in group) for group in groups]
    bins = sorted(plan_bins(lengths, budget), key=lambda rows: -sum(lengths[row] for row in rows))
    return [pack_one([sample for row in rows for sample in groups[row]]) for rows in bins]


def plan_bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Which rows share a micro-batch, longest first: no bin over the budget but for single rows that are longer
    themselves."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    bins: list[list[int]] = []
    loads: list[int] = []
    for row in order:
        fit = next((i for i, load in enumerate(loads) if load + lengths[row] <= budget), None)
        if fit is None:
            bins.append([])
            loads.append(0)
            fit = len(bins) - 1
        bins[fit].append(row)
        loads[fit] += lengths[row]
    # Longest first: attention takes long ones one by one, and all that are short or equally long at once.
    by_length = {row: place for place, row in enumerate(order)}
    return [sorted(rows, key=by_length.__getitem__) for rows in _evened(order, lengths, budget, len(bins)) or bins]


def pack_one(samples: Sequence[Sample]) -> PackedBatch:
    """One micro-batch of all these samples, in their order."""
    prompts = [np.asarray(sample.prompt_tokens, np.int64) for sample in samples]
    responses = [np.asarray(sample.tokens, np.int64) for sample in samples]
    tokens = np.concatenate([part for pair in zip(prompts, responses, strict=True) for part in pair])
    lengths = np.array([sample.length for sample in samples])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.append(tokens[1:], NO_LABEL)
    labels[starts[1:] - 1] = NO_LABEL
    # Response token j of a sequence, at start + P + j, is the label of the row before it.
    label_rows = np.concatenate(
        [
            np.arange(len(response)) + start + len(prompt) - 1
            for start, prompt, response in zip(starts[:-1], prompts, responses, strict=True)
        ]
    )

    def flat(values: Sequence[npt.ArrayLike]) -> npt.NDArray[Any]:
        """Each sample's [R] values, or its one value for all R, one sample after another."""
        return np.concatenate([np.broadcast_to(v, len(r)) for v, r in zip(values, responses, strict=True)])

    trained = flat([_or(sample.trained, True) for sample in samples]).astype(np.bool_)
    label_rows = label_rows[trained]

    def at_labels(values: Sequence[npt.ArrayLike], dtype: type[np.generic], default: float) -> Tensor:
        """[T]: the values where trained tokens are the label."""
        row = np.full(len(tokens), default, dtype)
        row[label_rows] = flat(values)[trained]
        return torch.from_numpy(row)

    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        labels=torch.from_numpy(labels),
        mask=at_labels([True] * len(samples), np.bool_, False),
        label_rows=torch.from_numpy(label_rows),
        infer_logprobs=at_labels([_or(s.infer_logprobs, 0.0) for s in samples], np.float32, 0.0),
        advantages=at_labels([s.advantage for s in samples], np.float32, 0.0),
        token_weights=at_labels([s.token_weight for s in samples], np.float32, 0.0),
        versions=at_labels([_or(s.versions, -1) for s in samples], np.int32, -1),
        sequence=torch.from_numpy(np.repeat(np.arange(len(samples), dtype=np.int32), lengths)),
        rollouts=[sample.rollout for sample in samples],
        starts=starts.tolist(),
        routing=_routing(samples),
    )


def _routing(samples: Sequence[Sample]) -> Tensor | None:
    shape = next((sample.routing.shape[1:] for sample in samples if sample.routing is not None), None)
    if shape is None:
        return None
    packed = np.full((sum(sample.length for sample in samples), *shape), -1, np.int16)
    start = 0
    for sample in samples:
        if sample.routing is not None:
            packed[start : start + sample.length - 1] = sample.routing
        start += sample.length
    return torch.from_numpy(packed)


def _or(values: npt.ArrayLike | None, default: float) -> npt.ArrayLike:
    return default if values is None else values


def _evened(order: Sequence[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """The same number of bins, each row to the emptiest; None if one then overflows."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for row in order:
        emptiest = loads.index(min(loads))
        if bins[emptiest] and loads[emptiest] + lengths[row] > budget:
            return None
        bins[emptiest].append(row)
        loads[emptiest] += lengths[row]
    return bins


def _checked_length(sample: Sample) -> int:
    num_prompt, num_response = np.size(sample.prompt_tokens), np.size(sample.tokens)
    if not num_prompt or not num_response:
        raise DataError(
            f"rollout {sample.rollout} has {num_prompt} prompt and {num_response} response tokens; "
            "each needs at least 1"
        )
    for name in ("infer_logprobs", "versions", "trained"):
        values = getattr(sample, name)
        if values is not None and np.shape(values) != (num_response,):
            raise DataError(f"rollout {sample.rollout}: {name} {np.shape(values)} for {num_response} response tokens")
    if sample.routing is not None and len(sample.routing) != sample.length - 1:
        raise DataError(
            f"rollout {sample.rollout}: experts of {len(sample.routing)} tokens, not of {sample.length - 1}"
        )
    return num_prompt + num_response
