"""The variable-length kernel and bfloat16 on a GPU, against float32 on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from asystem.models import Decoder, ModelSpec, PackedAttention, init_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = [1, 37, 200, 8]


def attention(device: str) -> PackedAttention:
    return PackedAttention(torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device), max(LENGTHS))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_gradients(kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(sum(LENGTHS), h, 64, generator=generator) for h in (4, kv_heads, kv_heads)]
    exact = [x.to(dtype).float().requires_grad_() for x in exact]
    ours = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    expected, out = attention("cpu")(0, *exact), attention("cuda")(0, *ours)
    toward = torch.randn(expected.shape, generator=generator).to(dtype)
    expected.backward(toward.float())
    out.backward(toward.cuda())
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.float().cpu(), expected, atol=tolerance, rtol=tolerance)
    for mine, other in zip(ours, exact, strict=True):
        assert mine.grad is not None and other.grad is not None
        error = (mine.grad.float().cpu() - other.grad).norm() / other.grad.norm()
        assert error < tolerance


@pytest.mark.parametrize("compiled", [False, True])
def test_decoder_in_bfloat16(compiled: bool) -> None:
    spec = ModelSpec("qwen3", 100, 128, 256, 3, 4, 2, 64, qk_norm=True, tie_embeddings=True)
    exact = Decoder(spec)
    init_weights(exact, 0, std=0.1)
    ours = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    if compiled:
        for block in ours.layers:
            block.compile_parts(dynamic=True)
    tokens = torch.randint(0, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    expected = exact.logits(exact(tokens, positions, attention("cpu"))).log_softmax(-1)
    logits = ours.logits(ours(tokens.cuda(), positions.cuda(), attention("cuda")))
    assert logits.dtype == torch.float32
    logprobs = logits.log_softmax(-1)
    assert (logprobs.cpu() - expected).abs().mean() < 0.03
    expected[:, 7].mean().backward()
    logprobs[:, 7].mean().backward()
    mine, other = ours.layers[0].attn.qkv_proj.weight.grad, exact.layers[0].attn.qkv_proj.weight.grad
    assert (mine.float().cpu() - other).norm() / other.norm() < 0.1
