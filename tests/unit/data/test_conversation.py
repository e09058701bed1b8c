"""Conversations to tokens: which of them are trained, and every row that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from asystem.config import FinetuneConfig, TooLong, Turns
from asystem.data.conversation import Conversation, ConversationEncoder, check_row
from asystem.data.tokenizer import Tokenizer, byte_tokenizer
from asystem.errors import DataError

CHAT = [
    {"role": "user", "content": "sort 21"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "on"},
    {"role": "assistant", "content": "21"},
]
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
)
# As Qwen3's: an empty thought before the last answer alone, so that earlier answers change when others follow.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode(row: dict[str, Any], template: str | None = None, **changes: Any) -> list[Conversation]:
    tokenizer: Tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    preferences = changes.pop("preferences", False)
    row = check_row(row, "rows.jsonl, line 7", preferences=preferences)
    return ConversationEncoder(tokenizer, FinetuneConfig(**changes), preferences=preferences)(row, "rows.jsonl, line 7")


def shown(conversation: Conversation) -> tuple[str, str]:
    """The whole text, and the trained part of it with | between parts."""
    tokenizer = byte_tokenizer()
    parts, previous = [], False
    for token, trained in zip(conversation.tokens, conversation.trained, strict=True):
        if trained:
            parts += ["|"] if not previous and parts else []
            parts.append(tokenizer.decode([token], skip_special=False))
        previous = trained
    return tokenizer.decode(conversation.tokens, skip_special=False), "".join(parts)


def test_every_assistant_turn_is_trained_up_to_its_end_token() -> None:
    (conversation,) = encode({"messages": CHAT})
    assert shown(conversation) == (
        "<|im_start|>user\nsort 21<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"
        "<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n21<|im_end|>",
        "12<|im_end|>|21<|im_end|>",
    )
    assert conversation.num_trained == 6
    sample = conversation.sample(0.5, number=3)
    prompt = byte_tokenizer().encode_prompt(CHAT[:1])
    assert sample.prompt_tokens == prompt  # exactly what generation is given
    assert sample.rollout == 3 and sample.length == len(conversation.tokens)


def test_markers_of_the_template_decide_where_it_has_them() -> None:
    (conversation,) = encode({"messages": CHAT}, MARKED)
    assert shown(conversation) == (
        "[user]sort 21\n[assistant]12<|im_end|>\n[user]on\n[assistant]21<|im_end|>",
        "12<|im_end|>|21<|im_end|>",
    )


@pytest.mark.parametrize("template", [None, MARKED, THINKING])
def test_the_last_turn_alone(template: str | None) -> None:
    (conversation,) = encode({"messages": CHAT}, template, turns=Turns.last)
    assert shown(conversation)[1] in ("21<|im_end|>", "<think>21<|im_end|>")


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_remedies() -> None:
    with pytest.raises(DataError, match=r"line 7: the chat template renders .* message 2 differently .*turns=last"):
        encode({"messages": CHAT}, THINKING)


def test_a_template_that_marks_too_little_is_refused() -> None:
    once = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(DataError, match="marks 1 parts as generated, of 2 assistant turns"):
        encode({"messages": CHAT}, once)


def test_text_stands_as_it_is_and_ends_with_the_end_token() -> None:
    (conversation,) = encode({"prompt": "ab=", "response": "é"})
    assert conversation.tokens == [97, 98, 61, 195, 169, 258]
    assert conversation.trained == [False] * 3 + [True] * 3


def test_a_response_after_messages_goes_through_the_template() -> None:
    whole, split = encode({"messages": CHAT[:2]}), encode({"prompt": CHAT[:1], "response": "12"})
    assert whole == split


def test_tools_and_missing_contents_reach_the_template() -> None:
    template = (
        "{{ tools[0].name }}:{% for m in messages %}{{ m.content if m.content is defined else '-' }};{% endfor %}"
    )
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    (conversation,) = encode({"messages": [CHAT[0], calls], "tools": [{"name": "f"}]}, template)
    assert shown(conversation) == ("f:sort 21;-;", "-;")


def test_too_long_rows_are_dropped_or_cut() -> None:
    row = {"prompt": "ab", "response": "cdef"}
    assert encode(row, max_tokens=6) == []
    (cut,) = encode(row, max_tokens=6, too_long=TooLong.cut)
    assert cut.tokens == [97, 98, 99, 100, 101, 102]  # no end token: the answer goes on
    assert encode(row, max_tokens=2, too_long=TooLong.cut) == []  # nothing to train is left


def test_tokens_that_begin_a_sequence_cannot_be_trained() -> None:
    (conversation,) = encode({"messages": CHAT[1:2]}, "{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert (conversation.trained, conversation.prompt_length) == ([False, True], 1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab", "chosen": "x", "rejected": "yz"},
        {"prompt": CHAT[:1], "chosen": "x", "rejected": "yz"},
        {"prompt": CHAT[:1], "chosen": [{"role": "assistant", "content": "x"}], "rejected": [CHAT[1]]},
        {"prompt": "ab", "chosen": [{"role": "assistant", "content": "x"}], "rejected": [CHAT[1]]},
        {"chosen": CHAT, "rejected": [*CHAT[:3], {"role": "assistant", "content": "x"}]},
        {"prompt": "sort 21", "chosen": CHAT[:2], "rejected": [CHAT[0], {"role": "assistant", "content": "x"}]},
    ],
)
def test_preferences_share_a_prompt_and_train_their_answers(row: dict[str, Any]) -> None:
    chosen, rejected = encode(row, preferences=True)
    assert chosen.tokens[: chosen.prompt_length] == rejected.tokens[: rejected.prompt_length]
    assert shown(chosen)[1] != shown(rejected)[1]
    assert "|im_end|>|" not in shown(chosen)[1]  # the assistant's turns before the prompt's end are context


def test_a_pair_is_dropped_whole() -> None:
    row = {"prompt": "ab", "chosen": "x", "rejected": "much longer"}
    assert encode(row, preferences=True, max_tokens=6) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object, got list"),
        ({"text": "x"}, 'neither "messages" nor "prompt" and "response"'),
        ({"prompt": "x", "chosen": "y"}, "preferences are for asystem dpo"),
        ({"prompt": "", "response": "y"}, '"prompt" is missing or empty'),
        ({"prompt": "x", "response": ""}, '"response" is no text or empty'),
        ({"prompt": "x", "response": ["y"]}, '"response" is no text or empty'),
        ({"messages": "hello"}, '"messages" is no list of messages'),
        ({"messages": [{"content": "x"}]}, '"messages" 1 is no message with a "role"'),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, '"messages" 2, of the assistant, has no "content"'),
        ({"messages": CHAT[:1]}, "no message of the assistant to learn from"),
    ],
)
def test_malformed_rows_are_named(row: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        encode(row)
    assert str(raised.value).startswith("rows.jsonl, line 7: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "rejected": "y"}, '"chosen" is missing or empty'),
        ({"prompt": "x", "chosen": "y", "rejected": ""}, '"rejected" is missing or empty'),
        ({"chosen": "x", "rejected": "y"}, '"prompt" is missing or empty'),
        ({"chosen": CHAT, "rejected": "y"}, '"rejected" is no list of messages'),
        ({"chosen": CHAT, "rejected": CHAT}, '"chosen" and "rejected" do not differ'),
    ],
)
def test_malformed_preferences_are_named(row: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        encode(row, preferences=True)
    assert message in str(raised.value)
