"""AdamW over masters and moments that may be kept in fewer bits, or in the host's memory, than it computes with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from asystem.config import Master, Optimizer, TrainingConfig
from asystem.training.offload import HostStates
from asystem.training.ranks import RankGradients
from asystem.training.states import Dynamic8Bit, Float32, Kind, StochasticBFloat16, local, stochastic_round_
from asystem.training.streaming import HostSums

PIECE = 2**24  # elements updated at once where states are not all float32 on the device: 64 MiB for each of four
KEYS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")  # master and moments, as checkpoints name them


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter, or of this rank's part of it."""

    name: str
    start: int
    rows: int

    def of(self, tensor: Tensor) -> Tensor:
        """The rows, as a view."""
        return local(tensor).narrow(0, self.start, self.rows)


class MasterOptimizer:
    """Master weights and moments of a model's parameters.

    A float32 parameter (whole, or FSDP's shard) is its own master; so is a bfloat16 one under
    ``training.master=bfloat16_stochastic``. Any other of lower precision has a float32 copy, which is rounded after a
    step into the very tensor that the model holds, which others may read too. Gradients are taken off the parameters
    during the backward pass; those of micro-batches add up in float32, or in bfloat16 rounded stochastically where
    masters are.

    Args:
        params: the model's parameters by name; those that lie in the host's memory are streamed to the device.
        exact: the values to start from where the parameters have already been rounded.
        gradients: what several ranks have to settle about theirs; None = there is one rank.
        device: that computes; None = where the parameters are.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        exact: dict[str, Tensor],
        cfg: TrainingConfig,
        gradients: RankGradients | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.params, self.cfg, self._ranks = params, cfg, gradients
        device = device or next(iter(params.values())).device
        self._host = HostStates(device) if cfg.offload_optimizer and device.type == "cuda" else None
        streamed = {name: p for name, p in params.items() if self._host is not None and not p.is_cuda}
        self._sums = HostSums(streamed, device) if streamed else None
        self._streamed = streamed.keys()
        self._stochastic = cfg.master is Master.bfloat16_stochastic
        self._own = {name for name, p in params.items() if p.dtype is torch.float32 or self._stochastic}
        self.masters = {
            name: p if name in self._own else self._placed(exact[name].detach().float()) for name, p in params.items()
        }
        self._kinds = {name: self._kinds_of(p) for name, p in params.items()}
        self._states = {
            name: [(self.masters[name],), *(tuple(map(self._placed, kind.zeros(p))) for kind in self._kinds[name][1:])]
            for name, p in params.items()
        }
        self._is_plain = self._host is None and all(isinstance(k, Float32) for ks in self._kinds.values() for k in ks)
        self._steps = torch.zeros(())
        self._noise = torch.Generator(device=device)
        self._gradients: dict[str, Tensor] = {}
        for name, p in params.items():
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._take_gradient, name)
            )
        self.reset()

    def reset(self) -> None:
        """Moments of zero: a new phase of training. Made at once, not at the first step, so that loading fills them."""
        for _, *moments in self._states.values():
            for kept in moments:
                for tensor in kept:
                    tensor.zero_()
        self._steps.zero_()
        self._reseed()

    @torch.no_grad()
    def step(self, lr: float, clip_norm: float) -> float:
        """Clips to ``clip_norm`` (0 = no clipping) and updates, or leaves all as it is if the gradient is not finite.

        Returns:
            the norm of the whole gradient before clipping, the same on all ranks; NaN or infinity = no update was made.
        """
        if self._sums is not None:
            self._sums.wait()
        norm = self._norm() if self._ranks is None else self._ranks.settle(self._gradients)
        if math.isfinite(norm):
            self._steps += 1
            scale = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm > 0 else 1.0
            if self._is_plain:
                self._update_all(lr, scale)
            else:
                for piece, states in self._pieces():
                    self._update(piece, states, lr, scale)
        if self._sums is not None and self._host is not None:
            self._host.wait()  # weights that were written back are read next
        self._gradients.clear()
        self._reseed()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Takes loaded states up: rounds the masters into the model's parameters, in place."""
        for name, master in self.masters.items():
            if name not in self._own:
                self.params[name].copy_(master)
        self._reseed()

    def tensors(self) -> dict[str, Tensor]:
        """Everything to be saved, by name; loading writes into these tensors, then `publish`."""
        return {key: tensor for key, _, tensor in self.states()}

    def states(self) -> Iterator[tuple[str, str, Tensor]]:
        """As `tensors`: the name under which it is saved, that of its parameter ("" = of none), and the tensor."""
        if self._host is not None:
            self._host.wait()
        yield "optimizer.steps", "", self._steps
        for name, states in self._states.items():
            for key, kept in zip(KEYS, states, strict=True):
                for place, tensor in enumerate(kept):
                    yield f"{key}{'_scale' * place}.{name}", name, tensor.detach()

    def _kinds_of(self, p: nn.Parameter) -> tuple[Kind, Kind, Kind]:
        """Of the master and the two moments. Norms and biases, which are few, are not kept in 8 bits."""
        plain: Kind = StochasticBFloat16() if self._stochastic else Float32()
        if self.cfg.optimizer is Optimizer.adamw8bit and p.ndim >= 2:
            return plain, Dynamic8Bit(signed=True), Dynamic8Bit(signed=False)
        return plain, plain, plain

    def _placed(self, state: Tensor) -> Tensor:
        return state if self._host is None else self._host.place(state)

    def _reseed(self) -> None:
        """Rounding is a function of the step, so that a resumed run repeats it."""
        self._noise.manual_seed(int(self._steps))

    def _take_gradient(self, name: str, p: Tensor) -> None:
        """Called in the backward pass when a parameter's gradient is complete, so that few of them stand at once."""
        if p.grad is None:  # compiled blocks have it called for what no gradient reaches, as the biases of experts
            return
        grad, p.grad = p.grad, None
        held = self._gradients.get(name)
        if self._sums is not None and name in self._streamed:
            self._gradients[name] = self._sums.add(name, grad, first=held is None)
        elif held is None:
            self._gradients[name] = grad if self._stochastic else grad.float()
        elif self._stochastic:
            stochastic_round_(local(held), local(held).float() + local(grad), self._noise)
        else:
            held.add_(grad)

    def _norm(self) -> float:
        if self._sums is None:
            return float(get_total_norm(list(self._gradients.values())))
        rest = [grad for name, grad in self._gradients.items() if name not in self._streamed]
        norms = [norm.float() for norm in torch._foreach_norm(rest)] if rest else []
        norms += [self._sums.norms[name] for name in self._gradients if name in self._streamed]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _update_all(self, lr: float, scale: float) -> None:
        """Where all is float32 on the device: few launches for all parameters."""
        for decay in (True, False):
            names = [name for name in self._gradients if (self.params[name].ndim >= 2) == decay]
            if not names:
                continue
            grads = [local(self._gradients[name]) for name in names]
            if scale < 1.0:
                torch._foreach_mul_(grads, scale)
            columns = zip(*([local(kept[0]) for kept in self._states[name]] for name in names), strict=True)
            masters, means, squares = map(list, columns)
            self._adamw(masters, grads, means, squares, lr, decay)
            for name, master in zip(names, masters, strict=True):
                if name not in self._own:
                    local(self.params[name]).copy_(master)

    def _update(self, piece: Piece, states: list[list[Tensor]], lr: float, scale: float) -> None:
        param, kinds = self.params[piece.name], self._kinds[piece.name]
        is_streamed, is_own = piece.name in self._streamed, piece.name in self._own
        grad = states.pop()[0] if is_streamed else piece.of(self._gradients[piece.name])
        master, mean, square = (kind.read(kept) for kind, kept in zip(kinds, states[:3], strict=True))
        grad = grad.float() * scale
        self._adamw([master], [grad], [mean], [square], lr, param.ndim >= 2)
        for kind, kept, values in zip(kinds, states[:3], (master, mean, square), strict=True):
            kind.write(kept, values, self._noise)
        if not is_own:
            (states[3][0] if is_streamed else piece.of(param)).copy_(master)

    def _adamw(
        self,
        masters: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        lr: float,
        decay: bool,
    ) -> None:
        """In place. Decay is for matrices, not for norms and biases."""
        before = torch.full((len(masters),), float(self._steps) - 1, device=masters[0].device)
        adamw(
            masters,
            grads,
            means,
            squares,
            [],
            list(before.unbind()),
            fused=True,
            amsgrad=False,
            beta1=self.cfg.betas[0],
            beta2=self.cfg.betas[1],
            lr=lr,
            weight_decay=self.cfg.weight_decay if decay else 0.0,
            eps=self.cfg.eps,
            maximize=False,
        )

    def _pieces(self) -> Iterator[tuple[Piece, list[list[Tensor]]]]:
        """All parameters that have a gradient, some rows at a time, with their states on the device."""
        pieces = []
        for name in self._gradients:
            part = local(self.params[name])
            rows = max(1, PIECE // max(1, part[:1].numel()))
            pieces += [Piece(name, start, min(rows, len(part) - start)) for start in range(0, len(part), rows)]
        states = [[[piece.of(tensor) for tensor in kept] for kept in self._of(piece.name)] for piece in pieces]
        yield from zip(pieces, states if self._host is None else self._host.stream(states), strict=True)

    def _of(self, name: str) -> list[tuple[Tensor, ...]]:
        """A parameter's states; of a streamed one also what is to become of it, and its gradient, the last."""
        extra = [(self.params[name],)] if name not in self._own else []
        return [*self._states[name], *extra, (self._gradients[name],)] if name in self._streamed else self._states[name]
