"""/v1/chat/completions by OpenAI's own client."""

import threading

import openai
import pytest

from farshore.proto import inference_pb2 as api

MESSAGES = [{"role": "user", "content": "Where is Paris?"}]


def ids_of(served, text):
    return served.tokenizer.encode(text)


def test_an_answer_is_whole(http, client, served):
    ids = ids_of(served, "In France.")
    http.engine.auto = ids
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES)
    assert answer.choices[0].message.content == "In France."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    sent = http.engine.next_sequence().request
    assert answer.usage.prompt_tokens == len(sent.prompt)
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.total_tokens == len(sent.prompt) + len(ids)


def test_the_prompt_is_the_chat_templates(http, client, encode_chat):
    http.engine.auto = []
    client.chat.completions.create(model="smollm2", messages=MESSAGES)
    assert list(http.engine.next_sequence().request.prompt) == encode_chat(MESSAGES)


def test_a_stream_gives_the_same_text(http, client, served):
    http.engine.auto = ids_of(served, "In France, on the Seine.")
    chunks = list(client.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "In France, on the Seine."
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("stop") == 1
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_in_a_last_chunk_if_asked_for(http, client, served):
    http.engine.auto = ids_of(served, "Hi")
    chunks = list(
        client.chat.completions.create(
            model="smollm2", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_choices_are_told_apart(http, client, served):
    call = {}
    thread = threading.Thread(
        target=lambda: call.update(
            answer=client.chat.completions.create(model="smollm2", messages=MESSAGES, n=2)
        )
    )
    thread.start()
    sequence = http.engine.next_sequence()
    sequence.tokens(*ids_of(served, "One"), choice=0)
    sequence.tokens(*ids_of(served, "Two"), choice=1)
    sequence.finish(choice=1)
    sequence.finish(api.FINISH_REASON_LENGTH, choice=0)
    thread.join(30)
    first, second = call["answer"].choices
    assert (first.index, first.message.content, first.finish_reason) == (0, "One", "length")
    assert (second.index, second.message.content, second.finish_reason) == (1, "Two", "stop")


def test_logprobs_name_tokens_and_alternatives(http, client, served):
    paris, rome = ids_of(served, " Paris")[0], ids_of(served, " Rome")[0]
    result = {}
    thread = threading.Thread(
        target=lambda: result.update(
            answer=client.chat.completions.create(
                model="smollm2", messages=MESSAGES, logprobs=True, top_logprobs=2
            )
        )
    )
    thread.start()
    sequence = http.engine.next_sequence()
    assert sequence.request.sampling.logprobs == 2
    top = [{"token_id": paris, "logprob": -0.5}, {"token_id": rome, "logprob": -1.5}]
    sequence.token(token_id=paris, logprob=-0.5, top=top)
    sequence.finish()
    thread.join(30)
    (value,) = result["answer"].choices[0].logprobs.content
    assert (value.token, value.logprob, bytes(value.bytes)) == (" Paris", -0.5, b" Paris")
    assert [(other.token, other.logprob) for other in value.top_logprobs] == [
        (" Paris", -0.5),
        (" Rome", -1.5),
    ]


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({}, "temperature", 1.0),
        ({"temperature": 0}, "temperature", 0.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"seed": 7}, "seed", 7),
        ({"seed": -1}, "seed", (1 << 64) - 1),
        ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
        ({"frequency_penalty": -0.5}, "frequency_penalty", -0.5),
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_completion_tokens": 6}, "max_tokens", 6),
        ({"extra_body": {"top_k": 3}}, "top_k", 3),
        ({"extra_body": {"top_k": -1}}, "top_k", 0),
        ({"extra_body": {"min_p": 0.25}}, "min_p", 0.25),
        ({"extra_body": {"repetition_penalty": 1.5}}, "repetition_penalty", 1.5),
        ({"logit_bias": {"5": -100}}, "logit_bias", {5: -100.0}),
    ],
)
def test_options_reach_the_engine(http, client, given, field, expected):
    http.engine.auto = []
    client.chat.completions.create(model="smollm2", messages=MESSAGES, **given)
    sampling = http.engine.next_sequence().request.sampling
    value = getattr(sampling, field)
    assert (dict(value) if field == "logit_bias" else value) == expected


def test_without_max_tokens_an_answer_may_use_all_positions(http, client, served):
    http.engine.auto = []
    client.chat.completions.create(model="smollm2", messages=MESSAGES)
    sent = http.engine.next_sequence().request
    assert sent.sampling.max_tokens == served.config.max_positions - len(sent.prompt)


def test_parts_developer_text_and_no_op_fields_are_taken(http, client, encode_chat):
    http.engine.auto = []
    parts = [{"role": "user", "content": [{"type": "text", "text": "Where is Paris?"}]}]
    client.chat.completions.create(
        model="smollm2",
        messages=parts,
        user="me",
        metadata={"a": "b"},
        service_tier="auto",
        store=False,
        response_format={"type": "text"},
        parallel_tool_calls=True,
    )
    assert list(http.engine.next_sequence().request.prompt) == encode_chat(MESSAGES)


def test_a_stop_string_ends_the_text(http, client, served):
    http.engine.auto = ids_of(served, "One. Two. Three.")
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, stop=[" Two"])
    assert answer.choices[0].message.content == "One."
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"extra_body": {"no_such": 1}}, "no_such"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages.0.colour"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"temperature": "hot"}, "temperature"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"store": True}, "store"),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_it(client, given, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "smollm2", "messages": MESSAGES} | given)
    assert caught.value.body["type"] == "invalid_request_error"
    if param is not None:
        assert caught.value.body["param"] == param
        assert param.split(".")[-1] in caught.value.body["message"]


def test_limits_are_those_of_all_requests(client):
    with pytest.raises(openai.BadRequestError, match="temperature 3"):
        client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=3)
    with pytest.raises(openai.BadRequestError, match="ask for at most"):
        client.chat.completions.create(model="smollm2", messages=MESSAGES, max_tokens=1 << 20)


def test_an_unknown_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.body["code"] == "model_not_found"


def test_leaving_a_stream_ends_its_sequence(http, client, served):
    stream = client.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
    sequence = http.engine.next_sequence()
    sequence.tokens(*ids_of(served, "Hello"))
    next(stream)
    stream.close()
    assert sequence.ended.wait(30)


def test_an_engine_that_is_gone_in_the_middle_is_an_error_in_the_stream(http, client, served):
    import grpc

    stream = client.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
    sequence = http.engine.next_sequence()
    sequence.tokens(*ids_of(served, "Hello"))
    assert next(stream).choices
    sequence.fail(grpc.StatusCode.INTERNAL, "broken")
    with pytest.raises(openai.APIError, match="broken"):
        list(stream)


def test_an_engine_that_refuses_gives_the_status(http, client):
    import grpc

    result = {}

    def call():
        try:
            client.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
        except openai.APIStatusError as error:
            result["error"] = error

    thread = threading.Thread(target=call)
    thread.start()
    http.engine.next_sequence().fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full for now")
    thread.join(30)
    assert result["error"].status_code == 429
    assert result["error"].response.headers["retry-after"] == "1"


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
        {"extra_body": {"structured_outputs": {"regex": "[a-z]+"}}},
        {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}},
        {"extra_body": {"structured_outputs": {"grammar": 'start: "a"'}}},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
            "tool_choice": "required",
        },
    ],
)
def test_a_structure_reaches_the_engine_as_a_grammar(http, client, given):
    http.engine.auto = []
    client.chat.completions.create(model="smollm2", messages=MESSAGES, **given)
    assert http.engine.next_sequence().request.grammar


def test_a_keyword_that_is_not_supported_is_a_400_that_names_it(client):
    schema = {"type": "array", "uniqueItems": True}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(model="smollm2", messages=MESSAGES, response_format=wanted)


def test_a_forced_call_is_its_arguments(http, client, served):
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in "fg"]
    named = {"type": "function", "function": {"name": "g"}}
    http.engine.auto = served.tokenizer.encode('{"city": "Paris"}')
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, tools=tools, tool_choice=named
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("g", '{"city": "Paris"}')
    http.engine.auto = served.tokenizer.encode('[{"name": "f", "arguments": {"city": "Rome"}}]')
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, tools=tools, tool_choice="required"
    )
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["f"]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_words_ids_and_lengths_reach_the_engine(http, client, served):
    http.engine.auto = []
    client.chat.completions.create(
        model="smollm2",
        messages=MESSAGES,
        extra_body={
            "min_tokens": 3,
            "allowed_token_ids": [5, 6],
            "bad_words": ["cat"],
            "truncate_prompt_tokens": 4,
        },
    )
    sent = http.engine.next_sequence().request
    assert (sent.sampling.min_tokens, list(sent.sampling.allowed_token_ids)) == (3, [5, 6])
    expected = [served.tokenizer.encode(text) for text in ("cat", " cat")]
    assert [list(word.ids) for word in sent.bad_words] == expected and not sent.sampling.bad_words
    assert len(sent.prompt) == 4
