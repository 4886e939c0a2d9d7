"""The options that say what is loaded: what is typed, and what reaches the configuration. Starts no
cluster."""

import argparse

import pytest

from farshore.client.cli.options.model import json_object, tokens
from farshore.model_spec import ModelSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8192", 8192),
        ("32K", 32768),
        ("32k", 32000),
        ("25.6k", 25600),
        ("1M", 1 << 20),
        ("1m", 10**6),
        (" 4K ", 4096),
    ],
)
def test_numbers_of_tokens_are_read_as_vllm_does(text, expected):
    assert tokens(text) == expected


@pytest.mark.parametrize("text", ["", "K", "1.5K", "1.5", "-1", "1KiB", "1e4", "0x10", "nan"])
def test_other_numbers_of_tokens_name_the_form(text):
    with pytest.raises(argparse.ArgumentTypeError, match="as in 32K"):
        tokens(text)


@pytest.mark.parametrize(
    "text", ["", "yarn", "{rope_type: yarn}", "[1]", "3", "[" * 100_000], ids=lambda text: text[:9]
)
def test_other_things_than_json_objects(text):
    with pytest.raises(argparse.ArgumentTypeError, match="JSON"):
        json_object(text)


MODEL_OPTIONS = [
    *("--max-model-len", "4K", "--rope-scaling", '{"rope_type": "linear", "factor": 2.0}'),
    *(
        "--tokenizer",
        "t",
        "--chat-template",
        "c.jinja",
        "--generation-config",
        "none",
        "--revision",
        "v1",
        "--special-tokens-in-chat",
        "parse",
    ),
]
EXPECTED = dict(
    max_model_len=4096,
    rope_scaling={"rope_type": "linear", "factor": 2.0},
    tokenizer="t",
    chat_template="c.jinja",
    generation_config="none",
    revision="v1",
    special_tokens_in_chat="parse",
)


def test_serve_passes_every_option_on(run, cluster):
    done = run("serve", "--model", "org/m", *MODEL_OPTIONS, "--served-model-name", "one", "two")
    assert done.code == 0 and "serves one at" in done.out
    assert cluster.config.spec == ModelSpec(model="org/m", served_names=("one", "two"), **EXPECTED)


def test_generate_passes_them_to_the_cluster_that_it_starts(run, farshore, cluster, monkeypatch):
    monkeypatch.setattr("farshore.client.cli.connect.DEFAULT_SERVER", "127.0.0.1:1")
    farshore.engine.auto = [5]
    cluster.address = farshore.address
    assert run("generate", "Hi", "--raw", *MODEL_OPTIONS).code == 0
    assert cluster.config.spec == ModelSpec(**EXPECTED)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ([], "bfloat16"),
        *(
            ([word], dtype)
            for word, dtype in (
                ("auto", "bfloat16"),
                ("bfloat16", "bfloat16"),
                ("bf16", "bfloat16"),
                ("float32", "float32"),
                ("float", "float32"),
            )
        ),
    ],
)
def test_names_of_types(run, cluster, given, dtype):
    assert run("serve", *(["--dtype", *given] if given else [])).code == 0
    assert cluster.config.dtype == dtype


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dtype", "float16"), "--dtype float16 is unsupported: use bfloat16"),
        (("--dtype", "half"), "--dtype half is unsupported: use bfloat16"),
        (("--dtype", "int8"), "--dtype int8: use bfloat16 (also auto) or float32"),
        (("--max-model-len", "0"), "--max-model-len 0: use 2 to"),
        (("--max-model-len", "lots"), "is no number of tokens"),
        (("--rope-scaling", "yarn"), "is not JSON"),
        (("--rope-scaling", "{}"), "name a rope_type"),
        (("--served-model-name",), "expected at least one argument"),
        (("--served-model-name", "a b"), "no spaces"),
        (("--special-tokens-in-chat", "maybe"), "invalid choice"),
        (("--chat-template", ""), "--chat-template is empty"),
        (("--model", ""), "--model is empty"),
    ],
)
def test_values_that_can_not_work_are_wrong_usage(run, cluster, options, expected):
    done = run("serve", *options)
    assert done.code == 2 and done.out == "" and cluster.config is None
    assert expected in " ".join(done.err.split())
