"""Finds the tool calls in a model's answer, in the formats that models were trained on.

Used by ``answers`` for each choice of a chat with tools, with pieces of text of any size. A call is given
when it is complete. Text that only looks like a call is content: nothing is lost. Must not know about tokens.
"""

import json
import uuid
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, Protocol

from farshore.gateway.requests.stop_strings import StopStrings

Format = Literal["hermes", "llama3", "mistral"]


class Call(NamedTuple):
    """A function that the model wants called. ``arguments``: a JSON text."""

    id: str
    name: str
    arguments: str


class Found(NamedTuple):
    """What has become final: text, and calls behind it."""

    content: str
    calls: tuple[Call, ...] = ()


class CallParser(Protocol):
    def push(self, text: str) -> Found:
        """Adds text. Returns what is final now."""

    def finish(self) -> Found:
        """Ends the text. Returns what was held back."""


def format_of(template: str) -> Format | None:
    """The format of a model's calls, by its chat template; None if the template shows no tools, or asks for
    another format."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or '"parameters"' in template:
        return "llama3"
    return None


def parser_of(kind: Format, names: Collection[str]) -> CallParser:
    """A parser for one answer. ``names``: of the functions that the request offers."""
    if kind == "hermes":
        return Blocks("<tool_call>", "</tool_call>")
    if kind == "mistral":
        return Tail("[TOOL_CALLS]")
    return Objects(names)


class Forced:
    """An answer that is a call by its structure: the arguments of the function ``name``, or with None a list
    of calls."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._text = ""

    def push(self, text: str) -> Found:
        self._text += text
        return Found("")

    def finish(self) -> Found:
        value = _json(self._text)
        if self._name is not None:
            value = [{"name": self._name, "arguments": value}]
        calls = [_call(one, _long_id) for one in value] if isinstance(value, list) else []
        found = tuple(call for call in calls if call is not None)
        # An answer that max_tokens cut short is no JSON.
        return Found("", found) if found else Found(self._text)


class Blocks:
    """Hermes, Qwen and others: each call is a JSON object between two marks."""

    def __init__(self, begin: str, end: str) -> None:
        self._begin, self._end = begin, end
        self._inside = False
        self._mark = StopStrings([begin])
        self._block = ""
        self._blank = ""
        self._called = False

    def push(self, text: str) -> Found:
        content, calls = "", []
        for character in text:
            final = self._mark.push(character)
            if self._inside:
                self._block += final
            else:
                content += self._with_blanks(final)
            if not self._mark.found:
                continue
            if self._inside:
                call = _call(_json(self._block), _long_id)
                if call is None:
                    content += self._with_blanks(f"{self._begin}{self._block}{self._end}")
                else:
                    calls.append(call)
                    self._blank, self._called = "", True
            self._inside = not self._inside
            self._mark = StopStrings([self._end if self._inside else self._begin])
            self._block = ""
        return Found(content, tuple(calls))

    def finish(self) -> Found:
        held = self._mark.finish()
        if not self._inside:
            text = self._with_blanks(held)
            return Found(text if self._called else text + self._blank)
        # Models at the end of max_tokens, and some others, leave the last mark out.
        call = _call(_json(self._block + held), _long_id)
        if call is not None:
            return Found("", (call,))
        return Found(self._with_blanks(f"{self._begin}{self._block}{held}"))

    def _with_blanks(self, text: str) -> str:
        """``text``, with the blanks that were held back before it; holds its own last blanks back. Blanks
        between calls belong to no content."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        return kept


class Tail:
    """Mistral: a mark, and behind it a list of calls, or ``name[ARGS]{…}`` for each."""

    def __init__(self, mark: str) -> None:
        self._mark_text = mark
        self._mark = StopStrings([mark])
        self._tail = ""

    def push(self, text: str) -> Found:
        if self._mark.found:
            self._tail += text
            return Found("")
        content = ""
        for index, character in enumerate(text):
            content += self._mark.push(character)
            if self._mark.found:
                self._tail = text[index + 1 :]
                break
        return Found(content)

    def finish(self) -> Found:
        if not self._mark.found:
            return Found(self._mark.finish())
        calls = self._listed() or self._named()
        return Found("", calls) if calls else Found(f"{self._mark_text}{self._tail}")

    def _listed(self) -> tuple[Call, ...]:
        listed = _json(self._tail)
        calls = [_call(one, _short_id) for one in listed] if isinstance(listed, list) else []
        return tuple(call for call in calls if call is not None) if all(calls) else ()

    def _named(self) -> tuple[Call, ...]:
        calls = []
        for piece in self._tail.split(self._mark_text):
            name, mark, arguments = piece.partition("[ARGS]")
            if not mark:
                name, _, arguments = piece.partition("{")
                arguments = "{" + arguments
            call = _call({"name": name.strip(), "arguments": _json(arguments)}, _short_id)
            if call is None:
                return ()
            calls.append(call)
        return tuple(calls)


class Objects:
    """Llama 3: the whole answer is one JSON object, or several with semicolons between them."""

    _TAG = "<|python_tag|>"

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._plain = False

    def push(self, text: str) -> Found:
        if self._plain:
            return Found(text)
        self._held += text
        start = self._held.lstrip()
        if not start or start.startswith("{") or self._TAG.startswith(start[: len(self._TAG)]):
            return Found("")
        self._plain = True
        held, self._held = self._held, ""
        return Found(held)

    def finish(self) -> Found:
        held, self._held = self._held, ""
        calls = self._calls(held)
        return Found("", calls) if calls else Found(held)

    def _calls(self, text: str) -> tuple[Call, ...]:
        rest = text.strip().removeprefix(self._TAG).strip()
        calls = []
        while rest:
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return ()
            call = _call(value, _long_id)
            if call is None or call.name not in self._names:
                return ()
            calls.append(call)
            rest = rest[end:].lstrip().removeprefix(";").lstrip()
        return tuple(calls)


def _json(text: str) -> Any:
    """The value; None if there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, new_id: Callable[[], str]) -> Call | None:
    """The call that a JSON value describes; None if it describes none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if arguments is None and not {"arguments", "parameters"} & value.keys():
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return Call(new_id(), value["name"], json.dumps(arguments, ensure_ascii=False))


def _long_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _short_id() -> str:
    """Mistral's templates take ids of exactly nine letters and digits."""
    return uuid.uuid4().hex[:9]
