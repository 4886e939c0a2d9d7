"""Structures of texts become grammars, or errors that name what is not supported."""

import pytest

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.gateway.requests.structure import check, grammar_of
from farshore.proto import inference_pb2 as api


def choice(*texts):
    return api.Structure(choice=api.Choices(texts=texts))


@pytest.mark.parametrize(
    "structure",
    [
        api.Structure(json_schema='{"type": "object", "properties": {"a": {"type": "integer"}}}'),
        api.Structure(regex=r"[a-z]+/\d{3}"),
        choice("yes", 'no "or"\nmaybe'),
        api.Structure(grammar='start: "a" ("b" | "c")+'),
    ],
)
def test_what_is_supported_gives_a_grammar(structure):
    assert grammar_of(structure)


@pytest.mark.parametrize(
    ("structure", "named"),
    [
        (api.Structure(json_schema='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (api.Structure(json_schema='{"not": {}}'), "'not'"),
        (api.Structure(json_schema='{"if": {}, "then": {}}'), "'if'"),
        (api.Structure(json_schema='{"anyOf": [{"items": {"minLenght": 3}}]}'), "'minLenght'"),
        (api.Structure(json_schema='{"$defs": {"a": {"contains": {}}}}'), "'contains'"),
        (api.Structure(json_schema='{"type": "string", "format": "colour"}'), "colour"),
        (api.Structure(json_schema='{"type": "string", "x-guidance": {"lenient": true}}'), "x-guidance"),
        (api.Structure(json_schema="[1]"), "a JSON schema is an object"),
        (api.Structure(json_schema="{"), "json_schema can't be used"),
        (api.Structure(regex="a("), "unclosed group"),
        (api.Structure(grammar="start: thing"), "thing"),
    ],
)
def test_what_is_not_supported_is_named(structure, named):
    with pytest.raises(InvalidRequest) as caught:
        grammar_of(structure)
    assert named in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (api.Sampling(structure=api.Structure()), "structure is empty"),
        (api.Sampling(structure=choice()), "at least one text"),
        (api.Sampling(structure=choice("a", "")), "none of them empty"),
        (api.Sampling(structure=api.Structure(regex="a" * 40_000)), "40000 characters"),
        (api.Sampling(structure=choice("a"), ignore_eos=True), "ignore_eos"),
    ],
)
def test_limits(sampling, named):
    with pytest.raises(InvalidRequest, match=named):
        check(sampling, Limits())
