"""A mixture of experts on a GPU: grouped products against expert after expert, captured steps against eager ones."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.captured import CapturedRunner
from asystem.models import Decoder, ModelSpec, MoESpec, PackedAttention, init_weights, quantize
from asystem.models.moe import MoE, Router, record_routing
from asystem.types import SamplingParams, Trajectory

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a CUDA device, 8.0 up"
)

LING = MoESpec(16, 4, 64, 64, (0,), score="sigmoid", groups=4, top_groups=2, has_bias=True, scaling=2.0)
SPECS = {
    "qwen3_moe": ModelSpec("qwen3_moe", 503, 128, 64, 3, 8, 2, 32, qk_norm=True, moe=MoESpec(8, 2, 96)),
    "olmoe": ModelSpec("olmoe", 503, 128, 96, 3, 4, 2, 32, qk_norm=True, qk_norm_whole=True, moe=MoESpec(8, 3, 96)),
    "ling": ModelSpec("bailing_moe_v2", 503, 128, 192, 3, 8, 2, 32, rotary_factor=0.5, qk_norm=True, moe=LING),
}


def make_model(kind: str) -> Decoder:
    model = Decoder(SPECS[kind])
    init_weights(model, 0, std=0.1)
    return model.to("cuda", torch.bfloat16)


def generate(model: Decoder, **config: Any) -> tuple[Engine, dict[int, Trajectory]]:
    options = {"max_running": 32, "return_routing": True} | config
    engine = Engine(model, GenerationConfig(**options), stop_ids=[5], seed=1, max_length=150)
    rng = np.random.default_rng(0)
    for group, length in enumerate((1, 16, 33, 90)):
        tokens = rng.integers(10, 503, length).astype(np.int32)
        engine.submit(EngineRequest(100 * group + i, group, 0, tokens, SamplingParams(50)) for i in range(5))
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.decode(max_steps=20).finished
    return engine, {t.rollout: t for t in finished}


@pytest.mark.parametrize("tokens", [1, 300])
def test_grouped_products_and_gradients(tokens: int) -> None:
    exact = MoE(64, MoESpec(8, 2, 32), None)
    init_weights(exact, 0, std=0.2)
    ours = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    exact.load_state_dict({name: p.float() for name, p in ours.state_dict().items()})  # the same rounded weights
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (theirs := exact(x.float())).square().sum().backward()
    (out := ours(x.cuda())).float().square().sum().backward()
    torch.testing.assert_close(out.cpu().float(), theirs, atol=3e-2, rtol=3e-2)
    for name, p in exact.named_parameters():
        found, want = ours.get_parameter(name).grad, p.grad
        assert found is not None and want is not None
        assert (found.cpu().float() - want).norm() < 3e-2 * want.norm(), name


@pytest.mark.parametrize(("kind", "bits"), [*((kind, None) for kind in SPECS), ("ling", torch.int8)])
def test_captured_steps_agree_with_a_full_forward(kind: str, bits: torch.dtype | None) -> None:
    model = make_model(kind) if bits is None else quantize(make_model(kind), bits)
    engine, finished = generate(model)
    assert isinstance(engine.runner, CapturedRunner) and len(finished) == 20
    routers, agreed = [module for module in model.modules() if isinstance(module, Router)], []
    for t in finished.values():
        tokens = torch.from_numpy(np.concatenate([t.prompt_tokens, t.tokens])).long().cuda()
        attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32, device="cuda"), len(tokens))
        with torch.no_grad(), record_routing(routers) as chosen:
            hidden = model(tokens, torch.arange(len(tokens), device="cuda"), attend)
            logprobs = model.logits(hidden[len(t.prompt_tokens) - 1 : -1]).log_softmax(-1).cpu()
        want = logprobs.gather(-1, torch.from_numpy(t.tokens).long()[:, None])[:, 0]
        # A token near the border between two experts may be computed by another one: few are far off.
        assert (torch.from_numpy(t.logprobs) - want).abs().median() < 2e-2
        assert t.routing is not None
        agreed.append((np.sort(t.routing, -1) == torch.stack(chosen, 1)[:-1].sort(-1).values.cpu().numpy()).mean())
    assert np.mean(agreed) > 0.95
