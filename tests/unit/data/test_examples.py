"""Datasets of fine-tuning: what is held out, what is counted, and batches by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asystem.config import Command, Config
from asystem.data.examples import Example, ExampleBatch, load_examples
from asystem.data.tokenizer import byte_tokenizer
from asystem.errors import DataError


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}=", "response": "x" * (n + 1)} for n in range(count)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(command=Command.sft, recipe_dir=str(tmp_path))
    config.data.train = "train.jsonl"
    write(tmp_path / "train.jsonl", rows(6))
    return config


def write(path: Path, content: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def test_the_survey_counts_tokens_and_leaves_out_what_is_too_long(config: Config) -> None:
    config.finetune.max_tokens = 7  # prompt 2, response n + 1, end token 1
    train, held_out = load_examples(config, byte_tokenizer())
    assert (len(train), len(held_out), held_out.survey()) == (6, 0, [])
    assert train.survey() == [Example(n, length=n + 4, trained=n + 2) for n in range(4)]
    assert train.sequences(5) == []


def test_answers_without_an_end_token_are_noted(config: Config) -> None:
    config.data.train = "chat.jsonl"
    write(Path(config.recipe_dir) / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}])
    tokenizer = byte_tokenizer()
    assert [example.ends for example in load_examples(config, tokenizer)[0].survey()] == [True]
    tokenizer.chat_template = "A:{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert [example.ends for example in load_examples(config, tokenizer)[0].survey()] == [False]


def test_rows_put_aside_are_drawn_by_seed_and_do_not_train(config: Config) -> None:
    write(Path(config.recipe_dir) / "train.jsonl", [*rows(6), *rows(6)])  # each row twice
    config.finetune.held_out = 3

    def lengths(seed: int) -> tuple[list[int], list[int]]:
        config.seed = seed
        train, held_out = load_examples(config, byte_tokenizer())
        return [e.length for e in train.survey()], [e.length for e in held_out.survey()]

    train, held_out = lengths(0)
    assert lengths(0) == (train, held_out)
    assert any(lengths(seed) != (train, held_out) for seed in (1, 2, 3))
    assert len(held_out) == 3 and not set(train) & set(held_out)
    config.finetune.held_out = 12
    with pytest.raises(DataError, match=r"finetune\.held_out=12 leaves nothing of 12 training rows"):
        load_examples(config, byte_tokenizer())


def test_held_out_rows_must_not_train(config: Config) -> None:
    config.data.evaluation = "held_out.jsonl"
    write(Path(config.recipe_dir) / "held_out.jsonl", [{"prompt": "9=", "response": "y"}, rows(3)[2]])
    with pytest.raises(DataError, match=r"1 training rows are held out too, the first is .*train\.jsonl, line 3"):
        load_examples(config, byte_tokenizer())


def test_a_malformed_row_is_named_before_anything_is_encoded(config: Config) -> None:
    write(Path(config.recipe_dir) / "train.jsonl", [*rows(2), {"prompt": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r'train\.jsonl, line 3: neither "messages" nor'):
        load_examples(config, byte_tokenizer())
    config.command = Command.dpo
    with pytest.raises(DataError, match=r'train\.jsonl, line 1: "chosen" is missing'):
        load_examples(config, byte_tokenizer())


def test_no_rows_are_refused(config: Config) -> None:
    config.data.train = None
    with pytest.raises(DataError, match="no training rows"):
        load_examples(config, byte_tokenizer())


def test_batches_are_cut_evenly_and_keep_global_counts() -> None:
    batch = ExampleBatch.of([Example(n, length, length - 2) for n, length in enumerate((12, 7, 6, 5))], held_out=True)
    left, right = batch.split(2)
    assert [[row.number for row in part.rows] for part in (left, right)] == [[0, 3], [1, 2]]
    assert (left.num_rows, left.num_trained, left.held_out) == (4, 22, True)
