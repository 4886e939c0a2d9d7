"""The base of both clients: how they are made, how they start streams, and which gateway a call asks next.

Used by ``client.Client`` and ``aio.AsyncClient``, which make the calls and await them. Must not make a call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import grpc

from farshore.client import events
from farshore.client.sdk import calls, replies
from farshore.client.sdk.course import Course
from farshore.client.sdk.gateways import Gateway, Gateways, addresses_of
from farshore.client.sdk.resume import Answering
from farshore.errors import FarshoreError, NotFound
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api

GOODBYE_S = 2.0
"""How long closing a client waits for the ends of requests whose streams were closed."""

_Answers = TypeVar("_Answers")
_ClusterEvents = TypeVar("_ClusterEvents")


class Connection(ABC, Generic[_Answers, _ClusterEvents]):
    """``_Answers``, ``_ClusterEvents``: the client's streams."""

    def __init__(
        self, address: str | Iterable[str], *, timeout_s: float = 10.0, resume_s: float = 30.0
    ) -> None:
        """``address``: HOST:PORT, or several: a list, or one string with commas between them.
        ``timeout_s``: deadline of each call except ``generate``, at each gateway. ``resume_s``: how long a
        stream whose gateway or engine was lost looks for one that goes on with it; 0: an answer that has
        tokens fails at once.

        Connects with the first call: directly to a gateway on this machine, else through the proxy that the
        environment variables ``http_proxy`` and ``no_proxy`` configure. Raises InvalidRequest if there is no
        address."""
        self._addresses = addresses_of(address)
        self._timeout_s = timeout_s
        self._resume_s = resume_s
        self._live: dict[Answering, Course[events.Event]] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of all gateways, as they were given."""
        return self._addresses

    @property
    def address(self) -> str:
        """The address of the gateway that answered last; the first one until one has."""
        return self._gateways.preferred.address

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
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choice: Iterable[str] | None = None,
        grammar: str | None = None,
        model: str = "",
        cache_salt: str = "",
        priority: int = 0,
        request_id: str = "",
        resume_from: int = 0,
        deadline_s: float = 86_400.0,
        **sampling: Any,
    ) -> _Answers:
        """Streams a completion: Accepted, Prefill (not always), PromptLogprobs (if asked for), Tokens,
        Finished. The stream's ``text()`` and ``result()`` await the whole answer.

        Give one of ``prompt`` (text, used as it is), ``messages`` (a chat) and ``token_ids``. Or give none
        of them but the ``request_id`` of an earlier call, to read that request from token ``resume_from``,
        counted over all choices. Closing the stream ends the request: at once if it has no ``request_id``
        of yours, else within seconds, unless it is read again. ``deadline_s``: the deadline of the whole
        call.

        If the gateway or its engine is lost, the stream goes on by itself, without a gap or a repetition:
        at the same gateway, which keeps the answers of its requests, or at any, which generates the answer
        again from the same seed and drops what came before. It fails with a TransportError, which is
        retryable, if none goes on within ``resume_s``, or if the answer is generated differently, as
        rounding may cause in bfloat16. A request that is read by its id alone goes on at its own gateway
        only.

        ``messages`` are formatted by the model's chat template, which rules the roles. Each is in OpenAI's
        shape: role, content (a string, or parts of the type text), tool_calls, tool_call_id, name,
        reasoning_content. With them may come ``tools`` (JSON objects, or their texts), ``template_arguments``
        (variables of the template, such as ``{"enable_thinking": False}``), ``continue_final_message`` (the
        answer goes on with the last message) and ``add_generation_prompt`` (default: unless the last message
        is continued).

        Give one of ``json_schema`` (an object, or its text), ``regex``, ``choice`` (texts) and ``grammar``
        (in Lark's syntax), and the text follows it. One that ``max_tokens`` cuts short does not.

        Raises InvalidRequest at the call if a value does not fit the request. The stream raises the gateway's
        errors, such as InvalidRequest, NotFound, Overloaded and TransportError.

        ``sampling``: fields of :class:`farshore.sampling.Sampling`, such as ``max_tokens=32``; what is None
        or not given takes the default. TypeError for other names. ``stop`` may be one string. Without
        ``seed`` it follows from ``request_id``. Each Token names its choice.

        ``cache_salt``: the stored KV of this prompt serves requests with the same salt only, so that no other
        client can tell from response times that the prompt was sent before. Requests without a salt share.

        ``priority``: of the requests that wait for an engine's memory those with the lowest number start
        first. It does not change the order of those that have started.
        """
        request = calls.generate(
            prompt,
            messages,
            token_ids,
            chat=dict(
                tools=tools,
                template_arguments=template_arguments,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            ),
            sampling=sampling,
            structure=dict(json_schema=json_schema, regex=regex, choice=choice, grammar=grammar),
            model=model,
            cache_salt=cache_salt,
            priority=priority,
            request_id=request_id,
            resume_from=resume_from,
        )
        answering = Answering(request, owned=not request_id)
        course = Course(self._gateways, answering, deadline_s=deadline_s, resume_s=self._resume_s)
        stream = self._answers(course, answering, lambda: self._ended(answering))
        self._live[answering] = course
        return stream

    def watch_events(self, *, since: int = 0, follow: bool = False) -> _ClusterEvents:
        """The cluster's events with numbers above ``since``; with ``follow`` also those to come, for as
        long as it is read. The stream raises TransportError if the gateway or the controller does not
        answer."""
        feed = _Happenings(admin.WatchEventsRequest(since=since, follow=follow))
        deadline_s = None if follow else self._timeout_s
        return self._cluster_events(Course(self._gateways, feed, deadline_s=deadline_s, resume_s=0.0))

    def _ended(self, answering: Answering) -> None:
        """A stream ended. A request that only it could read is cancelled, else the gateway would
        wait for a reader."""
        course = self._live.pop(answering, None)
        if course is not None and course.running and answering.owned and answering.finished is None:
            self._say_goodbye(course.gateway, api.CancelRequest(request_id=answering.request_id))

    def _end_all(self) -> None:
        for answering in list(self._live):
            self._ended(answering)

    @property
    @abstractmethod
    def _gateways(self) -> Gateways: ...

    @abstractmethod
    def _say_goodbye(self, gateway: Gateway, request: api.CancelRequest) -> None:
        """Begins to cancel, within GOODBYE_S."""

    @abstractmethod
    def _answers(
        self, course: Course[events.Event], answering: Answering, on_close: Callable[[], None]
    ) -> _Answers: ...

    @abstractmethod
    def _cluster_events(self, course: Course[events.ClusterEvent]) -> _ClusterEvents: ...


class RequestStream:
    """What the streams of one request have in both clients."""

    _course: Course[events.Event]
    _answering: Answering

    @property
    def request_id(self) -> str:
        """Cancels the request."""
        return self._answering.request_id

    @property
    def losses(self) -> int:
        """How often its gateway or engine was lost since it began, and it had to go on."""
        return self._course.losses


class Asking:
    """The gateways that one unary call asks, in turn, until one answers. ``failed`` after each that does
    not."""

    def __init__(self, gateways: Gateways, call: calls.Call[Any]) -> None:
        self._call = call
        self._left = gateways.in_turn()
        self._failures: list[FarshoreError] = []

    def gateways(self) -> Iterator[Gateway]:
        while self._left:
            yield self._left.pop(0)

    def failed(self, gateway: Gateway, error: grpc.RpcError) -> None:
        """Raises the call's error if the next gateway is not to be asked, or there is none."""
        failed = gateway.error(error)
        if not isinstance(failed, self._call.passes):
            raise failed from error
        self._failures.append(failed)
        if not self._left:
            # A gateway that is not reached may have what the others do not find.
            told = [failure for failure in self._failures if not isinstance(failure, NotFound)]
            raise (told or self._failures)[-1] from error


class _Happenings:
    """A Feed of ``course``: the cluster's events. It is not resumed."""

    repeatable = True

    def __init__(self, request: admin.WatchEventsRequest) -> None:
        self._request = request
        self.tokens = 0

    def call(self, gateway: Gateway, *, anew: bool, timeout_s: float | None) -> Any:
        return gateway.operators.WatchEvents(self._request, timeout=timeout_s)

    def take(self, message: admin.ClusterEvent) -> events.ClusterEvent:
        self.tokens += 1
        return replies.plain(events.ClusterEvent, message)
