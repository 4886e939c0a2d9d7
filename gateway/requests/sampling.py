"""Checks a request's sampling parameters before the request reaches an engine.

Called by ``validate``. Each refusal names the value, the limit and the fix. Must not know about prompts.
"""

from collections.abc import Iterable

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api

_UP_TO_2 = (-2.0, 2.0, "a number from -2 to 2")
# NaN is in no range: it compares false with everything.
_RANGES = {
    "temperature": (0.0, 2.0, "a number from 0 (greedy) to 2"),
    "min_p": (0.0, 1.0, "a number from 0 (off) to 1"),
    "presence_penalty": _UP_TO_2,
    "frequency_penalty": _UP_TO_2,
}
# transformers and vLLM accept any number above 0; with numbers far from 1, logits exceed the range of
# float32.
_REPETITION = (0.01, 100.0)
# Logits divided by a lower temperature may exceed the range of float32, too.
_LEAST_TEMPERATURE = 1e-6
_ROUNDED = 1e-6  # relative tolerance: 0.01 arrives as a float32 slightly below 0.01
_MOST_BIAS = 100.0


def check(sampling: api.Sampling, *, vocab: int, limits: Limits) -> None:
    """Raises InvalidRequest for the first parameter that is out of range. ``vocab``: token ids of the
    model."""
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidRequest("max_tokens is 0: ask for at least 1, or leave it unset")
    for name, (low, high, fix) in _RANGES.items():
        value = getattr(sampling, name)
        if not low <= value <= high:
            raise InvalidRequest(f"{name} {value:g}: use {fix}")
    if 0 < sampling.temperature < _LEAST_TEMPERATURE * (1 - _ROUNDED):
        raise InvalidRequest(
            f"temperature {sampling.temperature:g}: use 0 (greedy), or {_LEAST_TEMPERATURE:g} to 2"
        )
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"top_p {sampling.top_p:g}: use a number above 0, up to 1")
    low, high = _REPETITION
    if sampling.HasField("repetition_penalty") and not (
        low * (1 - _ROUNDED) <= sampling.repetition_penalty <= high
    ):
        raise InvalidRequest(
            f"repetition_penalty {sampling.repetition_penalty:g}: use a number from {low:g} to {high:g}; "
            "1 is none"
        )
    most = min(limits.logprobs, vocab)
    if sampling.logprobs > most:
        raise InvalidRequest(f"logprobs {sampling.logprobs}: ask for at most {most} alternatives a token")
    _check_choices(sampling, limits)
    _check_bias(sampling, vocab, limits)
    _check_stops(sampling, vocab, limits)


def _check_choices(sampling: api.Sampling, limits: Limits) -> None:
    if not sampling.HasField("n"):
        return
    if not 1 <= sampling.n <= limits.choices:
        raise InvalidRequest(f"n {sampling.n}: ask for 1 to {limits.choices} choices")
    if sampling.n > 1 and not sampling.temperature:
        raise InvalidRequest(
            f"n {sampling.n} with temperature 0 would give {sampling.n} times the same answer: "
            "set a temperature above 0, or n 1"
        )


def _check_bias(sampling: api.Sampling, vocab: int, limits: Limits) -> None:
    if len(sampling.logit_bias) > limits.logit_biases:
        raise InvalidRequest(
            f"logit_bias has {len(sampling.logit_bias)} entries; give at most {limits.logit_biases}"
        )
    _check_ids("logit_bias", sampling.logit_bias, vocab)
    for token, bias in sampling.logit_bias.items():
        if not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise InvalidRequest(
                f"logit_bias {bias:g} of token {token}: use a number from {-_MOST_BIAS:g} to {_MOST_BIAS:g}"
            )


def _check_stops(sampling: api.Sampling, vocab: int, limits: Limits) -> None:
    if len(sampling.stop) > limits.stops:
        raise InvalidRequest(f"stop has {len(sampling.stop)} strings; give at most {limits.stops}")
    for place, stop in enumerate(sampling.stop):
        if not 1 <= len(stop) <= limits.stop_chars:
            raise InvalidRequest(
                f"stop string {place} has {len(stop)} characters; give it 1 to {limits.stop_chars}"
            )
    if len(sampling.stop_token_ids) > limits.stop_token_ids:
        raise InvalidRequest(
            f"stop_token_ids has {len(sampling.stop_token_ids)} ids; give at most {limits.stop_token_ids}"
        )
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab)


def _check_ids(name: str, ids: Iterable[int], vocab: int) -> None:
    for token in ids:
        if token >= vocab:
            raise InvalidRequest(f"{name}: token id {token} is outside the vocabulary: use 0 to {vocab - 1}")
