"""Completes a request's sampling parameters by the model's defaults, and checks them, before the request
reaches an engine.

Called by ``intake`` and ``validate``. Each refusal names the value, the limit and the fix. Must not know
about prompts.
"""

from collections.abc import Iterable

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.gateway.requests import structure
from farshore.models.config.generation import GenerationDefaults
from farshore.proto import inference_pb2 as api
from farshore.sampling import BIASES, RANGES, WARM, Sampling

_NEUTRAL = Sampling()


_COMPLETED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The options, besides max_tokens, for which a model's files may name a default."""


def complete(sampling: api.Sampling, generation: GenerationDefaults, *, temperature: float) -> None:
    """Sets what a request leaves unset to what the model's files name, and else to the value that changes
    nothing. ``temperature``: where neither names one; faces of the API differ in it."""
    for name in _COMPLETED:
        if not sampling.HasField(name):
            named = getattr(generation, name)
            neutral = temperature if name == "temperature" else getattr(_NEUTRAL, name)
            setattr(sampling, name, neutral if named is None else named)


def default_tokens(generation: GenerationDefaults, limits: Limits, *, positions: int, fill: bool) -> int:
    """``max_tokens`` of a request without. ``positions``: the model's. ``fill``: all of them, unless the
    model's files name a number."""
    return min(positions, generation.max_tokens or (positions if fill else limits.default_max_tokens))


def in_effect(generation: GenerationDefaults, limits: Limits, *, positions: int) -> api.Sampling:
    """The values that the unset options of a request over gRPC get."""
    shown = api.Sampling(
        max_tokens=default_tokens(generation, limits, positions=positions, fill=False),
        presence_penalty=_NEUTRAL.presence_penalty,
        frequency_penalty=_NEUTRAL.frequency_penalty,
        n=_NEUTRAL.n,
        skip_special_tokens=_NEUTRAL.skip_special_tokens,
    )
    complete(shown, generation, temperature=_NEUTRAL.temperature)
    return shown


def check(sampling: api.Sampling, *, vocab: int, limits: Limits) -> None:
    """Raises InvalidRequest for the first parameter that is out of range. ``vocab``: token ids of the
    model."""
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidRequest(
            "max_tokens is 0: ask for at least 1, or leave it unset", field="sampling.max_tokens"
        )
    for name, allowed in RANGES.items():
        if sampling.HasField(name) and not allowed.has(value := getattr(sampling, name)):
            raise InvalidRequest(f"{name} {value:g}: use a number {allowed.words}", field=f"sampling.{name}")
    if sampling.temperature and not WARM.has(sampling.temperature):
        raise InvalidRequest(
            f"temperature {sampling.temperature:g}: use {WARM.words}", field="sampling.temperature"
        )
    most = min(limits.logprobs, vocab)
    for name in ("logprobs", "prompt_logprobs"):
        if (asked := getattr(sampling, name)) > most:
            raise InvalidRequest(
                f"{name} {asked}: ask for at most {most} alternatives a token", field=f"sampling.{name}"
            )
    _check_choices(sampling, limits)
    _check_bias(sampling, vocab, limits)
    _check_stops(sampling, vocab, limits)
    _check_restrictions(sampling, vocab, limits)
    structure.check(sampling, limits)


def _check_choices(sampling: api.Sampling, limits: Limits) -> None:
    if not sampling.HasField("n"):
        return
    if not 1 <= sampling.n <= limits.choices:
        raise InvalidRequest(f"n {sampling.n}: ask for 1 to {limits.choices} choices", field="sampling.n")
    if sampling.n > 1 and not sampling.temperature:
        raise InvalidRequest(
            f"n {sampling.n} with temperature 0 would give {sampling.n} times the same answer: "
            "set a temperature above 0, or n 1",
            field="sampling.n",
        )


def _check_bias(sampling: api.Sampling, vocab: int, limits: Limits) -> None:
    if len(sampling.logit_bias) > limits.logit_biases:
        raise InvalidRequest(
            f"logit_bias has {len(sampling.logit_bias)} entries; give at most {limits.logit_biases}",
            field="sampling.logit_bias",
        )
    _check_ids("logit_bias", sampling.logit_bias, vocab)
    for token, bias in sampling.logit_bias.items():
        if not BIASES.has(bias):
            raise InvalidRequest(
                f"logit_bias {bias:g} of token {token}: use a number {BIASES.words}",
                field="sampling.logit_bias",
            )


def _check_stops(sampling: api.Sampling, vocab: int, limits: Limits) -> None:
    if len(sampling.stop) > limits.stops:
        raise InvalidRequest(
            f"stop has {len(sampling.stop)} strings; give at most {limits.stops}", field="sampling.stop"
        )
    for place, stop in enumerate(sampling.stop):
        if not 1 <= len(stop) <= limits.stop_chars:
            raise InvalidRequest(
                f"stop string {place} has {len(stop)} characters; give it 1 to {limits.stop_chars}",
                field="sampling.stop",
            )
    if len(sampling.stop_token_ids) > limits.stop_token_ids:
        raise InvalidRequest(
            f"stop_token_ids has {len(sampling.stop_token_ids)} ids; give at most {limits.stop_token_ids}",
            field="sampling.stop_token_ids",
        )
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab)


def _check_restrictions(sampling: api.Sampling, vocab: int, limits: Limits) -> None:
    if sampling.HasField("max_tokens") and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}: lower it",
            field="sampling.min_tokens",
        )
    if sampling.HasField("truncate_prompt_tokens") and not sampling.truncate_prompt_tokens:
        raise InvalidRequest(
            "truncate_prompt_tokens is 0: keep at least 1, or leave it unset",
            field="sampling.truncate_prompt_tokens",
        )
    if len(sampling.allowed_token_ids) > limits.allowed_token_ids:
        raise InvalidRequest(
            f"allowed_token_ids has {len(sampling.allowed_token_ids)} ids; give at most"
            f" {limits.allowed_token_ids}",
            field="sampling.allowed_token_ids",
        )
    _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab)
    if len(sampling.bad_words) > limits.bad_words:
        raise InvalidRequest(
            f"bad_words has {len(sampling.bad_words)} texts; give at most {limits.bad_words}",
            field="sampling.bad_words",
        )
    for place, word in enumerate(sampling.bad_words):
        if not 1 <= len(word) <= limits.bad_word_chars:
            raise InvalidRequest(
                f"bad word {place} has {len(word)} characters; give it 1 to {limits.bad_word_chars}",
                field="sampling.bad_words",
            )


def _check_ids(name: str, ids: Iterable[int], vocab: int) -> None:
    for token in ids:
        if token >= vocab:
            raise InvalidRequest(
                f"{name}: token id {token} is outside the vocabulary: use 0 to {vocab - 1}",
                field=f"sampling.{name}",
            )
