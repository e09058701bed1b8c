"""The byte tokenizer, folders, stop ids, chat templates, and what is refused. transformers is compared elsewhere."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from asystem.data.tokenizer import Tokenizer, byte_tokenizer, check_tokenizer, load_tokenizer
from asystem.errors import DataError


def test_bytes_are_their_own_ids() -> None:
    tokenizer = byte_tokenizer()
    every = bytes(range(128)).decode() + "é→😀"
    assert tokenizer.encode(every) == list(every.encode())
    assert tokenizer.decode(tokenizer.encode(every)) == every
    assert tokenizer.encode("a<|im_end|><|pad|><|im_start|>") == [97, 258, 256, 257]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids) == (259, 258, 256, {258})
    assert tokenizer.encode("") == []


def test_decode() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(np.array([104, 105, 258], dtype=np.int32)) == "hi"
    assert tokenizer.decode([104, 258], skip_special=False) == "h<|im_end|>"
    assert tokenizer.decode([0xE9, 97]) == "\ufffda"  # no UTF-8


def test_chat() -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "2 1"}]
    expected = "<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\n2 1<|im_end|>\n"
    assert tokenizer.apply_chat(messages, add_generation_prompt=False) == expected
    assert tokenizer.apply_chat(messages) == expected + "<|im_start|>assistant\n"


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_ids = frozenset({258, 10})
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("ü <|pad|>") == [195, 188, 32, 256]
    assert (again.eos_id, again.pad_id, again.eos_ids, again.vocab_size) == (258, 256, {258, 10}, 259)
    assert again.chat_template == tokenizer.chat_template
    assert pickle.loads(pickle.dumps(again)).encode("ü") == [195, 188]  # it travels to workers


def folder_with(tmp_path: Path, **config: object) -> Path:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_end_tokens(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, eos_token={"content": "<|im_start|>", "special": True})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids) == (257, 257, {257})
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(folder).eos_ids == {257, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    assert load_tokenizer(folder).eos_ids == {257, 256, 258}
    folder_with(tmp_path)
    (folder / "config.json").write_text('{"eos_token_id": 258}')
    assert load_tokenizer(folder).eos_token == "<|im_end|>"


def test_templates(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ x }}"}]
    folder = folder_with(tmp_path, eos_token="<|im_end|>", bos_token="<|pad|>", chat_template=named)
    assert load_tokenizer(folder).apply_chat([], x=3) == "<|pad|>3"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        load_tokenizer(folder).apply_chat([])
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(DataError, match="unsafe"):  # a template is downloaded code
        load_tokenizer(folder).apply_chat([])
    (folder / "chat_template.jinja").unlink()
    folder_with(tmp_path, eos_token="<|im_end|>")
    with pytest.raises(DataError, match="no chat template"):
        load_tokenizer(folder).apply_chat([])


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'tokenizer\.json does not exist; .*"bytes"'):
        load_tokenizer(tmp_path)
    folder = folder_with(tmp_path)
    with pytest.raises(DataError, match="names no end token"):
        load_tokenizer(folder)
    folder_with(tmp_path, eos_token="<|absent|>")
    with pytest.raises(DataError, match=r'no token "<\|absent\|>"'):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("3")
    with pytest.raises(DataError, match="not a JSON object"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(folder)


def test_vocabulary_must_cover_the_tokenizer() -> None:
    tokenizer: Tokenizer = load_tokenizer("bytes")
    check_tokenizer(tokenizer, 259)
    check_tokenizer(tokenizer, 512)  # padded vocabularies are common
    with pytest.raises(DataError, match=r"does not match the model's vocabulary: .* 258, the model has 200 tokens"):
        check_tokenizer(tokenizer, 200)
