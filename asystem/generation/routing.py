"""Which experts computed each token, kept beside its keys and values.

So what shares, copies, frees or computes those again does the same with the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asystem.models.decoder import Decoder
from asystem.models.moe import Router, record_routing
from asystem.models.spec import ModelSpec


class RoutingCache:
    """Choices of all tokens in the KV pool.

    Attributes:
        data: [blocks * block_size + 1, layers with experts, top_k]; the last place is for what nobody reads.
    """

    def __init__(self, model: Decoder, num_blocks: int, block_size: int, device: torch.device) -> None:
        moe = model.spec.moe
        assert moe is not None, "a dense model has no experts to choose"
        shape = (num_blocks * block_size + 1, len(model.spec.expert_layers), moe.top_k)
        self.data = torch.zeros(shape, dtype=moe.choice_dtype, device=device)
        self.block_size = block_size
        self._routers = [module for module in model.modules() if isinstance(module, Router)]

    @contextmanager
    def keep(self, blocks: Tensor, offsets: Tensor, active: Tensor | None = None) -> Iterator[None]:
        """Keeps what the model chooses meanwhile, for tokens at [T] `offsets` of [T] `blocks`; `active` [T] or all."""
        with record_routing(self._routers) as chosen:
            yield
        places = blocks * self.block_size + offsets
        if active is not None:
            places = torch.where(active, places, len(self.data) - 1)
        self.data[places] = torch.stack(chosen, 1).to(self.data.dtype)

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """As `kv_cache.KVCache.copy_blocks`."""
        blocks = self.data[:-1].view(-1, self.block_size, *self.data.shape[1:])
        source, destination = (torch.tensor(x, device=self.data.device) for x in (sources, destinations))
        blocks[destination] = blocks[source]

    def read(self, blocks: Sequence[int], num_tokens: int) -> npt.NDArray[np.uint8 | np.int16]:
        """The choices of a sequence's first tokens: [num_tokens, layers with experts, top_k]."""
        places = torch.arange(num_tokens)
        places = torch.tensor(blocks)[places // self.block_size] * self.block_size + places % self.block_size
        found: npt.NDArray[np.uint8 | np.int16] = self.data[places.to(self.data.device)].cpu().numpy()
        return found


def routing_bytes(spec: ModelSpec) -> int:
    """Of one token."""
    return 0 if spec.moe is None else len(spec.expert_layers) * spec.moe.top_k * spec.moe.choice_dtype.itemsize
