"""Converts the API's messages to the SDK's values.

Called by ``sdk``. Must not know how messages arrive.
"""

import dataclasses
from typing import Any, TypeVar

from farshore.client import events
from farshore.errors import TransportError
from farshore.proto import inference_pb2 as api

_Value = TypeVar("_Value")


def event_of(event: api.GenerateEvent) -> events.Event:
    """The value of a stream's event. Raises TransportError for one of a newer API."""
    kind = event.WhichOneof("kind")
    if kind == "token":
        token = event.token
        return plain(
            events.Token,
            token,
            logprob=token.logprob if token.HasField("logprob") else None,
            top=tuple(plain(events.Alternative, other) for other in token.top),
        )
    if kind == "prefill":
        return plain(events.Prefill, event.prefill)
    if kind == "accepted":
        return plain(events.Accepted, event.accepted)
    if kind == "prompt_logprobs":
        return events.PromptLogprobs(
            first=event.prompt_logprobs.first,
            tokens=tuple(_prompt_token(token) for token in event.prompt_logprobs.tokens),
        )
    if kind != "finished":
        raise TransportError("the gateway sent an event this client does not know: use the same version")
    done = event.finished
    return events.Finished(
        choices=tuple(plain(events.Completion, choice, reason=_reason(choice)) for choice in done.choices),
        prompt_tokens=done.usage.prompt_tokens,
        completion_tokens=done.usage.completion_tokens,
        cached_tokens=done.usage.cached_tokens,
        queued_ms=done.timings.queued_ms,
        ttft_ms=done.timings.ttft_ms,
        tpot_ms=done.timings.tpot_ms,
        total_ms=done.timings.total_ms,
        shards=tuple(plain(events.ShardUse, shard) for shard in done.shards),
    )


def _prompt_token(token: api.PromptToken) -> events.PromptToken:
    return plain(
        events.PromptToken,
        token,
        logprob=token.logprob if token.HasField("logprob") else None,
        top=tuple(plain(events.Alternative, other) for other in token.top),
    )


def _reason(completion: api.Completion) -> Any:
    """The reason as an ``events.FinishReason``."""
    return api.FinishReason.Name(completion.reason).removeprefix("FINISH_REASON_").lower()


def plain(kind: type[_Value], message: Any, **converted: Any) -> _Value:
    """A dataclass of ``kind``, from the message's fields of the same names and from ``converted``."""
    names = (field.name for field in dataclasses.fields(kind) if field.name not in converted)
    return kind(**{name: getattr(message, name) for name in names}, **converted)
