"""Translates OpenAI-compatible bodies into GenerateRequests.

Called by ``endpoints``, with bodies that ``bodies`` has parsed. What fields may hold is checked by
``gateway.requests``, for all faces of the API alike.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from farshore.gateway.api.openai.errors import ApiError
from farshore.gateway.api.openai.parsing import Parsing
from farshore.gateway.api.openai.schema import (
    MOST_PROMPTS,
    ChatBody,
    ChatMessage,
    Common,
    CompletionBody,
    DetokenizeBody,
    NamedTool,
    ObjectFormat,
    SchemaFormat,
    TokenizeBody,
)
from farshore.proto import inference_pb2 as api
from farshore.text import quoted

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for /v1/completions. Chats may use what their prompt leaves."""

_SPECIAL_MARKS = ("llama3", "mistral")
"""Formats of tool calls whose marks are special tokens: these must be part of the text."""

_PASSED_ON = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "skip_special_tokens",
)


def chat_request(body: ChatBody, parsing: Parsing) -> api.GenerateRequest:
    """Raises ApiError. ``parsing``: what is known of the model's answers."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens differ: give one of them",
            param="max_completion_tokens",
        )
    if body.tool_choice not in (None, "none") and not body.tools:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    sampling = _sampling(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is not None:
        sampling.max_tokens = max_tokens
    if body.logprobs:
        sampling.logprobs = body.top_logprobs or 0
    tools = body.tools if body.tools and _shown(body, parsing) else None
    if (schema := forced_schema(body)) is not None:
        if sampling.HasField("structure"):
            raise ApiError(
                400, "a forced tool call and another structure exclude one another", param="tool_choice"
            )
        sampling.structure.json_schema = json.dumps(schema)
    elif tools and parsing.tool_format in _SPECIAL_MARKS and body.skip_special_tokens is None:
        sampling.skip_special_tokens = False
    return _request(body, sampling, chat=_chat(body, tools=tools))


def completion_requests(body: CompletionBody) -> list[api.GenerateRequest]:
    """One for each prompt, in order. Raises ApiError."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of is not supported: leave it out, or set it to n", param="best_of")
    sampling = _sampling(body)
    sampling.max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if asks_for_echo_alone(body):
        # An engine computes a prompt by computing the token after it, which the answer then leaves out.
        sampling.max_tokens = 1
        sampling.ClearField("min_tokens")
    if body.logprobs is not None:
        sampling.logprobs = body.logprobs
        if body.echo and body.prompt_logprobs is None:
            sampling.prompt_logprobs = body.logprobs
    prompts = _prompts(body)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ApiError(400, f"prompt has {len(prompts)} prompts: give 1 to {MOST_PROMPTS}", param="prompt")
    if len(prompts) > 1 and body.request_id:
        raise ApiError(400, "request_id names one request: give one prompt with it", param="request_id")
    return [_request(body, sampling, **prompt) for prompt in prompts]


def asks_for_echo_alone(body: CompletionBody) -> bool:
    """Whether the answer is to be the prompt and nothing more, as programs that score a text ask."""
    return bool(body.echo) and body.max_tokens == 0


def names_of(body: BaseModel) -> Mapping[str, str | None]:
    """The fields of a GenerateRequest whose names in the body differ -> these names; None for no one field.
    Of the others, the name is the last part of the path."""
    if isinstance(body, DetokenizeBody):
        return {"prompt": "tokens"}
    if isinstance(body, CompletionBody):
        echoed = body.echo and body.prompt_logprobs is None
        own = {"tokens": "prompt"} | ({"sampling.prompt_logprobs": "logprobs"} if echoed else {})
    elif isinstance(body, ChatBody) or body.messages is not None:
        own = {"prompt": "messages", "chat": "messages"}
        own |= {"chat.template_arguments": "chat_template_kwargs", "sampling.logprobs": "top_logprobs"}
        if getattr(body, "max_completion_tokens", None) is not None:
            own["sampling.max_tokens"] = "max_completion_tokens"
    else:
        own = {}
    if isinstance(body, Common):
        given = body.structured_outputs is not None
        own["sampling.structure"] = (
            "structured_outputs" if given else "response_format" if has_structure(body) else "tool_choice"
        )
    return {"sampling": None, **own}


def tokenize_request(body: TokenizeBody) -> api.GenerateRequest:
    """A request with the prompt to tokenize. Raises ApiError."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give one of prompt and messages", param="prompt")
    if body.prompt is not None:
        return api.GenerateRequest(model=body.model, text=body.prompt)
    return api.GenerateRequest(model=body.model, chat=_chat(body, tools=body.tools))


def _shown(body: ChatBody, parsing: Parsing) -> bool:
    """Whether the model is shown the tools."""
    if body.tool_choice == "none":
        return False
    if parsing.tool_format is None and forced_schema(body) is None:
        raise ApiError(
            400,
            "tools: the model's chat template has no known format of tool calls; leave tools out, force a"
            " call by tool_choice, or serve the model with --tool-call-parser",
            param="tools",
        )
    return True


def forced_schema(body: ChatBody) -> dict[str, Any] | None:
    """The JSON schema of an answer that has to be a call; None unless ``tool_choice`` forces one. A named
    function's answer is its arguments, a required call's a list of calls."""
    tools = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in body.tools or ()}
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        if name not in tools:
            raise ApiError(400, f"tool_choice: tools has no function {quoted(name)}", param="tool_choice")
        return tools[name]
    if body.tool_choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in tools.items()
    ]
    most = {"maxItems": 1} if body.parallel_tool_calls is False else {}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}


def _request(body: Common, sampling: api.Sampling, **prompt: Any) -> api.GenerateRequest:
    return api.GenerateRequest(
        model=body.model,
        sampling=sampling,
        cache_salt=body.cache_salt or "",
        request_id=body.request_id or "",
        priority=_signed("priority", body.priority or 0, 32),
        **prompt,
    )


def _sampling(body: Common) -> api.Sampling:
    """The options of both endpoints, without max_tokens and logprobs."""
    sampling = api.Sampling()
    for name in _PASSED_ON:
        value = getattr(body, name)
        if value is not None:
            setattr(sampling, name, value)
    if body.include_stop_str_in_output is not None:
        sampling.include_stop_str = body.include_stop_str_in_output
    if body.n is not None:
        sampling.n = body.n
    if body.top_k is not None:
        # vLLM's -1 means all tokens.
        sampling.top_k = _unsigned("top_k", 0 if body.top_k == -1 else body.top_k, 32)
    if body.seed is not None:
        # OpenAI's seeds are signed; the same bits are another name for the same draws.
        sampling.seed = body.seed % (1 << 64)
    if body.stop is not None:
        sampling.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop)
    sampling.stop_token_ids.extend(body.stop_token_ids or ())
    sampling.allowed_token_ids.extend(body.allowed_token_ids or ())
    sampling.bad_words.extend(body.bad_words or ())
    if body.min_tokens is not None:
        sampling.min_tokens = body.min_tokens
    # vLLM's -1 means as many as the model takes, which is what a prompt may have anyway.
    if body.truncate_prompt_tokens not in (None, -1):
        sampling.truncate_prompt_tokens = _unsigned("truncate_prompt_tokens", body.truncate_prompt_tokens, 32)
    if body.prompt_logprobs is not None:
        if body.stream:
            raise ApiError(
                400, "prompt_logprobs are not sent in streams: leave out stream", param="prompt_logprobs"
            )
        sampling.prompt_logprobs = body.prompt_logprobs
    structure = _structure(body)
    if structure is not None:
        sampling.structure.CopyFrom(structure)
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise ApiError(
                400, f"logit_bias: {quoted(token)} is no token id: use numbers as keys", param="logit_bias"
            )
        sampling.logit_bias[_unsigned("logit_bias", int(token), 32)] = bias
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    return sampling


def has_structure(body: Common) -> bool:
    """Whether the body asks for a structure of the answer, other than a call's."""
    return body.structured_outputs is not None or isinstance(
        body.response_format, ObjectFormat | SchemaFormat
    )


def _structure(body: Common) -> api.Structure | None:
    """The structure that the answer must follow; None for none."""
    given = []
    wanted = body.response_format
    if isinstance(wanted, ObjectFormat):
        given.append(api.Structure(json_schema='{"type": "object"}'))
    elif isinstance(wanted, SchemaFormat):
        given.append(api.Structure(json_schema=json.dumps(wanted.json_schema.of)))
    if (own := body.structured_outputs) is not None:
        if own.json_ is not None:
            schema = own.json_ if isinstance(own.json_, str) else json.dumps(own.json_)
            given.append(api.Structure(json_schema=schema))
        if own.regex is not None:
            given.append(api.Structure(regex=own.regex))
        if own.choice is not None:
            given.append(api.Structure(choice=api.Choices(texts=own.choice)))
        if own.grammar is not None:
            given.append(api.Structure(grammar=own.grammar))
        if not given:
            raise ApiError(
                400, "structured_outputs: give json, regex, choice or grammar", param="structured_outputs"
            )
    if len(given) > 1:
        raise ApiError(
            400,
            "the answer can follow one structure: give response_format or one of structured_outputs",
            param="structured_outputs",
        )
    return given[0] if given else None


def _unsigned(name: str, value: int, bits: int) -> int:
    if not 0 <= value < 1 << bits:
        raise ApiError(400, f"{name} {value}: use 0 to {(1 << bits) - 1}", param=name)
    return value


def _signed(name: str, value: int, bits: int) -> int:
    most = 1 << (bits - 1)
    if not -most <= value < most:
        raise ApiError(400, f"{name} {value}: use {-most} to {most - 1}", param=name)
    return value


def _prompts(body: CompletionBody) -> list[dict[str, Any]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [{"text": prompt}]
    if prompt and isinstance(prompt[0], int):
        return [{"tokens": api.TokenIds(ids=prompt)}]
    return [{"text": one} if isinstance(one, str) else {"tokens": api.TokenIds(ids=one)} for one in prompt]


def _chat(body: ChatBody | TokenizeBody, *, tools: list[Any] | None) -> api.Chat:
    chat = api.Chat(
        messages=[_message(message) for message in body.messages or ()],
        tools=[json.dumps(tool.model_dump(exclude_none=True)) for tool in tools or ()],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )
    if body.chat_template_kwargs:
        chat.template_arguments = json.dumps(body.chat_template_kwargs)
    return chat


def _message(message: ChatMessage) -> api.Message:
    translated = api.Message(
        role=message.role,
        name=message.name or "",
        tool_call_id=message.tool_call_id or "",
        reasoning_content=message.reasoning_content,
        tool_calls=[
            api.ToolCall(id=call.id or "", name=call.function.name, arguments=_text(call.function.arguments))
            for call in message.tool_calls or ()
        ],
    )
    if isinstance(message.content, str):
        translated.content = message.content
    elif message.content is not None:
        translated.text_parts.extend(part.text for part in message.content)
    return translated


def _text(arguments: str | Mapping[str, Any] | None) -> str:
    if arguments is None or isinstance(arguments, str):
        return arguments or ""
    return json.dumps(arguments)
