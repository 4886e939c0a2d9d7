"""The Python client: a gateway's API as plain calls and values.

Used by programs and by the command line. Raises the errors of ``farshore.errors``, never gRPC's. Must not
know what runs behind the gateways.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from farshore.client import events
from farshore.client.chat import chat_of
from farshore.client.converted import event_of, plain
from farshore.client.gateways import Gateway, Gateways
from farshore.errors import DeadlineExceeded, FarshoreError, InvalidRequest, NotFound, TransportError
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling

_Value = TypeVar("_Value")

_SAMPLING = {option.name for option in dataclasses.fields(Sampling)}


class Client:
    """A connection to the gateways of one cluster; a context manager. Thread-safe.

    Calls go to the gateway that answered last. If it is not reached, or reports that the cluster's part which
    the call needs is not, the other gateways are asked in turn; the last error is raised if all fail.
    """

    def __init__(self, address: str | Iterable[str], *, timeout_s: float = 10.0) -> None:
        """``address``: HOST:PORT, or several: a list, or one string with commas between them. ``timeout_s``:
        deadline of each call except ``generate``, at each gateway. Connects with the first call: directly to
        a gateway on this machine, else through the proxy that the environment variables ``http_proxy`` and
        ``no_proxy`` configure. Raises InvalidRequest if there is no address."""
        self._gateways = Gateways(address)
        self._timeout_s = timeout_s

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of all gateways, as they were given."""
        return self._gateways.addresses

    @property
    def address(self) -> str:
        """The address of the gateway that answered last; the first one until one has."""
        return self._gateways.preferred.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections, which ends the streams that are being read."""
        self._gateways.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Mapping[str, Any]] | None = None,
        token_ids: Iterable[int] | None = None,
        tools: Iterable[Mapping[str, Any] | str] | None = None,
        template_arguments: Mapping[str, Any] | str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        model: str = "",
        cache_salt: str = "",
        priority: int = 0,
        request_id: str = "",
        resume_from: int = 0,
        deadline_s: float = 86_400.0,
        **sampling: Any,
    ) -> Iterator[events.Event]:
        """Streams a completion: Accepted, Prefill (not always), PromptLogprobs (if asked for), Tokens,
        Finished.

        Give one of ``prompt`` (text, used as it is), ``messages`` (a chat) and ``token_ids``. Or give none of
        them but the ``request_id`` of an earlier call, to resume that request from token ``resume_from``,
        counted over all choices. Closing the iterator ends the request: at once if it has no ``request_id``
        of yours, else within seconds. ``deadline_s``: the deadline of the whole call.

        With several gateways, a request whose gateway or engine is lost before its first token goes to the
        next gateway, and Accepted comes again. After its first token it fails with a TransportError, which
        is retryable: send the request again.

        ``messages`` are formatted by the model's chat template, which rules the roles. Each is in OpenAI's
        shape: role, content (a string, or parts of the type text), tool_calls, tool_call_id, name,
        reasoning_content. With them may come ``tools`` (JSON objects, or their texts), ``template_arguments``
        (variables of the template, such as ``{"enable_thinking": False}``), ``continue_final_message`` (the
        answer goes on with the last message) and ``add_generation_prompt`` (default: unless the last message
        is continued).

        Raises InvalidRequest at the call if a value does not fit the request. The iterator raises the
        gateway's errors, such as InvalidRequest, NotFound, Overloaded and TransportError.

        ``sampling``: fields of :class:`farshore.sampling.Sampling`, such as ``max_tokens=32``; what is None
        or not given takes the default. TypeError for other names. ``stop`` may be one string. Each Token
        names its choice.

        ``cache_salt``: the stored KV of this prompt serves requests with the same salt only, so that no other
        client can tell from response times that the prompt was sent before. Requests without a salt share.

        ``priority``: of the requests that wait for an engine's memory those with the lowest number start
        first. It does not change the order of those that have started.
        """
        if unknown := sampling.keys() - _SAMPLING:
            raise TypeError(f"generate() has no option {', '.join(sorted(unknown))}")
        given = {name: value for name, value in sampling.items() if value is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        try:
            request = api.GenerateRequest(
                model=model,
                request_id=request_id,
                resume_from=resume_from,
                cache_salt=cache_salt,
                priority=priority,
                sampling=api.Sampling(**given),
                **_prompt(
                    prompt,
                    messages,
                    token_ids,
                    tools=tools,
                    template_arguments=template_arguments,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                ),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidRequest(f"a value does not fit the request: {error}") from error
        until_s = time.monotonic() + deadline_s
        return self._stream(
            lambda gateway: gateway.inference.Generate(request, timeout=max(0.0, until_s - time.monotonic())),
            read=event_of,
            begins=lambda event: isinstance(event, events.Token),
            # A request that is read again is in the log of one gateway.
            elsewhere=NotFound if resume_from or request.WhichOneof("prompt") is None else None,
        )

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Mapping[str, Any]] | None = None,
        model: str = "",
        add_special_tokens: bool = True,
        **chat: Any,
    ) -> list[int]:
        """The token ids of a prompt, which is not run. Give ``prompt`` or ``messages``, with them the options
        of a chat that :meth:`generate` describes. ``add_special_tokens``: around a text; a chat's are the
        template's. Raises InvalidRequest, also for another model."""
        try:
            given = _prompt(prompt, messages, None, **chat)
            request = api.TokenizeRequest(model=model, add_special_tokens=add_special_tokens, **given)
        except (AttributeError, ValueError) as error:
            raise InvalidRequest(f"a value does not fit the request: {error}") from error
        return list(self._call(lambda gateway: gateway.inference.Tokenize, request).ids)

    def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """The text of token ids, without special tokens. Raises InvalidRequest for ids outside of the
        vocabulary, and for another model."""
        try:
            request = api.DetokenizeRequest(model=model, ids=token_ids)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"a token id does not fit the request: {error}") from error
        return self._call(lambda gateway: gateway.inference.Detokenize, request).text

    def models(self) -> tuple[events.Model, ...]:
        """The model that is served, once by each of its names; the first is the one that answers show."""
        reply = self._call(lambda gateway: gateway.inference.ListModels, api.ListModelsRequest())
        return tuple(plain(events.Model, model) for model in reply.models)

    def model(self, name: str) -> events.Model:
        """The model of that name. Raises NotFound."""
        request = api.GetModelRequest(name=name)
        return plain(events.Model, self._call(lambda gateway: gateway.inference.GetModel, request))

    def cancel(self, request_id: str) -> None:
        """Ends a request; returns when its memory is free. Raises NotFound if no gateway knows it, and
        TransportError if one that may know it is not reached."""
        request = api.CancelRequest(request_id=request_id)
        failures: list[FarshoreError] = []
        for gateway in self._gateways.in_turn():
            try:
                gateway.inference.Cancel(request, timeout=self._timeout_s)
                return
            except grpc.RpcError as error:
                failures.append(gateway.error(error))
        raise next((failed for failed in failures if not isinstance(failed, NotFound)), failures[0])

    def status(self) -> events.ClusterStatus:
        """The cluster's status. Raises TransportError if the gateway or the controller does not answer."""
        reply = self._call(lambda gateway: gateway.operators.ClusterStatus, admin.ClusterStatusRequest())
        return plain(
            events.ClusterStatus,
            reply,
            workers=tuple(
                plain(events.Worker, worker, links=tuple(plain(events.Link, link) for link in worker.links))
                for worker in reply.workers
            ),
            sequences=tuple(
                plain(
                    events.Sequence,
                    sequence,
                    spans=tuple(plain(events.Span, span) for span in sequence.spans),
                )
                for sequence in reply.sequences
            ),
        )

    def scale(self, *, dense: int | None = None, attention: int | None = None) -> dict[str, int]:
        """Changes how many workers there are to be; None: as it is. Returns the numbers in force, by kind;
        workers start and retire meanwhile. Raises InvalidRequest for a number that can't work, TransportError
        if the gateway or the controller does not answer."""
        request = admin.ScaleRequest(dense_workers=dense, attention_workers=attention)
        reply = self._call(lambda gateway: gateway.operators.Scale, request)
        return {"dense": reply.dense_workers, "attention": reply.attention_workers}

    def drain(self, worker: str, *, timeout_s: float | None = None) -> str:
        """Begins to drain a worker, named by its id or its slot, and returns its id: it gets nothing new,
        what it has ends or goes elsewhere, then it ends, and another one takes its place. ``timeout_s``: what
        is left then fails; None: the cluster's for a dense worker, for an attention worker as long as it
        takes. Raises NotFound if it does not run, TransportError as :meth:`down`."""
        request = admin.DrainRequest(worker_id=worker, timeout_s=timeout_s)
        return self._call(lambda gateway: gateway.operators.Drain, request).worker_id

    def down(self) -> None:
        """Begins to end the cluster: all workers and the controller. Raises TransportError if the gateway or
        the controller does not answer."""
        self._call(lambda gateway: gateway.operators.Down, admin.DownRequest())

    def watch_events(self, *, since: int = 0, follow: bool = False) -> Iterator[events.ClusterEvent]:
        """The cluster's events with numbers above ``since``; with ``follow`` also those to come, for as
        long as it is read. The iterator raises TransportError if the gateway or the controller does not
        answer."""
        request = admin.WatchEventsRequest(since=since, follow=follow)
        return self._stream(
            lambda gateway: gateway.operators.WatchEvents(
                request, timeout=None if follow else self._timeout_s
            ),
            read=lambda event: plain(events.ClusterEvent, event),
            begins=lambda event: True,
        )

    def is_serving(self, *, timeout_s: float = 1.0) -> bool:
        """Whether a gateway answers and is ready; that one is used from now on. Returns at once if nothing
        listens. ``timeout_s``: for each gateway."""
        return self._prefer_one(lambda status: status == health_pb2.HealthCheckResponse.SERVING, timeout_s)

    def is_up(self, *, timeout_s: float = 1.0) -> bool:
        """As :meth:`is_serving`, but whether a gateway answers, ready or not."""
        return self._prefer_one(lambda status: status is not None, timeout_s)

    def _prefer_one(self, wanted: Callable[[int | None], bool], timeout_s: float) -> bool:
        for gateway in self._gateways.in_turn():
            if wanted(_health(gateway, timeout_s)):
                self._gateways.prefer(gateway)
                return True
        return False

    def _call(self, method: Callable[[Gateway], Any], request: Any) -> Any:
        """Calls the method of the first gateway that answers, and returns its reply."""
        gateways = self._gateways.in_turn()
        for gateway in gateways:
            try:
                reply = method(gateway)(request, timeout=self._timeout_s)
            except grpc.RpcError as error:
                failed = gateway.error(error)
                silent = isinstance(failed, TransportError | DeadlineExceeded)
                if gateway is gateways[-1] or not silent:
                    raise failed from error
            else:
                self._gateways.prefer(gateway)
                return reply
        raise AssertionError("the last gateway's error was raised")

    def _stream(
        self,
        start: Callable[[Gateway], Any],
        *,
        read: Callable[[Any], _Value],
        begins: Callable[[_Value], bool],
        elsewhere: type[FarshoreError] | None = None,
    ) -> Iterator[_Value]:
        """The values that ``read`` makes of the messages of a stream, from the first gateway whose stream
        begins: ``begins`` says with which value. The first call is made now. ``elsewhere``: an error after
        which the next gateway is asked, besides TransportError."""
        gateways = self._gateways.in_turn()
        first = start(gateways[0])

        def follow() -> Iterator[_Value]:
            begun = False
            unreached: FarshoreError | None = None
            for gateway in gateways:
                call = first if gateway is gateways[0] else start(gateway)
                try:
                    for message in call:
                        value = read(message)
                        if not begun:
                            self._gateways.prefer(gateway)
                            begun = begins(value)
                        yield value
                    return
                except grpc.RpcError as error:
                    failed = gateway.error(error)
                    if isinstance(failed, TransportError):
                        unreached = failed
                    elif elsewhere is None or not isinstance(failed, elsewhere):
                        raise failed from error
                    if begun or gateway is gateways[-1]:
                        raise (unreached or failed) from error
                finally:
                    call.cancel()

        return follow()


def _health(gateway: Gateway, timeout_s: float) -> int | None:
    """The health status; None if nothing answers, or something other than a gateway."""
    service = api.DESCRIPTOR.services_by_name["InferenceService"].full_name
    try:
        return gateway.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s).status
    except grpc.RpcError:
        return None


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
