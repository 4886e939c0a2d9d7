"""The bodies of OpenAI-compatible requests: fields, types, and what is refused.

Read by ``translate``; ``openapi`` publishes the same models. Ranges are checked where all requests are, in
``gateway.requests``. A field that is unknown or unsupported is an error that names it, unless it is null. The
shapes are those of OpenAI's API reference, the additions those of vLLM.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


UInt = Annotated[int, Field(ge=0, lt=1 << 32, strict=True), BeforeValidator(_whole)]
Int = Annotated[StrictInt, BeforeValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]


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
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    refusal: None = None


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
    choice: list[StrictStr] | None = None
    grammar: StrictStr | None = None


class Common(_Body):
    """The fields of both endpoints. ``user``, ``metadata``, ``safety_identifier`` and ``prompt_cache_key``
    name the caller and change no answer; the other fields that only accept their no-op value do likewise."""

    model: StrictStr = ""
    n: UInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    seed: Int | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
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
    stop_token_ids: list[UInt] | None = None
    min_tokens: UInt | None = None
    allowed_token_ids: list[UInt] | None = None
    bad_words: list[StrictStr] | None = None
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
    messages: list[ChatMessage]
    max_tokens: UInt | None = None
    max_completion_tokens: UInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: UInt | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    modalities: list[Literal["text"]] | None = None
    # vLLM's
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Common):
    prompt: StrictStr | list[StrictStr] | list[UInt] | list[list[UInt]]
    max_tokens: UInt | None = None
    logprobs: UInt | None = None
    echo: StrictBool | None = None
    best_of: UInt | None = None
    suffix: None = None


class TokenizeBody(_Body):
    """Give ``prompt`` or ``messages``."""

    model: StrictStr = ""
    prompt: StrictStr | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(_Body):
    model: StrictStr = ""
    tokens: list[UInt]
