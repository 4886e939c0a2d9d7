"""Templates and conversations for these tests."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("templates")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a city, <now> & later: "é"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name", "nullable": True},
                "days": {"type": "integer", "default": 3},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "hours": {"type": "array", "items": {"type": "number"}},
                "place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
                "either": {"oneOf": [{"type": "string"}, {"type": ["null", "number"]}]},
            },
            "required": ["city"],
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "now", "description": "Time", "parameters": {"type": "object", "properties": {}}},
}


def call(name, arguments, call_id="abc123def"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": " What's the weather in <b>Köln</b> & 東京? \n"}
SYSTEM = {"role": "system", "content": "Be brief. /no_think"}
ANSWER = {"role": "assistant", "content": "  Sunny.\n"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": " two"}]}
CALLS = {
    "role": "assistant",
    "tool_calls": [call("get_weather", {"city": "Köln", "days": 2, "big": 2**60, "x": [1.5, None, True]})],
}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "name": "get_weather", "content": '{"t": 21}'}
THOUGHT = {"role": "assistant", "content": "It is 4.", "reasoning_content": "2 + 2\n"}
INLINE_THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 4."}

CONVERSATIONS = {
    "user": dict(messages=[USER]),
    "system": dict(messages=[SYSTEM, USER]),
    "turns": dict(messages=[SYSTEM, USER, ANSWER, USER, ANSWER, USER]),
    "no generation prompt": dict(messages=[USER, ANSWER], add_generation_prompt=False),
    "tools": dict(messages=[SYSTEM, USER], tools=[WEATHER, TIME]),
    "calls": dict(messages=[USER, CALLS, RESULT], tools=[WEATHER]),
    "calls and an answer": dict(messages=[USER, CALLS, RESULT, ANSWER, USER], tools=[WEATHER]),
    "two results": dict(messages=[USER, CALLS, RESULT, RESULT], tools=[WEATHER]),
    "content with calls": dict(messages=[USER, {**CALLS, "content": "I look."}, RESULT], tools=[TIME]),
    "two calls": dict(
        messages=[USER, {**CALLS, "tool_calls": [*CALLS["tool_calls"], call("now", {})]}],
        tools=[WEATHER, TIME],
    ),
    "short id": dict(messages=[USER, {**CALLS, "tool_calls": [call("now", {}, "1")]}, RESULT]),
    "result without call": dict(messages=[USER, RESULT]),
    "reasoning": dict(messages=[USER, THOUGHT, USER]),
    "reasoning at the end": dict(messages=[USER, THOUGHT], add_generation_prompt=False),
    "reasoning with calls": dict(messages=[USER, {**CALLS, "reasoning_content": "hm"}, RESULT]),
    "inline reasoning": dict(
        messages=[USER, INLINE_THOUGHT, USER, INLINE_THOUGHT], add_generation_prompt=False
    ),
    "no thinking": dict(messages=[USER], template_arguments={"enable_thinking": False}),
    "thinking": dict(messages=[USER], template_arguments={"enable_thinking": True}),
    "arguments": dict(
        messages=[SYSTEM, USER],
        template_arguments={"date_string": "1 Jan 2025", "reasoning_effort": "high", "bos_token": "<B>"},
    ),
    "tools apart": dict(
        messages=[SYSTEM, USER], tools=[WEATHER], template_arguments={"tools_in_user_message": False}
    ),
    "documents": dict(messages=[USER], template_arguments={"documents": [{"title": "a", "text": "b"}]}),
    "wrong order": dict(messages=[USER, USER]),
    "assistant first": dict(messages=[ANSWER, USER]),
    "unknown role": dict(messages=[{"role": "wizard", "content": "Hi"}]),
    "developer": dict(messages=[{"role": "developer", "content": "Hi"}, USER]),
    "named user": dict(messages=[{**USER, "name": "ada"}, {"role": "skip", "content": ""}, ANSWER]),
    "continued": dict(
        messages=[USER, {"role": "assistant", "content": "It is "}],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "continued user": dict(messages=[USER], add_generation_prompt=False, continue_final_message=True),
    "continued calls": dict(messages=[USER, CALLS], add_generation_prompt=False, continue_final_message=True),
    "blank": dict(messages=[{"role": "user", "content": ""}]),
    "parts": dict(messages=[PARTS]),
    "system parts": dict(messages=[{**PARTS, "role": "system"}, USER, ANSWER, PARTS]),
    "continued parts": dict(messages=[PARTS], add_generation_prompt=False, continue_final_message=True),
}


def as_request(conversation):
    """The conversation's JSON as a gateway sends it: tools and arguments as JSON texts."""

    def with_texts(message):
        if "tool_calls" not in message:
            return message
        calls = [
            {**each, "function": {**each["function"], "arguments": json.dumps(each["function"]["arguments"])}}
            for each in message["tool_calls"]
        ]
        return {**message, "tool_calls": calls}

    defaults = dict(tools=(), template_arguments={}, add_generation_prompt=True, continue_final_message=False)
    given = defaults | conversation
    return given | {
        "messages": [with_texts(message) for message in given["messages"]],
        "tools": [json.dumps(tool) for tool in given["tools"]],
        "template_arguments": json.dumps(given["template_arguments"]) if given["template_arguments"] else "",
    }


@pytest.fixture(scope="session")
def template_source():
    """template_source(name) -> the Jinja source of one of our templates."""
    return lambda name: (FOLDER / f"{name}.jinja").read_text()


@pytest.fixture(scope="session")
def conversations():
    """Conversations by name, as keyword arguments of Conversation."""
    return CONVERSATIONS


@pytest.fixture(scope="session")
def request_of():
    return as_request


@pytest.fixture(scope="session")
def transformers_renders():
    """transformers_renders(template, conversation) -> the text that transformers renders, or its
    exception."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    def render(template, conversation):
        tokenizer.chat_template = template
        given = dict(conversation)
        arguments = given.pop("template_arguments", {})
        given.setdefault("add_generation_prompt", True)
        try:
            return tokenizer.apply_chat_template(
                given.pop("messages"), tokenize=False, **{"tools": None} | given, **arguments
            )
        except Exception as error:
            return error

    return render
