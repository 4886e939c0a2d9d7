"""Makes the SDK's values from the gateway's messages.

Called by ``calls`` and ``resume``, for both clients. Must not know how messages arrive.
"""

import dataclasses
from typing import Any, TypeVar

from farshore.client import events
from farshore.errors import TransportError
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api
from farshore.proto.words import word

_Value = TypeVar("_Value")


def plain(kind: type[_Value], message: Any, /, **converted: Any) -> _Value:
    """A dataclass of ``kind``, from the message's fields of the same names and from ``converted``."""
    names = (field.name for field in dataclasses.fields(kind) if field.name not in converted)  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **converted)


def event(message: api.GenerateEvent) -> events.Event:
    """Raises TransportError for a kind of event that a newer gateway sends."""
    kind = message.WhichOneof("kind")
    if kind == "token":
        token = message.token
        return plain(
            events.Token,
            token,
            logprob=token.logprob if token.HasField("logprob") else None,
            top=tuple(plain(events.Alternative, other) for other in token.top),
        )
    if kind == "prefill":
        return plain(events.Prefill, message.prefill)
    if kind == "accepted":
        return plain(events.Accepted, message.accepted)
    if kind == "prompt_logprobs":
        return events.PromptLogprobs(
            first=message.prompt_logprobs.first,
            tokens=tuple(_prompt_token(token) for token in message.prompt_logprobs.tokens),
        )
    if kind != "finished":
        raise TransportError("the gateway sent an event this client does not know: use the same version")
    done = message.finished
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


def models(message: api.ListModelsResponse) -> tuple[events.Model, ...]:
    return tuple(plain(events.Model, model) for model in message.models)


def status(message: admin.ClusterStatusResponse) -> events.ClusterStatus:
    return plain(
        events.ClusterStatus,
        message,
        workers=tuple(_worker(worker) for worker in message.workers),
        sequences=tuple(
            plain(events.Sequence, sequence, spans=tuple(plain(events.Span, span) for span in sequence.spans))
            for sequence in message.sequences
        ),
    )


def _worker(worker: admin.WorkerStatus) -> events.Worker:
    return plain(
        events.Worker,
        worker,
        kind=word(admin.WorkerKind, worker.kind),
        state=word(admin.WorkerState, worker.state),
        links=tuple(plain(events.Link, link) for link in worker.links),
    )


def _reason(completion: api.Completion) -> Any:
    """The reason as an ``events.FinishReason``."""
    return word(api.FinishReason, completion.reason)
