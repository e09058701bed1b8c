"""Text to token ids and back, and chat templates.

Wraps the `tokenizers` library, whose import takes milliseconds where transformers takes seconds. `byte_tokenizer` needs
no files at all: one id a byte, for tasks that start from random weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from asystem.data.template import Span, render
from asystem.errors import DataError

BYTES = "bytes"
PAD, CHAT_START, CHAT_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Message = dict[str, Any]


class Tokenizer:
    """A fast tokenizer with its end and padding tokens and its chat template.

    Attributes:
        eos_id: the end token, which also ends demonstrations.
        eos_ids: all ids that end a response (generation_config.json may name several).
        pad_id: the padding token; the end token where there is none.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        eos_token: str,
        pad_token: str | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._fast = fast
        self._config = dict(config or {})  # tokenizer_config.json as it was read, written back by `save`
        self.eos_token = eos_token
        self.pad_token = eos_token if pad_token is None else pad_token
        self.eos_id = self._id(eos_token)
        self.pad_id = self._id(self.pad_token)
        self.eos_ids: frozenset[int] = frozenset({self.eos_id, *eos_ids})
        self.chat_template = chat_template

    @cached_property
    def end_tokens(self) -> list[str]:
        """The tokens of `eos_ids` as text."""
        return [token for number in sorted(self.eos_ids) if (token := self._fast.id_to_token(number)) is not None]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._fast.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands: special tokens written in it count, none are added."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """A prompt as plain text, or as chat messages through the chat template."""
        return self.encode(prompt if isinstance(prompt, str) else self.apply_chat(prompt))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids`` (a list or an integer array); bytes that are no UTF-8 become U+FFFD."""
        text: str = self._fast.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return text

    def apply_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation by the model's chat template, up to where the assistant speaks.

        Args:
            messages: each {"role": ..., "content": ...}.
            variables: whatever else the template reads, such as ``enable_thinking``.

        Raises:
            DataError: no chat template, or one that refuses these messages.
        """
        return self.apply_chat_marked(messages, add_generation_prompt=add_generation_prompt, **variables)[0]

    def apply_chat_marked(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any
    ) -> tuple[str, list[Span]]:
        """The same, and the spans that the template marks as the assistant's own; none where it marks nothing."""
        if self.chat_template is None:
            raise DataError("the tokenizer has no chat template; give prompts as plain text, not as chat messages")
        values: dict[str, Any] = {
            name: _content(value) for name, value in self._config.items() if name.endswith("_token") and value
        }
        values |= {"eos_token": self.eos_token, "pad_token": self.pad_token, "tools": None, "documents": None}
        values |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **variables}
        return render(self.chat_template, values)

    def encode_spans(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Token ids, and which of the tokens lie within one of the spans, which are in order and do not overlap."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        inside = [False] * len(encoding.ids)
        token, offsets = 0, encoding.offsets
        for start, end in spans:
            while token < len(offsets) and offsets[token][1] <= end:
                # Some tokenizers leave white space out of a token's offsets: its end is where it ends all the same.
                inside[token] = offsets[token][0] >= start and offsets[token][1] > start
                token += 1
        return encoding.ids, inside

    def save(self, path: str | Path) -> None:
        """Writes a folder's tokenizer files, as transformers' AutoTokenizer reads them."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self._config
        config |= {"eos_token": self.eos_token, "pad_token": self.pad_token}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        self._fast.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", config)
        stops = [self.eos_id, *sorted(self.eos_ids - {self.eos_id})]
        generation = {"eos_token_id": stops if len(stops) > 1 else self.eos_id, "pad_token_id": self.pad_id}
        _write_json(folder / "generation_config.json", generation)

    def _id(self, token: str) -> int:
        number = self._fast.token_to_id(token)
        if number is None:
            raise DataError(f'the tokenizer has no token "{token}", which its configuration names')
        return int(number)


def byte_tokenizer() -> Tokenizer:
    """259 ids: the 256 bytes under their own values, then <|pad|>, <|im_start|>, <|im_end|> (the end token)."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True) for token in (PAD, CHAT_START, CHAT_END)])
    return Tokenizer(fast, eos_token=CHAT_END, pad_token=PAD, chat_template=CHATML)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """``"bytes"``, or the tokenizer of a Hugging Face folder.

    Raises:
        DataError: no tokenizer.json, an unreadable file, or no end token.
    """
    if str(path) == BYTES:
        return byte_tokenizer()
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f'{file} does not exist; give a folder with tokenizer.json, or "{BYTES}"')
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:  # (the library raises nothing narrower)
        raise DataError(f"{file} cannot be read: {error}") from None
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    stops = _stop_ids(folder)
    eos_token = _content(config.get("eos_token")) or (fast.id_to_token(stops[0]) if stops else None)
    if eos_token is None:
        raise DataError(f'{folder} names no end token; set "eos_token" in its tokenizer_config.json')
    return Tokenizer(
        fast,
        eos_token=eos_token,
        pad_token=_content(config.get("pad_token")),
        eos_ids=stops,
        chat_template=_chat_template(folder, config),
        config=config,
    )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer that can produce ids beyond the model's vocabulary.

    Raises:
        DataError: with both numbers.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer does not match the model's vocabulary: its largest id is {tokenizer.vocab_size - 1}, "
            f"the model has {vocab_size} tokens (0 to {vocab_size - 1}); use the model's own tokenizer, "
            f"or model.vocab_size={tokenizer.vocab_size} for random weights"
        )


def _byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself when printable, else 256 and up (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the configuration's; of several named ones, "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _stop_ids(folder: Path) -> list[int]:
    """End ids of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return [int(i) for i in ids] if isinstance(ids, list) else [int(ids)]
    return []


def _content(token: Any) -> str | None:
    """A token stands as text or as {"content": text, ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
