"""Logits, folders and tokenizers against transformers' own. All in one file: importing it takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from asystem.data.tokenizer import byte_tokenizer, load_tokenizer
from asystem.models import Decoder, PackedAttention, init_weights, load_model, save_model, spec_from_hf, to_hf_state

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that all three bands of frequencies occur
}
BASE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
BASE |= {"max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def heads(query: int, kv: int, head_dim: int | None = None) -> dict[str, Any]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": head_dim}


CASES = {
    "llama-grouped": ("Llama", heads(4, 2, 6)),
    "llama-wide-heads-tied": ("Llama", heads(2, 2, 16) | {"tie_word_embeddings": True}),
    "llama-one-kv-head-scaled": ("Llama", heads(3, 1, 8) | {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "qwen2-grouped-tied": ("Qwen2", heads(4, 2) | {"tie_word_embeddings": True}),
    "qwen2-one-kv-head": ("Qwen2", heads(3, 1) | {"intermediate_size": 37}),
    "qwen3-grouped": ("Qwen3", heads(4, 2, 10)),
    "qwen3-full-heads-tied": ("Qwen3", heads(3, 3, 8) | {"tie_word_embeddings": True}),
    "qwen3-one-kv-head": ("Qwen3", heads(4, 1, 12) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 16}
CASES |= {
    "qwen3_moe-normalised": ("Qwen3Moe", heads(4, 2, 10) | EXPERTS),
    "qwen3_moe-some-dense-tied": (
        "Qwen3Moe",
        heads(3, 1, 8) | EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [0], "tie_word_embeddings": True},
    ),
    "qwen3_moe-every-second": ("Qwen3Moe", heads(2, 2, 8) | EXPERTS | {"decoder_sparse_step": 2, "num_experts": 3}),
    "olmoe-grouped": ("Olmoe", heads(4, 2) | {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-normalised": ("Olmoe", heads(3, 3) | {"num_experts": 5, "num_experts_per_tok": 1, "norm_topk_prob": True}),
}
LENGTHS = [1, 7, 100, 23]


def reference(case: str) -> Any:
    """transformers' model with every weight, norm and bias random, so that none can be left out unseen."""
    family, options = CASES[case]
    options = {k: v for k, v in options.items() if v is not None or k != "head_dim"}
    config = getattr(transformers, f"{family}Config")(**BASE | options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def packed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, PackedAttention]:
    tokens = torch.randint(0, BASE["vocab_size"], (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return tokens, positions, PackedAttention(bounds, max(LENGTHS))


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    return torch.cat([model(part[None]).logits[0] for part in packed()[0].split(LENGTHS)])


@torch.no_grad()
def our_logits(model: Decoder) -> torch.Tensor:
    return model.logits(model(*packed()))


def assert_same_weights(ours: Decoder, theirs: Any) -> None:
    state = to_hf_state(ours.spec, ours.state_dict())
    expected = _single_experts(dict(theirs.named_parameters()))  # a tied head counts once
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def _single_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as folders have them; in memory transformers stacks the experts."""
    single = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for name in state.keys() - single.keys():
        layer, kind = name.split(".experts.")
        parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
        for expert, matrix in enumerate(state[name]):
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                single[f"{layer}.experts.{expert}.{part}_proj.weight"] = rows
    return single


@pytest.mark.parametrize("case", CASES)
def test_their_folder_gives_their_logits(case: str, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert_same_weights(ours, theirs)
    expected = their_logits(theirs)
    assert expected.std() > 0.1  # not a comparison of zeros
    torch.testing.assert_close(our_logits(ours), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("case", "shard_bytes"), [(case, 6000) for case in CASES] + [(case, 2**30) for case in CASES if "moe" not in case]
)
def test_our_folder_gives_them_our_logits(case: str, shard_bytes: int, tmp_path: Path) -> None:
    theirs = reference(case)
    ours = Decoder(spec_from_hf(theirs.config.to_dict()))
    init_weights(ours, seed=3, std=0.2)
    save_model(ours, ours.spec, tmp_path / "out", max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or shard_bytes == 6000
    reloaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(reloaded) is type(theirs)
    assert_same_weights(ours, reloaded)
    torch.testing.assert_close(our_logits(ours), their_logits(reloaded), atol=1e-4, rtol=0)


def test_their_shards_are_read(tmp_path: Path) -> None:
    theirs = reference("qwen2-grouped-tied")
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(load_model(tmp_path), theirs)


def test_bfloat16_folder_keeps_its_bits(tmp_path: Path) -> None:
    theirs = reference("qwen3-grouped").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype=torch.bfloat16)
    assert_same_weights(ours, theirs)
    save_model(ours, ours.spec, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto"))


def test_the_older_spelling_of_rope_is_read() -> None:
    theirs = reference("llama-one-kv-head-scaled")
    config = theirs.config.to_dict()
    rope = dict(config.pop("rope_parameters"))
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert spec_from_hf(config) == spec_from_hf(theirs.config.to_dict())


def test_auto_tokenizer_reads_a_saved_folder(tmp_path: Path) -> None:
    ours = byte_tokenizer()
    model = reference("llama-grouped")
    spec = spec_from_hf(model.config.to_dict() | {"vocab_size": 259})
    decoder = Decoder(spec)
    init_weights(decoder, 0)
    save_model(decoder, spec, tmp_path / "model", tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Grüße,\n\t42 \x00 <|im_start|>x<|im_end|>"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos_id, ours.pad_id, 259)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat(messages, add_generation_prompt=prompt) == expected
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert generation.eos_token_id == ours.eos_id


def test_their_tokenizer_folder_is_read(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.chat_template = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content | tojson }}{% endfor %}"
    theirs.add_special_tokens({"bos_token": "<s>"})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "theirs")
    assert ours.encode("<s>añ<|pad|>") == theirs.encode("<s>añ<|pad|>", add_special_tokens=False)
    messages = [{"role": "user", "content": "é\n"}]
    assert ours.apply_chat(messages) == theirs.apply_chat_template(messages, tokenize=False) == '<s>[user] "é\\n"'


@pytest.mark.parametrize("kind", ["bytes", "words", "trimmed"])
def test_marked_parts_of_a_conversation_are_theirs(tmp_path: Path, kind: str) -> None:
    """Their `return_assistant_tokens_mask`, for tokens of one byte, and for merged ones with both kinds of offsets."""
    byte_tokenizer().save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "héllo there, what is 7 and 8?"},
        {"role": "assistant", "content": "héllo to you, 7 and 8 is 15"},
        {"role": "user", "content": "and what is 7 and 9?"},
        {"role": "assistant", "content": "7 and 9 is 16"},
    ]
    if kind != "bytes":
        merged = _merging_tokenizer([m["content"] for m in messages], trim=kind == "trimmed")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<|im_end|>")
    theirs.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[assistant]{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}[user]{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    ours = load_tokenizer(tmp_path / "theirs")
    tokens, trained = ours.encode_spans(*ours.apply_chat_marked(messages, add_generation_prompt=False))
    assert tokens == expected["input_ids"]
    assert [int(is_trained) for is_trained in trained] == expected["assistant_masks"]
    assert 0 < sum(trained) < len(tokens)


def _merging_tokenizer(texts: list[str], *, trim: bool) -> tokenizers.Tokenizer:
    """Byte-level BPE with merges; ``trim``: offsets of tokens leave white space out."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|im_end|>"], show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return fast
