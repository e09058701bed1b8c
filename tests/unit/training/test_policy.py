"""Log-probabilities of packed sequences: against each alone, against plain torch."""

from __future__ import annotations

import pytest
import torch
from training_helpers import make_model, make_samples

from asystem.data.packing import pack_one
from asystem.errors import ConfigError
from asystem.models import PackedAttention
from asystem.training.policy import Policy


@torch.no_grad()
def test_packed_equals_one_at_a_time() -> None:
    policy, samples = Policy(make_model()), make_samples([4, 1, 9, 6])
    packed = pack_one(samples)
    logprobs, entropy = policy(packed)
    alone = [policy(pack_one([sample])) for sample in samples]
    torch.testing.assert_close(logprobs, torch.cat([one for one, _ in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, torch.cat([one for _, one in alone]), atol=1e-5, rtol=0)
    assert not logprobs[~packed.mask].any() and (logprobs[packed.mask] < 0).all()


@torch.no_grad()
def test_against_the_definition_with_temperature() -> None:
    model, (sample,) = make_model(), make_samples([5])
    packed = pack_one([sample])
    logprobs, entropy = Policy(model, temperature=0.7)(packed)
    hidden = model(packed.tokens, packed.positions, PackedAttention(packed.cu_seqlens, packed.max_seqlen))
    probs = torch.softmax(model.logits(hidden).double() / 0.7, dim=-1)
    for row in packed.label_rows.tolist():
        p = probs[row]
        assert float(logprobs[row]) == pytest.approx(float(p[packed.labels[row]].log()), abs=1e-5)
        assert float(entropy[row]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.temperature is 0"):
        Policy(make_model(), temperature=0)
