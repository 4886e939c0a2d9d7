"""The generated documents are what the code says today, and the table of OpenAI's fields is true."""

import importlib.util
from pathlib import Path

import openai
import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat

DOCS = Path(__file__).resolve().parents[2] / "docs"
STREAMED = {"stream", "stream_options"}


def _load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "generate" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["accelerators", "api", "openai"])
def test_the_committed_document_is_up_to_date(name):
    module = _load(name)
    stale = f"run python -P docs/generate/{name}.py"
    assert module.TARGET.read_text(encoding="utf-8") == module.text(), stale


def test_every_method_and_body_is_documented():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in (
        "**BatchGenerate**",
        "**WatchEvents**",
        "`POST /v1/chat/completions`",
        "`resume`",
        "ChatBody (HTTP)",
    ):
        assert name in text
    assert "buf:lint" not in text


@pytest.fixture(scope="module")
def table():
    return _load("openai")


@pytest.fixture
def client(harness, loop_thread, served):
    with harness.gateway(loop_thread, served, http="127.0.0.1:0") as made:
        made.engine.auto = (10,)
        url = f"http://{made.gateway.http_address}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as opened:
            yield opened


def _ask(client, kind, extra):
    if kind == "ChatBody":
        messages = [{"role": "user", "content": "Hi"}]
        return client.chat.completions.create(model="smollm2", messages=messages, extra_body=extra)
    return client.completions.create(model="smollm2", prompt="Hi", extra_body=extra)


@pytest.mark.parametrize(("kind", "params"), [("ChatBody", chat), ("CompletionBody", completion)])
def test_every_field_of_openais_package_is_supported_or_refused_by_name(client, table, kind, params):
    """Also the fields of a newer package than the table was written for."""
    body = getattr(table, kind)
    known = set(body.model_json_schema()["properties"])
    theirs = set(params.CompletionCreateParamsBase.__annotations__)
    assert not known & set(table.REFUSED[body])
    assert known - theirs - table.ADDED <= {"stream", *_of_the_other(table, body)}
    for name in sorted((theirs | set(table.REFUSED[body])) - known):
        with pytest.raises(openai.BadRequestError) as refused:
            _ask(client, kind, {name: {"a": 1}})
        assert (refused.value.body["param"], refused.value.body["code"]) == (name, "unsupported")


def _of_the_other(table, body):
    """Fields that OpenAI documents for the other call only, and that both take."""
    other = table.ChatBody if body is table.CompletionBody else table.CompletionBody
    return set(other.model_fields) & set(body.model_fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [("service_tier", "flex"), ("store", True), ("modalities", ["audio"]), ("suffix", "x"), ("best_of", 2)],
)
def test_a_value_that_is_not_supported_is_refused_by_name(client, name, value):
    kind = "ChatBody" if name == "modalities" else "CompletionBody"
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(client, kind, {name: value})
    assert refused.value.body["param"].startswith(name)


def test_a_field_is_described_as_its_own_call_takes_it(table):
    sections = dict(section.split("`", 1) for section in table.text().split("\n## `")[1:])
    assert "| `tokens` |" in sections["/detokenize"]
    assert "up to 128" in sections["/v1/completions"] and "up to 128" not in sections["/tokenize"]
    for call in ("/v1/completions", "/v1/chat/completions"):
        assert "| `prompt_logprobs` | supported | up to 20; not in streams |" in sections[call]


def test_null_means_not_given(client, table):
    for name in table.REFUSED[table.ChatBody]:
        assert _ask(client, "ChatBody", {name: None}).choices
