"""Tool calls and reasoning in model answers: whole, and cut into pieces of any size."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.gateway.api.openai.calls import format_of, parser_of
from farshore.gateway.api.openai.reasoning import ReasoningParser

NAMES = ["weather", "time"]
PARIS = {"city": "Paris"}


def parsed(kind, pieces):
    parser = parser_of(kind, NAMES)
    found = [parser.push(piece) for piece in pieces] + [parser.finish()]
    content = "".join(one.content for one in found)
    return content, [(call.name, json.loads(call.arguments)) for one in found for call in one.calls]


ANSWERS = [
    ("hermes", "Just text.", "Just text.", []),
    ("hermes", "a < b and <tool> c", "a < b and <tool> c", []),
    (
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [("weather", PARIS)],
    ),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n'
        '<tool_call>{"name": "time", "arguments": {}}</tool_call>',
        "Let me see.",
        [("weather", PARIS), ("time", {})],
    ),
    # The last mark is missing.
    ("hermes", '<tool_call>{"name": "time", "arguments": {}}', "", [("time", {})]),
    # No JSON, and JSON that is no call, stay text.
    ("hermes", "x <tool_call>{oops}</tool_call>", "x <tool_call>{oops}</tool_call>", []),
    ("hermes", "<tool_call>[1]</tool_call> y", "<tool_call>[1]</tool_call> y", []),
    ("hermes", '<tool_call>{"name": "ti', '<tool_call>{"name": "ti', []),
    # A mark in a string of the arguments' text would end the block in every parser; a brace does not.
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": "P}a\\"r{is"}}</tool_call>',
        "",
        [("weather", {"city": 'P}a"r{is'})],
    ),
    ("mistral", "Hello", "Hello", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "time", "arguments": {}}]',  # noqa: E501
        "",
        [("weather", PARIS), ("time", {})],
    ),
    ("mistral", 'Ok.[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', "Ok.", [("weather", PARIS)]),
    (
        "mistral",
        '[TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]time{}',
        "",
        [("weather", PARIS), ("time", {})],
    ),
    ("mistral", "[TOOL_CALLS] oops", "[TOOL_CALLS] oops", []),
    ("llama3", "It is sunny.", "It is sunny.", []),
    ("llama3", '{"name": "weather", "parameters": {"city": "Paris"}}', "", [("weather", PARIS)]),
    (
        "llama3",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "time", "parameters": {}}',  # noqa: E501
        "",
        [("weather", PARIS), ("time", {})],
    ),
    # An object that names no offered function is an answer in JSON.
    ("llama3", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    ("llama3", '{"a": ', '{"a": ', []),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), ANSWERS)
def test_calls_are_found_however_the_text_is_cut(kind, text, content, calls):
    assert parsed(kind, [text]) == (content, calls)
    assert parsed(kind, list(text)) == (content, calls)
    assert parsed(kind, [text[:7], text[7:]]) == (content, calls)


@given(st.text(alphabet='<>/tol_ca{}[]TOLCAS:"\\ \nab;|python', max_size=60), st.integers(1, 7))
def test_text_without_calls_is_never_lost(text, step):
    for kind in ("hermes", "mistral", "llama3"):
        content, calls = parsed(kind, [text[i : i + step] for i in range(0, len(text), step)])
        assert calls or content == text


def test_ids_are_of_the_models_kind():
    mistral = parser_of("mistral", NAMES)
    mistral.push('[TOOL_CALLS] [{"name": "time", "arguments": {}}]')
    (call,) = mistral.finish().calls
    assert len(call.id) == 9 and call.id.isalnum()
    hermes = parser_of("hermes", NAMES)
    ids = [hermes.push('<tool_call>{"name": "time"}</tool_call>').calls[0].id for _ in range(2)]
    assert len(set(ids)) == 2 and all(one.startswith("call_") for one in ids)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>", "hermes"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}<|python_tag|>", "llama3"),
        ("{{ messages }}", None),
        ("{{ tools }}", None),
    ],
)
def test_the_template_tells_the_format(template, kind):
    assert format_of(template) == kind


THOUGHTS = [
    (False, "Plain answer.", "", "Plain answer."),
    (False, "<think>\nHm, so.\n</think>\n\nYes.", "Hm, so.\n", "Yes."),
    (True, "Hm.</think>Yes, <think> is a mark.", "Hm.", "Yes, <think> is a mark."),
    (True, "Never ends", "Never ends", ""),
    (False, "<thin", "", "<thin"),
    (True, "a</thin", "a</thin", ""),
    (False, "<think></think>Yes", "", "Yes"),
]


@pytest.mark.parametrize(("begun", "text", "reasoning", "content"), THOUGHTS)
def test_reasoning_is_parted_however_the_text_is_cut(begun, text, reasoning, content):
    for pieces in ([text], list(text), [text[:9], text[9:]]):
        parser = ReasoningParser(begun=begun)
        parts = [parser.push(piece) for piece in pieces] + [parser.finish()]
        assert "".join(part.reasoning for part in parts) == reasoning
        assert "".join(part.content for part in parts) == content
