"""Renders conversations with a model's chat templates, as transformers' ``apply_chat_template`` does.

Called by ``process``, so it runs under that process's limits. A template is not trusted, and neither is a
conversation: either may make the other run for ever. It must not know about pipes or tokens' ids.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from farshore.models.chat.environment import Environment, Raised, takes_parts
from farshore.models.chat.marks import Marker
from farshore.models.chat.protocol import MOST_DEPTH, TEMPLATE_FIELDS
from farshore.text import quoted, shortened

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Stands behind the final message while it is rendered; transformers uses the same."""


class Refused(Exception):
    """A conversation that can't be rendered. The text is for the user."""


class CompiledTemplate:
    """One template. ``takes_parts``: see ``environment.takes_parts``."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateError, or any other error: templates are untrusted programs."""
        environment = Environment()
        self.source = source
        self.takes_parts = takes_parts(environment.parse(source))
        self._template = environment.from_string(source)

    def render(self, values: Mapping[str, Any], most_chars: int) -> str:
        """Raises Refused if the text has more than ``most_chars`` characters, else what the template
        raises."""
        pieces, chars = [], 0
        for piece in self._template.generate(values):
            chars += len(piece)
            if chars > most_chars:
                raise Refused(
                    f"the prompt has more than {most_chars} characters after the chat template: shorten it"
                )
            pieces.append(piece)
        return "".join(pieces)


class ChatTemplates:
    """The templates of one model, by name."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """``special_tokens``: texts by role, such as ``bos_token``."""
        self._templates = {name: CompiledTemplate(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)

    @property
    def sources(self) -> list[str]:
        return [template.source for template in self._templates.values()]

    def render(self, conversation: Mapping[str, Any], marker: Marker, *, most_chars: int) -> str:
        """The prompt's text, with the marks that ``marker`` put into the user's strings.

        ``conversation``: the fields of ``prompts.Conversation``. Raises Refused with a short text without
        marks.
        """
        try:
            given = _given(conversation)
            template = self._choose(given["tools"])
            if not template.takes_parts:
                given["messages"] = [_joined(message) for message in given["messages"]]
            marked = marker.mark(given)
            return self._render(template, marked, conversation, most_chars)
        except (Refused, MemoryError):
            raise
        except Raised as error:
            raise Refused(_cannot(marker.unmarked(str(error)))) from error
        except Exception as error:
            # A template may raise any exception, and the text may quote messages of any length.
            text = marker.unmarked(str(error))
            name = type(error).__name__
            raise Refused(_cannot(f"{name}: {text}" if text else name)) from error

    def _choose(self, tools: Any) -> CompiledTemplate:
        """The template named tool_use if there are tools and it exists; else the one named default."""
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise Refused(f"the model has no default chat template, only {sorted(self._templates)}")
        return self._templates["default"]

    def _render(
        self,
        template: CompiledTemplate,
        given: Mapping[str, Any],
        conversation: Mapping[str, Any],
        most_chars: int,
    ) -> str:
        messages = [_with_reasoning(message) for message in given["messages"]]
        final = None
        if conversation["continue_final_message"]:
            final, messages[-1] = _tagged(messages[-1], template.source)
            most_chars += len(_TAG)
        values = {"documents": None} | self._special_tokens | given["template_arguments"]
        values |= {
            "messages": messages,
            "tools": given["tools"],
            "add_generation_prompt": conversation["add_generation_prompt"],
        }
        text = template.render(values, most_chars)
        return text if final is None else _without_tag(text, final)


def _cannot(why: str) -> str:
    return f"its chat template can't render these messages: {shortened(why)}"


def _given(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """All that a user gives to a template, with JSON texts parsed."""
    tools = [_json_object(tool, f"tool {index}") for index, tool in enumerate(conversation["tools"])]
    arguments = _json_object(conversation["template_arguments"] or {}, "template_arguments")
    if taken := sorted(TEMPLATE_FIELDS & arguments.keys()):
        raise Refused(f"template_arguments can't set {', '.join(map(repr, taken))}: leave them out")
    documents = arguments.get("documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        raise Refused("template_arguments: documents must be a list of objects")
    messages = [_with_calls(message, index) for index, message in enumerate(conversation["messages"])]
    return {"messages": messages, "tools": tools or None, "template_arguments": arguments}


def _with_calls(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with its tool calls' arguments as objects: templates print them as JSON."""
    if "tool_calls" not in message:
        return dict(message)
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"]
        arguments = _json_object(
            function.get("arguments") or {}, f"the arguments of tool call {number} of message {index}"
        )
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its parts as one string."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning also under the name that gpt-oss's template reads."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _tagged(message: dict[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """(the text to continue, the message with the tag behind it)."""
    content = message.get("content")
    if content is None or content == []:
        raise Refused("continue_final_message: the final message has no content to continue")
    if "content" not in source:
        raise Refused("continue_final_message: the chat template shows no content")
    if isinstance(content, str):
        return content, {**message, "content": content + _TAG}
    *before, last = content
    return last["text"], {**message, "content": [*before, {**last, "text": last["text"] + _TAG}]}


def _without_tag(text: str, final: str) -> str:
    """``text`` up to the tag; without trailing blanks if the template has trimmed the tag's."""
    tag = text.rfind(_TAG.strip())
    if tag < 0 or final.strip() not in text:
        raise Refused(
            "continue_final_message: the chat template does not show the final message as it is; "
            "leave continue_final_message out"
        )
    return text[:tag] if text.startswith(_TAG, tag) else text[:tag].rstrip()


def _json_object(given: Any, what: str) -> dict[str, Any]:
    """``given``, or what it says if it is a JSON text. Raises Refused unless that is an object that is nested
    at most MOST_DEPTH deep."""
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given, parse_constant=_no_constant, parse_float=_finite)
        except RecursionError:
            raise Refused(f"{what}: nested more than {MOST_DEPTH} deep") from None
        except ValueError as error:
            raise Refused(f"{what}: not valid JSON ({shortened(str(error), 100)})") from error
    if not isinstance(value, dict):
        raise Refused(f"{what}: must be a JSON object, not {quoted(json.dumps(value)[:100], 60)}")
    level: Sequence[Any] = [value]
    for _ in range(MOST_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise Refused(f"{what}: nested more than {MOST_DEPTH} deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value
