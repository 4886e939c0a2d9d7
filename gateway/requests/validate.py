"""Validates and tokenizes a client's request: makes the job that an engine runs, or raises InvalidRequest.

Called by ``intake`` for each new request, so that requests are refused before an engine allocates
memory; only the pool's size is checked by the engine. Each refusal names the limit and the fix. Must not know
about gRPC calls, and must never log a prompt.
"""

import hashlib
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from farshore.errors import InvalidRequest, ModelError
from farshore.gateway.limits import Limits
from farshore.gateway.requests import chat, structure
from farshore.gateway.requests import sampling as sampling_limits
from farshore.gateway.served import Served
from farshore.ids import FIRST_EPOCH
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import inference_pb2 as api
from farshore.text import quoted

PREFIX_TOKENS = 256
"""Tokens of the prompt's beginning by which an engine is chosen: a block, the least that is found again."""
_APPLIED_HERE = (
    "stop",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str",
    "structure",
    "bad_words",
    "truncate_prompt_tokens",
)
"""Options of sampling that the gateway applies or translates: the engine does not get them."""

_CHUNK = 1 << 14
"""Ids handled in one native call: other threads get the interpreter's lock between two calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A validated request.

    ``stop_token_ids``: the client's, and the model's unless ``ignore_eos`` is set. ``prompt_end``: the last
    ids of the prompt that have text, from ``Tokenizer.prompt_end``; ``prompt_end_text``: their text.
    ``shows_special_tokens``, ``includes_stop``: how the answer's text is made. ``message``: the
    serialised SequenceRequest for the engine, with the prompt. A list of the prompt's ids would take ten
    times the memory, and serialising it would block the event loop.
    """

    prompt_tokens: int
    prompt_end: tuple[int, ...]
    prompt_end_text: str
    shows_special_tokens: bool
    includes_stop: bool
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    seed: int
    message: bytes
    prefix_key: int | None = None
    """64 bits of a hash of the prompt's first PREFIX_TOKENS and of its salt; None if it has fewer."""


def has_prompt(request: api.GenerateRequest) -> bool:
    """Whether the call can start a request; without a prompt it can only reconnect to one."""
    return request.WhichOneof("prompt") is not None


def check_cheap(request: api.GenerateRequest, served: Served, limits: Limits, *, default_tokens: int) -> None:
    """The checks that need no tokenizing. ``default_tokens``: of a request without max_tokens. Raises
    InvalidRequest, or ModelError for an unknown model."""
    check_model(request.model, served)
    sampling_limits.check(request.sampling, vocab=served.config.vocab, limits=limits)
    most = limits.request_values_for(served.config.max_positions)
    if (asked := values(request.sampling, default_tokens=default_tokens)) > most:
        raise InvalidRequest(
            f"n * max_tokens * (1 + logprobs) is {asked}: a request may ask for at most {most} tokens and "
            "alternatives together; lower one of the three",
            field="sampling.max_tokens",
        )
    _check_salt(request.cache_salt, limits)
    _check_prompt(request, served, limits)


def check_request_id(request: api.GenerateRequest, limits: Limits) -> None:
    """Raises InvalidRequest if the id is too long."""
    if len(request.request_id) > limits.request_id_chars:
        raise InvalidRequest(
            f"request_id has {len(request.request_id)} characters; use at most {limits.request_id_chars}",
            field="request_id",
        )


def values(sampling: api.Sampling, *, default_tokens: int) -> int:
    """Tokens and alternatives that a request may produce: the size of its events in the request log.
    ``default_tokens``: of a request without max_tokens."""
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else default_tokens
    return (sampling.n or 1) * max_tokens * (1 + sampling.logprobs)


def kept_values(sampling: api.Sampling, limits: Limits, *, default_tokens: int) -> int:
    """As :func:`values`, with the most that a prompt's log-probabilities may be: its tokens are not counted
    yet."""
    of_prompt = limits.prompt_values if sampling.HasField("prompt_logprobs") else 0
    return values(sampling, default_tokens=default_tokens) + of_prompt


def prepare(
    request: api.GenerateRequest,
    served: Served,
    limits: Limits,
    *,
    sequence_id: str,
    default_tokens: int,
    fill: bool = False,
) -> Job:
    """Tokenizes the prompt, checks lengths and makes the job. Slow for long prompts: call it in a thread. It
    never holds the interpreter's lock for long. ``default_tokens``: of a request without max_tokens, lowered
    to the positions that are left. ``fill``: the engine may lower it further. Raises InvalidRequest."""
    asked = request.sampling
    message = cluster.SequenceRequest(sequence_id=sequence_id, epoch=FIRST_EPOCH)
    ids = _ids(request, served, limits)
    if asked.truncate_prompt_tokens:
        ids = ids[-asked.truncate_prompt_tokens :]
    for first in range(0, len(ids), _CHUNK):
        message.prompt.extend(ids[first : first + _CHUNK])
    if not message.prompt:
        raise InvalidRequest("the prompt is empty: send at least one token", field="prompt")
    count = len(message.prompt)
    _check_prompt_values(count, asked, limits)
    sampling = message.sampling
    sampling.CopyFrom(asked)
    sampling.max_tokens = _max_tokens(count, asked, served, default_tokens)
    sampling.n = asked.n or 1
    if not asked.HasField("seed"):
        sampling.seed = secrets.randbits(64)
    for name in _APPLIED_HERE:
        sampling.ClearField(name)
    sampling.ClearField("stop_token_ids")
    own_stops = () if asked.ignore_eos else served.stop_ids
    sampling.stop_token_ids.extend(dict.fromkeys((*own_stops, *asked.stop_token_ids)))
    message.cache_salt = request.cache_salt
    message.fill = fill
    message.priority = request.priority
    message.grammar = structure.grammar_of(asked.structure)
    message.bad_words.extend(api.TokenIds(ids=word) for word in _bad_words(asked, served))
    prompt_end = served.tokenizer.prompt_end(message.prompt)
    return Job(
        prompt_tokens=count,
        prompt_end=prompt_end,
        prompt_end_text=served.tokenizer.decode(prompt_end),
        shows_special_tokens=asked.HasField("skip_special_tokens") and not asked.skip_special_tokens,
        includes_stop=asked.include_stop_str,
        n=sampling.n,
        stop=tuple(asked.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        seed=sampling.seed,
        message=message.SerializeToString(),
        prefix_key=_prefix_key(message.prompt, request.cache_salt),
    )


def _check_prompt_values(prompt_tokens: int, sampling: api.Sampling, limits: Limits) -> None:
    if not sampling.HasField("prompt_logprobs"):
        return
    each = 1 + sampling.prompt_logprobs
    if prompt_tokens * each > limits.prompt_values:
        raise InvalidRequest(
            f"prompt_logprobs {sampling.prompt_logprobs} of a prompt of {prompt_tokens} tokens: with so many "
            f"alternatives a prompt may have at most {limits.prompt_values // each} tokens; ask for fewer "
            "alternatives, or shorten the prompt",
            field="sampling.prompt_logprobs",
        )


def _prefix_key(prompt: Sequence[int], salt: str) -> int | None:
    if len(prompt) < PREFIX_TOKENS:
        return None
    beginning = array("I", prompt[:PREFIX_TOKENS]).tobytes()
    return int.from_bytes(hashlib.blake2b(beginning + salt.encode(), digest_size=8).digest())


def _bad_words(sampling: api.Sampling, served: Served) -> list[list[int]]:
    """The token sequences of the bad words: of each as it is, and within a text, as vLLM does."""
    encode = served.tokenizer.encode
    texts = [text for word in sampling.bad_words for text in (word, f" {word.lstrip()}")]
    found = [encode(text, add_special_tokens=False) for text in dict.fromkeys(texts)]
    return [ids for ids in found if ids]


def tokens_of(
    request: api.GenerateRequest, served: Served, limits: Limits, *, special: bool
) -> Sequence[int]:
    """The token ids of a prompt that is not to be run. ``special``: add the special tokens that the tokenizer
    puts around a text; a chat's are the template's. Slow for long prompts, as :func:`prepare`. Raises
    InvalidRequest."""
    check_model(request.model, served)
    _check_prompt(request, served, limits)
    return _ids(request, served, limits, special=special)


def text_of(ids: Sequence[int], *, model: str, served: Served) -> str:
    """The text of token ids, without special tokens. Slow for many: call it in a thread. Raises
    InvalidRequest."""
    check_model(model, served)
    check_token_ids(ids, served)
    return served.tokenizer.decode(ids)


def check_model(name: str, served: Served) -> None:
    """Raises ModelError unless ``name`` is a name of the served model, or empty."""
    if name and name not in served.spec.names:
        raise ModelError(f"{unknown_model(name, served)}; leave model empty for it", field="model")


def unknown_model(name: str, served: Served) -> str:
    """Says that no model has this name, and which names there are."""
    return f"unknown model {quoted(name)}: this gateway serves {' and '.join(map(repr, served.spec.names))}"


def _check_salt(salt: str, limits: Limits) -> None:
    if len(salt) > limits.cache_salt_chars:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters: use at most {limits.cache_salt_chars}, or a hash of it",
            field="cache_salt",
        )


def _check_prompt(request: api.GenerateRequest, served: Served, limits: Limits) -> None:
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        if not request.tokens.ids:
            raise InvalidRequest("the prompt is empty: send at least one token id", field="prompt")
    elif kind == "chat":
        _check_chars(chat.checked_chars(request.chat, limits), served, limits)
    elif not request.text:
        raise InvalidRequest("the prompt is empty: give chat messages, text or token ids", field="prompt")
    else:
        _check_chars(len(request.text), served, limits)


def _check_chars(chars: int, served: Served, limits: Limits) -> None:
    most = _most_chars(served, limits)
    if chars > most:
        raise InvalidRequest(
            f"the prompt has {chars} characters; a model of {served.positions} "
            f"takes at most {most}: shorten it",
            field="prompt",
        )


def _most_chars(served: Served, limits: Limits) -> int:
    return served.config.max_positions * limits.chars_per_position


def _ids(
    request: api.GenerateRequest, served: Served, limits: Limits, *, special: bool = True
) -> Sequence[int]:
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        ids: Sequence[int] = request.tokens.ids
    elif kind == "text":
        ids = served.tokenizer.encode(request.text, add_special_tokens=special)
    else:
        ids = served.chat.encode(chat.conversation(request.chat), most_chars=_most_chars(served, limits))
    # A tokenizer may know more tokens than the model, such as one added for padding.
    check_token_ids(ids, served)
    return ids


def check_token_ids(ids: Sequence[int], served: Served) -> None:
    """Raises InvalidRequest for an id that the model does not have."""
    vocab = served.config.vocab
    for first in range(0, len(ids), _CHUNK):
        chunk = ids[first : first + _CHUNK]
        if max(chunk) >= vocab:
            index = next(index for index, token in enumerate(chunk) if token >= vocab)
            raise InvalidRequest(
                f"token id {chunk[index]} at index {first + index} is outside the vocabulary: "
                f"use 0 to {vocab - 1}",
                field="prompt",
            )


def _max_tokens(prompt_tokens: int, sampling: api.Sampling, served: Served, default_tokens: int) -> int:
    max_positions = served.config.max_positions
    left = max_positions - prompt_tokens
    if left < 1:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens and the model {served.positions}: "
            f"shorten the prompt to at most {max_positions - 1} tokens",
            field="prompt",
        )
    if not sampling.HasField("max_tokens"):
        return min(default_tokens, left)
    if sampling.max_tokens > left:
        raise InvalidRequest(
            f"prompt of {prompt_tokens} tokens + max_tokens {sampling.max_tokens} is more than the model's "
            f"{served.positions}: ask for at most {left} tokens, or shorten the prompt",
            field="sampling.max_tokens",
        )
    return sampling.max_tokens
