"""Bodies that are slow to parse for their size are refused before they are parsed: the event loop waits."""

import pytest

from farshore.gateway.api.openai import bodies
from farshore.gateway.api.openai.errors import ApiError
from farshore.gateway.api.openai.openapi import description
from farshore.gateway.api.openai.schema import ChatBody, CompletionBody, DetokenizeBody


def refusal(kind, text):
    with pytest.raises(ApiError) as caught:
        bodies.parsed(kind, text.encode())
    return caught.value


def lists(schema, path=""):
    """(path, schema) of each array that has its own schema of items."""
    if isinstance(schema, dict):
        if schema.get("type") == "array":
            yield path, schema
        for key, value in schema.items():
            yield from lists(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from lists(value, f"{path}.{index}")


def test_every_list_of_a_body_is_bounded():
    found = dict(lists(description()["components"]["schemas"]))
    assert len(found) > 10
    assert not [path for path, schema in found.items() if "maxItems" not in schema]


@pytest.mark.parametrize("item", ["{}", "[]", '{"role":"a"}'])
@pytest.mark.parametrize(
    "kind, field", [(ChatBody, "messages"), (CompletionBody, "prompt"), (DetokenizeBody, "tokens")]
)
def test_objects_are_counted_before_any_is_made(kind, field, item):
    many = ",".join([item] * (bodies.MOST_CONTAINERS + 1))
    assert "objects and arrays" in str(refusal(kind, f'{{"{field}":[{many}]}}'))


def test_objects_are_counted_wherever_they_are():
    message = '{{"role":"a","content":[{}]}}'.format(",".join(['{"type":"text","text":""}'] * 4000))
    assert "objects and arrays" in str(
        refusal(ChatBody, '{{"messages":[{}]}}'.format(",".join([message] * 20)))
    )


def test_brackets_in_texts_are_no_objects():
    text = '{[\\"{\\\\' * bodies.MOST_CONTAINERS
    body = bodies.parsed(ChatBody, f'{{"messages":[{{"role":"user","content":"{text}"}}]}}'.encode())
    assert body.messages[0].content == '{["{\\' * bodies.MOST_CONTAINERS


@pytest.mark.parametrize("text", ['{"', '{"\\', '["{', '{[\\"'])
def test_what_is_no_json_is_refused_too(text):
    assert refusal(ChatBody, text * (bodies.MOST_CONTAINERS + 1)).status == 400


def test_a_list_ends_at_its_first_wrong_item():
    """An error is made for each wrong item otherwise; 60,000 of them took seconds."""
    with pytest.raises(ValueError) as caught:
        CompletionBody.model_validate_json('{{"prompt":[{}]}}'.format(",".join(["{}"] * 60_000)))
    assert caught.value.error_count() < 10


def test_biases_are_counted_before_they_are_checked():
    biases = ",".join(f'"{token}":"a"' for token in range(5000))
    found = refusal(ChatBody, f'{{"messages":[{{"role":"a"}}],"logit_bias":{{{biases}}}}}')
    assert found.param == "logit_bias" and "5000 biases" in str(found) and "at most 1024" in str(found)


@pytest.mark.parametrize(
    "prompt, param",
    [("5," * 2000 + "-1", "prompt.2000"), ('"a","b",1', "prompt.2"), ('"a",' * 199 + '"a"', "prompt")],
)
def test_the_kind_of_prompt_that_fits_furthest_is_told(prompt, param):
    assert refusal(CompletionBody, f'{{"prompt":[{prompt}]}}').param == param


def test_whole_floats_are_token_ids():
    assert bodies.parsed(CompletionBody, b'{"prompt":[1,2.0]}').prompt == [1, 2]
    assert refusal(CompletionBody, '{"prompt":[1,2.5]}').status == 400
