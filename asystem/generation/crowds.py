"""Which rows of the running batch read a shared prefix together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from asystem.generation.kernels.attention import CROWD, Crowds
from asystem.generation.rows import Rows

_MIN_SHARED = 0.1  # share of all cached tokens that crowds must save, to be worth a second attention launch
_PREFIX_PART = 256  # tokens of a shared prefix that one program reads


class Sharing(NamedTuple):
    """How a step reads shared prefixes; powers of two, so that few graphs serve all. 0 crowds = each row for itself."""

    crowds: int  # places for them: programs that find theirs empty are not free
    splits: int  # parts that each prefix is cut into


ALONE = Sharing(0, 1)


class CrowdTable:
    """The crowds of the running batch, found anew whenever rows joined, left or moved."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        places = power_of_two(max(1, num_rows // 2))
        self._all = Crowds(
            torch.full((places, CROWD), -1, dtype=torch.int32, device=device),
            torch.zeros(places, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
        )
        self._seen: tuple[int, int] | None = None
        self._sharing = ALONE

    def of(self, batch: int, sharing: Sharing) -> Crowds | None:
        if not sharing.crowds:
            return None
        places = slice(0, sharing.crowds)
        return Crowds(self._all.rows[places], self._all.shared[places], self._all.skip[:batch])

    def refresh(self, rows: Rows, num_rows: int, block_size: int) -> Sharing:
        """Looks at the tables if need be, and decides whether reading prefixes together saves enough."""
        if self._seen == (rows.changes, num_rows):
            return self._sharing
        self._seen = (rows.changes, num_rows)
        table, position = rows.table[:num_rows].cpu().numpy(), rows.position[:num_rows].cpu().numpy()
        found = find_crowds(table, position, block_size)
        saved = sum(shared * (len(members) - 1) for members, shared in found)
        self._sharing = ALONE
        if found and saved >= _MIN_SHARED * (position + 1).sum():
            self._write(found)
            longest = max(shared for _, shared in found)
            self._sharing = Sharing(power_of_two(len(found)), min(16, power_of_two(-(-longest // _PREFIX_PART))))
        return self._sharing

    def _write(self, found: list[tuple[list[int], int]]) -> None:
        everything = (self._all.rows, self._all.shared, self._all.skip)
        members, shared, skip = (np.zeros(x.shape, np.int32) for x in everything)
        members[:] = -1
        for place, (rows, tokens) in enumerate(found):
            members[place, : len(rows)], shared[place], skip[rows] = rows, tokens, tokens
        for tensor, array in zip(everything, (members, shared, skip), strict=True):
            tensor.copy_(torch.from_numpy(array))


def find_crowds(
    table: npt.NDArray[np.int64], position: npt.NDArray[np.int64], block_size: int
) -> list[tuple[list[int], int]]:
    """Rows whose tables begin with the same blocks.

    Rows with equal tables stand beside each other in the order looked at; a crowd ends where the next row would lower
    what it saves, or shares more with the one after.

    Args:
        table: [n, M]. position: [n], of each row's newest token; blocks before it are full and never written again.

    Returns:
        (2 to `CROWD` rows, tokens that they share) of each crowd.
    """
    full = position // block_size
    order = sorted(range(len(table)), key=lambda row: (table[row, : full[row]].tobytes(), row))
    lines, limit = table[order], np.minimum(full[order][1:], full[order][:-1])
    equal = np.logical_and.accumulate(lines[1:] == lines[:-1], axis=1).sum(1)
    common = [*np.minimum(equal, limit).tolist(), 0]  # blocks that each row in order shares with the next one
    crowds: list[tuple[list[int], int]] = []
    members, shared = order[:1], 0
    for row, before, after in zip(order[1:], common[:-1], common[1:], strict=True):
        blocks = min(before, shared) if len(members) > 1 else before
        worse = blocks * len(members) < shared * (len(members) - 1)
        if len(members) == CROWD or not blocks or worse or after > before:
            crowds.append((members, shared))
            members, shared = [row], 0
        else:
            members, shared = [*members, row], blocks
    crowds.append((members, shared))
    return [(sorted(rows), blocks * block_size) for rows, blocks in crowds if len(rows) > 1]


def power_of_two(count: int) -> int:
    """The power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
