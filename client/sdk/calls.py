"""The gateway's calls as values: which method, with what message, and what its reply means.

Called by both clients, which differ in how they make a call and not in what they ask. Must not know gRPC's
channels.
"""

import dataclasses
import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from farshore.client import events
from farshore.client.chat import as_json, chat_of
from farshore.client.sdk import replies
from farshore.client.sdk.gateways import Gateway
from farshore.errors import DeadlineExceeded, FarshoreError, InvalidRequest, TransportError
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling

_Value = TypeVar("_Value")

_SAMPLING = {option.name for option in dataclasses.fields(Sampling)}

_SILENT = (TransportError, DeadlineExceeded)
"""A gateway that fails so may be passed over: it, or the cluster's part that the call needs, is not
reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[_Value]):
    """A unary call. ``method`` finds it among a gateway's stubs, ``read`` makes the value of its reply.
    ``passes``: errors after which the next gateway is asked."""

    method: Callable[[Gateway], Callable[..., Any]]
    request: Message
    read: Callable[[Any], _Value]
    passes: tuple[type[FarshoreError], ...] = _SILENT


def generate(
    prompt: str | None,
    messages: Iterable[Mapping[str, Any]] | None,
    token_ids: Iterable[int] | None,
    *,
    chat: Mapping[str, Any],
    sampling: Mapping[str, Any],
    structure: Mapping[str, Any],
    **fields: Any,
) -> api.GenerateRequest:
    """See ``Client.generate``. ``chat``: options of messages. ``structure``: of the text. ``fields``: of the
    message. The request gets an id if it has none, so that it can be resumed; and a seed that follows from
    the id, so that every gateway gives the same answer, also to a caller that sends the same request
    again."""
    if unknown := sampling.keys() - _SAMPLING:
        raise TypeError(f"generate() has no option {', '.join(sorted(unknown))}")
    given = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    request = _message(
        lambda: api.GenerateRequest(
            sampling=api.Sampling(structure=_structure(**structure), **given),
            **_prompt(prompt, messages, token_ids, **chat),
            **fields,
        )
    )
    if request.WhichOneof("prompt") is not None:
        request.request_id = request.request_id or secrets.token_hex(16)
        if not request.sampling.HasField("seed"):
            digest = hashlib.sha256(request.request_id.encode()).digest()
            request.sampling.seed = int.from_bytes(digest[:8]) >> 1
    return request


def tokenize(
    prompt: str | None,
    messages: Iterable[Mapping[str, Any]] | None,
    *,
    model: str,
    add_special_tokens: bool,
    chat: Mapping[str, Any],
) -> Call[list[int]]:
    request = _message(
        lambda: api.TokenizeRequest(
            model=model, add_special_tokens=add_special_tokens, **_prompt(prompt, messages, None, **chat)
        )
    )
    return Call(
        method=lambda gateway: gateway.inference.Tokenize, request=request, read=lambda reply: list(reply.ids)
    )


def detokenize(token_ids: Iterable[int], *, model: str) -> Call[str]:
    request = _message(lambda: api.DetokenizeRequest(model=model, ids=token_ids))
    return Call(
        method=lambda gateway: gateway.inference.Detokenize, request=request, read=lambda reply: reply.text
    )


def models() -> Call[tuple[events.Model, ...]]:
    return Call(
        method=lambda gateway: gateway.inference.ListModels,
        request=api.ListModelsRequest(),
        read=replies.models,
    )


def model(name: str) -> Call[events.Model]:
    return Call(
        method=lambda gateway: gateway.inference.GetModel,
        request=_message(lambda: api.GetModelRequest(name=name)),
        read=lambda reply: replies.plain(events.Model, reply),
    )


def cancel(request_id: str) -> Call[None]:
    """Any gateway may run the request, so all are asked until one does."""
    return Call(
        method=lambda gateway: gateway.inference.Cancel,
        request=_message(lambda: api.CancelRequest(request_id=request_id)),
        read=lambda reply: None,
        passes=(FarshoreError,),
    )


def status() -> Call[events.ClusterStatus]:
    return Call(
        method=lambda gateway: gateway.operators.ClusterStatus,
        request=admin.ClusterStatusRequest(),
        read=replies.status,
    )


def scale(*, dense: int | None, attention: int | None) -> Call[dict[str, int]]:
    return Call(
        method=lambda gateway: gateway.operators.Scale,
        request=_message(lambda: admin.ScaleRequest(dense_workers=dense, attention_workers=attention)),
        read=lambda reply: {"dense": reply.dense_workers, "attention": reply.attention_workers},
    )


def drain(worker: str, *, timeout_s: float | None) -> Call[str]:
    return Call(
        method=lambda gateway: gateway.operators.Drain,
        request=_message(lambda: admin.DrainRequest(worker_id=worker, timeout_s=timeout_s)),
        read=lambda reply: reply.worker_id,
    )


def down() -> Call[None]:
    return Call(
        method=lambda gateway: gateway.operators.Down, request=admin.DownRequest(), read=lambda reply: None
    )


def _message(make: Callable[[], _Value]) -> _Value:
    try:
        return make()
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"a value does not fit the request: {error}") from error


def _structure(
    json_schema: Mapping[str, Any] | str | None,
    regex: str | None,
    choice: Iterable[str] | None,
    grammar: str | None,
) -> api.Structure | None:
    given = {"json_schema": json_schema, "regex": regex, "choice": choice, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InvalidRequest(f"{' and '.join(names)} were given: a text can follow one of them")
    if json_schema is not None:
        return api.Structure(json_schema=as_json(json_schema))
    if choice is not None:
        if isinstance(choice, str):
            raise InvalidRequest("choice is a text: give a list of the texts to choose from")
        return api.Structure(choice=api.Choices(texts=choice))
    return api.Structure(regex=regex, grammar=grammar) if names else None


def _prompt(
    prompt: str | None,
    messages: Iterable[Mapping[str, Any]] | None,
    token_ids: Iterable[int] | None,
    **chat: Any,
) -> dict[str, Any]:
    given = [
        name
        for name, value in (("prompt", prompt), ("messages", messages), ("token_ids", token_ids))
        if value is not None
    ]
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} were given: give one of prompt, messages and token_ids")
    if messages is not None:
        return {"chat": chat_of(messages, **chat)}
    if unused := sorted(name for name, value in chat.items() if value):
        raise InvalidRequest(f"{' and '.join(unused)} can only be given with messages")
    if prompt is not None:
        return {"text": prompt}
    if token_ids is not None:
        return {"tokens": api.TokenIds(ids=token_ids)}
    return {}
