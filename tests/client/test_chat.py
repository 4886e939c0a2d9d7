"""Chats in OpenAI's shape become the API's messages, or are refused by name."""

import pytest

from farshore.client.chat import chat_of
from farshore.client.sdk import Client
from farshore.errors import InvalidRequest
from farshore.proto import inference_pb2 as api


def message_of(**fields):
    (message,) = chat_of([{"role": "user"} | fields]).messages
    return message


def test_all_fields():
    call = {
        "id": "c1",
        "type": "function",
        "index": 0,
        "function": {"name": "f", "arguments": {"city": "Köln", "n": 2**60}},
    }
    chat = chat_of(
        [
            {"role": "user", "content": "Hi", "name": "ada", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21"}]},
        ],
        tools=[{"type": "function"}, '{"a": 1}'],
        template_arguments={"enable_thinking": False},
        continue_final_message=True,
    )
    arguments = '{"city": "Köln", "n": 1152921504606846976}'
    assert chat == api.Chat(
        messages=[
            api.Message(role="user", content="Hi", name="ada"),
            api.Message(
                role="assistant",
                tool_calls=[api.ToolCall(id="c1", name="f", arguments=arguments)],
                reasoning_content="hm",
            ),
            api.Message(role="tool", tool_call_id="c1", text_parts=["21"]),
        ],
        tools=['{"type": "function"}', '{"a": 1}'],
        template_arguments='{"enable_thinking": false}',
        continue_final_message=True,
    )
    assert not chat.HasField("add_generation_prompt") and not chat.messages[1].HasField("content")


def test_arguments_as_text_and_without():
    calls = [{"function": {"name": "f", "arguments": text}} for text in ('{"a": 1.0}', "", None)]
    got = message_of(tool_calls=[*calls, {"function": {"name": "f"}}])
    assert [call.arguments for call in got.tool_calls] == ['{"a": 1.0}', "", "", ""]


def test_content():
    assert message_of(content="").HasField("content")
    assert not message_of().HasField("content") and not message_of(content=None).HasField("content")
    assert message_of(content=[]).text_parts == [""]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(text="Hi"), "message 0 has the unknown field 'text': use content, name"),
        (
            dict(content=[{"type": "image_url", "image_url": {}}]),
            "part 0 of message 0 has the type 'image_url'",
        ),
        (dict(content=[{"text": "x"}]), "part 0 of message 0 has the type 'None': only 'text'"),
        (dict(content=[{"type": "text", "text": "x", "cache": 1}]), "unknown field 'cache'"),
        (dict(tool_calls=[{"type": "custom"}]), "tool call 0 of message 0 has the type 'custom'"),
        (
            dict(tool_calls=[{"function": {"code": "x"}}]),
            "tool call 0 of message 0 has the unknown field 'code'",
        ),
        (dict(audio={"id": "a"}), "unknown field 'audio'"),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(InvalidRequest) as refused:
        message_of(**fields)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "asked",
    [
        dict(messages=[{"role": "user", "content": 5}]),
        dict(messages=[{"role": "user", "content": ["Hi"]}]),
        dict(messages=[{"role": 5, "content": "Hi"}]),
        dict(messages=["Hi"]),
        dict(messages=[{"role": "user", "tool_calls": ["x"]}]),
        dict(messages=[], tools=[{1, 2}]),
        dict(prompt="Hi", tools=[{}]),
        dict(token_ids=[1], continue_final_message=True),
    ],
)
def test_values_that_do_not_fit(asked):
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest):
        client.generate(**asked)
