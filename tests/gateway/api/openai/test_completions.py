"""/v1/completions, /v1/models, /tokenize and /detokenize."""

import threading

import grpc
import httpx2
import openai
import pytest


def test_a_text_is_continued(http, client, served):
    http.engine.auto = served.tokenizer.encode(" France")
    answer = client.completions.create(model="smollm2", prompt="Paris is in")
    assert answer.choices[0].text == " France" and answer.object == "text_completion"
    sent = http.engine.next_sequence().request
    assert list(sent.prompt) == served.tokenizer.encode("Paris is in")
    assert sent.sampling.max_tokens == 16 and sent.sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("ab", ["ab"]), (["ab", "cd"], ["ab", "cd"]), ([5, 6, 7], [[5, 6, 7]]), ([[5], [6, 7]], [[5], [6, 7]])],
)
def test_prompts_are_texts_or_tokens_one_or_many(http, client, served, prompt, prompts):
    http.engine.auto = served.tokenizer.encode(" x")
    answer = client.completions.create(model="smollm2", prompt=prompt)
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    sent = [list(http.engine.next_sequence().request.prompt) for _ in prompts]
    assert sorted(sent) == sorted(p if isinstance(p, list) else served.tokenizer.encode(p) for p in prompts)


def test_echo_begins_with_the_prompt(http, client, served):
    http.engine.auto = served.tokenizer.encode(" France")
    for prompt in ("Paris is in", served.tokenizer.encode("Paris is in")):
        answer = client.completions.create(model="smollm2", prompt=prompt, echo=True)
        assert answer.choices[0].text == "Paris is in France"
        chunks = client.completions.create(model="smollm2", prompt=prompt, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Paris is in France"


def test_echo_of_a_truncated_prompt_is_what_is_left_of_it(http, client, served):
    http.engine.auto = served.tokenizer.encode(" France")
    ids = served.tokenizer.encode("Paris is in")
    for prompt in ("Paris is in", ids, ids * 5000):
        answer = client.completions.create(
            model="smollm2", prompt=prompt, echo=True, extra_body={"truncate_prompt_tokens": 2}
        )
        assert answer.choices[0].text == served.tokenizer.decode(ids[-2:]) + " France"
        assert list(http.engine.next_sequence().request.prompt) == ids[-2:]


def test_a_stream_of_many_prompts_tells_them_apart(http, client, served):
    http.engine.auto = served.tokenizer.encode(" one two")
    chunks = client.completions.create(model="smollm2", prompt=["a", "b"], stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: " one two", 1: " one two"}


def test_a_stream_has_each_prompts_tokens_as_they_come(http, client, served):
    """The second prompt's first, while the first has none."""
    one, two = served.tokenizer.encode("a"), served.tokenizer.encode("b")
    word = served.tokenizer.encode(" word")
    sequences = {}

    def arrived():
        while len(sequences) < 2:
            sequence = http.engine.next_sequence()
            sequences[tuple(sequence.request.prompt)] = sequence
        sequences[tuple(two)].tokens(*word)

    thread = threading.Thread(target=arrived)
    thread.start()
    chunks = client.completions.create(model="smollm2", prompt=["a", "b"], stream=True)
    first = next(iter(chunks)).choices[0]
    thread.join(30)
    assert (first.index, first.text) == (1, " word")
    sequences[tuple(two)].finish()
    assert next(chunks).choices[0].index == 1
    sequences[tuple(one)].tokens(*word)
    sequences[tuple(one)].finish()
    assert {chunk.choices[0].index for chunk in chunks} == {0}


@pytest.mark.parametrize("failing", [0, 1])
def test_one_prompt_that_is_refused_is_the_status_of_a_stream(http, client, served, failing):
    result = {}

    def call():
        try:
            client.completions.create(model="smollm2", prompt=["a", "b"], stream=True)
        except openai.APIStatusError as error:
            result["error"] = error

    thread = threading.Thread(target=call)
    thread.start()
    sequences = sorted((http.engine.next_sequence() for _ in range(2)), key=lambda s: list(s.request.prompt))
    sequences[failing].fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full for now")
    thread.join(30)
    assert result["error"].status_code == 429
    assert sequences[1 - failing].ended.wait(30)


def test_leaving_a_stream_of_many_prompts_ends_them_all(http, client, served):
    http_stream = client.completions.create(model="smollm2", prompt=["a", "b", "c"], stream=True)
    sequences = [http.engine.next_sequence() for _ in range(3)]
    sequences[1].tokens(*served.tokenizer.encode(" word"))
    next(iter(http_stream))
    http_stream.close()
    assert all(sequence.ended.wait(30) for sequence in sequences)


def test_logprobs_are_lists_by_token(http, client, served):
    france = served.tokenizer.encode(" France")[0]
    result = {}
    thread = threading.Thread(
        target=lambda: result.update(
            answer=client.completions.create(model="smollm2", prompt="Paris is in", logprobs=1)
        )
    )
    thread.start()
    sequence = http.engine.next_sequence()
    for _ in range(2):
        sequence.token(token_id=france, logprob=-0.25, top=[{"token_id": france, "logprob": -0.25}])
    sequence.finish()
    thread.join(30)
    logprobs = result["answer"].choices[0].logprobs
    assert logprobs.tokens == [" France", " France"] and logprobs.token_logprobs == [-0.25, -0.25]
    assert logprobs.top_logprobs == [{" France": -0.25}] * 2 and logprobs.text_offset == [0, 7]


@pytest.mark.parametrize(
    "given",
    [{"suffix": "x"}, {"best_of": 3}, {"prompt": []}, {"prompt": [[]]}],
)
def test_what_is_not_supported_is_a_400(client, given):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{"model": "smollm2", "prompt": "a"} | given)


def test_models_are_listed_by_each_name(client, served):
    assert [model.id for model in client.models.list()] == list(served.spec.names)
    assert client.models.retrieve("smollm2").id == "smollm2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_tokens_of_texts_and_chats(base_url, served, encode_chat):
    ids = served.tokenizer.encode("Hello world")
    reply = httpx2.post(f"{base_url}/tokenize", json={"prompt": "Hello world"}).json()
    assert reply == {"count": 2, "max_model_len": served.config.max_positions, "tokens": ids}
    messages = [{"role": "user", "content": "Hi"}]
    assert httpx2.post(f"{base_url}/tokenize", json={"messages": messages}).json()["tokens"] == encode_chat(
        messages
    )
    assert httpx2.post(f"{base_url}/detokenize", json={"tokens": ids}).json() == {"prompt": "Hello world"}
    refused = httpx2.post(f"{base_url}/detokenize", json={"tokens": [1 << 20]})
    assert refused.status_code == 400 and "outside the vocabulary" in refused.json()["error"]["message"]
