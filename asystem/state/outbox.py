"""AState through buffers, the sending side: every rank of training writes what it holds; those that need it read.

Nothing is gathered: a rank's part of the weights is written into a buffer of its own, and copied from there into the
parameters of each replica. A tied head is the embedding and goes once. Under adapters, what they leave frozen goes with
the first publication alone.

One buffer is enough for publication after publication: the controller awaits `load_weights` of all readers before it
asks for the next update, so nothing is overwritten that somebody still reads. Generation decodes while it is written.

Parameters that are sent as they are live in the buffer from the first publication on, so that later ones copy nothing
here: whole ones on the buffer's device and in the dtype on the wire. Shards, blocks of a cut model and merged matrices
are copied each time. As long as parameters stay where they are, so does all that copies and checksums need of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asystem.config import Transport
from asystem.errors import CapacityError
from asystem.models import PlainWeight, plain_weights
from asystem.spmd import Buffer, DeviceBuffer, SharedBuffer
from asystem.state.checksum import Checksums, Part, lazy_checksums, settled
from asystem.state.payload import Pair, WeightPayload, copy_all, lay_out


class Outbox:
    """A rank's buffer, in which each publication replaces the one before; it must have been read by then.

    Args:
        model: its parameters; a rank of several has its part of each.
        dtype: on the wire; None = as the parameters are.
        verify_every: publications of which the first brings checksums; 0 = none does.
        transport: whose memory the buffer is; auto = this process's, for readers in it.
        rank: of training.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        verify_every: int = 1,
        transport: Transport = Transport.auto,
        rank: int = 0,
    ) -> None:
        self.model, self.dtype, self.verify_every = model, dtype, verify_every
        self.transport, self.rank = transport, rank
        self._seen: list[tuple[int, int]] = []
        self._weights: list[PlainWeight] = []
        self._frozen: list[PlainWeight] = []
        self._changing: _Part | None = None
        self._once: WeightPayload | None = None
        self._published = 0

    @torch.no_grad()
    def write(self) -> WeightPayload:
        """Copies what this rank holds, adapters merged into the matrices that they stand beside: with adapters, whose
        shards are gathered, all ranks call it in step."""
        self._look()
        verify = self.verify_every > 0 and self._published % self.verify_every == 0
        frozen = [] if self._published else self._frozen
        if self._changing is None:
            self._changing = _Part(self._weights, self)
        # What goes once is held until all have read it, which is when the next publication is asked for.
        self._once = _Part(frozen, self, lasting=False).write(frozen, verify) if frozen else None
        self._published += 1
        return self._changing.write(self._weights, verify, self._once)

    def _look(self) -> None:
        """Looks through the model again, unless its parameters are the same and lie where they lay; FSDP has new ones
        at times, whose addresses say nothing."""
        parameters = _parameters(self.model)
        is_plain = all(type(parameter) is nn.Parameter for parameter in parameters)
        seen = [(id(parameter), parameter.data_ptr()) for parameter in parameters] if is_plain else []
        if not seen or seen != self._seen:
            weights = plain_weights(self.model)
            self._weights = [weight for weight in weights if not weight.frozen]
            self._frozen = [weight for weight in weights if weight.frozen]
            self._seen = seen


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """All of a model's, tied ones more than once."""
    # Not `Module.parameters`: with names, and to tell tied ones apart, it takes five times as long at each publication.
    found, modules = [], [model]
    for module in modules:  # which grow
        modules += [child for child in module._modules.values() if child is not None]
        found += [parameter for parameter in module._parameters.values() if parameter is not None]
    return found


class _Part:
    """A buffer for some of a rank's weights."""

    def __init__(self, weights: Sequence[PlainWeight], outbox: Outbox, *, lasting: bool = True) -> None:
        self.dtype, self.rank = outbox.dtype, outbox.rank
        self.places = lay_out([(w.name, w.shape, w.box, self.dtype or w.dtype) for w in weights])
        device = next(outbox.model.parameters()).device
        self.buffer = allocate(outbox.transport, self.places[-1].end, device, lasting)
        self._targets = [place.of(self.buffer.flat()) for place in self.places]
        self._seen: Sequence[PlainWeight] = ()
        self._merged: list[int] = []  # weights that are computed each time, by the number of their place
        self._blocks: dict[int, Tensor] = {}  # all others, which stay where they are as long as these weights are seen
        self._pairs: list[Pair] = []
        self._checksums: Checksums | None = None  # of them, unless they are converted on their way

    def write(self, weights: Sequence[PlainWeight], verify: bool, frozen: WeightPayload | None = None) -> WeightPayload:
        """Copies the weights, in the order of the places."""
        is_new = weights is not self._seen
        if is_new:
            self._seen, self._merged = weights, [index for index, w in enumerate(weights) if w.is_merged]
            self._stand({index: w.local()[1] for index, w in enumerate(weights) if not w.is_merged})
        sums: list[Tensor] = []  # of the numbers before they are copied
        for index in self._merged:
            block = weights[index].local()[1]
            sums += [lazy_checksums([self._sent(index, block)])] if verify else []
            copy_all([(self._targets[index], block)])
        sums += [self._sums()] if verify else []
        copy_all(self._pairs)
        if is_new and self.buffer.lasting:
            self._adopt(weights)
        checksums = dict(zip([*self._merged, *self._blocks], settled(sums), strict=True)) if verify else {}
        if self._targets[0].is_cuda:
            torch.cuda.current_stream(self._targets[0].device).synchronize()  # others cannot wait for this stream
        ordered = tuple(checksums[index] for index in sorted(checksums))
        return WeightPayload(self.places, self.buffer, ordered, self.rank, frozen)

    def _stand(self, blocks: dict[int, Tensor]) -> None:
        pairs = [(self._targets[index], block) for index, block in blocks.items()]
        self._blocks, self._checksums = blocks, None
        self._pairs = [(target, block) for target, block in pairs if target.data_ptr() != block.data_ptr()]

    def _sums(self) -> Tensor:
        """Checksums of the blocks that stay where they are."""
        if self._checksums is not None:
            return self._checksums.take()
        made = Checksums([self._sent(index, block) for index, block in self._blocks.items()])
        if all(block.dtype is self._targets[index].dtype for index, block in self._blocks.items()):
            self._checksums = made
        return made.take()

    def _sent(self, index: int, block: Tensor) -> Part:
        return block.to(self._targets[index].dtype), self.places[index].box, self.places[index].shape

    def _adopt(self, weights: Sequence[PlainWeight]) -> None:
        """Parameters whose numbers are in the buffer have them there from now on, in the place of their own memory."""
        blocks = dict(self._blocks)
        for index, weight in enumerate(weights):
            parameter, target = weight.source, self._targets[index]
            if weight.piece is None and type(parameter) is nn.Parameter and not hasattr(parameter, "placements"):
                alike = parameter.dtype is target.dtype and parameter.device == target.device
                if alike and parameter.is_contiguous() and not parameter.is_pinned():  # those are streamed from there
                    parameter.data = target
                    blocks[index] = parameter.detach()
        self._stand(blocks)


def allocate(transport: Transport, nbytes: int, device: torch.device, lasting: bool) -> Buffer | DeviceBuffer:
    """Memory for a transport; auto: for readers in this process, where the parameters are.

    Raises:
        CapacityError: the GPU has not so much left.
    """
    if transport is Transport.ipc or (transport is Transport.auto and device.type == "cuda"):
        try:
            return DeviceBuffer(nbytes, device, lasting=lasting)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"weights.transport=ipc needs {nbytes / 2**30:.2f} GiB on the GPU for weights on their way, and "
                f"{torch.cuda.mem_get_info(device)[0] / 2**30:.2f} are free: lower generation.kv_tokens, or set "
                "weights.transport=shared_memory"
            ) from error
    return SharedBuffer(nbytes, lasting=lasting) if transport is Transport.shared_memory else Buffer(nbytes)
