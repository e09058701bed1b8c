"""The model as training sees it: log-probabilities and entropies of given tokens, never the whole logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asystem.data.packing import PackedBatch
from asystem.models import Decoder, PackedAttention

_CHUNK_LOGITS = 2**26  # logits held at once, 256 MiB in float32; they are computed again in the backward pass


class Policy(nn.Module):
    """A decoder whose forward pass ends in the log-probability of each label.

    The head is applied here, inside `forward`, so that FSDP2 has its weight gathered, and only where a label counts.
    """

    def __init__(self, decoder: Decoder, temperature: float = 1.0) -> None:
        super().__init__()
        self.decoder = decoder
        self.temperature = temperature  # that the tokens were sampled at: the policy is the tempered distribution

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities [T] of ``batch.labels`` with gradient and entropies [T] without; 0 outside the mask."""
        hidden = self.decoder(batch.tokens, batch.positions, PackedAttention(batch.cu_seqlens, batch.max_seqlen))
        rows = batch.mask.nonzero().squeeze(1)
        hidden, labels = hidden[rows], batch.labels[rows]
        weight = self.decoder.head_weight()
        chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
        if len(rows) <= chunk:
            logprobs, entropy = self._head(hidden, weight, labels)
        else:
            parts = [
                checkpoint(self._head, h, weight, y, use_reentrant=False)
                for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
            ]
            logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        zeros = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
        return zeros.index_put((rows,), logprobs), zeros.index_put((rows,), entropy)

    def _head(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [R, D], weight [V, D], labels [R] -> log-probabilities and entropies, both [R] float32."""
        logits = nn.functional.linear(hidden, weight).float() / self.temperature
        log_p = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, labels[:, None]).squeeze(1), entropy
