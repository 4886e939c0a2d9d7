"""What a cluster is asked to load: names, JSON for another process, and the refusals."""

import pytest

from farshore.errors import InvalidRequest
from farshore.model_spec import ModelSpec


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("smollm2", ("smollm2",)),
        ("/models/tiny.gguf", ("/models/tiny.gguf", "tiny")),
        ("org/tiny", ("org/tiny", "tiny")),
        ("org/tiny:Q4_K_M", ("org/tiny:Q4_K_M", "tiny:Q4_K_M")),
        (".", (".",)),
    ],
)
def test_without_names_the_model_has_its_own_and_a_short_one(model, names):
    assert ModelSpec(model=model).names == names


def test_given_names_replace_its_own():
    spec = ModelSpec(model="/models/tiny", served_names=("a", "b", "a"))
    assert spec.names == ("a", "b") and spec.name == "a"


def test_json_carries_everything():
    spec = ModelSpec(
        model="org/tiny",
        revision="v1",
        tokenizer="/t",
        chat_template="/c",
        max_model_len=5,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "nested": [1, {"x": None}]},
        served_names=("ä", "b"),
        special_tokens_in_chat="parse",
    )
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert ModelSpec.from_json("{}") == ModelSpec()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"nodel": "x"}',
        '{"max_model_len": "x"}',
        '{"served_names": 3}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_other_json_is_refused(text):
    with pytest.raises(InvalidRequest, match="options"):
        ModelSpec.from_json(text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": ""}, "--model is empty"),
        ({"chat_template": ""}, "--chat-template is empty"),
        ({"max_model_len": 1}, "--max-model-len 1: use 2 to"),
        ({"max_model_len": 1 << 40}, "--max-model-len 1099511627776"),
        ({"rope_scaling": [1]}, "--rope-scaling .* JSON object"),
        ({"rope_scaling": {"factor": 2}}, "name a rope_type"),
        ({"rope_scaling": {"rope_type": None}}, "name a rope_type"),
        ({"served_names": ("a", "")}, "--served-model-name ''"),
        ({"served_names": ("a b",)}, "no spaces"),
        ({"served_names": ("x" * 257,)}, "--served-model-name"),
        ({"special_tokens_in_chat": "yes"}, "use one of text, parse"),
    ],
)
def test_values_that_can_not_work(options, expected):
    with pytest.raises(InvalidRequest, match=expected):
        ModelSpec(**options)
