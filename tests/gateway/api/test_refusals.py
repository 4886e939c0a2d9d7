"""Every refusal of a request: its status, and that its message names the limit and the fix."""

import grpc
import pytest

from farshore.gateway.limits import Limits
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api


def _chat(*messages):
    return api.Chat(messages=[api.Message(role=role, content=content) for role, content in messages])


def _message(*tools, **fields):
    message = api.Message(**{"role": "user", "content": "Hi"} | fields)
    return dict(text=None, chat=api.Chat(messages=[message], tools=tools))


BAD = {
    "content twice": (_message(text_parts=["a"]), "message 0 has content and text_parts"),
    "long role": (_message(role="r" * 65), "the role of message 0 has 65 characters: use at most 64"),
    "long name": (_message(name="n" * 65), "the name of message 0 has 65 characters"),
    "long call": (_message(tool_calls=[api.ToolCall(name="n" * 65)]), "a tool call's name of message 0"),
    "long call id": (_message(tool_calls=[api.ToolCall(id="n" * 65)]), "a tool call's id of message 0"),
    "long id of a result": (_message(tool_call_id="n" * 65), "tool_call_id of message 0"),
    "many tools": (_message(*["{}"] * 513), "513 tools: use at most 512"),
    "bad tool": (_message("{}", "["), "tool 1: not valid JSON"),
    "deep tool": (_message('{"a":' * 70 + "1" + "}" * 70), "tool 0: nested more than 64 deep"),
    "bad call": (
        _message(tool_calls=[api.ToolCall(name="f", arguments="[]")]),
        "the arguments of tool call 0 of message 0: must be a JSON object",
    ),
    "huge chat": (_message(content="a" * (8192 * 256)), "characters; a model of 8192 positions"),
    "empty text": (dict(text=""), "empty"),
    "no prompt": (dict(text=None), "empty"),
    "no ids": (dict(text=None, tokens=api.TokenIds()), "empty"),
    "no messages": (dict(text=None, chat=_chat()), "empty"),
    "blank messages": (dict(text=None, chat=_chat(("user", ""))), "empty"),
    "no role": (dict(text=None, chat=_chat(("", "Hi"))), "message 0 has no role"),
    "unknown model": (dict(model="gpt-9"), "'smollm2'"),
    "no tokens": (dict(sampling=dict(max_tokens=0)), "at least 1"),
    "cold": (dict(sampling=dict(temperature=-0.1)), "0 (greedy) to 2"),
    "hot": (dict(sampling=dict(temperature=2.1)), "0 (greedy) to 2"),
    "temperature nan": (dict(sampling=dict(temperature=float("nan"))), "0 (greedy) to 2"),
    "temperature inf": (dict(sampling=dict(temperature=float("inf"))), "0 (greedy) to 2"),
    "top_p 0": (dict(sampling=dict(top_p=0.0)), "above 0"),
    "top_p above": (dict(sampling=dict(top_p=1.5)), "up to 1"),
    "top_p nan": (dict(sampling=dict(top_p=float("nan"))), "above 0"),
    "min_p": (dict(sampling=dict(min_p=1.1)), "0 (off) to 1"),
    "min_p nan": (dict(sampling=dict(min_p=float("nan"))), "0 (off) to 1"),
    "no repetition": (dict(sampling=dict(repetition_penalty=0.0)), "from 0.01 to 100"),
    "tiny repetition": (dict(sampling=dict(repetition_penalty=1e-38)), "from 0.01 to 100"),
    "negative repetition": (dict(sampling=dict(repetition_penalty=-1.0)), "from 0.01 to 100"),
    "much repetition": (dict(sampling=dict(repetition_penalty=101.0)), "from 0.01 to 100"),
    "repetition nan": (dict(sampling=dict(repetition_penalty=float("nan"))), "from 0.01 to 100"),
    "barely warm": (dict(sampling=dict(temperature=1e-7)), "0 (greedy), or 1e-06 to 2"),
    "many values": (
        dict(sampling=dict(n=32, temperature=1.0, logprobs=20, max_tokens=8000)),
        "at most 1048576 tokens and alternatives",
    ),
    "presence": (dict(sampling=dict(presence_penalty=2.5)), "-2 to 2"),
    "frequency": (dict(sampling=dict(frequency_penalty=-2.5)), "-2 to 2"),
    "frequency nan": (dict(sampling=dict(frequency_penalty=float("nan"))), "-2 to 2"),
    "logprobs": (dict(sampling=dict(logprobs=21)), "at most 20"),
    "no choices": (dict(sampling=dict(n=0)), "1 to 32"),
    "many choices": (dict(sampling=dict(n=33, temperature=1.0)), "1 to 32"),
    "greedy choices": (dict(sampling=dict(n=2)), "temperature above 0"),
    "bias": (dict(sampling=dict(logit_bias={1: 101.0})), "-100 to 100"),
    "bias nan": (dict(sampling=dict(logit_bias={1: float("nan")})), "-100 to 100"),
    "bias outside": (dict(sampling=dict(logit_bias={49152: 1.0})), "0 to 49151"),
    "many biases": (dict(sampling=dict(logit_bias=dict.fromkeys(range(1025), 1.0))), "at most 1024"),
    "empty stop": (dict(sampling=dict(stop=["a", ""])), "stop string 1 has 0 characters"),
    "long stop": (dict(sampling=dict(stop=["a" * 257])), "1 to 256"),
    "many stops": (dict(sampling=dict(stop=["a"] * 17)), "at most 16"),
    "stop id outside": (dict(sampling=dict(stop_token_ids=[49152])), "0 to 49151"),
    "many stop ids": (dict(sampling=dict(stop_token_ids=[1] * 129)), "at most 128"),
    "id outside": (dict(text=None, tokens=api.TokenIds(ids=[1, 49152])), "49152 at index 1"),
    "too long": (dict(sampling=dict(max_tokens=8192)), "8192 positions"),
    "full prompt": (dict(text=None, tokens=api.TokenIds(ids=[5] * 8192)), "8192 tokens"),
    "huge text": (dict(text="a" * (8192 * 256 + 1)), "2097153 characters"),
    "long id": (dict(request_id="x" * 129), "at most 128"),
    "long salt": (dict(cache_salt="x" * 257), "at most 256"),
    "resume without id": (dict(resume_from=1), "request_id"),
    "bad roles": (dict(text=None, chat=_chat(("user", "Hi")), model="other"), "unknown model"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid(farshore, harness, case):
    fields, words = BAD[case]
    failure = harness.failure_of(farshore.generate(**fields))
    assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in failure.details()
    assert farshore.engine.idle


def test_a_refusal_by_length_names_all_numbers(farshore, harness):
    tokens = api.TokenIds(ids=[5] * 8000)
    failure = harness.failure_of(farshore.generate(None, tokens=tokens, sampling=dict(max_tokens=500)))
    for number in ("8000", "500", "8192", "192"):
        assert number in failure.details()


def test_overload_is_refused_with_a_hint(start, harness):
    farshore = start(limits=Limits(max_live_requests=1, retry_after_ms=250))
    first = farshore.generate()
    sequence = farshore.engine.next_sequence()
    failure = harness.failure_of(farshore.generate())
    assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again in 250 ms" in failure.details()
    assert dict(failure.trailing_metadata())["grpc-retry-pushback-ms"] == "250"
    sequence.finish()
    list(first)
    farshore.engine.auto = ()
    list(farshore.generate())


def test_a_refused_request_does_not_count_as_live(start, harness):
    farshore = start(limits=Limits(max_live_requests=1))
    too_long = dict(text=None, tokens=api.TokenIds(ids=[5] * 8192))
    for _ in range(3):
        assert harness.failure_of(farshore.generate(**too_long)).code() == grpc.StatusCode.INVALID_ARGUMENT
    farshore.engine.auto = ()
    list(farshore.generate())


def test_unreachable_controller(start, harness):
    farshore = start(controller="127.0.0.1:1")
    with pytest.raises(grpc.RpcError) as failure:
        farshore.operators.ClusterStatus(admin.ClusterStatusRequest(), timeout=30)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "controller" in failure.value.details()
    farshore.engine.auto = (5,)
    assert len(list(farshore.generate())) == 3


def test_a_controller_that_misses_its_directory_says_so(start):
    farshore = start()
    farshore.engine.status = (grpc.StatusCode.UNAVAILABLE, "redis://redis:6379/0 does not answer")
    with pytest.raises(grpc.RpcError) as failure:
        farshore.operators.ClusterStatus(admin.ClusterStatusRequest(), timeout=30)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
    assert failure.value.details() == "redis://redis:6379/0 does not answer"
