"""The ``param`` of an error is a field of the body, whatever the gateway calls it inside."""

import httpx2
import pytest

USER = {"role": "user", "content": "Hi"}
WRONG_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}},
}
WRONG_CALL = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"uniqueItems": True}}}],
    "tool_choice": "required",
}
CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
CASES = {
    "structure of a format": (CHAT, {"response_format": WRONG_FORMAT}, "response_format"),
    "structure of vLLM": (CHAT, {"structured_outputs": {"regex": "("}}, "structured_outputs"),
    "structure of a call": (CHAT, WRONG_CALL, "tool_choice"),
    "alternatives": (CHAT, {"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    "completion tokens": (CHAT, {"max_completion_tokens": 1 << 20}, "max_completion_tokens"),
    "tokens": (CHAT, {"max_tokens": 1 << 20}, "max_tokens"),
    "a long chat": (CHAT, {"messages": [USER | {"content": "a " * 20_000}]}, "messages"),
    "no message": (CHAT, {"messages": []}, "messages"),
    "no role": (CHAT, {"messages": [USER, USER | {"role": ""}]}, "messages.1.role"),
    "arguments": (CHAT, {"chat_template_kwargs": {"a": "x" * (1 << 20)}}, "messages"),
    "sampling": (CHAT, {"temperature": 9}, "temperature"),
    "a long text": (TEXT, {"prompt": "a " * 20_000}, "prompt"),
    "many ids": (TEXT, {"prompt": [5] * 9000}, "prompt"),
    "logprobs": (TEXT, {"prompt": "a", "logprobs": 99}, "logprobs"),
    "echoed logprobs": (TEXT, {"prompt": [5] * 8000, "logprobs": 20 + 12, "echo": True}, "logprobs"),
    "an empty text": (TOKENIZE, {"prompt": ""}, "prompt"),
    "an empty chat": (TOKENIZE, {"messages": []}, "messages"),
    "an unknown id": (DETOKENIZE, {"tokens": [1 << 20]}, "tokens"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_the_bodys_field(base_url, case):
    path, fields, param = CASES[case]
    body = ({"messages": [USER]} if path == CHAT else {}) | fields
    reply = httpx2.post(base_url + path, json=body, timeout=30)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
