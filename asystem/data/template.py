"""Chat templates: Jinja programs that come with models, rendered as transformers renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from asystem.errors import DataError

Span = tuple[int, int]
"""Characters from the first up to the second."""

# Around what a template marks by {% generation %}. Noncharacters of Unicode, so that no text holds them.
_START, _END = "\ufdd0generation\ufdd1", "\ufdd0endgeneration\ufdd1"


def render(source: str, values: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The text, and which spans of it the template marks as the assistant's, with {% generation %} ...
    {% endgeneration %}.

    Raises:
        DataError: the template is broken or refuses these values.
    """
    from jinja2 import TemplateError

    try:
        marked: str = _compile(source).render(values)
    except (TemplateError, TypeError) as error:
        raise DataError(f"the chat template cannot render these messages: {error}") from None
    text, spans, start = "", [], 0
    for piece in re.split(f"({_START}|{_END})", marked):
        if piece == _START:
            start = len(text)
        elif piece == _END:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    """They come with downloaded models, so they run in Jinja's sandbox; the settings are transformers'."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{_START}{caller()}{_END}"

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(source)
