"""From a row of a fine-tuning dataset to tokens, and which of them are trained: the assistant's own.

    {"messages": [{"role": ..., "content": ...}, ...]}      every assistant turn is trained (`finetune.turns`)
    {"prompt": ..., "response": text}                       the response is
    {"prompt": ..., "chosen": ..., "rejected": ...}         preferences (DPO): each answer is, after the same prompt

A prompt is text or chat messages, an answer too. Text is taken as it stands and the end token ends the answer; messages
go through the tokenizer's chat template, with the row's "tools" where it has some. The assistant's part is what the
template marks by {% generation %}, else what it adds between `messages[:i]` with a generation prompt and
`messages[:i + 1]`, both of which must be how the whole conversation begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asystem.config import FinetuneConfig, TooLong, Turns
from asystem.data.packing import Sample
from asystem.data.task import Row
from asystem.data.template import Span
from asystem.data.tokenizer import Message, Tokenizer
from asystem.errors import DataError


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sequence: ``trained`` tells which of ``tokens`` are the assistant's own. Tokens after the last are left out.

    Attributes:
        prompt_length: tokens before the first trained one, at least 1.
    """

    tokens: list[int]
    trained: list[bool]
    prompt_length: int

    @property
    def num_trained(self) -> int:
        """Tokens that the loss counts."""
        return sum(self.trained)

    def sample(self, token_weight: float, number: int) -> Sample:
        """For packing, under the number of its row."""
        first, tokens, trained = self.prompt_length, self.tokens, self.trained
        return Sample(tokens[:first], tokens[first:], token_weight, rollout=number, trained=trained[first:])


@dataclass(frozen=True, slots=True)
class Answer:
    """What a row asks to be learned: an answer after a prompt, both text or both messages."""

    prompt: str | list[Message]
    answer: str | list[Message]


class ConversationEncoder:
    """Rows to sequences, by a tokenizer and its template."""

    def __init__(self, tokenizer: Tokenizer, cfg: FinetuneConfig, *, preferences: bool) -> None:
        self.tokenizer, self.cfg, self.preferences = tokenizer, cfg, preferences

    def __call__(self, row: Row, where: str) -> list[Conversation]:
        """One sequence, or the chosen and the rejected one; none for a row that is too long and to be dropped.

        Raises:
            DataError: naming ``where``, if the row is malformed or the template does not show the assistant's part.
        """
        answers = _pair(row, where) if self.preferences else [_answer(row, where)]
        try:
            sequences = [self._cut(*self._encode(answer, row.get("tools"))) for answer in answers]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        fitting = [sequence for sequence in sequences if sequence is not None]
        return fitting if len(fitting) == len(sequences) else []

    def _encode(self, answer: Answer, tools: Any) -> tuple[list[int], list[bool]]:
        if isinstance(answer.prompt, str):
            assert isinstance(answer.answer, str), "text is answered by text"
            prompt = self.tokenizer.encode(answer.prompt)
            response = [*self.tokenizer.encode(answer.answer), self.tokenizer.eos_id]
            return prompt + response, [False] * len(prompt) + [True] * len(response)
        assert isinstance(answer.answer, list), "messages are answered by messages"
        text, spans = self._spans([*answer.prompt, *answer.answer], len(answer.prompt), tools)
        return self.tokenizer.encode_spans(text, spans)

    def _spans(self, messages: list[Message], first: int, tools: Any) -> tuple[str, list[Span]]:
        """The rendered conversation, and its trained parts: those of assistant messages from ``first`` on."""
        text, marked = self.tokenizer.apply_chat_marked(messages, add_generation_prompt=False, tools=tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [index for index in turns if index >= first]
        wanted = wanted[-1:] if self.cfg.turns is Turns.last else wanted
        if not marked:
            return text, [self._span(text, messages, index, tools) for index in wanted]
        if len(marked) != len(turns):
            raise DataError(
                f"the chat template marks {len(marked)} parts as generated, of {len(turns)} assistant turns"
            )
        return text, [span for index, span in zip(turns, marked, strict=True) if index in wanted]

    def _span(self, text: str, messages: list[Message], turn: int, tools: Any) -> Span:
        """Where one turn stands, by rendering what comes before it, and what comes up to its end."""
        before = self.tokenizer.apply_chat(messages[:turn], tools=tools)
        upto = text  # of the last turn
        if turn + 1 < len(messages):
            upto = self.tokenizer.apply_chat(messages[: turn + 1], add_generation_prompt=False, tools=tools)
        if not (text.startswith(upto) and upto.startswith(before)):
            raise DataError(
                f"the chat template renders what comes before message {turn + 1} differently once later messages "
                "follow, so that the assistant's part cannot be told; train the last turn alone (finetune.turns=last), "
                "or give a template with {% generation %} markers (model.chat_template=FILE)"
            )
        start, stop = len(before), len(upto)
        ends = [upto.rfind(end, start) + len(end) for end in self.tokenizer.end_tokens if end in upto[start:]]
        return start, max(ends, default=stop)  # what follows the end token, a line break mostly, is not generated

    def _cut(self, tokens: list[int], trained: list[bool]) -> Conversation | None:
        """None if it is too long and to be dropped, or nothing trained is left of it."""
        limit = self.cfg.max_tokens
        if len(tokens) > limit and self.cfg.too_long is TooLong.drop:
            return None
        places = [place for place, is_trained in enumerate(trained[:limit]) if is_trained and place > 0]
        if not places:
            return None
        first, end = places[0], places[-1] + 1
        return Conversation(tokens[:end], [False, *trained[1:end]], first)


def check_row(row: Any, where: str, *, preferences: bool) -> Row:
    """The row, in which all is there and of the right kind.

    Raises:
        DataError: naming ``where`` and what is wrong.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    for answer in _pair(row, where) if preferences else [_answer(row, where)]:
        if isinstance(answer.answer, list) and not any(m["role"] == "assistant" for m in answer.answer):
            raise DataError(f"{where}: no message of the assistant to learn from")
    return row


def _answer(row: Row, where: str) -> Answer:
    if row.get("messages") is not None:
        return Answer([], _messages(row["messages"], "messages", where))
    if row.get("response") is None:
        hint = "; preferences are for asystem dpo" if "chosen" in row else ""
        raise DataError(f'{where}: neither "messages" nor "prompt" and "response"{hint}')
    prompt, response = _prompt(row, where), row["response"]
    if not isinstance(response, str) or not response:
        raise DataError(f'{where}: "response" is no text or empty')
    return Answer(prompt, response if isinstance(prompt, str) else [{"role": "assistant", "content": response}])


def _pair(row: Row, where: str) -> list[Answer]:
    """The chosen and the rejected answer. Where they are whole conversations, what both begin with is the prompt."""
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise DataError(f'{where}: "{name}" is missing or empty')
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _prompt(row, where)
        if isinstance(prompt, str):
            return [Answer(prompt, text) for text in (chosen, rejected)]
        return [Answer(prompt, [{"role": "assistant", "content": text}]) for text in (chosen, rejected)]
    answers = [_messages(row[name], name, where) for name in ("chosen", "rejected")]
    if answers[0][0]["role"] == "assistant":
        prompt = _prompt(row, where)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [Answer(prompt, answer) for answer in answers]
    common = 0
    while common < min(map(len, answers)) and answers[0][common] == answers[1][common]:
        common += 1
    if common in map(len, answers):
        raise DataError(f'{where}: "chosen" and "rejected" do not differ')
    return [Answer(answer[:common], answer[common:]) for answer in answers]


def _prompt(row: Row, where: str) -> str | list[Message]:
    prompt = row.get("prompt")
    if not prompt:
        raise DataError(f'{where}: "prompt" is missing or empty')
    return prompt if isinstance(prompt, str) else _messages(prompt, "prompt", where)


def _messages(value: Any, name: str, where: str) -> list[Message]:
    """Chat messages, without the keys that are null (Parquet fills them in)."""
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: "{name}" is no list of messages, or empty')
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where}: "{name}" {number} is no message with a "role"')
        message = {key: part for key, part in message.items() if part is not None}
        if not isinstance(message.get("content"), (str, list)) and "tool_calls" not in message:
            raise DataError(f'{where}: "{name}" {number}, of the {message["role"]}, has no "content"')
        messages.append(message)
    return messages
