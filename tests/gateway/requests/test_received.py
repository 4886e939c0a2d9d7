"""received.parse: bytes within the limits parse as protobuf does, bytes beyond them are refused."""

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.gateway.requests import received
from farshore.proto import inference_pb2 as api

LIMITS = Limits(messages=8)
POSITIONS = 1000


def _parse(raw):
    return received.parse(raw, max_positions=POSITIONS, limits=LIMITS)


calls = st.builds(
    api.ToolCall, id=st.text(max_size=3), name=st.text(max_size=3), arguments=st.text(max_size=9)
)
messages = st.builds(
    api.Message,
    role=st.text(max_size=3),
    content=st.none() | st.text(max_size=20),
    text_parts=st.lists(st.text(max_size=5), max_size=2),
    tool_calls=st.lists(calls, max_size=1),
    name=st.text(max_size=3),
)
chats = st.builds(
    api.Chat,
    messages=st.lists(messages, max_size=4),
    tools=st.lists(st.text(max_size=5), max_size=3),
    template_arguments=st.text(max_size=5),
    add_generation_prompt=st.none() | st.booleans(),
    continue_final_message=st.booleans(),
)
samplings = st.builds(
    api.Sampling,
    max_tokens=st.none() | st.integers(0, 2**32 - 1),
    temperature=st.none() | st.floats(0, 2, width=32),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-1, 1, width=32), max_size=3),
    stop=st.lists(st.text(max_size=3), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
)
prompts = st.one_of(
    st.builds(lambda text: dict(text=text), st.text()),
    st.builds(
        lambda ids: dict(tokens=api.TokenIds(ids=ids)), st.lists(st.integers(0, 2**32 - 1), max_size=50)
    ),
    st.builds(lambda chat: dict(chat=chat), chats),
)
requests = st.builds(
    lambda prompt, **fields: api.GenerateRequest(**prompt, **fields),
    prompts,
    sampling=samplings,
    model=st.text(max_size=5),
    request_id=st.text(max_size=5),
    resume_from=st.integers(0, 2**32 - 1),
    cache_salt=st.text(max_size=5),
    resume=st.none()
    | st.builds(
        lambda choices, seed: api.Resume(received=[api.TokenIds(ids=ids) for ids in choices], seed=seed),
        st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=3),
        st.none() | st.integers(0, 2**64 - 1),
    ),
)


@given(requests)
@settings(max_examples=300, deadline=None)
def test_a_request_within_limits_is_parsed_unchanged(request):
    raw = request.SerializeToString()
    parsed, _, size_bytes = _parse(raw)
    assert parsed == request
    assert size_bytes == len(raw)


@given(
    st.binary(max_size=200) | st.builds(lambda a, b: a.SerializeToString()[:-1] + b, requests, st.binary())
)
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_a_request_or_refused(raw):
    try:
        parsed, _, _ = _parse(raw)
    except InvalidRequest:
        return
    assert parsed == api.GenerateRequest.FromString(raw)


@given(requests, requests)
@settings(max_examples=300, deadline=None)
def test_fingerprints_are_equal_for_equal_prompts_and_sampling(one, other):
    def fingerprinted(request):
        same = api.GenerateRequest.FromString(request.SerializeToString())
        for field in ("model", "request_id", "resume_from", "resume"):
            same.ClearField(field)
        return same

    other.sampling.CopyFrom(one.sampling)
    fingerprints = [
        _parse(request.SerializeToString()).fingerprint for request in (one, other, fingerprinted(one))
    ]
    assert fingerprints[0] == fingerprints[2]
    assert (fingerprints[0] == fingerprints[1]) == (fingerprinted(one) == fingerprinted(other))


def test_a_map_in_another_order_is_the_same():
    orders = [dict.fromkeys(ids, 1.0) for ids in (range(50), reversed(range(50)))]
    raws = [
        api.GenerateRequest(text="a", sampling=api.Sampling(logit_bias=bias)).SerializeToString()
        for bias in orders
    ]
    assert _parse(raws[0]).fingerprint == _parse(raws[1]).fingerprint


def _field(number, content):
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value):
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


USER = _field(1, _field(1, b"user"))
REFUSED = {
    "ids": (_field(4, _field(1, b"\x05" * 1000)), "1000 tokens"),
    "long ids": (_field(4, _field(1, _varint(2**32 - 1) * 1000)), "1000 tokens"),
    "ids in pieces": (_field(4, _field(1, b"\x05" * 400) * 3), "1200 tokens"),
    "ids in two fields": (_field(4, _field(1, b"\x05" * 600)) * 2, None),
    "received choices": (_field(11, b"\x0a\x00" * 33), "more than 32 choices"),
    "received ids": (_field(11, _field(1, _field(1, b"\x05" * 1001))), "1001 tokens"),
    "received ids, unpacked": (_field(11, _field(1, b"\x08\x05" * 1000)), "too many fields"),
    "unpacked ids": (_field(4, b"\x08\x05" * 1000), "too many fields"),
    "messages": (_field(2, USER * 9), "more than 8 messages"),
    "empty messages": (_field(2, b"\x0a\x00" * 300_000), "more than 8 messages"),
    "roles of one message": (_field(2, _field(1, b"\x0a\x00" * 300_000)), "too many fields"),
    "tool calls of one message": (_field(2, _field(1, b"\x22\x00" * 300_000)), "too many fields"),
    "fields of a tool call": (_field(2, _field(1, _field(4, b"\x0a\x00" * 300_000))), "too many fields"),
    "parts of one message": (_field(2, _field(1, b"\x1a\x00" * 300_000)), "too many fields"),
    "tools": (_field(2, b"\x12\x00" * 300_000), "too many fields"),
    "unknown fields": (b"\xf8\x01\x01" * 300_000, "too many fields"),
    "sampling": (_field(5, b"\x62\x00" * 40_000), "at most 65536"),
    "group": (b"\x0b\x0c", "no GenerateRequest"),
    "text that is no text": (_field(3, b"\xff\xfe"), "no GenerateRequest"),
    "cut off": (_field(3, b"abc")[:-1], "no GenerateRequest"),
    "endless number": (b"\x38" + b"\xff" * 20, "no GenerateRequest"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    raw, words = REFUSED[case]
    if words is None:
        _parse(raw)  # Each field is within the limit; protobuf merges them, and validation refuses the sum.
        return
    with pytest.raises(InvalidRequest, match=words):
        _parse(raw)


FIELDS = {
    "ids": "tokens",
    "unpacked ids": "tokens",
    "messages": "chat.messages",
    "tool calls of one message": "chat.messages",
    "tools": "chat",
    "received choices": "resume.received",
    "sampling": "sampling",
    "unknown fields": None,
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_refusal_names_its_field(case):
    with pytest.raises(InvalidRequest) as caught:
        _parse(REFUSED[case][0])
    assert caught.value.field == FIELDS[case]


@pytest.mark.parametrize("order", [1, -1])
def test_a_prompt_that_is_truncated_may_be_longer_than_the_model(order):
    request = api.GenerateRequest(
        tokens=api.TokenIds(ids=[5] * 2000), sampling=api.Sampling(truncate_prompt_tokens=10)
    )
    fields = [_field(4, request.tokens.SerializeToString()), _field(5, request.sampling.SerializeToString())]
    assert _parse(b"".join(fields[::order])).request == request
    request.sampling.truncate_prompt_tokens = 0
    with pytest.raises(InvalidRequest, match="2000 tokens"):
        _parse(request.SerializeToString())


OVERSIZE = {
    "64 MiB of ids": _field(4, _field(1, b"\x05" * ((64 << 20) - 20))),
    "a role of 9 MB": _field(2, _field(1, _field(1, b"r" * 9_000_000) + _field(2, b"Hi"))),
}
BIG = {
    "300,000 messages": (_field(2, USER * 300_000), "more than 4096 messages"),
    "300,000 empty messages": (_field(2, b"\x0a\x00" * 300_000), "more than 4096 messages"),
    "4 MB of ids": (_field(4, _field(1, b"\x05" * 4_000_000)), "8192 positions"),
    "a role of 3 MB": (_field(2, _field(1, _field(1, b"r" * 3_000_000) + _field(2, b"Hi"))), "at most 64"),
    "many bare messages": (_field(2, USER * 4096), "at least one message with content"),
    "300,000 tool calls": (_field(2, _field(1, b"\x22\x00" * 300_000)), "too many fields"),
    "a tool of 3 MB": (
        _field(2, _field(1, _field(1, b"user") + _field(2, b"Hi")) + _field(2, b"x" * 3_000_000)),
        "at most 1048576",
    ),
    "garbage": (b"\xff" * 1000, "no GenerateRequest"),
}


@pytest.fixture
def send(farshore):
    generate = farshore.channel.unary_stream("/farshore.inference.v1.InferenceService/Generate", None, None)
    return lambda raw: generate(raw, timeout=30)


@pytest.mark.parametrize("case", OVERSIZE)
def test_messages_above_grpcs_limit(farshore, harness, send, case):
    failure = harness.failure_of(send(OVERSIZE[case]))
    assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in failure.details() and "8388608" in failure.details()
    assert farshore.engine.idle


def test_messages_above_our_limit_and_below_grpcs(farshore, harness, send):
    failure = harness.failure_of(send(_field(3, b"a" * (5 << 20))))
    assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 4194304: shorten the prompt" in failure.details()
    assert farshore.engine.idle


@pytest.mark.parametrize("case", BIG)
def test_messages_below_grpcs_limit(farshore, harness, send, case):
    raw, words = BIG[case]
    failure = harness.failure_of(send(raw))
    assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in failure.details()
    assert farshore.engine.idle


def test_the_limit_follows_the_model():
    limits = Limits()
    assert limits.message_bytes_for(8192) == 4 << 20
    assert limits.message_bytes_for(2 << 20) == 8 << 20
    assert limits.message_bytes_for(1 << 30) == 16 << 20


def test_garbage_for_other_methods(farshore):
    call = farshore.channel.unary_unary("/farshore.inference.v1.InferenceService/Cancel", None, None)
    with pytest.raises(grpc.RpcError) as refused:
        call(b"\xff" * 10, timeout=30)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
