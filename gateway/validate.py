"""From what a client sent to what an engine runs, or an error that names the limit and the fix.

Called by ``service`` for every new request. Everything is checked here, before an engine takes memory; only
the size of the pool is the engine's to judge. Must not know about gRPC calls, and must never log a prompt.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farshore.errors import InvalidRequest, ModelError
from farshore.gateway import sampling as sampling_limits
from farshore.gateway.limits import Limits
from farshore.gateway.served import Served
from farshore.proto import inference_pb2 as api


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked request. ``stop_token_ids``: the client's, and the model's own unless it wants to go on."""

    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    cache_salt: str


def has_prompt(request: api.GenerateRequest) -> bool:
    return request.WhichOneof("prompt") is not None


def fingerprint(request: api.GenerateRequest) -> bytes:
    """Equal for requests that ask for the same thing: same prompt as written, same sampling."""
    asked = api.GenerateRequest()
    asked.CopyFrom(request)
    for reader_field in ("model", "request_id", "resume_from"):
        asked.ClearField(reader_field)
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()


def check_cheap(request: api.GenerateRequest, served: Served, limits: Limits) -> None:
    """All that can be refused without tokenizing. Raises InvalidRequest."""
    _check_model(request.model, served)
    sampling_limits.check(request.sampling, vocab=served.config.vocab, limits=limits)
    _check_salt(request.cache_salt, limits)
    _check_prompt(request, served, limits)


def check_request_id(request: api.GenerateRequest, limits: Limits) -> None:
    if len(request.request_id) > limits.request_id_chars:
        raise InvalidRequest(
            f"request_id has {len(request.request_id)} characters; use at most {limits.request_id_chars}"
        )
    if request.resume_from and not request.request_id:
        raise InvalidRequest("resume_from needs the request_id of the request to go on with")


def prepare(request: api.GenerateRequest, served: Served, limits: Limits) -> Job:
    """Tokenize and check lengths: slow for long prompts, so callers run it in a thread."""
    prompt = _token_ids(request, served)
    if not prompt:
        raise InvalidRequest("the prompt is empty: send at least one token")
    asked = request.sampling
    own_stops = () if asked.ignore_eos else served.stop_ids
    return Job(
        prompt=tuple(prompt),
        max_tokens=_max_tokens(len(prompt), asked, served.config.max_positions, limits),
        # Of an unset field the value is 0: the default of all but these.
        n=asked.n or 1,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p if asked.HasField("top_p") else 1.0,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else 1.0,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=dict(asked.logit_bias),
        logprobs=asked.logprobs if asked.HasField("logprobs") else None,
        seed=asked.seed if asked.HasField("seed") else secrets.randbits(64),
        stop=tuple(asked.stop),
        stop_token_ids=tuple(dict.fromkeys((*own_stops, *asked.stop_token_ids))),
        cache_salt=request.cache_salt,
    )


def _check_model(name: str, served: Served) -> None:
    if name and name not in (served.name, served.alias):
        raise ModelError(
            f"unknown model {name!r}: this gateway serves {served.name!r}; leave model empty for it"
        )


def _check_salt(salt: str, limits: Limits) -> None:
    if len(salt) > limits.cache_salt_chars:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters: use at most {limits.cache_salt_chars}, or a hash of it"
        )


def _check_prompt(request: api.GenerateRequest, served: Served, limits: Limits) -> None:
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        _check_token_ids(request.tokens.ids, served)
        return
    if kind == "chat":
        _check_chat(request.chat)
        chars = sum(len(message.content) for message in request.chat.messages)
    else:
        chars = len(request.text)
        if not chars:
            raise InvalidRequest("the prompt is empty: give chat messages, text or token ids")
    most = served.config.max_positions * limits.chars_per_position
    if chars > most:
        raise InvalidRequest(
            f"the prompt has {chars} characters; a model of {served.config.max_positions} positions "
            f"takes at most {most}: shorten it"
        )


def _check_chat(chat: api.Chat) -> None:
    if not any(message.content for message in chat.messages):
        raise InvalidRequest("the prompt is empty: give at least one message with content")
    for place, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequest(f"message {place} has no role: use 'system', 'user' or 'assistant'")


def _check_token_ids(ids: Sequence[int], served: Served) -> None:
    if not ids:
        raise InvalidRequest("the prompt is empty: send at least one token id")
    vocab = served.config.vocab
    if max(ids) >= vocab:
        place = next(place for place, token in enumerate(ids) if token >= vocab)
        raise InvalidRequest(
            f"token id {ids[place]} at index {place} is outside the vocabulary: use 0 to {vocab - 1}"
        )


def _token_ids(request: api.GenerateRequest, served: Served) -> list[int]:
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        return list(request.tokens.ids)
    if kind == "text":
        return served.tokenizer.encode(request.text)
    return served.tokenizer.encode_chat(
        [{"role": message.role, "content": message.content} for message in request.chat.messages]
    )


def _max_tokens(prompt_tokens: int, sampling: api.Sampling, max_positions: int, limits: Limits) -> int:
    left = max_positions - prompt_tokens
    if left < 1:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens and the model {max_positions} positions: "
            f"shorten the prompt to at most {max_positions - 1} tokens"
        )
    if not sampling.HasField("max_tokens"):
        return min(limits.default_max_tokens, left)
    if sampling.max_tokens > left:
        raise InvalidRequest(
            f"prompt of {prompt_tokens} tokens + max_tokens {sampling.max_tokens} is more than the model's "
            f"{max_positions} positions: ask for at most {left} tokens, or shorten the prompt"
        )
    return sampling.max_tokens
