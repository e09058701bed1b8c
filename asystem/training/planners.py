"""How torch.distributed.checkpoint is told which blocks of a tensor a rank holds, to write them or to fill them.

Its own planners know tensors and DTensors; a rank's part of fused matrices, cut over ranks and sharded besides, is
several blocks. Files are the same whoever holds what: blocks of whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from asystem.models import Box, Held


class BlockSavePlanner(DefaultSavePlanner):
    """Writes each block; one that several ranks hold is written by one of them."""

    def __init__(self, tensors: Mapping[str, Held]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = _by_place(tensors)
        self._items = [_item(name, held, box) for name, held in tensors.items() for box, _ in held.blocks]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._blocks[_place(index)]


class BlockLoadPlanner(DefaultLoadPlanner):
    """Fills each block, from whatever blocks the files hold."""

    def __init__(self, tensors: Mapping[str, Held]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._blocks = tensors, _by_place(tensors)

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata), "set up before it plans"
        items = []
        for name, held in self._tensors.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata), f"{name} was saved as a tensor"
            items += create_read_items_for_chunk_list(name, stored, [_chunk(box) for box, _ in held.blocks])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._blocks[_place(index)]


def _by_place(tensors: Mapping[str, Held]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    return {(name, box.start): block for name, held in tensors.items() for box, block in held.blocks}


def _place(index: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(index.offset or ())


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.shape))


def _item(name: str, held: Held, box: Box) -> WriteItem:
    data = TensorWriteData(_chunk(box), TensorProperties(dtype=held.dtype), torch.Size(held.shape))
    return WriteItem(MetadataIndex(name, torch.Size(box.start)), WriteItemType.SHARD, tensor_data=data)
