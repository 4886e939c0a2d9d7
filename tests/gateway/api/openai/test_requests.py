"""Names of requests over HTTP: retries by ``request_id``, and X-Request-Id, which is for traces only."""

import httpx2
import openai
import pytest

CHAT = dict(model="smollm2", messages=[{"role": "user", "content": "Hi"}])


@pytest.fixture
def ask(http, client):
    http.engine.auto = (10, 11)
    return lambda **fields: client.chat.completions.create(**CHAT | fields)


def test_a_retry_gets_the_first_ones_answer(http, ask):
    """A whole answer, then the same as a stream."""
    named = dict(extra_body={"request_id": "a"}, seed=1)
    first = ask(**named)
    again = ask(**named)
    assert again.choices[0].message == first.choices[0].message and again.usage == first.usage
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True, **named)]
    assert "".join(pieces) == first.choices[0].message.content
    http.engine.next_sequence()
    assert http.engine.idle


def test_another_request_of_the_same_id_is_a_409(ask):
    ask(extra_body={"request_id": "a"})
    with pytest.raises(openai.ConflictError) as caught:
        ask(extra_body={"request_id": "a"}, max_tokens=3)
    assert caught.value.body["param"] == "request_id" and caught.value.body["code"] == "already_exists"


def test_ids_of_http_and_grpc_are_the_same_log(http, ask):
    answer = ask(extra_body={"request_id": "a"})
    *_, done = http.generate(None, request_id="a")
    assert done.finished.usage.completion_tokens == answer.usage.completion_tokens


def test_a_trace_id_is_sent_back_and_names_no_request(http, base_url):
    http.engine.auto = (10,)
    for content in ("One", "Two"):
        body = dict(model="smollm2", messages=[{"role": "user", "content": content}])
        reply = httpx2.post(f"{base_url}/v1/chat/completions", json=body, headers={"x-request-id": "t"})
        assert reply.status_code == 200 and reply.headers["x-request-id"] == "t"


@pytest.mark.parametrize("given", ["", "x" * 129, "a b"])
def test_an_unusable_trace_id_is_replaced(base_url, given):
    ids = {httpx2.get(f"{base_url}/v2/none", headers={"x-request-id": given}).headers["x-request-id"]}
    ids.add(httpx2.get(f"{base_url}/version").headers["x-request-id"])
    assert len(ids) == 2 and all(len(one) == 32 for one in ids)


def test_what_is_found_while_a_prompt_is_tokenized_names_its_field(http, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smollm2", prompt=[1, 49152])
    assert caught.value.body["param"] == "prompt"
