"""Parts the text of a chat's answer into content, reasoning and tool calls.

Configured by ``endpoints``, used by ``answers`` for each choice. Must not know the shape of an answer.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from farshore.gateway.api.openai.calls import Call, CallParser, Forced, Format, Found, format_of, parser_of
from farshore.gateway.api.openai.reasoning import BEGIN, Parted, ReasoningParser
from farshore.gateway.served import Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsing:
    """How a model's answers are parted. ``tool_format``: None if it makes no calls."""

    tool_format: Format | None
    reasons: bool

    @classmethod
    def of(cls, served: Served) -> "Parsing":
        """As the options say, or by the chat template."""
        asked, template = served.spec.tool_call_parser, served.chat_template
        tool_format = format_of(template) if asked == "auto" else None if asked == "none" else asked
        reasoning = served.spec.reasoning_parser
        return cls(
            tool_format=tool_format,
            reasons=BEGIN in template if reasoning == "auto" else reasoning == "think",
        )


class Piece(NamedTuple):
    """Text that is final, by kind, and the calls behind it."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()


class ChoiceText:
    """The text of one choice. ``prompt_end``: the last characters of the prompt. ``names``: of the functions
    that the request offers; none: calls are text."""

    def __init__(
        self,
        parsing: Parsing,
        *,
        prompt_end: str,
        names: Collection[str],
        forced: Forced | None,
        structured: bool = False,
    ) -> None:
        """``structured``: the answer has a structure from its first token on, so it has no reasoning, even
        where the prompt begins one. ``forced``: parses an answer whose structure is a call."""
        self._reasoning: ReasoningParser | None = None
        if parsing.reasons and not structured and forced is None:
            self._reasoning = ReasoningParser(begun=prompt_end.rstrip().endswith(BEGIN))
        self._calls: CallParser | None = forced
        if forced is None and names and parsing.tool_format is not None:
            self._calls = parser_of(parsing.tool_format, names)

    def push(self, text: str) -> Piece:
        """Adds text. Returns what is final now."""
        parted = Parted("", text) if self._reasoning is None else self._reasoning.push(text)
        found = self._found(parted.content)
        return Piece(parted.reasoning, found.content, found.calls)

    def finish(self) -> Piece:
        """Ends the text. Returns what was held back."""
        parted = Parted("", "") if self._reasoning is None else self._reasoning.finish()
        found = self._found(parted.content)
        last = Found("") if self._calls is None else self._calls.finish()
        return Piece(parted.reasoning, found.content + last.content, found.calls + last.calls)

    def _found(self, content: str) -> Found:
        return Found(content) if self._calls is None else self._calls.push(content)
