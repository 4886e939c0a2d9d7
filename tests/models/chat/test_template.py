"""Our rendering of templates against transformers' ``apply_chat_template``, and what templates may do."""

import functools
import json

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.models.chat.environment import Environment, takes_parts
from farshore.models.chat.marks import ControlTokens, Marker
from farshore.models.chat.template import ChatTemplates, Refused

FAMILIES = ["llama3", "mistral", "qwen25", "qwen3", "gemma", "gpt_oss", "smollm", "smollm3"]
NAMES = [*FAMILIES, "constructs"]  # constructs: the rest of Jinja.
TAKE_PARTS = {"qwen3", "gemma"}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "default": "y"}}},
    },
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@functools.cache
def _compiled(source):
    return ChatTemplates({"default": source}, SPECIAL)


def render(source, request, most_chars=1 << 20):
    templates = ChatTemplates(source, SPECIAL) if isinstance(source, dict) else _compiled(source)
    return templates.render(request, Marker(ControlTokens(()), besides=()), most_chars=most_chars)


@pytest.fixture
def refusal(request_of):
    """refusal(source, **conversation) -> the text of the refusal."""

    def of(source, **conversation):
        with pytest.raises(Refused) as refused:
            render(source, request_of(dict(messages=[]) | conversation))
        return str(refused.value)

    return of


def _joined(conversation):
    """What a template that takes only strings is given for parts."""
    messages = [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in conversation["messages"]
    ]
    return conversation | {"messages": messages}


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name, template_source, conversations, request_of, transformers_renders):
    source, rendered = template_source(name), 0
    for case, conversation in conversations.items():
        expected = transformers_renders(source, conversation if name in TAKE_PARTS else _joined(conversation))
        if isinstance(expected, str):
            assert render(source, request_of(conversation)) == expected, case
            rendered += 1
        else:
            with pytest.raises(Refused) as refused:
                render(source, request_of(conversation))
            if isinstance(expected, jinja2.TemplateError):  # The template's own message.
                assert str(expected)[:100] in str(refused.value), case
    assert rendered >= 14


@pytest.mark.parametrize("name", NAMES)
def test_which_templates_take_parts(name, template_source):
    assert takes_parts(Environment().parse(template_source(name))) == (name in TAKE_PARTS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for p in m.content %}{% endfor %}", True),
        ("{% for p in m['content'][1:] | list %}{% endfor %}", True),
        ("{% set c = m['content'] or [] %}{% set d = c %}{% for p in d %}{% endfor %}", True),
        ("{% for p in (x if y else m.get('content')) %}{% endfor %}", True),
        ("{% macro f(a, b) %}{% for p in b %}{% endfor %}{% endmacro %}{{ f(1, b=m.content) }}", True),
        ("{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}", True),
        ("{{ m.content[0].text }}", True),
        ("{{ m.content[0] }}{{ m.content | trim }}{% for p in m.parts %}{% endfor %}", False),
        (
            "{% if m.content is string %}{{ m.content }}{% else %}{{ raise_exception('no') }}{% endif %}",
            False,
        ),
        ("{% for m in messages %}{% for t in tools %}{{ m.content }}{% endfor %}{% endfor %}", False),
    ],
)
def test_what_visits_parts(source, expected):
    assert takes_parts(Environment().parse(source)) == expected


def test_named_templates(refusal, request_of):
    tools = [{"name": "t"}]
    both = {"tool_use": "T{{ tools | length }}", "default": "D"}
    assert render(both, request_of(dict(messages=[]))) == "D"
    assert render(both, request_of(dict(messages=[], tools=tools))) == "T1"
    assert render({"default": "D"}, request_of(dict(messages=[], tools=tools))) == "D"
    assert "no default chat template, only ['rag', 'tool_use']" in refusal({"tool_use": "T", "rag": "R"})


def test_numbers_stay_as_they_are(request_of):
    arguments = {"big": 2**70, "one": 1, "real": 1.0, "none": None, "yes": True}
    request = request_of(dict(messages=[], template_arguments={"value": arguments}))
    assert render("{{ value | tojson }}", request) == json.dumps(arguments)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(tools=["[1]"]), "tool 0: must be a JSON object, not '[1]'"),
        (dict(tools=["{}", "{"]), "tool 1: not valid JSON (Expecting property name"),
        (dict(tools=["[" * 100_000]), "tool 0: nested more than 64 deep"),
        (dict(tools=['{"a":' * 64 + "1" + "}" * 64]), "tool 0: nested more than 64 deep"),
        (dict(template_arguments='"x"'), "template_arguments: must be a JSON object"),
        (dict(template_arguments='{"a": NaN}'), "NaN is no JSON number"),
        (dict(template_arguments='{"a": 1e999}'), "a number is too large"),
        (dict(template_arguments='{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
        (dict(template_arguments='{"documents": ["a"]}'), "documents must be a list of objects"),
        (dict(template_arguments='{"messages": [], "tools": 1}'), "can't set 'messages', 'tools'"),
        (
            dict(messages=[{"role": "a", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]),
            "the arguments of tool call 0 of message 0: not valid JSON",
        ),
        (dict(messages=[{"role": "a"}], continue_final_message=True), "no content to continue"),
        (dict(messages=[{"role": "a", "content": "x"}], continue_final_message=True), "shows no content"),
    ],
)
def test_refused_before_rendering(given, words, request_of):
    with pytest.raises(Refused) as refused:
        render("{{ messages }}", request_of(dict(messages=[])) | given)
    assert words in str(refused.value) and len(str(refused.value)) < 200


def test_63_levels_are_taken(request_of):
    request = request_of(dict(messages=[])) | dict(tools=['{"a":' * 63 + "1" + "}" * 63])
    assert render("{{ tools | length }}", request) == "1"


def test_final_message_that_the_template_changes(refusal):
    for source in ("{{ messages[0].content[:2] }}", "{{ messages[0].content | upper }}"):
        given = dict(messages=[{"role": "a", "content": "Hello"}], continue_final_message=True)
        assert "does not show the final message as it is" in refusal(source, **given)


def test_raised_messages_are_passed_on(refusal):
    assert refusal("{{ raise_exception('roles must alternate') }}").endswith(": roles must alternate")


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",  # RecursionError
        "{{ '{7}'.format(1) }}",  # IndexError
        "{{ '%d' % 'x' }}",
        "{{ 1 // 0 }}",
        "{{ range(10 ** 9) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0]['x'] + 1 }}",
        "{{ raise_exception(messages[0]['content'] * 100000) }}",
        "{% include 'other' %}",
        "{% set n = namespace(_a=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ dict.__class__.__mro__ }}{{ dict.mro() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}{{ ('{0.__class__.__mro__}' | format)[0] }}{{ 1 / 0 }}",
    ],
)
def test_every_exception_is_a_short_refusal(source, refusal):
    message = refusal(source, messages=[{"role": "user", "content": "Hello you"}])
    assert "can't render these messages: " in message and len(message) <= 260


def test_long_output(request_of):
    request = request_of(dict(messages=[]))
    source = "{% for n in range(1000) %}{{ 'x' * 100 }}{% endfor %}"
    assert len(render(source, request, most_chars=100_000)) == 100_000
    with pytest.raises(Refused, match="more than 99999 characters after the chat template"):
        render(source, request, most_chars=99_999)


_words = st.sampled_from(["Hi", " x ", "\n", "", "</think>", "<think>", "é<&'\"", "/no_think", "{{ x }}"])
_texts = st.lists(_words, max_size=4).map("".join)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda children: st.lists(children, max_size=2) | st.dictionaries(_words, children, max_size=2),
    max_leaves=4,
)
_objects = st.dictionaries(_words, _values, max_size=3)
_calls = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": _texts, "arguments": _objects})},
    optional={"id": st.sampled_from(["abcdefghi", "1"])},
)
_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
    optional={
        "content": _texts | st.lists(_texts.map(lambda text: {"type": "text", "text": text}), min_size=1),
        "tool_calls": st.lists(_calls, min_size=1, max_size=2),
        "reasoning_content": _texts,
        "name": _texts,
        "tool_call_id": st.sampled_from(["abcdefghi", "1"]),
    },
)
_conversations = st.fixed_dictionaries(
    {"messages": st.lists(_messages, min_size=1, max_size=5)},
    optional={
        "tools": st.lists(st.sampled_from([TOOL, {**TOOL, "type": "other"}]), min_size=1)
        | st.lists(_objects, min_size=1),
        "template_arguments": st.fixed_dictionaries(
            {},
            optional={
                "enable_thinking": st.booleans(),
                "date_string": _texts,
                "documents": st.lists(_objects, max_size=2),
            },
        ),
    },
)
_ends = st.sampled_from(
    [{}, {"add_generation_prompt": False}, {"add_generation_prompt": False, "continue_final_message": True}]
)


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(conversation=_conversations, end=_ends)
def test_any_conversation_equals_transformers(
    name, template_source, request_of, transformers_renders, conversation, end
):
    source, conversation = template_source(name), conversation | end
    expected = transformers_renders(source, conversation if name in TAKE_PARTS else _joined(conversation))
    if isinstance(expected, str):
        assert render(source, request_of(conversation)) == expected
    else:
        with pytest.raises(Refused):
            render(source, request_of(conversation))
