"""The decoder by itself: packing, devices without memory, seeds, compiling. transformers is compared elsewhere."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from asystem.models import Decoder, ModelSpec, PackedAttention, RopeScaling, init_weights
from asystem.models.decoder import RMSNorm, inverse_frequencies, rotate

SPECS = {
    family: ModelSpec(
        family, 50, 16, 24, 3, 4, 2, 8,
        qk_norm=family == "qwen3", qkv_bias=family == "qwen2", tie_embeddings=family == "qwen3",
    )
    for family in ("llama", "qwen2", "qwen3")
}  # fmt: skip
LENGTHS = [5, 1, 9, 40, 3, 17]


def attention(lengths: list[int]) -> PackedAttention:
    return PackedAttention(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


def built(spec: ModelSpec, seed: int = 0) -> Decoder:
    model = Decoder(spec)
    init_weights(model, seed, std=0.3)
    return model


@pytest.mark.parametrize("family", SPECS)
def test_packed_equals_one_at_a_time(family: str) -> None:
    model = built(SPECS[family])
    tokens = torch.randint(0, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    together = model.logits(model(tokens, positions, attention(LENGTHS)))
    alone = [
        model.logits(model(part, torch.arange(len(part)), attention([len(part)]))) for part in tokens.split(LENGTHS)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    together.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_only_differences_of_positions_matter() -> None:
    model = built(SPECS["qwen3"])
    tokens = torch.arange(11)
    near = model(tokens, torch.arange(11), attention([11]))
    far = model(tokens, torch.arange(11) + 1000, attention([11]))
    swapped = model(tokens, torch.arange(11).flip(0), attention([11]))
    torch.testing.assert_close(near, far, atol=1e-3, rtol=1e-3)
    assert (near - swapped).abs().max() > 0.01


def test_built_without_memory_then_filled() -> None:
    spec = SPECS["llama"]
    with torch.device("meta"):
        model = Decoder(spec)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    init_weights(model, 0, std=0.3)
    tokens = torch.arange(7)
    expected = built(spec)(tokens, tokens, attention([7]))
    assert torch.equal(model(tokens, tokens, attention([7])), expected)


def test_training_after_inference_mode() -> None:
    model = built(SPECS["llama"])
    tokens = torch.arange(7)
    with torch.inference_mode():  # the rotary table is made here, and read below
        expected = model(tokens, tokens, attention([7]))
    out = model(tokens, tokens, attention([7]))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert model.embed.weight.grad is not None


def test_seeds_name_the_weights() -> None:
    spec = SPECS["qwen2"]
    one, same, other = built(spec, 1), built(spec, 1), built(spec, 2)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == ("norm" in name or "bias" in name), name
    deeper = ModelSpec(**{**vars(spec), "num_layers": 5})
    assert torch.equal(built(deeper, 1).layers[2].mlp.down_proj.weight, one.layers[2].mlp.down_proj.weight)
    plain = Decoder(spec)
    init_weights(plain, 0)
    assert plain.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_parameter_count() -> None:
    for spec in SPECS.values():
        assert sum(p.numel() for p in Decoder(spec).parameters()) == spec.num_parameters
    small = ModelSpec("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, qk_norm=True, tie_embeddings=True)
    assert small.num_parameters == 596_049_920  # Qwen3-0.6B


def test_rms_norm_by_hand_and_in_half_precision() -> None:
    norm = RMSNorm(2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    scale = 1 / math.sqrt((3 * 3 + 4 * 4) / 2 + 0.5)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3 * scale, 8 * scale]))
    large = torch.tensor([300.0, 400.0], dtype=torch.float16)  # its square is beyond float16
    torch.testing.assert_close(norm.half()(large).float(), torch.tensor([0.8485, 2.2627]), atol=2e-3, rtol=0)


def test_rotation_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    assert rotate(x, cos, sin).tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_llama3_scaling_by_hand() -> None:
    plain = ModelSpec("llama", 9, 8, 8, 1, 1, 1, 6, rope_theta=100.0)
    scaled = ModelSpec(**{**vars(plain), "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)})
    fast, middle, slow = inverse_frequencies(plain).tolist()
    turns = 64 * middle / (2 * math.pi)  # 64 * 0.2154 / 6.283 = 2.19 turns: between 1 and 4
    blend = (turns - 1) / 3
    expected = [fast, middle * blend + middle / 8 * (1 - blend), slow / 8]
    assert 1 < turns < 4
    torch.testing.assert_close(inverse_frequencies(scaled), torch.tensor(expected))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it while tracing
def test_compiled_parts_are_shared_by_all_layers_and_lengths() -> None:
    spec = ModelSpec(**{**vars(SPECS["qwen3"]), "num_layers": 12})  # torch gives up on the ninth variant
    eager = built(spec)
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for block in compiled.layers:
        block.compile_parts(backend=counter)
    for lengths in ([4, 5], [9, 2, 3], [17]):
        positions = torch.cat([torch.arange(n) for n in lengths])
        attend = attention(lengths)
        torch.testing.assert_close(compiled(positions, positions, attend), eager(positions, positions, attend))
    assert counter.frame_count == 4  # two halves, once by their first length and once for all others
    assert compiled.state_dict().keys() == eager.state_dict().keys()
