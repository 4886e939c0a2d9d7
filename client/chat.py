"""Converts a chat in OpenAI's shape to the API's messages.

Called by ``sdk``. Refuses what the API has no field for: a message that lost a part would be answered wrongly
without a word. Must not know which roles or fields a model's chat template reads.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from farshore.errors import InvalidRequest
from farshore.proto import inference_pb2 as api
from farshore.text import quoted

_FIELDS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content"})


def chat_of(
    messages: Iterable[Mapping[str, Any]],
    *,
    tools: Iterable[Mapping[str, Any] | str] | None = None,
    template_arguments: Mapping[str, Any] | str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
) -> api.Chat:
    """See ``Client.generate``. Raises InvalidRequest; TypeError or ValueError for values of a wrong type."""
    return api.Chat(
        messages=[_message(message, f"message {index}") for index, message in enumerate(messages)],
        tools=[as_json(tool) for tool in tools or ()],
        template_arguments=as_json(template_arguments) if template_arguments else "",
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )


def _message(message: Mapping[str, Any], where: str) -> api.Message:
    given = {key: value for key, value in message.items() if value is not None}
    _check_fields(given, _FIELDS, where)
    content = given.pop("content", None)
    if isinstance(content, str):
        given["content"] = content
    elif content is not None:
        given["text_parts"] = [
            _text(part, f"part {index} of {where}") for index, part in enumerate(content)
        ] or [""]
    given["tool_calls"] = [
        _call(call, f"tool call {index} of {where}") for index, call in enumerate(given.get("tool_calls", ()))
    ]
    return api.Message(**given)


def _text(part: Mapping[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind != "text":
        raise InvalidRequest(f"{where} has the type {quoted(str(kind), 60)}: only 'text' is supported")
    _check_fields(part, {"type", "text"}, where)
    return part.get("text", "")


def _call(call: Mapping[str, Any], where: str) -> api.ToolCall:
    # Streamed tool calls have an index.
    _check_fields(call, {"id", "type", "function", "index"}, where)
    if call.get("type", "function") != "function":
        raise InvalidRequest(
            f"{where} has the type {quoted(str(call['type']), 60)}: only 'function' is supported"
        )
    function = call.get("function") or {}
    _check_fields(function, {"name", "arguments"}, where)
    arguments = function.get("arguments")
    return api.ToolCall(
        id=call.get("id"),
        name=function.get("name"),
        arguments="" if arguments is None else as_json(arguments),
    )


def as_json(value: Mapping[str, Any] | str) -> str:
    """An object as JSON. A text is one already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check_fields(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(key for key in given.keys() - known if given[key] is not None)
    if unknown:
        raise InvalidRequest(
            f"{where} has the unknown field {quoted(str(unknown[0]), 60)}: use {', '.join(sorted(known))}"
        )
