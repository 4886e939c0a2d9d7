"""The bodies of OpenAI-compatible requests: fields, types, and what is refused.

Read by ``translate``; ``openapi`` publishes the same models. Ranges are checked where all requests are, in
``gateway.requests``. A field that is unknown or unsupported is an error that names it, unless it is null. The
shapes are those of OpenAI's API reference, the additions those of vLLM.

A body is parsed on the event loop, so every list has a bound that is checked before its items are, and its
first wrong item ends the parse: time must not grow with what is refused. The bounds are the defaults of
``Limits``; a gateway's own may be smaller.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from farshore.gateway.limits import Limits

_LIMITS = Limits()

MOST_PROMPTS = 128
"""Prompts of one call to /v1/completions. Each is a request of its own."""

MOST_IDS = _LIMITS.most_message_bytes
"""Token ids of one list: an id takes a byte of a GenerateRequest or more."""


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_ids(value: Any) -> Any:
    """``_whole`` for each id. Ids come by the thousand, and a list of none but ints is left as it is."""
    if isinstance(value, list) and len(value) <= MOST_IDS and float in set(map(type, value)):
        return [_whole(one) for one in value]
    return value


def _few_biases(value: Any) -> Any:
    """Pydantic counts the entries of an object after it has checked them."""
    if isinstance(value, dict) and len(value) > _LIMITS.logit_biases:
        facts = {"given": len(value), "most": _LIMITS.logit_biases}
        raise PydanticCustomError("too_long", "{given} biases were given: use at most {most}", facts)
    return value


def _at_most(items: int) -> Any:
    return Field(max_length=items, fail_fast=True)


UInt = Annotated[int, Field(ge=0, lt=1 << 32, strict=True), BeforeValidator(_whole)]
Int = Annotated[StrictInt, BeforeValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, lt=1 << 32, strict=True)]
IDS = BeforeValidator(_whole_ids)
Ids = Annotated[list[Id], _at_most(MOST_IDS), IDS]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Function(_Body):
    """A function that the model may call. ``parameters``: a JSON schema."""

    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


class CalledFunction(_Body):
    name: StrictStr
    arguments: StrictStr | dict[str, Any] | None = None


class ToolCall(_Body):
    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(_Body):
    type: Literal["text"]
    text: StrictStr


class ChatMessage(_Body):
    role: StrictStr
    content: StrictStr | Annotated[list[TextPart], _at_most(_LIMITS.messages)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], _at_most(_LIMITS.tools)] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    refusal: None = None


Messages = Annotated[list[ChatMessage], _at_most(_LIMITS.messages)]
Tools = Annotated[list[Tool], _at_most(_LIMITS.tools)]


class NamedFunction(_Body):
    name: StrictStr


class NamedTool(_Body):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(_Body):
    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class PlainFormat(_Body):
    type: Literal["text"]


class ObjectFormat(_Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Body):
    model_config = ConfigDict(extra="allow", protected_namespaces=(), populate_by_name=True)

    name: StrictStr | None = None
    description: StrictStr | None = None
    of: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class SchemaFormat(_Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuredOutputs(_Body):
    """vLLM's: give one of them."""

    json_: dict[str, Any] | StrictStr | None = Field(default=None, alias="json")
    regex: StrictStr | None = None
    choice: Annotated[list[StrictStr], _at_most(_LIMITS.structure_chars)] | None = None
    grammar: StrictStr | None = None


class Common(_Body):
    """The fields of both endpoints. ``user``, ``metadata``, ``safety_identifier`` and ``prompt_cache_key``
    name the caller and change no answer; the other fields that only accept their no-op value do likewise."""

    model: StrictStr = ""
    n: UInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stop: StrictStr | Annotated[list[StrictStr], _at_most(_LIMITS.stops)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    seed: Int | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(_few_biases)] | None = None
    user: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    # vLLM's
    top_k: Int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    ignore_eos: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    stop_token_ids: Annotated[list[Id], _at_most(_LIMITS.stop_token_ids), IDS] | None = None
    min_tokens: UInt | None = None
    allowed_token_ids: Annotated[list[Id], _at_most(_LIMITS.allowed_token_ids), IDS] | None = None
    bad_words: Annotated[list[StrictStr], _at_most(_LIMITS.bad_words)] | None = None
    truncate_prompt_tokens: Int | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: (
        Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    prompt_logprobs: UInt | None = None
    return_tokens_as_token_ids: StrictBool | None = None
    priority: Int | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    use_beam_search: Literal[False] | None = None
    cache_salt: StrictStr | None = None
    request_id: StrictStr | None = None


class ChatBody(Common):
    messages: Messages
    max_tokens: UInt | None = None
    max_completion_tokens: UInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: UInt | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    modalities: Annotated[list[Literal["text"]], _at_most(1)] | None = None
    # vLLM's
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Common):
    prompt: (
        StrictStr
        | Annotated[list[StrictStr], _at_most(MOST_PROMPTS)]
        | Ids
        | Annotated[list[Ids], _at_most(MOST_PROMPTS)]
    )
    max_tokens: UInt | None = None
    logprobs: UInt | None = None
    echo: StrictBool | None = None
    best_of: UInt | None = None
    suffix: None = None


class TokenizeBody(_Body):
    """Give ``prompt`` or ``messages``."""

    model: StrictStr = ""
    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(_Body):
    model: StrictStr = ""
    tokens: Ids
