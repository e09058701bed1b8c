"""From a packed batch to the log-probability of each response token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from asystem.data.packing import PackedBatch
from asystem.errors import ConfigError
from asystem.models import Decoder, PackedAttention, by_rows, group_name
from asystem.training.head import token_logprobs


class Policy(nn.Module):
    """Decoder and heads in one forward, so that FSDP has the heads' weights gathered while they are used.

    Args:
        value_head: a second head tells the value of each state, at first 0.
        keep_logits: see `token_logprobs`.
        exact_head: logits are not rounded to the model's dtype.
    """

    def __init__(
        self,
        decoder: Decoder,
        temperature: float = 1.0,
        *,
        entropy_gradient: bool = False,
        value_head: bool = False,
        keep_logits: bool = False,
        exact_head: bool = False,
    ) -> None:
        if temperature <= 0:
            raise ConfigError(
                f"rollout.temperature is {temperature}: greedy rollouts have no log-probabilities to train on; "
                "set it above 0"
            )
        super().__init__()
        self.decoder = decoder
        self.temperature, self.entropy_gradient = temperature, entropy_gradient
        self.keep_logits, self.exact_head = keep_logits, exact_head
        weight = torch.zeros(decoder.spec.hidden_size, device=decoder.embed.weight.device)
        self.value_head = nn.Parameter(weight) if value_head else None

    def forward(self, packed: PackedBatch) -> tuple[Tensor, ...]:
        """-> log-probabilities of the labels and entropies of the distributions, [T] float32, 0 where masked out; with
        a value head also the values of the states in which the labels were chosen.

        The first two are of the tempered distribution that rollouts are sampled from. The entropy has a gradient where
        ``entropy_gradient`` asks for one. Experts are those of ``packed.routing``, where that has any.
        """
        attend = PackedAttention(packed.cu_seqlens, packed.max_seqlen, packed.starts)
        hidden = self.decoder(packed.tokens, packed.positions, attend, packed.routing)
        rows = packed.label_rows
        labels = packed.labels.index_select(0, rows)
        hidden = hidden.index_select(0, rows)
        logprobs, entropy = self._scores(hidden, labels)
        empty = torch.zeros(len(packed.tokens), device=hidden.device)
        scores = [logprobs, entropy]
        if self.value_head is not None:
            scores.append(hidden.float() @ self.value_head.float())
        return tuple(empty.index_copy(0, rows, score) for score in scores)

    def _scores(self, hidden: Tensor, labels: Tensor) -> Sequence[Tensor]:
        """Log-probabilities and entropies [M] of hidden states [M, D]; ranks that have the same rows share them."""
        compute = partial(
            token_logprobs, self.decoder.head_weight(),
            temperature=self.temperature, entropy_gradient=self.entropy_gradient, keep_logits=self.keep_logits,
            exact=self.exact_head,
        )  # fmt: skip
        shard = self.decoder.shard
        if shard is None or shard.size == 1:
            return compute(hidden, labels)
        return by_rows(compute, hidden, labels, shard.rank, shard.size, group_name(shard.group))
