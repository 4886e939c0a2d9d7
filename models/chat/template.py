"""Renders chat templates: Jinja programs that come with a model and are not trusted.

Called by ``tokenizer``. Templates run in Jinja's immutable sandbox, with the helpers that transformers gives
them, since they are written for those. It must not know about tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from farshore.errors import InvalidRequest, ModelError
from farshore.text import shortened

_MOST_CHARS = 120


class ChatTemplate:
    """A compiled template. Immutable; threads may share it."""

    def __init__(self, source: str, *, where: str) -> None:
        """``where``: the model's name, for messages. Raises ModelError if ``source`` isn't valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        self._where = where
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"{where}: its chat template isn't valid Jinja ({error}); use another model"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The prompt's text. Raises InvalidRequest if the template refuses the messages or fails on them."""
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:
            # A template may raise any exception, and the text may quote messages of any length.
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise InvalidRequest(
                f"{self._where}: its chat template can't render these messages: {shortened(why, _MOST_CHARS)}"
            ) from error


class _GenerationBlocks(Extension):
    """``{% generation %}…{% endgeneration %}`` marks text for training. Here it renders its body only."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares tags like this

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a model would see as text.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    # Local time without a zone, as transformers gives it.
    return datetime.now().strftime(form)
