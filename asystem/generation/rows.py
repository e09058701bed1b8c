"""The running batch as tensors: one row a sequence, rows 0..n-1 in use, all on the model's device.

A decode step reads and writes only these tensors, so that a step needs no Python object a token and no copy to or
from the host; a runner may capture whole steps and run several before anyone looks (see `runner.Runner`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asystem.generation.sampler import stream_key
from asystem.generation.sequence import Sequence
from asystem.types import Finish

RUNNING, STOPPED, FULL = 0, 1, 2  # values of Rows.done
FINISH = {STOPPED: Finish.STOP, FULL: Finish.LENGTH}


class Response(NamedTuple):
    """One row's response so far, copied to the host: [T] each."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]


class Rows:
    """State of up to R running sequences.

    Attributes:
        drawn: [R] int64, response tokens so far.
        done: [R] int64, RUNNING, STOPPED or FULL.
        last_token, position: [R] int64, the newest token, whose keys and values are not in the cache yet, and its
            place in the sequence.
        key: [R] int64, stream of random numbers (`sampler.uniform`).
        limit: [R] int64, response tokens at most. heeds_stop: [R] int64, 1 where stop tokens end the sequence.
        temperature, top_p: [R] float32. top_k: [R] int64, the vocabulary's size where all tokens are kept.
        table: [R, M] int64, KV blocks.
        tokens, logprobs, versions: [R, max_length], the responses.
        changes: how often rows joined or moved, for who keeps what it derives from their tables.
    """

    _INTS = ("drawn", "done", "last_token", "position", "key", "limit", "heeds_stop", "top_k")

    def __init__(
        self, num_rows: int, max_length: int, blocks_per_row: int, vocab_size: int, seed: int, device: torch.device
    ) -> None:
        self.vocab_size, self.seed, self.device, self.changes = vocab_size, seed, device, 0
        # One tensor for all integers and one for all floats: rows move and join with one copy each.
        self._ints = torch.zeros(len(self._INTS), num_rows, dtype=torch.int64, device=device)
        self._floats = torch.zeros(2, num_rows, dtype=torch.float32, device=device)
        (self.drawn, self.done, self.last_token, self.position, self.key, self.limit, self.heeds_stop, self.top_k) = (
            self._ints.unbind()
        )
        self.temperature, self.top_p = self._floats.unbind()
        self.table = torch.zeros(num_rows, blocks_per_row, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(num_rows, max_length, dtype=torch.int32, device=device)
        self.versions = torch.zeros_like(self.tokens)
        self.logprobs = torch.zeros(num_rows, max_length, dtype=torch.float32, device=device)
        self._row = torch.arange(num_rows, device=device)

    @property
    def num_bytes(self) -> int:
        tensors = (self._ints, self._floats, self.table, self.tokens, self.versions, self.logprobs)
        return sum(t.nbytes for t in tensors)

    def join(self, first: int, sequences: list[Sequence]) -> None:
        """Fills rows `first`, `first + 1`, ... with sequences, those that continue with their response so far."""
        self.changes += 1
        rows = slice(first, first + len(sequences))
        ints, floats = zip(*(self._encode(s) for s in sequences), strict=True)
        self._ints[:, rows] = torch.tensor(ints).T.to(self.device)
        self._floats[:, rows] = torch.tensor(floats, dtype=torch.float32).T.to(self.device)
        table = np.zeros((len(sequences), self.table.shape[1]), np.int64)
        for line, sequence in zip(table, sequences, strict=True):
            line[: len(sequence.blocks)] = sequence.blocks
        self.table[rows] = torch.from_numpy(table).to(self.device)
        for row, sequence in enumerate(sequences, start=first):
            if not sequence.fresh:
                self._restore(row, sequence)

    def _encode(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        request, params = sequence.request, sequence.request.params
        greedy = params.temperature == 0  # top_k and top_p do not touch the likeliest token nor its log-probability
        newest = int(sequence.tokens[-1]) if len(sequence.tokens) else int(request.prompt_tokens[-1])
        ints = [
            len(sequence.tokens),
            RUNNING,
            newest,
            sequence.length - 1,
            stream_key(self.seed, request.rollout),
            params.max_new_tokens,
            int(not params.ignore_eos),
            self.vocab_size if greedy or params.top_k == 0 else params.top_k,
        ]
        return ints, [params.temperature, 1.0 if greedy else params.top_p]

    def _restore(self, row: int, sequence: Sequence) -> None:
        length = len(sequence.tokens)
        self.tokens[row, :length] = torch.tensor(sequence.tokens)
        self.logprobs[row, :length] = torch.tensor(sequence.logprobs)
        self.versions[row, :length] = torch.tensor(sequence.versions)

    def record(self, rows: slice, tokens: Tensor, logprobs: Tensor, stops: Tensor, version: int) -> None:
        """Appends one sampled token to each row and marks those that end with it.

        Args:
            tokens: [n] int64. logprobs: [n] float32. stops: [V] bool, the stop tokens. version: of the weights.
        """
        index, drawn = self._row[rows], self.drawn[rows]
        self.tokens[index, drawn] = tokens.to(torch.int32)
        self.logprobs[index, drawn] = logprobs
        self.versions[index, drawn] = version
        self.last_token[rows] = tokens
        self.position[rows] += 1
        drawn += 1
        stopped = stops[tokens] & (self.heeds_stop[rows] == 1)
        self.done[rows] = torch.where(stopped, STOPPED, torch.where(drawn >= self.limit[rows], FULL, RUNNING))

    def progress(self, first: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`drawn` and `done` of rows first..end-1, on the host in one copy."""
        drawn, done = self._ints[:2, first:end].cpu().numpy().copy()
        return drawn, done

    def extend_tables(self, rows: list[int], places: list[int], blocks: list[int]) -> None:
        """Writes new blocks at the given places of the given rows' tables."""
        entries = torch.tensor([rows, places, blocks])
        if self.device.type == "cuda":
            entries = entries.pin_memory()  # or the copy would wait for the steps under way
        row, place, block = entries.to(self.device, non_blocking=True)
        self.table[row, place] = block

    def responses(self, rows: list[int]) -> list[Response]:
        """Copies the responses of some rows to the host."""
        index = torch.tensor(rows, device=self.device)
        drawn = self.drawn[index].tolist()
        longest = max(drawn)
        arrays = [x[index, :longest].cpu().numpy() for x in (self.tokens, self.logprobs, self.versions)]
        return [Response(*(x[i, :n].copy() for x in arrays)) for i, n in enumerate(drawn)]

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Copies rows: (source, destination) pairs that do not overlap."""
        self.changes += 1
        source, destination = torch.tensor(moves).T.to(self.device)
        self._ints[:, destination] = self._ints[:, source]
        self._floats[:, destination] = self._floats[:, source]
        for tensor in (self.table, self.tokens, self.logprobs, self.versions):
            tensor[destination] = tensor[source]
