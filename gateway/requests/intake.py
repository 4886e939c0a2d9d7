"""Takes a request in: parses, checks and starts it, or finds the running one that it reconnects to.

Called by each face of the API, gRPC and HTTP, so that limits and errors are decided once. Must not know how a
call arrives or how events reach a reader.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.gateway.requests import received, resume, sampling, validate
from farshore.gateway.requests.log import RequestLog
from farshore.gateway.requests.request import Request, RequestKey
from farshore.gateway.requests.resume import Received
from farshore.gateway.served import Served
from farshore.proto import inference_pb2 as api

ANONYMOUS = "anonymous"
"""The principal of every call, while there are no keys."""


class Taken(NamedTuple):
    """A request to read, and where to begin: see :meth:`Request.follow`."""

    request: Request
    resume_from: int
    received: Received


class Intake:
    """Use it on the event loop only. ``clock``: monotonic seconds."""

    def __init__(
        self,
        *,
        served: Served,
        log: RequestLog,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.served = served
        self.log = log
        self.limits = limits
        self.clock = clock

    def take(
        self,
        raw: bytes,
        *,
        arrived_s: float,
        fill: bool = False,
        temperature: float = 0.0,
        most_values: int | None = None,
        principal: str = ANONYMOUS,
    ) -> Taken:
        """Finds the request or starts it. ``raw``: a serialised GenerateRequest. ``arrived_s``: when the call
        arrived, by ``clock``. ``fill``: a request without max_tokens may use all that its prompt leaves of
        the model's positions and of the KV pool. ``temperature``: used where
        neither the request nor the model names one. ``most_values``: tokens and alternatives that the batch
        has room for; None: the request is not one of a batch.
        ``principal``: the caller.

        Never awaits, so that of two calls with the same id only one starts it, and a later Cancel finds it.
        Raises InvalidRequest, NotFound, Overloaded or TransportError.
        """
        positions = self.served.config.max_positions
        message, fingerprint, _ = received.parse(raw, max_positions=positions, limits=self.limits)
        if most_values is not None:
            _check_batched(message)
        validate.check_request_id(message, self.limits)
        resume.check(message)
        key = RequestKey(principal, message.request_id)
        expected = fingerprint if validate.has_prompt(message) else None
        request = self.log.find_same(key, expected, message.resume_from)
        if request is None:
            if message.resume.HasField("seed") and not message.sampling.HasField("seed"):
                message.sampling.seed = message.resume.seed
            fill = fill and not message.sampling.HasField("max_tokens")
            generation = self.served.generation
            sampling.complete(message.sampling, generation, temperature=temperature)
            default_tokens = sampling.default_tokens(generation, self.limits, positions=positions, fill=fill)
            validate.check_cheap(message, self.served, self.limits, default_tokens=default_tokens)
            resume.check_repeatable(message)
            values = validate.kept_values(message.sampling, self.limits, default_tokens=default_tokens)
            _check_room(values, most_values)
            request = self.log.start(
                key,
                functools.partial(self._prepare, message, default_tokens, fill),
                fingerprint=fingerprint,
                choices=message.sampling.n or 1,
                values=values,
                arrived_s=arrived_s,
            )
        else:
            _check_room(request.values, most_values)
        tokens = tuple(choice.ids for choice in message.resume.received)
        return Taken(request, message.resume_from, Received(tokens))

    def _prepare(
        self, message: api.GenerateRequest, default_tokens: int, fill: bool, sequence_id: str
    ) -> validate.Job:
        return validate.prepare(
            message,
            self.served,
            self.limits,
            sequence_id=sequence_id,
            default_tokens=default_tokens,
            fill=fill,
        )


def _check_batched(message: api.GenerateRequest) -> None:
    if message.resume_from or any(choice.ids for choice in message.resume.received):
        raise InvalidRequest("a batch has whole answers: leave resume and resume_from out", field="resume")
    if message.sampling.HasField("prompt_logprobs"):
        raise InvalidRequest(
            "prompt_logprobs are not sent in a batch: use Generate", field="sampling.prompt_logprobs"
        )


def _check_room(values: int, most: int | None) -> None:
    if most is not None and values > most:
        raise InvalidRequest(
            f"the request may give {values} tokens and alternatives and its batch has room for {most} more: "
            "lower max_tokens, or send it in another batch",
            field="sampling.max_tokens",
        )
