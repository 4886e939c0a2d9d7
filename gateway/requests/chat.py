"""The chat half of validation: bounds of a conversation, and its shape for chat templates.

Called by ``validate``. The template judges roles, and which fields may stand together. JSON texts are parsed
in the template's process, so that a large one delays no other request. Must not know about templates.
"""

from typing import Any

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.models.chat.prompts import Conversation
from farshore.proto import inference_pb2 as api


def checked_chars(chat: api.Chat, limits: Limits) -> int:
    """Characters of the conversation, with an overhead for each message. Raises InvalidRequest. Runs on the
    event loop, for as many messages as ``limits`` has: it reads each field once."""
    texts_chars, json_chars, empty = 0, len(chat.template_arguments), True
    for index, message in enumerate(chat.messages):
        role, calls = message.role, message.tool_calls
        if not role:
            raise InvalidRequest(
                f"message {index} has no role: use 'system', 'user' or 'assistant'",
                field=_field(index, "role"),
            )
        _check_name("the role", role, index, "role", limits)
        _check_name("the name", message.name, index, "name", limits)
        _check_name("tool_call_id", message.tool_call_id, index, "tool_call_id", limits)
        chars = len(message.content) + len(message.reasoning_content)
        if parts := message.text_parts:
            if message.HasField("content"):
                raise InvalidRequest(
                    f"message {index} has content and text_parts: give one of them",
                    field=_field(index, "text_parts"),
                )
            chars += sum(map(len, parts))
        for call in calls:
            _check_name("a tool call's id", call.id, index, "tool_calls", limits)
            _check_name("a tool call's name", call.name, index, "tool_calls", limits)
            json_chars += len(call.arguments)
        texts_chars += chars + len(role)
        empty = empty and not (chars or calls)
    if empty:
        raise InvalidRequest(
            "the prompt is empty: give at least one message with content", field="chat.messages"
        )
    if len(chat.tools) > limits.tools:
        raise InvalidRequest(
            f"the chat has {len(chat.tools)} tools: use at most {limits.tools}", field="chat.tools"
        )
    json_chars += sum(map(len, chat.tools))
    if json_chars > limits.chat_json_chars:
        raise InvalidRequest(
            f"tools, arguments of tool calls and template_arguments have {json_chars} characters: "
            f"use at most {limits.chat_json_chars}",
            field="chat",
        )
    return texts_chars + json_chars + len(chat.messages) * limits.message_overhead_chars


def conversation(chat: api.Chat) -> Conversation:
    """The checked conversation as chat templates expect it."""
    continued = chat.continue_final_message
    return Conversation(
        messages=[_message(message) for message in chat.messages],
        tools=list(chat.tools),
        template_arguments=chat.template_arguments,
        add_generation_prompt=(
            chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continued
        ),
        continue_final_message=continued,
    )


def _check_name(what: str, name: str, index: int, field: str, limits: Limits) -> None:
    if len(name) > limits.role_chars:
        raise InvalidRequest(
            f"{what} of message {index} has {len(name)} characters: use at most {limits.role_chars}",
            field=_field(index, field),
        )


def _field(index: int, name: str) -> str:
    return f"chat.messages[{index}].{name}"


def _message(message: api.Message) -> dict[str, Any]:
    """A message in OpenAI's shape, without what was not given: templates test for that."""
    given: dict[str, Any] = {"role": message.role}
    if message.text_parts:
        given["content"] = [{"type": "text", "text": text} for text in message.text_parts]
    elif message.HasField("content") or not (message.tool_calls or message.reasoning_content):
        given["content"] = message.content
    if message.HasField("reasoning_content"):
        given["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        given["tool_calls"] = [_call(call) for call in message.tool_calls]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name}
    return given | {key: text for key, text in optional.items() if text}


def _call(call: api.ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return ({"id": call.id} if call.id else {}) | {"type": "function", "function": function}
