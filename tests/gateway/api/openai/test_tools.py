"""Tools and reasoning by OpenAI's own client, with a chat template that knows them."""

import dataclasses
import json

import openai
import pytest

from farshore.models.chat.prompts import ChatPrompts

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}<tool_call>"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}"
    "{% endfor %}\n{% endfor %}{% if think %}<think>\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Weather?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.fixture(scope="module")
def served_with_tools(served):
    prompts = ChatPrompts(served.tokenizer, template=TEMPLATE)
    yield dataclasses.replace(served, chat=prompts, chat_template=TEMPLATE)
    prompts.close()


@pytest.fixture
def http(harness, loop_thread, served_with_tools):
    with harness.gateway(loop_thread, served_with_tools, http="127.0.0.1:0") as made:
        yield made


def test_a_call_is_parsed_whole_and_streamed(http, client, served):
    http.engine.auto = served.tokenizer.encode("Let me see. " + CALL)
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    prompt = served.tokenizer.decode(http.engine.next_sequence().request.prompt)
    assert prompt.startswith("weather ")

    chunks = list(
        client.chat.completions.create(model="smollm2", messages=MESSAGES, tools=TOOLS, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather")]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_to_a_call_reaches_the_template(http, client, served):
    http.engine.auto = []
    called = {
        "id": "1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "Sunny"},
    ]
    client.chat.completions.create(model="smollm2", messages=messages, tools=TOOLS)
    prompt = served.tokenizer.decode(http.engine.next_sequence().request.prompt)
    assert "weather{'city': 'Paris'}" in prompt and "tool: Sunny" in prompt


def test_without_tools_or_with_none_a_call_is_text(http, client, served):
    http.engine.auto = served.tokenizer.encode(CALL)
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES)
    assert answer.choices[0].message.content == CALL and answer.choices[0].message.tool_calls is None
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, tools=TOOLS, tool_choice="none"
    )
    assert answer.choices[0].message.content == CALL


def test_parallel_tool_calls_off_gives_the_first(http, client, served):
    http.engine.auto = served.tokenizer.encode(CALL + CALL)
    for parallel, count in ((True, 2), (False, 1)):
        answer = client.chat.completions.create(
            model="smollm2", messages=MESSAGES, tools=TOOLS, parallel_tool_calls=parallel
        )
        assert len(answer.choices[0].message.tool_calls) == count


def test_tools_of_a_model_that_knows_none_are_a_400(start):
    made = start(http="127.0.0.1:0")
    base = f"http://{made.gateway.http_address}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            client.chat.completions.create(model="smollm2", messages=MESSAGES, tools=TOOLS)
        with pytest.raises(openai.BadRequestError, match="tool_choice needs tools"):
            client.chat.completions.create(model="smollm2", messages=MESSAGES, tool_choice="auto")


@pytest.mark.parametrize("begun", [False, True])
def test_reasoning_is_a_field_of_its_own(http, client, served, begun):
    http.engine.auto = served.tokenizer.encode(("" if begun else "<think>\n") + "Hm.</think>Sunny.")
    extra = {"chat_template_kwargs": {"think": begun}}
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, extra_body=extra)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Sunny.")
    chunks = client.chat.completions.create(model="smollm2", messages=MESSAGES, extra_body=extra, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Sunny."


@pytest.mark.parametrize(
    "structure",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"regex": "\\{\\}"}}},
    ],
)
def test_a_structured_answer_is_content_where_the_prompt_begins_reasoning(http, client, served, structure):
    """The structure holds from the first token on: there is no end of the reasoning to wait for."""
    http.engine.auto = served.tokenizer.encode("{}")
    extra = {"chat_template_kwargs": {"think": True}} | structure.get("extra_body", {})
    asked = dict(model="smollm2", messages=MESSAGES) | structure | {"extra_body": extra}
    message = client.chat.completions.create(**asked).choices[0].message
    assert (message.content, getattr(message, "reasoning_content", None)) == ("{}", None)
