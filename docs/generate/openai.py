"""Writes ``docs/openai.md``, which fields of OpenAI's API work: ``python -P docs/generate/openai.py``.

From ``gateway/api/openai/schema.py``, and from the names below of fields that OpenAI has and we do not. A
test compares the committed file with what this writes, sends the refused fields, and asks OpenAI's package
for others.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from farshore.gateway.api.openai.schema import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

TARGET = Path(__file__).resolve().parents[1] / "openai.md"

HEAD = """# OpenAI's API, field by field

Written by `docs/generate/openai.py` from the gateway's models of the bodies; a test holds it up to
date. Three things can happen to a field:

- **supported**: it does what OpenAI's reference says, or vLLM's for vLLM's additions;
- **supported for** some values: these are named, and any other value is refused;
- **refused**: the call fails with 400, and the field's name is the error's `param`.

No field is ignored, except where it is null, which means "not given". The names of other APIs' fields,
and misspelt ones, are refused in the same way, also inside messages, tools and options.

Calls: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/v1/models/{model}`; vLLM's
`/tokenize`, `/detokenize`, `/health`, `/version`; `/ready` (200 while an engine takes requests) and
`/openapi.json`. Sizes, types and errors are in [api.md](api.md).
"""

REFUSED = {
    ChatBody: (
        *("audio", "function_call", "functions", "moderation", "prediction", "prompt_cache_options"),
        *("prompt_cache_retention", "reasoning_effort", "verbosity", "web_search_options"),
    ),
    CompletionBody: (),
}
"""Fields that OpenAI has and the gateway refuses."""

ADDED = {
    *(
        "top_k",
        "min_p",
        "repetition_penalty",
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
    ),
    *("stop_token_ids", "min_tokens", "allowed_token_ids", "bad_words", "truncate_prompt_tokens"),
    *("structured_outputs", "cache_salt", "request_id", "add_generation_prompt", "continue_final_message"),
    *("chat_template_kwargs", "reasoning_content", "priority", "prompt_logprobs"),
}
"""Fields that vLLM's server has and OpenAI's API has not."""

_NAMES_CALLER = "names the caller; changes no answer"
NOTES = {
    "allowed_token_ids": "only these are drawn",
    "bad_words": "texts that do not come",
    "best_of": "for the value of `n`; another one is refused",
    "cache_salt": "stored prefixes are found by requests of the same salt alone",
    "content": "a text or parts of type `text`; images and audio are refused",
    "echo": "with `logprobs` also the log-probabilities of the prompt's tokens",
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "logit_bias": "-100 to 100, by token id",
    "logprobs": "of the model's own distribution: before bias, penalties and temperature",
    "max_completion_tokens": "as `max_tokens`; if both are given they must be equal",
    "max_tokens": "chats: what the prompt leaves of the model's positions; completions: 16",
    "metadata": _NAMES_CALLER,
    "model": "a name of `/v1/models`; empty: the one that is served",
    "n": "1 to 32; above 1 with a temperature above 0",
    "parallel_tool_calls": "false: the first call only",
    "prompt": "a text, token ids, or up to 128 of these",
    "prompt_logprobs": "up to 20; not in streams",
    "prompt_cache_key": _NAMES_CALLER,
    "reasoning_content": "of an earlier answer; the chat template decides whether the model sees it",
    "request_id": "a retry with the same id and body reads the same answer; another body is a 409",
    "response_format": "`text`, `json_object`, `json_schema`",
    "safety_identifier": _NAMES_CALLER,
    "seed": "equal seeds give equal draws; negative seeds too",
    "stop": "up to 16 texts",
    "stream_options": "with `stream`: `include_usage`, vLLM's `continuous_usage_stats`",
    "structured_outputs": "one of `json`, `regex`, `choice`, `grammar`",
    "temperature": "0 to 2",
    "tool_choice": "`none`, `auto`, `required`, or a function",
    "tools": "functions; parsed in the format of the model's chat template",
    "top_logprobs": "up to 20",
    "truncate_prompt_tokens": "keeps the prompt's last tokens; -1: all",
    "user": _NAMES_CALLER,
}


NOTES_OF = {
    TokenizeBody: {"prompt": "a text; give it or `messages`", "messages": "a chat; give it or `prompt`"},
    DetokenizeBody: {"tokens": "token ids; the answer's `prompt` is their text, without special tokens"},
}
"""Notes of fields whose names mean something else in other calls."""


def text() -> str:
    """The whole of ``docs/openai.md``."""
    lines = [HEAD]
    for kind, call in ((ChatBody, "/v1/chat/completions"), (CompletionBody, "/v1/completions")):
        own = [name for name in _names(kind) if name not in ADDED]
        rows = [*_rows(kind, own), *((name, "refused", NOTES.get(name, "")) for name in REFUSED[kind])]
        lines += [f"## `{call}`", "", *_table(sorted(rows)), "", "vLLM's additions:", ""]
        lines += [*_table(sorted(_rows(kind, [name for name in _names(kind) if name in ADDED]))), ""]
    lines += ["## Messages of a chat", "", *_table(sorted(_rows(ChatMessage, _names(ChatMessage)))), ""]
    for kind, call in ((TokenizeBody, "/tokenize"), (DetokenizeBody, "/detokenize")):
        lines += [f"## `{call}`", "", *_table(sorted(_rows(kind, _names(kind)))), ""]
    lines.pop()
    return "\n".join(lines) + "\n"


def _names(kind: type[BaseModel]) -> list[str]:
    return list(kind.model_json_schema()["properties"])


def _rows(kind: type[BaseModel], names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    schema = kind.model_json_schema()
    for name in names:
        values = _only(schema["properties"][name])
        supported = "supported" if values is None else f"supported for {values}" if values else "refused"
        yield name, supported, NOTES_OF.get(kind, NOTES).get(name, NOTES.get(name, ""))


def _only(schema: Mapping[str, Any]) -> str | None:
    """The only values that a field takes, besides null; "" for none, None if it takes all of its type."""
    if schema.get("type") == "null":
        return ""
    kinds = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    kind = kind.get("items", kind)
    if "const" in kind or "enum" in kind:
        values = [kind["const"]] if "const" in kind else kind["enum"]
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in values)
    return None


def _table(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    yield from ("| field | | |", "| --- | --- | --- |")
    for name, supported, note in rows:
        yield f"| `{name}` | {supported} | {note} |"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
