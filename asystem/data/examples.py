"""The datasets of `asystem sft` and `asystem dpo`, and the batches cut from them: rows by number, no tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from asystem.config import Command, Config
from asystem.data.batch import balanced
from asystem.data.conversation import Conversation, ConversationEncoder, check_row
from asystem.data.task import Row, locate_rows
from asystem.data.tokenizer import Tokenizer
from asystem.errors import DataError
from asystem.plugin import load_module, resolve


@dataclass(frozen=True, slots=True)
class Example:
    """What the controller knows of a row: no tokens.

    Attributes:
        number: of the row in its dataset. length: tokens of its sequences. trained: those that the loss counts.
        ends: whether each sequence ends in an end token.
        reference: sums of log-probabilities that the reference gives to the chosen and the rejected answer (DPO).
    """

    number: int
    length: int
    trained: int
    ends: bool = True
    reference: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Rows of one optimizer step's global batch or of a measurement: all of them, or one rank's part.

    Attributes:
        held_out: of which dataset.
        num_rows, num_trained: of the *global* batch, which losses are divided by.
    """

    rows: list[Example]
    held_out: bool
    num_rows: int
    num_trained: int

    @classmethod
    def of(cls, rows: list[Example], *, held_out: bool = False) -> ExampleBatch:
        """A whole batch."""
        return cls(rows, held_out, len(rows), sum(row.trained for row in rows))

    def split(self, parts: int) -> list[ExampleBatch]:
        """Parts of nearly equal tokens; with fewer rows than parts some are empty."""
        shares = balanced([row.length for row in self.rows], parts)
        return [replace(self, rows=[self.rows[place] for place in share]) for share in shares]


class ExampleSet:
    """A dataset's rows, and their sequences when they are asked for."""

    def __init__(self, rows: Sequence[tuple[str, Row]], encoder: ConversationEncoder) -> None:
        self._rows, self._encoder = rows, encoder

    def __len__(self) -> int:
        return len(self._rows)

    def sequences(self, number: int) -> list[Conversation]:
        """A row's sequence (DPO: the chosen and the rejected one); none if it is too long and dropped."""
        where, row = self._rows[number]
        return self._encoder(row, where)

    def survey(self) -> list[Example]:
        """Every row that is not dropped, by encoding it; so that a row which cannot be encoded is refused early."""
        ends, found = self._encoder.tokenizer.eos_ids, []
        for number in range(len(self)):
            if sequences := self.sequences(number):
                length, trained = sum(len(s.tokens) for s in sequences), sum(s.num_trained for s in sequences)
                found.append(Example(number, length, trained, all(s.tokens[-1] in ends for s in sequences)))
        return found


def load_examples(config: Config, tokenizer: Tokenizer) -> tuple[ExampleSet, ExampleSet]:
    """The rows to train on, and those held out.

    Raises:
        DataError: a dataset that cannot be read, a malformed row (with its line), a held-out row that training would
            see, or no rows.
    """
    data, cfg = config.data, config.finetune
    preferences = config.command is Command.dpo
    module = load_module(resolve(data.task, config.recipe_dir), key="data.task") if data.task else None
    train, held_out = (
        [(where, check_row(row, where, preferences=preferences)) for where, row in found]
        for found in (
            locate_rows("train", data.train, config.recipe_dir, module),
            locate_rows("evaluation", data.evaluation, config.recipe_dir, module),
        )
    )
    if not held_out and cfg.held_out:
        train, held_out = _put_aside(train, cfg.held_out, config.seed)
    if not train:
        raise DataError("no training rows: set data.train to a JSONL or Parquet file, or define train() in data.task")
    _refuse_seen(train, held_out)
    encoder = ConversationEncoder(tokenizer, cfg, preferences=preferences)
    return ExampleSet(train, encoder), ExampleSet(held_out, encoder)


Located = list[tuple[str, Row]]


def _put_aside(rows: Located, count: int, seed: int) -> tuple[Located, Located]:
    if count >= len(rows):
        raise DataError(f"finetune.held_out={count} leaves nothing of {len(rows)} training rows")
    held_out = [rows[number] for number in sorted(random.Random(f"{seed}/held out").sample(range(len(rows)), count))]
    keys = {_key(row) for _, row in held_out}
    return [(where, row) for where, row in rows if _key(row) not in keys], held_out  # without what repeats them


def _refuse_seen(train: Located, held_out: Located) -> None:
    keys = {_key(row) for _, row in held_out}
    found = [where for where, row in train if keys and _key(row) in keys]
    if found:
        raise DataError(f"{len(found)} training rows are held out too, the first is {found[0]}; remove them")


def _key(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=repr)
