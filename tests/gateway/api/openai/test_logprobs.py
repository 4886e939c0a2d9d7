"""Log-probabilities over HTTP: an echo's, vLLM's prompt_logprobs, and names of tokens."""

import threading

import openai
import pytest

PROMPT = "Paris is in"
TOP = -0.25


@pytest.fixture
def ask(http, served):
    """ask(call) -> its answer. The engine says of each token of PROMPT that its logprob is -0.5, rank 2, and
    that token 5 is likelier; then it sends " France"."""

    def run(call, tokens=1):
        result = {}

        def work():
            try:
                result["answer"] = call()
            except openai.APIError as error:
                result["answer"] = error

        thread = threading.Thread(target=work)
        thread.start()
        sequence = http.engine.next_sequence()
        prompt = list(sequence.request.prompt)
        first, *rest = prompt
        values = {"logprob": -0.5, "rank": 2, "top": [{"token_id": 5, "logprob": TOP}]}
        sequence.prompt_logprobs(0, {"token_id": first}, *({"token_id": id, **values} for id in rest))
        france = served.tokenizer.encode(" France")[0]
        for _ in range(tokens):
            sequence.token(token_id=france, logprob=-0.125, top=[{"token_id": france, "logprob": -0.125}])
        sequence.finish()
        thread.join(30)
        return result["answer"], sequence.request

    return run


def test_an_echo_with_logprobs_begins_with_the_prompts(client, ask, served):
    answer, sent = ask(lambda: client.completions.create(model="", prompt=PROMPT, echo=True, logprobs=1))
    assert sent.sampling.prompt_logprobs == 1 and sent.sampling.logprobs == 1
    (choice,) = answer.choices
    ids = served.tokenizer.encode(PROMPT)
    texts = [served.tokenizer.token_text(id) for id in ids]
    five = served.tokenizer.token_text(5)
    assert choice.text == "Paris is in France"
    assert choice.logprobs.tokens == [*texts, " France"]
    assert choice.logprobs.token_logprobs == [None, *[-0.5] * (len(ids) - 1), -0.125]
    assert choice.logprobs.top_logprobs == [None, *[{five: TOP}] * (len(ids) - 1), {" France": -0.125}]
    for text, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(text)


def test_a_stream_has_the_same(client, ask):
    def call():
        return list(client.completions.create(model="", prompt=PROMPT, echo=True, logprobs=1, stream=True))

    chunks, _ = ask(call)
    whole, _ = ask(lambda: client.completions.create(model="", prompt=PROMPT, echo=True, logprobs=1))
    parts = [chunk.choices[0] for chunk in chunks]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)


def test_a_prompt_alone_is_scored_without_an_answer(client, ask):
    """As evaluation harnesses ask: echo, logprobs, max_tokens 0."""
    answer, sent = ask(
        lambda: client.completions.create(model="", prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    )
    assert sent.sampling.max_tokens == 1
    (choice,) = answer.choices
    assert choice.text == PROMPT and len(choice.logprobs.tokens) == len(sent.prompt)
    assert choice.logprobs.top_logprobs == [None, *[{}] * (len(sent.prompt) - 1)]
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_prompt_logprobs_are_vllms(client, ask, served, kind):
    extra = {"extra_body": {"prompt_logprobs": 1, "priority": 7}}
    if kind == "chat":
        messages = [{"role": "user", "content": "Hi"}]
        answer, sent = ask(lambda: client.chat.completions.create(model="", messages=messages, **extra))
        entries = answer.prompt_logprobs
    else:
        answer, sent = ask(lambda: client.completions.create(model="", prompt=PROMPT, **extra))
        entries = answer.choices[0].prompt_logprobs
    assert sent.sampling.prompt_logprobs == 1 and sent.priority == 7
    first, *rest = entries
    assert first is None and len(rest) == len(sent.prompt) - 1
    text = served.tokenizer.token_text
    for token, entry in zip(sent.prompt[1:], rest, strict=True):
        assert entry["5"] == {"logprob": TOP, "rank": 1, "decoded_token": text(5)} or token == 5
        assert entry[str(token)] == {"logprob": -0.5, "rank": 2, "decoded_token": text(token)}


def test_the_priority_is_a_whole_number_in_any_form(client, ask):
    """As the other whole numbers: JSON does not tell 7.0 from 7."""
    _, sent = ask(lambda: client.completions.create(model="", prompt=PROMPT, extra_body={"priority": 7.0}))
    assert sent.priority == 7


def test_tokens_named_by_their_ids(client, ask, served):
    france = served.tokenizer.encode(" France")[0]
    extra = {"extra_body": {"return_tokens_as_token_ids": True}}
    answer, _ = ask(lambda: client.completions.create(model="", prompt=PROMPT, logprobs=1, **extra))
    assert answer.choices[0].logprobs.tokens == [f"token_id:{france}"]
    messages = [{"role": "user", "content": "Hi"}]
    answer, _ = ask(
        lambda: client.chat.completions.create(model="", messages=messages, logprobs=True, **extra)
    )
    assert answer.choices[0].logprobs.content[0].token == f"token_id:{france}"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"priority": 1 << 31}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ],
    ids=str,
)
def test_what_can_not_be_is_a_400_that_names_it(client, given, names):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="", prompt="a", extra_body=given)
    assert names in refused.value.body["message"]
