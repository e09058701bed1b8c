"""8-bit weights and the exact head on a GPU: captured steps against eager ones and a full forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from asystem.config import GenerationConfig
from asystem.generation import Engine, EngineRequest
from asystem.generation.captured import CapturedRunner
from asystem.generation.runner import head_logits
from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights, quantize
from asystem.state import Inbox, Outbox
from asystem.types import SamplingParams, Trajectory

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a CUDA device, 8.0 up"
)

SPEC = ModelSpec("qwen2", 5003, 96, 160, 3, num_heads=8, num_kv_heads=2, head_dim=64, qkv_bias=True)
INT8, FP8 = torch.int8, torch.float8_e4m3fn


def model(kind: torch.dtype | None, dtype: torch.dtype, std: float = 0.1) -> Decoder:
    if kind is FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    decoder = Decoder(SPEC)
    init_weights(decoder, seed=0, std=std)
    decoder.to("cuda", dtype)
    return decoder if kind is None else quantize(decoder, kind)


def requests(samples: int) -> list[EngineRequest]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 5003, length).astype(np.int32) for length in (1, 16, 130)]
    return [
        EngineRequest(100 * g + i, g, 0, tokens, SamplingParams(40, float(i % 2)))
        for g, tokens in enumerate(prompts)
        for i in range(samples)
    ]


def generate(decoder: Decoder, samples: int, **config: object) -> dict[int, Trajectory]:
    options = GenerationConfig(max_running=512, **config)  # type: ignore[arg-type]
    engine = Engine(decoder, options, stop_ids=[5, 9], seed=1, max_length=180)
    assert isinstance(engine.runner, CapturedRunner) == options.graphs
    engine.submit(requests(samples))
    return {t.rollout: t for t in engine.decode().finished}


@pytest.mark.parametrize("kind", [INT8, FP8])
@pytest.mark.parametrize("samples", [1, 5, 40, 100])  # few rows; one tile; several; more than the tiled kernel takes
def test_captured_steps_draw_what_eager_ones_draw(kind: torch.dtype, samples: int) -> None:
    decoder = model(kind, torch.float32)
    got, want = generate(decoder, samples), generate(decoder, samples, graphs=False)
    assert got.keys() == want.keys() and len(want) == 3 * samples
    parted = 0  # where a rounding in the eighth digit decides between neighbours of the cumulative distribution
    for rollout, t in want.items():
        both = min(len(t.tokens), len(got[rollout].tokens))
        same = got[rollout].tokens[:both] == t.tokens[:both]
        common = both if same.all() else int(same.argmin())
        parted += common < len(t.tokens)
        np.testing.assert_allclose(got[rollout].logprobs[:common], t.logprobs[:common], atol=1e-4)
    assert parted <= samples // 50, f"{parted} of {3 * samples}"


@pytest.mark.parametrize("kind", [INT8, FP8, None])
@pytest.mark.parametrize("head", ["auto", "float32"])
def test_log_probabilities_agree_with_a_full_forward(kind: torch.dtype | None, head: str) -> None:
    decoder = model(kind, torch.bfloat16, std=0.05)
    for t in generate(decoder, 8, head_dtype=head).values():
        tokens = torch.from_numpy(np.concatenate([t.prompt_tokens, t.tokens])).long().cuda()
        attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32, device="cuda"), len(tokens))
        with torch.no_grad():
            hidden = decoder(tokens, torch.arange(len(tokens), device="cuda"), attend)[len(t.prompt_tokens) - 1 : -1]
            logprobs = head_logits(decoder, hidden, head == "float32").float().log_softmax(-1)
        want = logprobs.gather(-1, tokens[len(t.prompt_tokens) :, None])[:, 0].cpu().numpy()
        np.testing.assert_allclose(t.logprobs, want, atol=2e-2)


def test_an_exact_head_rounds_no_logits() -> None:
    decoder, hidden = model(None, torch.bfloat16), torch.randn(6, 96, device="cuda").bfloat16()
    want = hidden.double() @ decoder.head_weight().double().T
    with torch.no_grad():
        exact, rounded = head_logits(decoder, hidden, True), head_logits(decoder, hidden, False)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (exact.double() - want).abs().max() < 1e-5 < 1e-3 < (rounded.double() - want).abs().max()


def test_graphs_see_weights_that_were_quantised_again() -> None:
    decoder = model(INT8, torch.float32)
    engine = Engine(decoder, GenerationConfig(max_running=8), stop_ids=[], seed=1, max_length=180)
    drawn = []
    for version in range(2):
        engine.submit(requests(1))
        drawn.append(sorted(engine.decode().finished, key=lambda t: t.rollout))
        assert isinstance(engine.runner, CapturedRunner)
        graphs = dict(engine.runner._graphs)
        other = Decoder(SPEC)
        init_weights(other, seed=1, std=0.1)
        Inbox(decoder).read([Outbox(other).write()])
        engine.weights_updated(version + 1)
    assert graphs and engine.runner._graphs == graphs
    want = generate(decoder, 1, graphs=False)
    for before, after in zip(*drawn, strict=True):
        assert before.tokens.tolist() != after.tokens.tolist() == want[after.rollout].tokens.tolist()
