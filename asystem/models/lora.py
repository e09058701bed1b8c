"""LoRA: low-rank adapters beside the decoder's frozen matrices (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    y = W x + (alpha / rank) B A x          W [out, in] frozen;  A [rank, in], B [out, rank] train;  B starts at 0

The decoder fuses matrices that read the same input, and PEFT names adapters by Hugging Face's parts of them. So an
adapted matrix has one A of [parts * rank, in], a single product, and one B of [out, rank], whose rows belong to the
parts as those of W do; `models.peft` cuts them into PEFT's tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asystem.config import LoraConfig
from asystem.errors import ModelError, nearest
from asystem.models.decoder import Decoder
from asystem.models.frozen import FrozenLinear
from asystem.models.hf import layout
from asystem.models.pieces import Box, Held, Piece, local_piece
from asystem.models.spec import ModelSpec
from asystem.models.weights import weight_pieces


@dataclass(frozen=True)
class Part:
    """Rows of a fused matrix that are one matrix to Hugging Face.

    Attributes:
        name: its module there, as "model.layers.0.self_attn.q_proj".
        adapted: false where `training.lora.targets` leaves it out.
    """

    name: str
    rows: int
    adapted: bool


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter for each adapted part of its rows.

    Args:
        base: [T, in] -> [T, out]; frozen here.
        parts: of its rows, in order, at least one adapted.
    """

    def __init__(
        self, base: nn.Linear | FrozenLinear, parts: Sequence[Part], rank: int, alpha: float, dropout: float
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.parts, self.rank, self.scale, self.dropout = tuple(parts), rank, alpha / rank, dropout
        self._adapted = [part for part in parts if part.adapted]
        self._rows = [part.rows for part in self._adapted]
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(len(self._rows) * rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(sum(self._rows), rank, device=device))

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """A uniform in ±1/sqrt(in), as PEFT draws it, and B = 0. Equal seeds and names give equal adapters."""
        if self.lora_A.is_meta:  # a shape to plan with
            return
        self.lora_B.zero_()
        bound = self.base.in_features**-0.5
        for part, a, _ in self.adapters():
            digest = hashlib.sha256(f"{seed}:{part.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        seen = F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x
        hidden = F.linear(seen, self.lora_A) * self.scale
        out: Tensor = self.base(x) + self._spread(torch.split(hidden, self.rank, dim=-1), self.lora_B)
        return out

    def delta(self) -> Tensor:
        """(alpha / rank) B A as one matrix [out, in] float32."""
        a, b = whole(self.lora_A).float() * self.scale, whole(self.lora_B).float()
        return self._spread([piece.T for piece in torch.split(a, self.rank)], b).T

    def merged(self) -> Tensor:
        """W + (alpha / rank) B A, [out, in] float32. Collective where weights are sharded."""
        base = self.base.dense() if isinstance(self.base, FrozenLinear) else whole(self.base.weight)
        return base.float() + self.delta()

    @property
    def box(self) -> Box:
        """Where this rank's part of the matrix lies in the whole."""
        if isinstance(self.base, FrozenLinear):  # of one rank
            return Box.whole((self.base.out_features, self.base.in_features))
        return local_piece(self.base.weight)[0]

    @property
    def dtype(self) -> torch.dtype:
        """What the matrix is multiplied in."""
        return self.base.scale.dtype if isinstance(self.base, FrozenLinear) else self.base.weight.dtype

    def local_merged(self) -> tuple[Box, Tensor]:
        """This rank's part of `merged`, and where it lies. Collective where adapters are sharded."""
        if isinstance(self.base, FrozenLinear):
            return self.box, self.merged()
        box, base = local_piece(self.base.weight)
        return box, base.float() + box.of(self.delta(), (0, 0))

    def adapters(self) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Each adapted part with its A [rank, in] and B [rows, rank], of whole tensors; collective as `merged`."""
        a, b = whole(self.lora_A.detach()), whole(self.lora_B.detach())
        yield from zip(self._adapted, torch.split(a, self.rank), torch.split(b, self._rows), strict=True)

    def _spread(self, hidden: Sequence[Tensor], b: Tensor) -> Tensor:
        """hidden: [T, rank] of each adapted part -> [T, out], 0 in the rows of the others."""
        if len(self.parts) == 1:
            return F.linear(hidden[0], b)
        adapted = iter(zip(hidden, torch.split(b, self._rows), strict=True))
        pieces = [
            F.linear(*next(adapted)) if part.adapted else hidden[0].new_zeros(hidden[0].shape[0], part.rows)
            for part in self.parts
        ]
        return torch.cat(pieces, dim=-1)


def add_lora(model: Decoder, cfg: LoraConfig, *, seed: int = 0, device: torch.device | None = None) -> None:
    """Freezes a decoder and puts adapters beside the matrices that ``cfg.targets`` names, in place; ``cfg.base`` says
    in how many bits these are kept.

    Experts of a mixture, whose matrices are stacked, get none.

    Args:
        device: where adapted matrices go, one at a time, and are quantised; None = where they are.

    Raises:
        ModelError: a target that the model has not.
    """
    check_targets(model.spec, cfg.targets)
    model.requires_grad_(False)
    for name, parts in _matrices(model.spec, cfg.targets).items():
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and any(part.adapted for part in parts):
            linear = linear.to(device)
            base = linear if cfg.base == "auto" else FrozenLinear(linear, cfg.base)
            adapted = LoraLinear(base, parts, cfg.rank, cfg.alpha, cfg.dropout)
            adapted.reset(seed)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, adapted)


def check_targets(spec: ModelSpec, targets: Sequence[str]) -> None:
    """Refuses names that no linear layer of the model has.

    Raises:
        ModelError: with the nearest one.
    """
    known = {part.name.rpartition(".")[2] for parts in _matrices(spec, targets).values() for part in parts}
    for target in targets:
        if target not in known:
            raise ModelError(f'training.lora.targets names "{target}", which the model has not{nearest(target, known)}')


@dataclass(frozen=True)
class PlainWeight:
    """A parameter that the decoder would have without adapters.

    Attributes:
        source: the parameter, or the layer whose merged weight it is.
        piece: where the model is cut over ranks, the one of its blocks that this stands for.
        frozen: it stays as it is for good, since adapters train alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: nn.Parameter | LoraLinear
    piece: Piece | None = None
    frozen: bool = False

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, rounded once, to ``dtype`` (None = its own). Collective where weights are sharded."""
        dtype = dtype or self.dtype
        if isinstance(self.source, LoraLinear):
            return self.source.merged().to(dtype)
        return whole(self.source.detach().to(dtype))  # converted first: half precision is half the traffic

    @property
    def box(self) -> Box:
        """Where this rank's part of it lies in the whole."""
        return self.source.box if isinstance(self.source, LoraLinear) else self.local()[0]

    @property
    def is_merged(self) -> bool:
        """Whether it is computed anew at each `local`."""
        return isinstance(self.source, LoraLinear)

    def local(self) -> tuple[Box, Tensor]:
        """What this rank has of it, and where in the whole that lies. Collective where adapters are sharded."""
        if isinstance(self.source, LoraLinear):
            return self.source.local_merged()
        if self.piece is not None:
            return Held.of(self.source, self.shape, [self.piece]).blocks[0]
        return local_piece(self.source.detach())


def plain_weights(model: nn.Module) -> list[PlainWeight]:
    """The parameters under the plain decoder's names, adapters merged into the matrices that they stand beside; of a
    decoder that is cut over ranks each block of them that this rank has."""
    if getattr(model, "shard", None) is not None:
        assert isinstance(model, Decoder), "decoders are cut"
        return _blocks(model)
    modules = dict(model.named_modules())
    frozen = {id(module.base) for module in modules.values() if isinstance(module, LoraLinear)}
    weights = []
    for name, module in modules.items():
        if isinstance(module, LoraLinear):
            shape = (sum(part.rows for part in module.parts), module.base.in_features)
            weights.append(PlainWeight(f"{name}.weight", shape, module.dtype, module))
            own = module.base.named_parameters(recurse=False)
            named = [(f"{name}.bias", param) for leaf, param in own if leaf == "bias"]
        elif id(module) in frozen:
            continue
        else:
            named = list(module.named_parameters(prefix=name, recurse=False))
        weights += [
            PlainWeight(name, tuple(param.shape), param.dtype, param, frozen=bool(frozen) and not param.requires_grad)
            for name, param in named
        ]
    return weights


def _blocks(model: Decoder) -> list[PlainWeight]:
    params = dict(model.named_parameters())
    return [
        PlainWeight(name, shape, params[name].dtype, params[name], piece)
        for name, (shape, pieces) in weight_pieces(model).items()
        for piece in pieces
        if Held.of(params[name], shape, [piece]).blocks
    ]


@torch.no_grad()
def merge(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state of the plain decoder, for `save_model`: adapters merged in float32, each tensor rounded once."""
    return {weight.name: weight.value(dtype) for weight in plain_weights(model)}


@torch.no_grad()
def decoding_copy(model: Decoder, dtype: torch.dtype) -> Decoder:
    """A plain decoder of what a model holds whole: itself where all of it is. Else one beside it that has copies of its
    own of what is sharded over ranks or has adapters, and shares all other parameters. Collective where it gathers.

    Args:
        dtype: of copies of sharded parameters; merged matrices stay as they are.
    """
    weights = plain_weights(model)
    if not any(map(_is_apart, weights)):
        return model
    with torch.device("meta"):
        copy = Decoder(model.spec)
    for weight in weights:
        value = weight.value(dtype if hasattr(weight.source, "full_tensor") else None) if _is_apart(weight) else None
        param = weight.source if value is None else nn.Parameter(value, requires_grad=False)
        parent, _, leaf = weight.name.rpartition(".")
        setattr(copy.get_submodule(parent), leaf, param)
    return copy


@torch.no_grad()
def refresh_copy(copy: Decoder, model: Decoder) -> None:
    """Writes the present weights into a `decoding_copy`, in place, one gathered after another: those that it does not
    share, but beside adapters not what is frozen. Collective where it gathers."""
    if copy is model:
        return
    weights = plain_weights(model)
    merged = [weight for weight in weights if isinstance(weight.source, LoraLinear)]
    for weight in merged or filter(_is_apart, weights):
        param = copy.get_parameter(weight.name)
        param.copy_(weight.value(param.dtype))


def _is_apart(weight: PlainWeight) -> bool:
    """Whether decoding cannot read what training holds of it."""
    return isinstance(weight.source, LoraLinear) or hasattr(weight.source, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """A DTensor's whole tensor, on every rank; any other tensor itself."""
    # Not isinstance: importing DTensor takes a second, which processes without FSDP need not wait for.
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _matrices(spec: ModelSpec, targets: Sequence[str]) -> dict[str, list[Part]]:
    """The decoder's matrices inside its layers, each with Hugging Face's parts of it in the order of their rows."""
    found: dict[str, list[Part]] = {}
    for theirs, place in layout(spec).items():
        if not place.name.endswith("_proj.weight"):  # not a linear layer
            continue
        name = theirs.removesuffix(".weight")
        part = Part(name, place.shape[0], name.rpartition(".")[2] in targets)
        found.setdefault(place.name.removesuffix(".weight"), []).append(part)
    return found
